"""Reads the checkpoints that V-MoE's authors released (google-research/vmoe), without JAX.

A checkpoint is PREFIX.index and PREFIX.data-00000-of-00008 and so on, msgpack each. The index holds
a tree of names; its leaves, counted in the order of the sorted names, are arrays, of which it has
shape and type. A data file holds parts of arrays, by these numbers, each with the slices that it
fills. Nothing is unpickled, and msgpack runs nothing.

The model is that of 2106.05974: a ViT with learned positions and a class token, in some of whose
blocks the MLP is E experts behind a linear router. Its GELU is the tanh form. K is not in the
files: the released V-MoE were trained with K = 2.

Axis letters: **P** side of a patch, **C** channels, **N** tokens with the class token, **D** width,
**h** heads, **d** = D / h, **H** hidden width of an MLP, **E** experts.
"""

from __future__ import annotations

import glob
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import half_copied

# Extension types of the files, by their number in vmoe/checkpoints/serialization.py.
NDARRAY, SLICES, ARRAY_OF_INDEX = 1, 6, 8
IS_DATA = "__msgpack_array_chunk_a87ca2__"  # a key that marks data files
# None: files from before June 2022, which were released first; their trees are the same
VERSIONS = (None, "20220622")
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Slices = tuple[slice, ...]
# Of pixels in 0..1, by channel: V-MoE saw them in -1..1.
MEAN = STD = (0.5, 0.5, 0.5)


