"""Describes the machine that measures, and says which rows it cannot measure and why."""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch

from lib.machine import cores, version_of
from lib.models.packed import can_pack
from lib.runs.environment import processor

PACKAGES = ("torch", "timm", "mixture-of-experts", "st-moe-pytorch", "transformers")


def capabilities() -> dict[str, bool]:
    """Asks which vectors, tiles and products this machine has, each by the library that uses it."""
    cpu, has_onednn = torch.cpu, torch.backends.mkldnn.is_available()
    return {
        "avx2": cpu._is_avx2_supported(),
        "avx512": cpu._is_avx512_supported(),
        "avx512_bf16": cpu._is_avx512_bf16_supported(),
        "amx": cpu._is_amx_tile_supported(),
        "onednn": has_onednn,
        "bf16_products": has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "packed_fp32": can_pack(torch.float32),
        "packed_bf16": can_pack(torch.bfloat16),
    }


def why_not(dtype: str, packed: bool) -> str:
    """Says why rows of a dtype, packed or not, cannot be measured here; "" where they can."""
    can = capabilities()
    if dtype != "fp32" and not can["bf16_products"]:
        return "no bf16 products on this processor (AVX-512 or AMX is needed)"
    if packed and not can["packed_fp32" if dtype == "fp32" else "packed_bf16"]:
        return f"this torch has no packed weights of {dtype} for this processor"
    return ""


def cannot() -> list[str]:
    """Lists what this machine cannot measure, in sentences."""
    can = capabilities()
    said = {
        f"{dtype}, {kind}: {reason}"
        for dtype in ("fp32", "bf16")
        for kind, packed in (("plain weights", False), ("packed weights", True))
        if (reason := why_not(dtype, packed))
    }
    if can["bf16_products"] and not can["amx"]:
        said.add("bf16 on AMX tiles, for which the goals were set: bf16 runs on AVX-512 here")
    return sorted(said)


def load_before() -> float:
    """Reads the load average over the last minute; says so where other work runs: a thread that
    waits for a core holds up each product that it has a share in."""
    load = os.getloadavg()[0]
    if load > 1.0:
        print(f"PROVISIONAL: other work runs on this machine (load average {load:.1f})")
    return load


def about(module: str, repeats: int, began: float, load: float) -> dict[str, Any]:
    """Describes a measurement that ends now, for its file.

    module: that was started, such as "benchmarks"; with the options of the command line it makes
    the command. began: by time.perf_counter; load: before anything was measured.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(time.perf_counter() - began),
        "repeats": repeats,
        "machine": describe(load),
    }


def describe(load: float) -> dict[str, Any]:
    """Describes processor, threads, versions, load and capabilities, for a file of JSON.

    load: the average over a minute before anything was measured.
    """
    return {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "versions": {package: version_of(package) for package in PACKAGES},
        # after: this program's own threads are in it
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "capabilities": capabilities(),
        "cannot": cannot(),
    }
