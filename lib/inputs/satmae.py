"""Turns SatMAE's checkpoints (2207.08051) into weights of timm's ViT for three colours.

Two kinds were released. Those trained on fMoW in colour are masked autoencoders of a plain ViT.
Those trained on Sentinel-2 see ten bands in three groups, each with a patch embedding of its own;
a token carries its place in the first part of D and its group in the rest.

Of the second kind the first group is taken: blue, green, red and near infrared (B2, B3, B4, B8).
In pretraining tokens are hidden, so an encoder that sees those of one group alone sees what it was
trained on; near infrared, which colour images lack, is held at its mean, as the authors mask bands.

Axis letters: **N** patches of an image, **D** width, **G** groups of bands, **P** side of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Of pixels in 0..1, by channel: fMoW in colour, util/datasets.py of the authors.
MEAN = (0.4182007312774658, 0.4214799106121063, 0.3991275727748871)
STD = (0.28774282336235046, 0.27541765570640564, 0.2764017581939697)
BANDS_OF_GROUP = (4, 4, 2)  # of the released file
# In the first group, whose bands are blue, green, red and near infrared:
RED_GREEN_BLUE, INFRARED = [2, 1, 0], 3
MEAN_OF_BAND = 0.5  # the authors scale the mean +- 2 deviations of a band to 0..1


def encoder(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Takes the encoder, for pixels normalised by `MEAN` and `STD`, under timm's names.

    state: without decoder and mask token; a head is left out. where: begins the messages. Raises
    ValueError for a model of series of images, one that was finetuned with pooled patches, and, of
    a model of groups, for embeddings that are absent, of another shape, or too many.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if any(name.startswith("fc_norm.") for name in state):
        raise ValueError(
            f"{where} has fc_norm.weight and so was finetuned on the mean of its patches, without "
            "the norm of its class token: take the file of the pretraining"
        )
    for name in ("cls_token", "pos_embed"):
        if name not in state or state[name].ndim != 3:
            raise ValueError(f"{where} lacks {name}, (1, N, D): it is no model of SatMAE")
    if "channel_embed" in state:
        return _of_first_group(state, where)
    width, of_place = state["cls_token"].shape[-1], state["pos_embed"].shape[-1]
    if of_place != width:
        raise ValueError(
            f"{where}: pos_embed is {tuple(state['pos_embed'].shape)}, expected (1, N, {width}); "
            "with times in the rest of the width it is a model of series of images, which is not "
            "read: take one of colour images or of groups of bands"
        )
    return state


def _of_first_group(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Takes from a model of groups of bands what its first group passes."""
    expected = _shapes_of_embeddings(state)
    for name, shape in expected.items():
        if name not in state or tuple(state[name].shape) != shape:
            given = f"is {tuple(state[name].shape)}" if name in state else "is absent"
            raise ValueError(
                f"{where}: {name} {given}, expected {shape}. Read are the released groups of "
                f"{', '.join(map(str, BANDS_OF_GROUP))} bands"
            )
    embeddings = [name for name in state if name.startswith(("patch_embed.", "channel_"))]
    if surplus := [name for name in embeddings if name not in expected]:
        raise ValueError(
            f"{where} has {surplus[0]}, and a model of {len(BANDS_OF_GROUP)} groups has "
            f"{', '.join(expected)}: it is another model"
        )
    kernel, bias = state["patch_embed.0.proj.weight"], state["patch_embed.0.proj.bias"]
    colours = kernel[:, RED_GREEN_BLUE]  # (D, 3, P, P)
    std, mean = torch.tensor(STD).view(1, 3, 1, 1), torch.tensor(MEAN).view(1, 3, 1, 1)
    # The group saw pixels in 0..1: x = std * normalised + mean, and infrared the same everywhere.
    bias = bias + (colours * mean).sum((1, 2, 3)) + MEAN_OF_BAND * kernel[:, INFRARED].sum((1, 2))
    positions, group = state["pos_embed"], state["channel_embed"][:, :1]  # (1, N + 1, .), (1, 1, .)
    of_class = state.get("channel_cls_embed", torch.zeros_like(group))
    rest = torch.cat([of_class, group.expand(-1, positions.shape[1] - 1, -1)], dim=1)
    encoder_state = {name: tensor for name, tensor in state.items() if name not in embeddings}
    return encoder_state | {
        "patch_embed.proj.weight": (colours * std).contiguous(),
        "patch_embed.proj.bias": bias,
        "pos_embed": torch.cat([positions, rest], dim=-1),  # (1, N + 1, D)
    }


def _shapes_of_embeddings(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Lists the shapes of all embeddings of a model of groups, by the sizes of some of them."""
    width, of_place = state["cls_token"].shape[-1], state["pos_embed"].shape[-1]
    of_group, first = width - of_place, state.get("patch_embed.0.proj.weight")
    patch = tuple(first.shape[2:]) if first is not None and first.ndim == 4 else (8, 8)
    shapes: dict[str, tuple[int, ...]] = {"channel_embed": (1, len(BANDS_OF_GROUP), of_group)}
    if "channel_cls_embed" in state:  # a finetuned model has it
        shapes["channel_cls_embed"] = (1, 1, of_group)
    for group, bands in enumerate(BANDS_OF_GROUP):
        shapes[f"patch_embed.{group}.proj.weight"] = (width, bands, *patch)
        shapes[f"patch_embed.{group}.proj.bias"] = (width,)
    return shapes