class ArrayOfIndex(NamedTuple):
    """Holds what the index says of an array."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read(prefix: Path, sha256: str) -> dict[str, Tensor]:
    """Reads a checkpoint as the state of our model: timm's names, and those of our MoE layers.

    prefix: path of the files without `.index`; sha256: of the index and the data files, one after
    the other. Raises FileNotFoundError for a file that is not there, ValueError for another hash, a
    file that is half copied or otherwise not of this format, and as `converted`.
    """
    return converted(read_arrays(prefix, sha256), prefix.name)


# ---------------------------------------------------------------- the files


def read_arrays(prefix: Path, sha256: str) -> dict[str, Tensor]:
    """Reads the arrays of a checkpoint by their path in its tree; errors as of `read`."""
    index_file, *data_files = files = _files(prefix)
    _check_hash(prefix.name, files, sha256)
    index = _unpacked(index_file)
    if not isinstance(index, dict) or not {"index", "shard_count"} <= index.keys():
        raise ValueError(f"{index_file.name} is no index of a V-MoE checkpoint: take another file")
    if index.get("version") not in VERSIONS or index["shard_count"] != len(data_files):
        raise ValueError(
            f"{index_file.name} is of version {index.get('version')!r} and names "
            f"{index['shard_count']} data files; read are versions {VERSIONS}, and there are "
            f"{len(data_files)} data files: get the files again"
        )
    infos = list(_leaves(index["index"], index_file.name))
    arrays = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos}
    filled: Counter[str] = Counter()
    for file in data_files:
        for name, slices, values in _parts(file, [name for name, _ in infos]):
            place = arrays[name][slices] if len(slices) == arrays[name].ndim else None
            if place is None or place.shape != values.shape:
                raise ValueError(
                    f"{file.name}: a part of {name} is {tuple(values.shape)} and does not fit into "
                    f"{tuple(arrays[name].shape)}, as the index has it: get the files again"
                )
            place.copy_(values)
            filled[name] += values.numel()
    for name, array in arrays.items():
        if filled[name] != array.numel():
            raise ValueError(
                f"{prefix.name}: of {name} there are {filled[name]:,} values, and the index says "
                f"{array.numel():,}: get the data files again"
            )
    return arrays


def _files(prefix: Path) -> list[Path]:
    """Lists the index and all data files, by number."""
    index = prefix.with_name(f"{prefix.name}.index")
    named = re.compile(re.escape(prefix.name) + r"\.data-\d{5}-of-\d{5}")
    beside = prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*")
    data = sorted(file for file in beside if named.fullmatch(file.name))
    if not index.is_file() or not data:
        raise FileNotFoundError(
            f"no weights at {prefix}.index and {prefix.name}.data-00000-of-...: a V-MoE checkpoint "
            "has an index and data files; copy them there, or set MOE_WEIGHTS to their folder"
        )
    count = int(data[-1].name.rpartition("-")[2])
    expected = [f"{prefix.name}.data-{i:05d}-of-{count:05d}" for i in range(count)]
    names = [file.name for file in data]
    if absent := [name for name in expected if name not in names]:
        raise FileNotFoundError(
            f"{prefix.parent} has {len(names)} of {count} data files, and not {absent[0]}: "
            "copy it there, too"
        )
    if surplus := [name for name in names if name not in expected]:
        raise ValueError(
            f"{prefix.parent} has {surplus[0]} beside the {count} data files {expected[0]} and so "
            "on: move it away"
        )
    return [index, *data]


def _check_hash(prefix: str, files: list[Path], sha256: str) -> None:
    needs = f"{prefix} needs its SHA-256, as vmoe:{prefix}@SHA256, and"
    if not sha256:
        raise ValueError(
            f"{needs} none was given: it is that of all its files, one after the other "
            f"(cat {prefix}.index {prefix}.data-* | sha256sum)"
        )
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while block := handle.read(2**24):
                digest.update(block)
    if digest.hexdigest() != sha256:
        for file in files:  # a file that is half copied is named
            _unpacked(file)
        raise ValueError(
            f"{needs} has {digest.hexdigest()}, not {sha256}: download it again, or name its hash"
        )


def _unpacked(file: Path) -> Any:
    import msgpack

    try:
        return msgpack.unpackb(file.read_bytes(), ext_hook=_extension, raw=False)
    except Exception as error:  # msgpack raises several kinds, and so does what it holds
        if "incomplete input" in str(error):
            raise ValueError(
                f"{file.name} is half copied: its {file.stat().st_size:,} bytes end in the midst "
                f"of a value. {half_copied.ADVICE}"
            ) from error
        raise ValueError(
            f"{file.name} does not read as a file of a V-MoE checkpoint ({error}): get it again"
        ) from error


def _extension(code: int, data: bytes) -> Any:
    """Decodes the values that msgpack does not know itself."""
    import msgpack

    if code == NDARRAY:
        shape, name, values = msgpack.unpackb(data, raw=True)
        # a copy: torch wants memory that may be written
        return torch.frombuffer(bytearray(values), dtype=_type(name)).view(shape)
    if code == SLICES:
        return tuple(_slice(part) for part in msgpack.unpackb(data, raw=True))
    if code == ARRAY_OF_INDEX:
        described, _, _ = msgpack.unpackb(data, raw=True)
        shape, name, *_ = msgpack.unpackb(described, raw=True)
        return ArrayOfIndex(tuple(shape), _type(name))
    raise ValueError(f"it has a value of type {code}, which no index or data file has")


def _type(name: bytes) -> torch.dtype:
    if name.decode() not in TYPES:
        raise ValueError(f"it has an array of {name.decode()}; read are {', '.join(TYPES)}")
    return TYPES[name.decode()]


def _slice(packed: bytes) -> slice:
    import msgpack

    start, stop, step = msgpack.unpackb(packed, raw=True)
    if step not in (None, 1):
        raise ValueError(f"it has a part of every {step}th value")
    return slice(start, stop)


def _leaves(tree: Any, where: str, path: str = "") -> Iterator[tuple[str, ArrayOfIndex]]:
    """Yields (path, array) of a tree in the order of JAX: depth first, by sorted names."""
    if isinstance(tree, ArrayOfIndex):
        yield path, tree
    elif isinstance(tree, dict):
        for name in sorted(tree):
            yield from _leaves(tree[name], where, f"{path}/{name}" if path else name)
    else:
        raise ValueError(f"{where} has {path or 'its tree'} as {tree!r}, which is no array")


def _parts(file: Path, names: list[str]) -> Iterator[tuple[str, Slices, Tensor]]:
    """Yields (name, slices, values) of each part of an array in a data file."""
    content = _unpacked(file)
    if not isinstance(content, dict) or IS_DATA not in content:
        raise ValueError(f"{file.name} is no data file of a V-MoE checkpoint: get it again")
    for number, parts in content.items():
        if number == IS_DATA:
            continue
        if not number.isdecimal() or int(number) >= len(names):
            raise ValueError(
                f"{file.name} has an array {number}, and the index has {len(names)}: get both again"
            )
        for pieces, slices in parts:  # pieces of at most 1 GB, flattened
            values, shape = torch.cat(pieces), tuple(s.stop - s.start for s in slices)
            if values.numel() != math.prod(shape):
                raise ValueError(
                    f"{file.name}: a part of {names[int(number)]} has {values.numel()} values, and "
                    f"its slices are {shape}: get it again"
                )
            yield names[int(number)], slices, values.view(shape)


# ---------------------------------------------------------------- our names

_NORM = {"scale": "weight", "bias": "bias"}
_BLOCK = re.compile(r"Encoder/encoderblock_(\d+)/(.+)")


def converted(arrays: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Turns the arrays of a V-MoE into the state of our model, float32.

    The head is left out where a layer stands before it that timm's ViT has not (`pre_logits`). K
    and what routers hold beside their weight are not in a file: `choice_bias` is 0. where: begins
    the messages. Raises ValueError for an array of another shape, one that is absent, and one that
    no V-MoE has, each by its name.
    """
    numbers = sorted({int(match[1]) for name in arrays if (match := _BLOCK.match(name))})
    if not any(_is_moe(arrays, number) for number in numbers):
        raise ValueError(
            f"{where} has no block with experts (Encoder/encoderblock_1/Moe/...): it is no V-MoE"
        )
    expected = _outer_shapes(arrays, where)
    width = expected["embedding/bias"][0]
    for number in range(numbers[-1] + 1):
        block = _shapes_of_block(arrays, number, width, where)
        expected |= {f"Encoder/encoderblock_{number}/{name}": s for name, s in block.items()}
    _check_shapes(arrays, expected, where)
    arrays = {name: array.float() for name, array in arrays.items()}
    state = {
        "cls_token": arrays["cls"],
        "pos_embed": arrays["Encoder/posembed_input/pos_embedding"],
        # (P, P, C, D) -> (D, C, P, P)
        "patch_embed.proj.weight": arrays["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"],
    }
    for number in numbers:
        start = f"Encoder/encoderblock_{number}/"
        block = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
        state |= {f"blocks.{number}.{name}": t for name, t in _block(block).items()}
    state |= {f"norm.{ours}": arrays[f"Encoder/encoder_norm/{n}"] for n, ours in _NORM.items()}
    if "pre_logits/kernel" not in arrays and "head/kernel" in arrays:
        state |= {"head.weight": arrays["head/kernel"].t(), "head.bias": arrays["head/bias"]}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _is_moe(arrays: Mapping[str, Tensor], number: int) -> bool:
    return any(name.startswith(f"Encoder/encoderblock_{number}/Moe/") for name in arrays)


