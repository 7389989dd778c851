"""A simulation of the model behind the guarantee for pruning by router norms.

Source: Chowdhury et al. 2024, 2405.16646, section 4.

An image is a set of n patches out of an orthonormal set of patterns. Pattern 0 stands in each image
of class +1, pattern 1 in each image of class -1, exactly once; the others are irrelevant to the
label. A patch is written as the index of its pattern: turning all patterns by one rotation, and
router and hidden rows with them, changes no inner product and no norm.

Each expert s takes the l patches J_s(x) with the largest router values and weighs them by a softmax
over these l:

    f(x) = sum_s f_s(x)
    f_s(x) = a_s sum_{j in J_s(x)} G_sj sum_r relu(<w_sr, x_j>)
    G_s = softmax of <w_s, x_j> over J_s

with fixed signs a_s, half of them +1. The loss is max(0, 1 - y f(x)); SGD with one rate for hidden
and one for router rows.

Axis letters: **B** images, **N** patches of an image (n), **L** patches an expert takes (l), **P**
patterns, **H** neurons of an expert, **E** experts, **S** logged steps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...spec import Positive, Spec
from ...spec.base import MOST_EXPERTS, Experts, Guard, Size, Weight


class PatchSpec(Spec):
    """Says the sizes, rates and starting scales of a simulation."""

    patterns: Annotated[Size, Field(ge=3)] = 64  # P, the two that bear the label counted
    patches: Size = 16  # n, patches of an image
    taken: Size = 4  # l, patches that an expert takes
    experts: Annotated[Experts, Field(ge=2)] = 16  # E; even, so that each class has as many
    neurons: Size = 8  # H of an expert
    batch: Positive = 64  # images a step
    steps: Positive = 400
    lr_expert: Guard = 0.1  # of the hidden rows
    lr_router: Guard = 2.0  # of the router rows
    # of the hidden rows at the start; small, so that the label is learnt and not drawn
    hidden_std: Guard = 0.01
    router_std: Guard = 0.3  # of the router rows at the start, before they are scaled by expert
    # routers start scaled by 1 to 1 + spread: pretrained ones differ in norm
    spread: Weight = 0.5
    # experts of each class that pretraining has turned to its pattern
    specialists: Annotated[int, Field(ge=0, le=MOST_EXPERTS)] = 2
    # of their router value for it, in standard deviations of their row
    head_start: Weight = 3.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.experts % 2:
            raise ValueError(
                f"experts={self.experts} must be even: half of them vote for each class"
            )
        if self.specialists > self.experts // 2:
            raise ValueError(
                f"specialists={self.specialists} of each class is more than the "
                f"{self.experts // 2} experts that vote for it"
            )
        if self.patches > self.patterns - 1:
            raise ValueError(
                f"patches={self.patches} is too many: an image has one of the two patterns with a "
                f"label and different ones of the {self.patterns - 2} others, so at most "
                f"{self.patterns - 1}"
            )
        if self.taken > self.patches:
            raise ValueError(
                f"taken={self.taken} is more than the patches={self.patches} of an image"
            )
        return self


@dataclass(frozen=True)
class PatchModel:
    """Holds the weights: router (E, P), hidden (E, H, P) and sign (E,), +1 or -1."""

    router: Tensor
    hidden: Tensor
    sign: Tensor

    def votes(self, patches: Tensor, taken: int) -> Tensor:
        """Computes (E, B) what each expert adds to the output of images (B, N) of patterns.

        Dropping an expert takes its row away.
        """
        gate, chosen = self.gates(patches, taken)
        # a patch is one pattern, so what its neurons add is a number an expert and pattern (E, P)
        of_pattern = self.hidden.relu().sum(dim=1)
        active = of_pattern.gather(1, chosen.flatten(1)).view_as(chosen)  # (E, B, L)
        return self.sign.unsqueeze(1) * (gate * active).sum(dim=-1)

    def gates(self, patches: Tensor, taken: int) -> tuple[Tensor, Tensor]:
        """Computes the gates over the patches that each expert takes, and their patterns.

        patches: (B, N). Returns two tensors (E, B, L).
        """
        value, place = self.router[:, patches].topk(taken, dim=-1)
        return value.softmax(dim=-1), patches.expand(len(self.router), -1, -1).gather(2, place)


@dataclass(frozen=True)
class PatchRun:
    """Holds what one simulation logged.

    step: (S,); norm: (S, E) router norms; loss: (S,) means over a batch; proficiency: (E,) at the
    start, for the label that the expert votes for; before and after: the model.
    """

    step: list[int]
    norm: Tensor
    loss: list[float]
    proficiency: Tensor
    before: PatchModel
    after: PatchModel

    def scores(self) -> dict[str, Tensor]:
        """Scores the experts, {name: (E,)}, high = keep, as `experts.scores` does from weights.

        Load cannot rank: every expert takes l patches of each image.
        """
        before, after = self.before, self.after
        change = after.router.norm(dim=1) - before.router.norm(dim=1)
        return {
            "router_norm_change": change,
            "router_norm_change_abs": change.abs(),
            "router_change": (after.router - before.router).norm(dim=1),
            "router_norm": after.router.norm(dim=1),
            "weight_change": (after.hidden - before.hidden).flatten(1).norm(dim=1),
        }


@dataclass(frozen=True)
class PatchTest:
    """Holds a simulation and what its experts say of fresh images.

    votes: (E, B), see `PatchModel.votes`. label: (B,), +1 or -1.
    """

    run: PatchRun
    votes: Tensor
    label: Tensor

    def accuracy(self, kept_experts: Tensor) -> float:
        """Computes the accuracy in percent where only these experts vote; indices (K,)."""
        output = self.votes[kept_experts].sum(dim=0)
        return 100 * (output.sign() == self.label).float().mean().item()


def draw(spec: PatchSpec, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws images as (B, N) patterns, and their labels (B,), +1 or -1.

    Irrelevant patterns differ within an image, so that no choice is a tie; the order of patches
    means nothing and is not shuffled.
    """
    # (B, 1) the pattern with the label: 0 for class +1, 1 for class -1
    labelled = torch.randint(2, (images, 1), generator=generator)
    order = torch.rand(images, spec.patterns - 2, generator=generator).argsort(dim=1)
    patches = torch.cat([labelled, 2 + order[:, : spec.patches - 1]], dim=1)
    return patches, 1.0 - 2.0 * labelled[:, 0]


