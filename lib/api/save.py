"""Files that say what they hold: a model with its structure, in one safetensors file.

    lib.save(model, "small.safetensors", class_names=["bath", "bed"])
    model = lib.restore("small.safetensors")

The file's metadata hold the architecture, the structure of every layer that was changed, what was
done to the model, class names and preprocessing. Nothing in it is ever run as code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import paths
from ..inputs.weights import sha256_state
from ..machine import version_of
from ..models.modes import ambient_modes_off
from .architecture import architecture_of, created, listed, mismatch, outputs_of, tensors_of
from .structure import describe, rebuild
from .traits import INFORMATION, is_own, take_settings, told_by, traits_of, why_not_told

FORMAT = 1
KEY = "moe_vision"  # of the description among the file's metadata
PACKAGES = ("torch", "timm", "safetensors", "moe-vit-book")
STEPS = tuple(name for name in INFORMATION if name not in ("class_names", "preprocessing"))


def save(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Iterable[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to one safetensors file that `restore` needs nothing beside.

    Tensors are written once, however many names they have. What was done to the model is taken from
    its attributes `pruning`, `extraction` and the like, where it has them.

    class_names: of the outputs, in their order, each once; None takes those of a restored model, if
    any. preprocessing: mean, std, size, interpolation, ... of the images; None takes those of a
    restored model, or of timm's configuration of the model. A module or a function of your own
    under one of these names is part of the model, and not read or written over. arguments: what
    timm.create_model was called with beside the name; None reads them off the model.

    Raises ValueError for a name that does not end in .safetensors, for a layer that cannot be
    described, for a `forward` that was set on a module and is none of its class, and for a model of
    timm that its name and arguments do not build; nothing is written then. The file is written
    whole or not at all.
    """
    path = _checked(Path(path).expanduser(), "saved as")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: give a torch.nn.Module, since a file says what "
            "the model is; bare weights are written by safetensors.torch.save_file"
        )
    if reason := why_not_told(model):
        raise ValueError(reason)
    structure = describe(model)
    tensors = tensors_of(model)
    if on_meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"{on_meta[0]} lies on the meta device, without values: nothing to save")
    stored, same = _written_once(tensors)
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    description = _plain(
        {
            "format": FORMAT,
            "versions": {name: version_of(name) for name in PACKAGES},
            "architecture": architecture_of(model, structure, arguments),
            "structure": structure,
            "steps": {  # in the order of what was done
                name: value
                for name, value in vars(model).items()
                if name in STEPS and told_by(model, name) is not None
            },
            "class_names": _class_names(model, class_names),
            "preprocessing": _preprocessing(model, preprocessing),
            "same": same,
            "frozen": frozen,
            "modules": traits_of(model),
        }
    )
    text = json.dumps(description | {"sha256": _sha256(description, stored)})
    with paths.written_whole(path) as part:
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it
        save_file(stored, part, metadata={KEY: text})
        part.chmod(mode)  # safetensors makes files that nobody else can read


@ambient_modes_off()
def restore(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Reads a model that `save` wrote, in evaluation mode, with the number type it was saved in.

    It carries `class_names`, `preprocessing` and the steps of the file as attributes.

    model: for a file that holds a class of your own: a new one, built as the saved one was, before
    any layer of it was changed. It gets the layers of the file in place (weights of a new one that
    lies on a device stay on that device) and is returned; after an error, throw it away.

    Raises FileNotFoundError if there is no file, and ValueError for a file that `save` did not
    write, that is damaged or of a later format, and where the built model or the given one is not
    the saved one without its weights: other names, shapes, classes or numbers, each named.
    """
    path = _checked(Path(path).expanduser(), "restored from")
    if model is not None and not isinstance(model, nn.Module):
        called = f"{model.__name__}(...)" if isinstance(model, type) else "YourClass(...)"
        what = "a class" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"model is {what}: give a new module, restore(path, {called})")
    description, tensors = _read(path)
    if model is None:
        model = _built(path, description["architecture"])
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        rebuild(model, description["structure"])
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    take_settings(model, description["modules"])
    if wrong := mismatch(description["modules"], tensors, model):
        versions = ", ".join(f"{k} {v}" for k, v in description["versions"].items())
        raise ValueError(
            f"{path.name} holds another model than the {type(model).__name__} built for it: "
            f"{listed(wrong)}. Give the module as it was built before it was changed; the file was "
            f"written with {versions}"
        )
    # Copied: memory of a tensor's own is aligned, and products of tensors that are not may round
    # in another way.
    own = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    _load(model, own, description)
    told = {name: description[name] for name in ("class_names", "preprocessing")}
    for name, value in (told | description["steps"]).items():
        if not is_own(model, name):
            setattr(model, name, value)
    return model.eval()


def description_of(path: str | Path) -> dict[str, Any]:
    """Reads what a file of `save` says of its model, without reading the weights.

    Raises FileNotFoundError and ValueError as `restore`, but for damaged weights.
    """
    return _description(_checked(Path(path).expanduser(), "read from"))


# ---- what is written


def _checked(path: Path, what: str) -> Path:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path.name}: models are {what} files that end in .safetensors; other formats "
            "(.pt, .pth, .pkl) are pickles, which can run code, and are never read or written"
        )
    return path


def _written_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies tensors to the CPU, one of several that are the same memory in the same shape.

    Returns {name: tensor}, and {name: the name that its tensor is stored under} of the others.
    """
    stored: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    name_of: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in name_of:
            same[name] = name_of[place]
            continue
        name_of[place] = name
        copied = tensor.detach().cpu().contiguous()
        # a view of a larger tensor: safetensors would refuse it
        is_view = copied.untyped_storage().nbytes() != copied.nbytes
        stored[name] = copied.clone() if is_view else copied
    return stored, same


def _class_names(model: nn.Module, given: Iterable[str] | None) -> list[str] | None:
    names = told_by(model, "class_names") if given is None else given
    if names is None:
        return None
    if isinstance(names, str | Mapping | set | frozenset) or not isinstance(names, Iterable):
        raise ValueError(
            f"class_names={names!r} is a {type(names).__name__}: give a list of words, one for "
            "each output and in their order"
        )
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names={names!r} must be a list of words, one for each output")
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"class_names has {', '.join(map(repr, doubles))} more than once: each output needs a "
            "name of its own"
        )
    classes = outputs_of(model)
    if isinstance(classes, int) and classes not in (0, len(names)):
        raise ValueError(
            f"class_names has {len(names)} names, the model {classes} outputs: give one for each"
        )
    return names