def _sizes(arrays: Mapping[str, Tensor], name: str, axes: str, where: str) -> tuple[int, ...]:
    """Gives the shape of an array by which others are checked. axes: a letter or more an axis."""
    if name not in arrays:
        raise ValueError(f"{where} lacks {name}, {axes}: get the files again")
    shape = tuple(arrays[name].shape)
    if len(shape) != len(axes.split(",")):
        members = " The routers of an ensemble (eee_...) are not read." if "Router" in name else ""
        raise ValueError(f"{where}: {name} is {shape}, expected {axes}.{members}")
    return shape


def _outer_shapes(arrays: Mapping[str, Tensor], where: str) -> dict[str, tuple[int, ...]]:
    """Lists the shapes of all arrays outside the blocks, by the sizes of some of them."""
    embedding = _sizes(arrays, "embedding/kernel", "(P, P, C, D)", where)
    positions = "Encoder/posembed_input/pos_embedding"
    width, tokens = embedding[-1], _sizes(arrays, positions, "(1, N, D)", where)[1]
    shapes = {
        "embedding/kernel": embedding,
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        positions: (1, tokens, width),
    }
    shapes |= {f"Encoder/encoder_norm/{name}": (width,) for name in _NORM}
    before = width
    for layer in ("pre_logits", "head"):  # either may be absent
        if any(name.startswith(f"{layer}/") for name in arrays):
            outputs = _sizes(arrays, f"{layer}/kernel", "(D, outputs)", where)[-1]
            shapes |= {f"{layer}/kernel": (before, outputs), f"{layer}/bias": (outputs,)}
            before = outputs
    return shapes


