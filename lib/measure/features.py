"""What a backbone knows, by depth: nearest neighbours and a linear probe on the features after each
block.

Features are the class token where all blocks have it first, the mean patch otherwise, after the
model's last norm before pooling. Of models that pool patches beside a class token (BEiT, EVA-02)
that is another token than their head reads. Axis letters: **n** images of a split, **D** width.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ..inputs.splits import Split, Splits
from ..models.tokens import begins_with_class_token, returns_tokens
from ..models.upcycle import block_mlps
from ..spec import RunSpec
from ..training.evaluate import BATCH
from ..training.losses import autocast

NEIGHBOURS = 20  # k of DINO's protocol (Caron et al. 2021), with cosine distance
RIDGE = (1.0, 10.0, 100.0, 1000.0)  # penalties; the best on validation images is used


def by_depth(model: nn.Module, splits: Splits, spec: RunSpec) -> list[dict[str, float]]:
    """Measures the test accuracy of both probes, in percent, after each block.

    Both fit on the training images as they are (no augmentation). The ridge penalty is chosen on
    validation images; test images are read once a probe. Returns rows {"block" (from 1),
    "knn_top1", "linear_top1", "penalty"}. Raises ValueError if the model cannot return its
    intermediate features.
    """
    if not returns_tokens(model):
        raise ValueError(
            "depth_probe=True needs a model that returns the tokens after each block, as a timm "
            f"VisionTransformer or Eva does, got {type(model).__name__}: set it to False"
        )
    names = ("train", "val", "test")
    by_split = {name: features(model, getattr(splits, name), spec) for name in names}
    labels = {name: getattr(splits, name).labels.numpy() for name in names}
    rows = []
    for block in range(len(by_split["train"])):
        train, val, test = (by_split[name][block] for name in names)
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train)), metric="cosine").fit(
            train, labels["train"]
        )
        scale = StandardScaler().fit(train)
        target = np.eye(len(splits.class_names))[labels["train"]]
        fits = {
            penalty: Ridge(alpha=penalty).fit(scale.transform(train), target) for penalty in RIDGE
        }
        best = max(
            RIDGE,
            key=lambda penalty: _top1(fits[penalty].predict(scale.transform(val)), labels["val"]),
        )
        rows.append(
            {
                "block": block + 1,
                "knn_top1": 100 * float(neighbours.score(test, labels["test"])),
                "linear_top1": _top1(fits[best].predict(scale.transform(test)), labels["test"]),
                "penalty": best,
            }
        )
    return rows


@torch.inference_mode()
def features(model: nn.Module, split: Split, spec: RunSpec) -> list[np.ndarray]:
    """Computes the (n, D) float32 features of a split after each block, but not of the input
    embedding, normed by the model's last norm."""
    model.eval()
    batches_of_block: list[list[Tensor]] = []
    names = [name for name, _ in block_mlps(model)]
    has_class_token = bool(names) and all(begins_with_class_token(model, name) for name in names)
    for index in torch.arange(len(split)).split(BATCH):
        images = split.batch(index, spec).to(spec.device)
        with autocast(spec):
            # norm=True applies the last norm at every depth; NLC keeps tokens in one axis
            layers = model.forward_intermediates(
                images,
                norm=True,
                output_fmt="NLC",
                intermediates_only=True,
                return_prefix_tokens=has_class_token,
            )
        if has_class_token:  # a layer is (patch tokens, prefix tokens), the class token first
            rows = [prefix_tokens[:, 0].float().cpu() for _, prefix_tokens in layers]
        else:
            rows = [tokens.mean(dim=1).float().cpu() for tokens in layers]
        batches_of_block = batches_of_block or [[] for _ in rows]
        for batches, row in zip(batches_of_block, rows, strict=True):
            batches.append(row)
    return [torch.cat(batches).numpy() for batches in batches_of_block]


def _top1(scores: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((scores.argmax(axis=1) == labels).mean())