def _preprocessing(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        given = told_by(model, "preprocessing")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"preprocessing={given!r} is a {type(given).__name__}: give a dict of words and "
            'numbers, {"mean": ..., "std": ..., "size": ...}'
        )
    if given is not None:
        return dict(given)
    # of the model, or of the one inside a module of one's own
    inside = (m for m in model.modules() if isinstance(getattr(m, "pretrained_cfg", None), dict))
    trunk = next(inside, None)
    if trunk is None:
        return None
    cfg = trunk.pretrained_cfg
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    size = size or (cfg.get("input_size") or (3, None, None))[1:]
    kept = {name: cfg.get(name) for name in ("mean", "std", "interpolation", "crop_pct")}
    return {"size": list(size)} | {name: value for name, value in kept.items() if value is not None}


def _plain(description: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a description into what JSON reads back from it: tuples and tensors become lists."""

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):  # tensors, arrays, and their numbers
            return value.tolist()
        raise ValueError(
            f"{value!r} cannot be written to the file, which holds numbers, words and lists of "
            "them: change it in arguments, preprocessing or the attributes of the model"
        )

    return json.loads(json.dumps(description, default=plain))


def _sha256(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Computes the SHA-256 over a description, without one, and all tensors."""
    text = json.dumps(description) + sha256_state(dict(tensors))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- what is read


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors' own error type is not public
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(
            f"{path.name} does not say what model it holds: it was not written by `save`. Bare "
            "weights are read with safetensors.torch.load_file, into a model of your own"
        )
    try:
        description = json.loads(metadata[KEY])
        written_format = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged: its description is no JSON text") from error
    if written_format != FORMAT:
        raise ValueError(
            f"{path.name} is of format {written_format}, and format {FORMAT} is what can be read: "
            f"use the version that wrote it, {description.get('versions')}"
        )
    return description


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the description and all tensors, by every name that they have."""
    description = _description(path)
    sha256 = description.pop("sha256", None)
    stored = load_file(path)
    if (actual := _sha256(description, stored)) != sha256:
        raise ValueError(
            f"{path.name} is damaged or was edited: its SHA-256 is {actual}, and {sha256} was "
            "written with it: save the model again, or copy the file again"
        )
    same = {name: stored[first] for name, first in description["same"].items()}
    return description, stored | same


def _built(path: Path, architecture: Mapping[str, Any]) -> nn.Module:
    if "timm" not in architecture:
        kind = architecture["class"]
        raise ValueError(
            f"{path.name} holds a {kind}, a class of your own: give a new one to put the weights "
            f"into, restore(path, {kind}(...))"
        )
    try:
        return created(architecture["timm"], architecture["arguments"])
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _load(model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Puts tensors in the place of a model's; ties what was tied, freezes what was frozen."""
    state = model.state_dict()
    model.load_state_dict({name: tensors[name] for name in state}, assign=True)
    for name, tensor in tensors.items():
        if name not in state:  # a buffer that no state holds
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = tensor
    for name, first in description["same"].items():
        owner, _, last = name.rpartition(".")
        first_owner, _, first_last = first.rpartition(".")
        if (tied := model.get_submodule(first_owner)._parameters.get(first_last)) is not None:
            model.get_submodule(owner)._parameters[last] = tied
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in description["frozen"])