def _shapes_of_block(
    arrays: Mapping[str, Tensor], number: int, width: int, where: str
) -> dict[str, tuple[int, ...]]:
    """Lists the shapes of all arrays of a block, by the sizes of some of them."""
    start = f"Encoder/encoderblock_{number}/"
    heads = _sizes(arrays, f"{start}SelfAttention/query/kernel", "(D, h, d)", where)[1]
    if width % heads:
        raise ValueError(f"{where}: block {number} has {heads} heads, which do not divide {width}")
    inside = (heads, width // heads)
    shapes = {f"LayerNorm_{i}/{name}": (width,) for i in (0, 1) for name in _NORM}
    for part in ("query", "key", "value"):
        shapes |= {f"SelfAttention/{part}/kernel": (width, *inside)}
        shapes |= {f"SelfAttention/{part}/bias": inside}
    shapes |= {"SelfAttention/out/kernel": (*inside, width), "SelfAttention/out/bias": (width,)}
    mlp, stack = "Mlp", ()
    if _is_moe(arrays, number):
        mlp = "Moe/Mlp"
        router = _sizes(arrays, f"{start}Moe/Router/dense/kernel", "(D, E)", where)
        stack = (router[-1],)
        shapes["Moe/Router/dense/kernel"] = (width, *stack)
    axes = "(E, D, H)" if stack else "(D, H)"
    hidden = _sizes(arrays, f"{start}{mlp}/Dense_0/kernel", axes, where)[-1]
    shapes |= {
        f"{mlp}/Dense_0/kernel": (*stack, width, hidden),
        f"{mlp}/Dense_0/bias": (*stack, hidden),
        f"{mlp}/Dense_1/kernel": (*stack, hidden, width),
        f"{mlp}/Dense_1/bias": (*stack, width),
    }
    return shapes


def _check_shapes(
    arrays: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    for name, shape in expected.items():
        if name not in arrays:
            raise ValueError(f"{where} lacks {name}, expected {shape}: get the files again")
        if tuple(arrays[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} is {tuple(arrays[name].shape)}, expected {shape} by the sizes of "
                "the other arrays"
            )
    if surplus := sorted(set(arrays) - set(expected)):
        raise ValueError(
            f"{where} has {surplus[0]} {tuple(arrays[surplus[0]].shape)}, which no V-MoE has "
            f"({len(surplus)} such in all): take a checkpoint of parameters alone"
        )


def _block(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the arrays of a block into those of ours. A kernel has its inputs first, ours last."""
    parts = ("query", "key", "value")
    state = {
        # 3 of (D, h, d) -> (3 D, D)
        "attn.qkv.weight": torch.cat(
            [arrays[f"SelfAttention/{part}/kernel"].flatten(1).t() for part in parts]
        ),
        "attn.qkv.bias": torch.cat([arrays[f"SelfAttention/{p}/bias"].flatten() for p in parts]),
        # (h, d, D) -> (D, D)
        "attn.proj.weight": arrays["SelfAttention/out/kernel"].flatten(0, 1).t(),
        "attn.proj.bias": arrays["SelfAttention/out/bias"],
    }
    for i in (0, 1):
        state |= {f"norm{i + 1}.{ours}": arrays[f"LayerNorm_{i}/{n}"] for n, ours in _NORM.items()}
    mlp, ours = ("Mlp", "mlp") if "Mlp/Dense_0/kernel" in arrays else ("Moe/Mlp", "mlp.experts")
    for i in (0, 1):  # dense (in, out), experts (E, in, out)
        state[f"{ours}.fc{i + 1}.weight"] = arrays[f"{mlp}/Dense_{i}/kernel"].transpose(-1, -2)
        state[f"{ours}.fc{i + 1}.bias"] = arrays[f"{mlp}/Dense_{i}/bias"]
    if mlp != "Mlp":
        state["mlp.router.weight"] = arrays["Moe/Router/dense/kernel"].t()
        state["mlp.router.choice_bias"] = torch.zeros(len(state["mlp.router.weight"]))
    return state
