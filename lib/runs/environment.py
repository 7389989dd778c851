"""Where and by which code a run is computed: versions, processor, and a hash of the modules that
decide a result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import version_of
from ..spec import RunSpec


def environment(spec: RunSpec) -> dict[str, Any]:
    """Collects versions, processor and how it multiplies: with spec and threads, all that a
    bit-for-bit equal record depends on."""
    from ..training.bfloat16 import in_hardware

    names = ("torch", "timm", "numpy", "datasets")
    accelerator = {} if spec.device == "cpu" else {"accelerator": _accelerator()}
    return {
        "python": platform.python_version(),
        # "none": packed images need no `datasets`
        **{name: version_of(name, absent="none") for name in names},
        "processor": processor(),
        **accelerator,
        "threads": spec.threads,
        "products": spec.dtype if in_hardware(spec) else f"float32, rounded to {spec.dtype}",
    }


def _accelerator() -> str:
    """The graphics card's model name; "none" where there is none, and the run is about to fail."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def processor() -> str:
    """Reads the processor's model name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# of lib: those that decide a result
ROOMS = ("inputs", "models", "routers", "pruning", "extraction", "training")


def code_hash(rooms: Sequence[str] = ROOMS) -> str:
    """Hashes the modules of `lib` that decide a result, to 16 digits; a page shows "computed by an
    older lib" where it differs."""
    lib = Path(__file__).parent.parent
    files = sorted(file for room in rooms for file in (lib / room).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
