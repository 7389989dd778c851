"""V-MoE written small: its arrays, its files as google-research/vmoe writes them, its forward pass.

Axis letters: **B** images, **N** tokens with the class token, **P** side of a patch, **D** width,
**h** heads, **d** = D / h, **H** hidden width, **E** experts, **K** experts a token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgpack
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

P, D, HEADS, H, E, CLASSES, GRID = 7, 16, 2, 24, 4, 5, 4
MOE_BLOCKS, DEPTH = (1, 3), 4  # counted from 0, as their names are


def shapes(pre_logits: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes that their own test of the model lists, for these sizes."""
    out = {
        "cls": (1, 1, D),
        "embedding/kernel": (P, P, 3, D),
        "embedding/bias": (D,),
        "Encoder/posembed_input/pos_embedding": (1, 1 + GRID**2, D),
        "Encoder/encoder_norm/scale": (D,),
        "Encoder/encoder_norm/bias": (D,),
        "head/kernel": (D, CLASSES),
        "head/bias": (CLASSES,),
    }
    if pre_logits:
        out |= {"pre_logits/kernel": (D, D), "pre_logits/bias": (D,)}
    for i in range(DEPTH):
        block = {f"LayerNorm_{n}/{name}": (D,) for n in (0, 1) for name in ("scale", "bias")}
        for part in ("query", "key", "value"):
            block[f"SelfAttention/{part}/kernel"] = (D, HEADS, D // HEADS)
            block[f"SelfAttention/{part}/bias"] = (HEADS, D // HEADS)
        block |= {
            "SelfAttention/out/kernel": (HEADS, D // HEADS, D),
            "SelfAttention/out/bias": (D,),
        }
        mlp, stack = ("Moe/Mlp", (E,)) if i in MOE_BLOCKS else ("Mlp", ())
        for n, (inputs, outputs) in enumerate(((D, H), (H, D))):
            block[f"{mlp}/Dense_{n}/kernel"] = (*stack, inputs, outputs)
            block[f"{mlp}/Dense_{n}/bias"] = (*stack, outputs)
        if stack:
            block["Moe/Router/dense/kernel"] = (D, E)
        out |= {f"Encoder/encoderblock_{i}/{name}": shape for name, shape in block.items()}
    return out


def drawn(pre_logits: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes(pre_logits).items()
    }


# ---- files


def _packed_slice(part: slice) -> bytes:
    return msgpack.packb((part.start, part.stop, None), use_bin_type=True)


def _packed_slices(parts: tuple[slice, ...]) -> bytes:
    return msgpack.packb(tuple(map(_packed_slice, parts)), use_bin_type=True)


def _packed_array(array: np.ndarray) -> msgpack.ExtType:
    content = (array.shape, array.dtype.name, array.tobytes("C"))
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def _slices_of(name: str, shape: tuple[int, ...], shards: int) -> list[tuple[slice, ...]]:
    """Stacks of experts are cut along E, as they lie on devices; all else is whole."""
    whole = tuple(slice(0, size) for size in shape)
    if "Moe/Mlp" not in name:
        return [whole]
    step = shape[0] // shards
    return [(slice(e, e + step), *whole[1:]) for e in range(0, shape[0], step)]


def nested(arrays: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def in_order_of_jax(tree: dict, path: str = "") -> list[str]:
    names = []
    for name in sorted(tree):
        here = f"{path}/{name}" if path else name
        is_node = isinstance(tree[name], dict)
        names += in_order_of_jax(tree[name], here) if is_node else [here]
    return names


def written(
    folder: Path, arrays: dict[str, np.ndarray], shards: int = 2, version: str | None = "20220622"
) -> tuple[str, str]:
    """Writes PREFIX.index and PREFIX.data-...; returns PREFIX and the SHA-256 of all together."""
    names = in_order_of_jax(nested(arrays))
    data: list[dict] = [{"__msgpack_array_chunk_a87ca2__": True} for _ in range(shards)]
    infos, turn = {}, 0
    for number, name in enumerate(names):
        array, numbers = arrays[name], []
        slices = _slices_of(name, array.shape, shards)
        for parts in slices:
            flat = array[parts].reshape(-1)
            half = max(1, flat.size // 2)  # two pieces, as arrays above 1 GB are cut
            pieces = [_packed_array(flat[i : i + half]) for i in range(0, flat.size, half)]
            chunk = [pieces, msgpack.ExtType(6, _packed_slices(parts))]
            data[turn % shards].setdefault(str(number), []).append(chunk)
            numbers.append(turn % shards)
            turn += 1
        shape = msgpack.packb((array.shape, array.dtype.name, False, {}), use_bin_type=True)
        content = (shape, tuple(map(_packed_slices, slices)), tuple(numbers))
        infos[name] = msgpack.ExtType(8, msgpack.packb(content, use_bin_type=True))
    # a tree in a file has any order: arrays are counted by the sorted names
    tree = nested(dict(reversed(infos.items())))
    index = {"shard_count": shards, "index": tree}
    index |= {"version": version} if version else {}
    (folder / "small.index").write_bytes(msgpack.packb(index, strict_types=True))
    for number, content in enumerate(data):
        file = folder / f"small.data-{number:05d}-of-{shards:05d}"
        file.write_bytes(msgpack.packb(content, strict_types=True))
    return "small", sha256(folder)


def sha256(folder: Path) -> str:
    files = [folder / "small.index", *sorted(folder.glob("small.data-*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# ---- forward pass, in their axes


def logits(arrays: dict[str, np.ndarray], images: Tensor, top_k: int) -> Tensor:
    """images: (B, 3, 28, 28) -> (B, CLASSES), as VisionTransformerMoe does without noise."""
    a = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x = images.permute(0, 2, 3, 1).unflatten(2, (GRID, P)).unflatten(1, (GRID, P))
    x = torch.einsum("bipjqc,pqcd->bijd", x, a["embedding/kernel"]) + a["embedding/bias"]
    x = torch.cat([a["cls"].expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
    x = x + a["Encoder/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        start = f"Encoder/encoderblock_{i}/"
        x = _block(
            {n.removeprefix(start): t for n, t in a.items() if n.startswith(start)}, x, top_k
        )
    x = _norm(a, "Encoder/encoder_norm", x)[:, 0]
    return x @ a["head/kernel"] + a["head/bias"]


def _norm(a: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), a[f"{name}/scale"], a[f"{name}/bias"], 1e-6)


def _block(a: dict[str, Tensor], x: Tensor, top_k: int) -> Tensor:
    y = _norm(a, "LayerNorm_0", x)
    query, key, value = (
        torch.einsum("bnc,chd->bnhd", y, a[f"SelfAttention/{part}/kernel"])
        + a[f"SelfAttention/{part}/bias"]
        for part in ("query", "key", "value")
    )
    weights = torch.einsum("bqhd,bkhd->bhqk", query / (D // HEADS) ** 0.5, key).softmax(-1)
    y = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    x = x + torch.einsum("bnhd,hdc->bnc", y, a["SelfAttention/out/kernel"])
    x = x + a["SelfAttention/out/bias"]
    y = _norm(a, "LayerNorm_1", x)
    if "Moe/Router/dense/kernel" not in a:
        y = F.gelu(y @ a["Mlp/Dense_0/kernel"] + a["Mlp/Dense_0/bias"], approximate="tanh")
        return x + y @ a["Mlp/Dense_1/kernel"] + a["Mlp/Dense_1/bias"]
    gates = (y @ a["Moe/Router/dense/kernel"]).softmax(-1)  # (B, N, E)
    threshold = gates.topk(top_k, dim=-1).values[..., -1:]
    gates = gates * (gates >= threshold)  # as printed: they do not sum to 1
    hidden = (
        torch.einsum("bnd,edh->bneh", y, a["Moe/Mlp/Dense_0/kernel"]) + a["Moe/Mlp/Dense_0/bias"]
    )
    hidden = F.gelu(hidden, approximate="tanh")
    out = torch.einsum("bneh,ehd->bned", hidden, a["Moe/Mlp/Dense_1/kernel"])
    return x + torch.einsum("bne,bned->bnd", gates, out + a["Moe/Mlp/Dense_1/bias"])
