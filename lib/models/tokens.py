"""What the tokens are that a layer of a timm model sees: whether the first is the class token, and
whether its batch axis counts images.

A model that has prefix tokens need not have a class token among them (registers), and one that has
a class token may add it after its trunk.

Axis letters: **B** images, **N** tokens of an image, **D** width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import signature

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from .modes import modes_kept

PROBED_IMAGES = 3  # no width, side or number of windows is one by chance in all layers


def _everywhere(model: nn.Module, name: str) -> bool:
    return True


def _after_joining(model: nn.Module, name: str) -> bool:
    """ConViT: the class token joins before one of the blocks."""
    return int(re.search(r"blocks\.(\d+)\.", name)[1]) >= model.local_up_to_layer


# {class of timm: whether the input of the layer of that name begins with the class token}, for
# models that have one
BEGINS_WITH_CLASS_TOKEN: dict[str, Callable[[nn.Module, str], bool]] = {
    "VisionTransformer": _everywhere,
    "VisionTransformerRelPos": _everywhere,
    "Beit": _everywhere,
    "Eva": _everywhere,
    "NaFlexVit": _everywhere,
    "MultiScaleVit": _everywhere,
    "PoolingVisionTransformer": _everywhere,
    "TNT": _everywhere,
    "ConVit": _after_joining,
    "Cait": lambda model, name: name.startswith("blocks_token_only."),
    "Xcit": lambda model, name: name.startswith("cls_attn_blocks."),
}


def has_class_token(model: nn.Module) -> bool:
    """Tells whether a model has a class token at all; registers are none."""
    return getattr(model, "cls_token", None) is not None


def returns_tokens(model: nn.Module) -> bool:
    """Tells whether a model returns the tokens after each block, prefix tokens apart."""
    forward = getattr(model, "forward_intermediates", None)
    return forward is not None and "return_prefix_tokens" in signature(forward).parameters


def begins_with_class_token(model: nn.Module, name: str) -> bool:
    """Tells whether the input (B, N, D) of a block's MLP begins with the class token.

    name: of the MLP in the model. A kind of model that is not known here counts as one whose input
    does not.
    """
    if not has_class_token(model):
        return False
    known = [BEGINS_WITH_CLASS_TOKEN.get(kind.__name__) for kind in type(model).__mro__]
    rule = next(filter(None, known), None)
    return rule is not None and rule(model, name)


def check_class_token(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ValueError unless the inputs of the layers `names` begin with the class token."""
    kind = type(model).__name__
    advice = "ask for the mean token with pool='mean', or for router='token'"
    if not has_class_token(model):
        raise ValueError(
            f"image-level routing reads the class token, and {kind} has none: {advice}"
        )
    for name in names:
        if not begins_with_class_token(model, name):
            raise ValueError(
                f"image-level routing reads the class token, and the input of {name} does not "
                f"begin with it in a {kind}: choose blocks that it has joined, or {advice}"
            )


def check_batch_of_images(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ValueError unless the first axis of the inputs of the layers `names` counts images.

    Some models cut an image into windows or sets of patches before their MLPs: a decision an image
    would be several there. Found out without computing, on tensors that have a shape and no values.
    """
    if any(kind.__name__ in BEGINS_WITH_CLASS_TOKEN for kind in type(model).__mro__):
        return  # plain transformers, class token or not: (B, N, D)
    first_axis: dict[str, int] = {}

    def watch(name: str) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            first_axis[name] = inputs[0].shape[0]

        return model.get_submodule(name).register_forward_pre_hook(note)

    hooks = [watch(name) for name in names]
    try:
        _forward_without_values(model)
    except Exception as error:  # whatever a model does that tensors without values cannot
        raise ValueError(
            f"whether {type(model).__name__} gives its MLPs one row of tokens an image could not "
            f"be found out ({error}): ask for router='token'"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        rows = first_axis.get(name)
        if rows != PROBED_IMAGES:
            raise ValueError(
                f"image-level routing decides once an image, and {name} of {type(model).__name__} "
                f"sees {rows} rows of tokens for {PROBED_IMAGES} images: ask for router='token'"
            )


def _forward_without_values(model: nn.Module) -> Tensor:
    """Runs a model, in evaluation mode, on images of its own size, on the meta device."""
    height, width = _image_size(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next(model.parameters()).dtype
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    shape = (PROBED_IMAGES, first.in_channels, height, width)
    images = torch.empty(shape, device="meta", dtype=dtype)
    with modes_kept(model), torch.no_grad():
        return functional_call(model.eval(), on_meta, (images,))


def _image_size(model: nn.Module) -> tuple[int, int]:
    """Gives height and width that a model, or the trunk inside it, was built for."""
    for module in model.modules():
        if size := getattr(module, "img_size", None):
            return to_2tuple(size)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg.get("input_size", (3, 224, 224))[1:])
