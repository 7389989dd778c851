"""What a run cuts before it trains: `PruneSpec` and `DropSpec` carried out, and models given the
shapes of cut ones.

Axis letters: **B** images, **C** channels, **E** experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extraction.saved import fit_extracted
from ..inputs.splits import Split
from ..models.backbone import build
from ..models.moe import MoELayer
from ..routers.group import GroupRouter
from ..routers.manual import labelled
from ..spec import DropSpec, ExtractSpec, PruneSpec, RunSpec, class_groups
from .experts import dropping, merging, scores
from .neurons.calibration import calibration
from .neurons.groups import groups_of, parts_in, prunable, shapes_of, supported
from .neurons.masks import mask_weights
from .neurons.removal import fit_shapes, remove
from .neurons.scores import Batches, cut_size, expert_scores, keep_indices, neuron_scores


def prune(model: nn.Module, spec: RunSpec, split: Split, classes: int) -> dict[str, Tensor]:
    """Prune `model` in place as `spec.prune` says; returns the masks of the unstructured arm,
    nothing else.

    Scores are taken on training images without augmentation, in float32. Experts go first, each
    scored on images of its own class group, or all on the same ones, whose tokens are forced
    through it; then the rest, on class-balanced images that the routers send where they like
    (Leiden thesis, its order). `spec.seed` draws the images. Raises ValueError as the scores do.
    """
    rules, generator = spec.prune, torch.Generator().manual_seed(spec.seed)

    def batches(index: Tensor) -> Batches:
        return [
            (split.batch(part, spec.data).to(spec.device), split.labels[part].to(spec.device))
            for part in index.chunk(rules.batches)
        ]

    balanced = batches(calibration(split.labels, [range(classes)], rules.images, generator)[0])
    present = parts_of(model, rules)
    groups = None
    if "experts" in present:
        count = next(module.experts for module in prunable(model, ("experts",)).values())
        groups = [balanced] * count
        if rules.by_class:
            drawn = calibration(split.labels, class_groups(classes, count), rules.images, generator)
            groups = [batches(index) for index in drawn]
    if not rules.structured:
        return mask_weights(
            model, balanced, rules.share, batches_of_expert=groups, parts=present, loss=_loss
        )
    rest = [part for part in present if part != "experts"]
    given = {"kind": rules.kind, "loss": _loss, "generator": generator}
    if groups is not None:
        _cut(model, expert_scores(model, groups, **given), rules.share)
    if rest:
        _cut(model, neuron_scores(model, balanced, parts=rest, **given), rules.share)
    return {}


def drop(
    model: nn.Module,
    spec: RunSpec,
    split: Split,
    classes: int,
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, list[float]]:
    """Take whole experts out of `model`, in place, as `spec.drop` says; returns the scores {layer:
    E}, empty for merging.

    Measured scores and merging see class-balanced training images without augmentation, which
    `spec.seed` draws, in float32. before: state of the model before finetuning, for scores that
    compare. Of an ensemble each member loses the same share. Raises ValueError as the scores and
    removals in `experts` and `merging` do.
    """
    rules, generator = spec.drop, torch.Generator().manual_seed(spec.seed)
    index = calibration(split.labels, [range(classes)], rules.images, generator)[0]
    batches = [split.batch(part, spec.data).to(spec.device) for part in index.split(64)]
    if rules.score in ("dern", "merge"):
        {"dern": merging.dern, "merge": merging.merge_similar}[rules.score](
            model, batches, rules.share
        )
        return {}
    measured = scores.calibrate(model, batches) if rules.score in scores.MEASURED else None
    found = scores.scores(
        model, rules.score, before=before, calibration=measured, generator=generator
    )
    dropping.drop_experts(model, _best(model, found, rules), rules.missing)
    return {name: score.tolist() for name, score in found.items()}


def _best(model: nn.Module, found: dict[str, Tensor], rules: DropSpec) -> dict[str, Tensor]:
    """{layer: experts that stay}: the best of each layer, in an ensemble the best of each member."""
    router = next(iter(dropping.routed(model).values())).router
    if not isinstance(router, GroupRouter):
        return scores.keep_by_score(found, rules.share)
    stay: dict[str, list[Tensor]] = {name: [] for name in found}
    for member in range(router.members):
        mine = (router.group.cpu() == member).nonzero()[:, 0]
        for name, kept in scores.keep_by_score(
            {name: score[mine] for name, score in found.items()}, rules.share
        ).items():
            stay[name].append(mine[kept])
    return {name: torch.cat(parts) for name, parts in stay.items()}


def _as_many(router: nn.Module, left: int, group: Tensor | None) -> Tensor:
    """(E',) any experts, as many as are left, and of an ensemble as many in each group: their
    weights are loaded over."""
    if group is None or not isinstance(router, GroupRouter):
        return torch.arange(left)
    return torch.cat(
        [(router.group == m).nonzero()[: int((group == m).sum()), 0] for m in range(router.members)]
    )


def fit_experts(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Drop experts of an unpruned model, in place, until it has as many as the state of a pruned or
    merged one says.

    Structure only: load the state afterwards. Both semantics are read off the state: a layer with
    `kept` has zero updates, one with fewer router rows reroutes. Returns the model.
    """
    cut: dict[str, dict[str, Tensor]] = {semantics: {} for semantics in dropping.SEMANTICS}
    for name, layer in dropping.routed(model).items():
        rows = state.get(f"{name}.router.weight")
        if f"{name}.kept" in state:
            cut["zero_update"][name] = state[f"{name}.kept"]
        elif rows is not None and len(rows) < layer.router.experts:
            cut["reroute"][name] = _as_many(
                layer.router, len(rows), state.get(f"{name}.router.group")
            )
    for semantics in reversed(
        dropping.SEMANTICS
    ):  # a layer of zero updates is not `routed` any more
        dropping.drop_experts(model, cut[semantics], semantics)
    return model


def load_pruned(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the unpruned `model`, cut as `fit_experts` does, with the state of its pruned or
    merged form loaded.

    Raises ValueError if the state is of another architecture. `model` is left as it is in any case.
    """
    made = fit_experts(copy.deepcopy(model), state)
    mine = made.state_dict()
    wrong = [
        name
        for name in {**mine, **state}
        if name not in mine or name not in state or mine[name].shape != state[name].shape
    ]
    if wrong:
        shapes = [
            f"{name}: {tuple(state[name].shape) if name in state else 'absent'} in the state, "
            f"{tuple(mine[name].shape) if name in mine else 'absent'} in the model"
            for name in wrong[:3]
        ]
        raise ValueError(
            f"the pruned state does not fit {type(model).__name__}, {len(wrong)} entries differ "
            f"({'; '.join(shapes)}): build the model with the backbone and the MoESpec that it had before pruning"
        )
    made.load_state_dict(dict(state))
    return made


def fit(model: nn.Module, state: Mapping[str, Tensor], spec: RunSpec) -> nn.Module:
    """Give an uncut model, in place, the shapes of `state`, which the run `spec` left; returns the
    model.

    Structure only: load the state afterwards. Raises ValueError as `fit_experts` and
    `removal.fit_shapes` do.
    """
    if spec.extracted:
        fit_extracted(model, state, _rules(spec))
    if spec.reduced:
        fit_experts(model, state)
    return fit_shapes(model, state) if spec.narrowed else model


def _rules(spec: RunSpec) -> ExtractSpec:
    return spec.extract or _rules(spec.init)


def restored(spec: RunSpec, state: Mapping[str, Tensor], classes: int, channels: int) -> nn.Module:
    """The model that the run `spec` left behind, from its final state. classes, channels: of its
    data set.

    Widths are read off the state. Raises ValueError for a state that another architecture left, for
    a pruned one with a spec that does not prune, and the other way round, and for one that another
    share was taken from.
    """
    plain = spec.but(
        init=None,
        backbone={"weights": None},
        prune=None,
        extract=None,
        drop=None,
        train=None,
        fresh_routers=False,
    )
    model = build(plain, classes, channels)
    whole = _sizes(model)
    fit(model, state, spec)
    if not spec.extracted:
        _check_shares(spec, whole, _sizes(model))
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(
            f"the state is not what run {spec.id} left: give the spec that it was made with, and its prune, drop "
            f"and extract ({str(error).splitlines()[-1].strip()})"
        ) from None
    return model


def _sizes(model: nn.Module) -> dict[str, int]:
    """Of each layer that can be cut how many neurons or head dimensions it has, and of each MoE
    layer how many experts."""
    return {name: shape[-1] for name, shape in shapes_of(supported(model)).items()} | {
        name: layer.experts.experts
        for name, layer in model.named_modules()
        if isinstance(layer, MoELayer)
    }


def _check_shares(spec: RunSpec, whole: dict[str, int], found: dict[str, int]) -> None:
    """ValueError if a layer has another size than the shares of the run and of those that it starts
    from leave of `whole`."""
    layers = {name for name in whole if f"{name}.experts.0" in whole}
    for name, size in found.items():
        left = _left(spec, whole[name], "moe" if name in layers else _part(name))
        if left not in (None, size):
            raise ValueError(
                f"{name} has {size} {'experts' if name in layers else 'groups'} in the state; of {whole[name]} the "
                f"shares of run {spec.id} leave {left}: give the spec that the state was made with"
            )


def _part(name: str) -> str:
    if name.endswith((".qk", ".vo")):
        return "attention"
    return "experts" if ".experts." in name else "mlp"


def _left(spec: RunSpec, size: int, part: str) -> int | None:
    """What the run and its ancestors leave of `size` experts (part "moe") or groups; None where
    neurons were cut before a layer became a mixture: then the state alone knows."""
    if spec.init is not None:
        if (
            part in ("mlp", "experts")
            and spec.moe is not None
            and spec.init.moe is None
            and spec.init.narrowed
        ):
            return None
        size = _left(spec.init, size, part)
    if size is None:
        return None
    if part == "moe":
        left = size if spec.drop is None else scores.remaining(size, spec.drop.share)
        return 1 if spec.train is not None and spec.train.single_expert_at else left
    rules = spec.prune
    cuts = rules is not None and rules.structured and (rules.parts is None or part in rules.parts)
    return size - cut_size(size, rules.share) if cuts else size


def check(model: nn.Module, rules: PruneSpec) -> None:
    """Raise ValueError if a layer cannot be cut or the share would leave one without groups; needs
    no data."""
    shapes = shapes_of(prunable(model, parts_of(model, rules)))
    for name, shape in shapes.items() if rules.structured else ():
        try:
            cut_size(shape[-1], rules.share)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def parts_of(model: nn.Module, rules: PruneSpec) -> tuple[str, ...]:
    """The parts that are pruned: those asked for, else all that the model has."""
    return parts_in(model) if rules.parts is None else rules.parts


def weights_in(model: nn.Module, rules: PruneSpec) -> int:
    """How many single weights and biases lie in groups that the rules may take."""
    modules = prunable(model, parts_of(model, rules))
    return sum(
        piece.numel()
        for name, module in modules.items()
        for _, pieces in groups_of(name, module)
        for piece in pieces
    )


def _cut(model: nn.Module, scores: dict[str, Tensor], share: float) -> None:
    remove(model, {name: keep_indices(score, share) for name, score in scores.items()})


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with labelled(model, labels):  # the warm-up of experts routes by class
        return F.cross_entropy(model(images), labels)
