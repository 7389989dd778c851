"""Freezes a model for inference: its weights are brought, once, into the form that products read.

fast = lib.freeze_for_inference(model)
with torch.inference_mode():
    logits = fast(images)
"""

from __future__ import annotations

import warnings

from torch import nn

from ..models import packed
from ..models.modes import ambient_modes_off
from .modules import to_change


def freeze_for_inference(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Packs the weights of linear maps, MLPs and experts, and returns the model, in evaluation
    mode.

    On CPU a plain weight is packed anew for each product; packed ones take as much memory again.
    On x86 without AVX-512 only experts to which few tokens go, as in batches of one image, are
    faster so: only experts are packed, and with more rows than `packed.FEW_ROWS` an expert, on
    average, the plain weights are used.
    They are used under `torch.inference_mode()` or `torch.no_grad()`, and outputs are equal up to
    rounding. Where gradients are recorded, after `model.train()`, on another device, under
    torch.compile or an exporter the model runs as it did. State dict, parameters and classes stay
    as they are; a copy (copy.deepcopy) is frozen as well, a model that `restore` reads is not, and
    a shallow one (copy.copy, replicas of nn.DataParallel) runs the weights of the model it was made
    of. Its blocks' convolutions and norms are left alone.

    A weight that has changed since is packed again before it is used. Seen is every change that
    torch counts (an operation in place, an optimiser's step, a state that is loaded, a cast, a
    move, another parameter). A write through `.data`, which torch does not count, is seen only
    where it changes one of the numbers that are compared, a row of each matrix and some by chance:
    a whole column or most of the numbers are, a few may not be. Freeze the model again after such a
    write. Weights made under `torch.inference_mode()` have no count: a copy of them has one, and in
    place they are not packed.

    inplace: change the model itself instead of a copy. Warns if nothing is packed (a model without
    experts on x86 without AVX-512, weights made under inference mode), or this torch has no packed
    weights for this processor and the model's type of numbers (float32, and bfloat16 from AVX-512
    on): the model then runs as it did.
    """
    # what is copied or packed under inference mode would be tensors without a count of changes
    with ambient_modes_off():
        frozen = to_change(model, inplace).eval()
        count = packed.pack(frozen)
    if not count:
        weights = [p for p in frozen.parameters() if p.is_floating_point()]
        types = sorted({str(p.dtype).removeprefix("torch.") for p in weights})
        elsewhere = sorted({p.device.type for p in weights} - {"cpu"})
        why = "it has no linear map, MLP or experts whose weights can be packed"
        if elsewhere:
            why = f"its weights lie on {', '.join(elsewhere)}, and packed ones are for the CPU"
        elif any(p.is_inference() for p in weights):
            why = (
                "its weights were made under torch.inference_mode(), where torch does not count "
                "changes of them: freeze a copy (inplace=False)"
            )
        elif not any(packed.can_pack(p.dtype) for p in weights):
            why = f"this torch has no packed weights of {', '.join(types)} for this processor"
        elif not packed.dense_maps_gain():
            why = "without AVX-512 only experts are faster with packed weights, and it has none"
        warnings.warn(
            f"freeze_for_inference left the {type(model).__name__} as it was: {why}", stacklevel=2
        )
    return frozen
