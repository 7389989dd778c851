"""Extracts experts from the MLPs of a trained model (MoEE, 2505.15414, its rivals and controls)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..extraction.extract import check, extract_layers
from ..models.modes import ambient_modes_off
from ..models.names import matching
from ..models.upcycle import chosen_mlps
from ..spec import ExtractSpec
from .loaders import Loader, calibration_images, check_loader
from .modules import checked_seed, note, rules_of, to_change
from .prune import CATCH_UP, REPAIRS, follows_stream

CLUSTERS = ("kmeans", "hdbscan", "random", "moee", "moefication")
AS_PUBLISHED = ("moee", "moefication")
STORAGES = ("shared", "copies")
POOLED = 0.3  # weight of all tokens' covariance in that of a cluster: small clusters are noisy


@ambient_modes_off()
def extract(
    model: nn.Module,
    loader: Loader,
    active: float = 0.5,
    *,
    clusters: str = "kmeans",
    count: int = 8,
    repair: str | None = None,
    storage: str = "shared",
    ignore: Sequence[str] = (),
    modules: Sequence[str] | None = None,
    images: int = 512,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Replaces the MLPs of a trained model by experts of their own neurons; returns that model.

    Tokens are clustered, each cluster keeps the neurons that it needs most, and a router sends a
    token to the nearest cluster. In the records of this book it keeps more accuracy than its static
    rival, `prune`, at equal multiply-adds, and less at equal stored size, and takes more time:
    compare both before you choose.

    active: share of a layer's neurons that a token passes, above 0 and at most 1; at 1 nothing is
    removed, nothing repaired, and the function stays the same.
    clusters: "kmeans" of `count` clusters of the MLP's inputs, "hdbscan", which finds their number
    itself (`count` is not looked at), or "random", the control; "moee" as published (hidden
    activations, HDBSCAN, cosine to the centres, neurons by variance, no repair) and "moefication"
    as published (`count` balanced clusters of neurons, several a token, a trained router;
    2110.01786).
    repair: of what the neurons that a cluster lacks gave: "ridge", "mean" or "none" as in `prune`;
    None is "ridge", and "none" for methods as published.
    storage: "shared" stores once what experts have in common. That is every weight where experts
    differ by their neurons and biases alone; after "ridge", which gives each its own output
    weights, it is the input weights. "copies" gives each expert its own: faster on some machines,
    and larger. Experts of "moefication" have nothing in common: either word is the same.
    ignore: patterns of names of layers that stay as they are. modules: patterns of MLPs to take
    instead of the blocks' own, such as "blocks.*.mlp_channels".
    images: calibration images, class-balanced, drawn by `seed` in one pass over the loader.

    Repair, modes (also a caller's), types and `inplace` as in `prune`. `model.extraction` gets a
    row a layer (`extraction.report`); a layer in which fewer than two clusters were found stays
    dense and says so. Raises ValueError for what does not fit, by name.
    """
    _check(active, clusters, repair, storage)
    seed = checked_seed(seed)
    extracted = to_change(model, inplace, "extraction")
    names = [name for name, _ in chosen_mlps(extracted, modules)]
    ignored = matching(names, ignore, "ignore")
    if ignored == names:
        raise ValueError(f"ignore={list(ignore)} leaves no MLP to extract from")
    check_loader(loader)
    loses = clusters not in AS_PUBLISHED and active < 1  # something that can be repaired
    method = (repair or "ridge") if loses else "none"
    in_sequence = method != "none" and modules is None and follows_stream(extracted)
    rules = _rules(float(active), clusters, count, method, storage, in_sequence)
    layers = {"ignore": ignored, "modules": modules}
    check(extracted, rules, **layers)  # before the images are read
    batches = [part for part, _ in calibration_images(loader, extracted, images, seed)]
    rows = extract_layers(extracted, batches, rules, seed, **layers, title="extract")
    asked = {"clusters_by": clusters, "repair": method, "storage": rules.storage}
    return note(extracted, "extraction", [row | asked for row in rows])


def _check(active: float, clusters: str, repair: str | None, storage: str) -> None:
    for name, value, valid in (
        ("clusters", clusters, CLUSTERS),
        ("repair", repair, (None, *REPAIRS)),
        ("storage", storage, STORAGES),
    ):
        if value not in valid:
            words = ", ".join(word for word in valid if word)
            raise ValueError(f"{name}={value!r} is unknown: valid are {words}")
    if not isinstance(active, (int, float)) or not 0 < active <= 1:
        raise ValueError(f"active={active!r}: the share that a token passes is above 0, at most 1")
    if clusters in AS_PUBLISHED and repair not in (None, "none"):
        raise ValueError(
            f"clusters={clusters!r} is the method as published, without repair: leave "
            f"repair={repair!r} out, or set clusters='hdbscan'"
        )


def _rules(
    active: float, clusters: str, count: int, method: str, storage: str, in_sequence: bool
) -> ExtractSpec:
    """The rules that the words stand for. Raises ValueError as `rules_of`."""
    if clusters == "moefication":
        return rules_of(
            ExtractSpec,
            clusters={"of": "neurons", "count": count},
            neurons={"active": active},
            router="trained",
        )
    stored = "copies"
    if storage == "shared":
        stored = "inputs" if method == "ridge" else "shared"
    if clusters == "moee":
        return rules_of(ExtractSpec, neurons={"active": active}, storage=stored)
    found: dict[str, Any] = {} if clusters == "hdbscan" else {"count": count}
    return rules_of(
        ExtractSpec,
        clusters={"method": clusters, "space": "input"} | found,
        neurons={
            "active": active,
            "score": "weighted",
            "statistics": "cluster" if clusters == "random" else "routed",
        },
        router="nearest",
        correction={
            "method": method,
            "pooled": POOLED if method == "ridge" else 0.0,
            "sequential": in_sequence,
            "catch_up": CATCH_UP if in_sequence else 1.0,
        },
        storage=stored,
    )
