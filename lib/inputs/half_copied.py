"""Tells a file of which only the beginning was copied from one that is damaged or another."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

ADVICE = "Copy or download it again, and compare its size with that where it comes from"


def why_half_copied(file: Path) -> str | None:
    """Says what a file lacks at its end, by the format that its beginning shows; None if nothing.

    Known are zip (.pth and .npz files) and safetensors; of others only that they are empty.
    """
    size = file.stat().st_size
    if not size:
        return "it is empty"
    with open(file, "rb") as handle:
        beginning = handle.read(8)
        if beginning.startswith(b"PK\x03\x04"):  # how a zip file's first member begins
            whole = zipfile.is_zipfile(file)
            return None if whole else "its table of contents, which stands at its end, is not there"
        if file.suffix != ".safetensors":
            return None
        # 8 bytes say how long the header is; it says where in the data each tensor ends
        header_bytes = int.from_bytes(beginning, "little")
        if 8 + header_bytes > size:
            return f"its header alone would need {8 + header_bytes:,} bytes, and it has {size:,}"
        try:
            header = json.loads(handle.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return None
    expected = 8 + header_bytes + max(ends, default=0)
    return f"it has {size:,} of {expected:,} bytes" if size < expected else None


def sentence(file: Path) -> str:
    """Writes what to append to an error about a file: that it is half copied, or nothing."""
    reason = why_half_copied(file)
    return f". It is half copied: {reason}. {ADVICE}" if reason else ""