def start(spec: PatchSpec, generator: torch.Generator) -> PatchModel:
    """Draws the pretrained model.

    Rows are normal, each router row is scaled by a factor of its own, and the first experts of each
    class have a head start: the theorem supposes that some experts are proficient from the start,
    which a plain normal draw leaves to luck.
    """
    scale = spec.router_std * (1 + spec.spread * torch.rand(spec.experts, 1, generator=generator))
    sign = torch.ones(spec.experts)
    sign[spec.experts // 2 :] = -1.0
    router = torch.randn(spec.experts, spec.patterns, generator=generator)
    for pattern, first in enumerate((0, spec.experts // 2)):
        router[first : first + spec.specialists, pattern] += spec.head_start
    hidden = torch.randn(spec.experts, spec.neurons, spec.patterns, generator=generator)
    return PatchModel(scale * router, spec.hidden_std * hidden, sign)


def proficiency(
    model: PatchModel, spec: PatchSpec, generator: torch.Generator, images: int = 2000
) -> Tensor:
    """Measures, on fresh images, how well each expert sees the class that it votes for: (E,).

    It is the chance that the pattern of this class is among the expert's l patches with a gate of
    at least 1/l.
    """
    patches, label = draw(spec, images, generator)
    gate, chosen = model.gates(patches, spec.taken)
    of_class = model.sign.unsqueeze(1) == label  # (E, B) of the class that the expert votes for
    seen = ((chosen == patches[:, 0].view(1, -1, 1)) & (gate >= 1 / spec.taken)).any(dim=-1)
    return (seen & of_class).sum(dim=1) / of_class.sum(dim=1).clamp_min(1)


def sgd_step(
    model: PatchModel, patches: Tensor, label: Tensor, spec: PatchSpec
) -> tuple[PatchModel, float]:
    """Makes one step of SGD; returns the new model, and the mean hinge loss before the step.

    patches: (B, N). label: (B,), +1 or -1.
    """
    router, hidden = model.router.detach().requires_grad_(), model.hidden.detach().requires_grad_()
    output = replace(model, router=router, hidden=hidden).votes(patches, spec.taken).sum(dim=0)
    loss = (1 - label * output).relu().mean()
    router_slope, hidden_slope = torch.autograd.grad(loss, (router, hidden))
    stepped = replace(
        model,
        router=(router - spec.lr_router * router_slope).detach(),
        hidden=(hidden - spec.lr_expert * hidden_slope).detach(),
    )
    return stepped, loss.item()


def simulate(spec: PatchSpec, generator: torch.Generator, every: int = 20) -> PatchRun:
    """Trains from `start` on fresh images in each step.

    Router norms and losses are logged every `every` steps and at the end.
    """
    model = before = start(spec, generator)
    proficiency_before = proficiency(before, spec, generator)
    steps, norms, losses = [], [], []
    for step in range(spec.steps + 1):
        patches, label = draw(spec, spec.batch, generator)
        updated, loss = sgd_step(model, patches, label, spec)
        if step % every == 0 or step == spec.steps:
            steps.append(step)
            norms.append(model.router.norm(dim=1))
            losses.append(loss)
        model = updated if step < spec.steps else model
    return PatchRun(steps, torch.stack(norms), losses, proficiency_before, before, model)


@functools.cache
def simulate_and_test(spec: PatchSpec, seed: int, every: int = 20, images: int = 4000) -> PatchTest:
    """Simulates a seed and lets the experts vote on fresh images, once in a process.

    every: see `simulate`. images: number of fresh images, of which each draw has its own generator.
    """
    run = simulate(spec, torch.Generator().manual_seed(seed), every)
    patches, label = draw(spec, images, torch.Generator().manual_seed(10_000 + seed))
    return PatchTest(run, run.after.votes(patches, spec.taken), label)
