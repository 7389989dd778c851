"""What a run asks of the machine that computes it, as resources of Dask: a card, and memory.

A worker says what it has when it is started: `--resources "GPU=1,MEMORY=60e9"`. Memory is asked for
where workers say how much they have, a card always.
"""

from __future__ import annotations

from functools import lru_cache

from ..spec import BackboneSpec, MoESpec, RunSpec

CARD, MEMORY = "GPU", "MEMORY"  # names of the resources: a number of cards, bytes
# Python, torch and timm, with 5,000 small images (seen: 830 to 1,000 MiB)
START_BYTES = 1e9
STATE_COPIES = 4  # weights, gradients, and AdamW's two moments
BYTES = 4  # of a float32


def of(spec: RunSpec) -> dict[str, float]:
    """Returns what a run needs, {resource: amount}.

    MEMORY is the machine's, in bytes; what a run for a card holds there is not in it. Images that
    are kept decoded are not in it either: they depend on the data set.
    """
    if spec.device == "cuda":
        return {CARD: 1, MEMORY: START_BYTES}
    return {MEMORY: START_BYTES + step_bytes(spec)}


def step_bytes(spec: RunSpec) -> float:
    """Estimates the bytes that a training step holds at its fullest moment, as `step_mib` of
    `lib.measure.memory` counts them on data; of a run without training, its weights.

    No data and no memory are needed. The activations are those of the dense model in float32, K
    times where a token passes K experts, which is more than an MoE layer saves.
    """
    weights, activations = _sizes(spec.backbone, spec.data.image_size, spec.moe)
    if spec.train is None:
        return weights
    passes = spec.moe.top_k if spec.moe is not None else 1
    return STATE_COPIES * weights + spec.train.batch * passes * activations


# The runs of a page are hundreds, their architectures a few.
@lru_cache(maxsize=64)
def _sizes(backbone: BackboneSpec, image_size: int, moe: MoESpec | None) -> tuple[float, float]:
    """Bytes of the weights, experts included, and of what autograd saves for an image in the dense
    model, each piece of memory once."""
    import torch

    from ..models.backbone import skeleton

    dense = skeleton(backbone, image_size, classes=2).train()
    whole = dense if moe is None else skeleton(backbone, image_size, classes=2, moe=moe)
    known = {tensor.untyped_storage()._cdata for tensor in (*dense.parameters(), *dense.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no two share an address

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        dense(torch.empty(1, 3, image_size, image_size, device="meta")).sum()
    weights = BYTES * sum(parameter.numel() for parameter in whole.parameters())
    return weights, float(sum(storage.nbytes() for storage in saved.values()))
