"""Dropping experts during one finetuning run (Chen et al. 2022, 2206.00277): which ones, and when. No training here.

    drop = ProgressiveDrop({name: layer.router.experts for name, layer in routed(model).items()}, steps)
    ... in step t:  for name, routing in tape: drop.update(name, routing)
                    if keep := drop.due(t): drop_experts(model, keep, "reroute")   # and a new optimiser for what is left

Axis letters: **A** assignments, **E** experts that a layer has now.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.routing import Routing


class ProgressiveDrop:
    """A running proficiency per expert and layer, and a threshold that grows until one expert a layer is left.

    Proficiency in a step: hit rate times mean gate weight, that is an expert's sum of gates, as a share of its layer's sum;
    averaged over steps with weight `decay` on the past. In step t an expert goes if its proficiency is below t / (end * steps)
    of the best in its layer; from step end * steps on the best stays alone, of equals the one with the lower index.
    Simplified against the paper, which compares with a fixed threshold at the ends of windows and drops the rest by force.

    experts: {layer: E}. steps: of the whole run. end: share of the steps after which one expert a layer is left (paper: half).
    """

    def __init__(self, experts: Mapping[str, int], steps: int, *, end: float = 0.5, decay: float = 0.9):
        if steps < 1 or not 0 < end <= 1 or not 0 <= decay < 1:
            raise ValueError(f"steps={steps} must be at least 1, end={end} above 0 and at most 1, decay={decay} at least 0 and "
                             "below 1")
        if not experts or min(experts.values()) < 1:
            raise ValueError(f"experts={dict(experts)} must name layers with at least one expert each")
        self.last, self.decay = end * steps, decay
        self.alive = {name: list(range(count)) for name, count in experts.items()}  # numbers that they had at the start
        self.proficiency: dict[str, Tensor | None] = dict.fromkeys(experts)

    def update(self, name: str, routing: Routing) -> None:
        """Take in one training step of a layer, whose router counts the experts that are alive.

        ValueError for an unknown layer, or one with another number of experts.
        """
        if name not in self.alive or routing.experts != len(self.alive[name]):
            known = ", ".join(f"{layer}: {len(alive)}" for layer, alive in self.alive.items())
            raise ValueError(f"a routing of {routing.experts} experts for layer {name!r} is not one of ({known}): drop experts "
                             "in the model as soon as they are due, with semantics 'reroute'")
        weight = routing.weight.detach().double().cpu()
        gates = torch.zeros(routing.experts, dtype=torch.float64).index_add(0, routing.expert.cpu(), weight)
        share = gates / gates.sum() if gates.sum() > 0 else torch.full_like(gates, 1 / len(gates))
        old = self.proficiency[name]
        self.proficiency[name] = share if old is None else self.decay * old + (1 - self.decay) * share

    def threshold(self, step: int) -> float:
        """Least proficiency in step `step` (from 0), as a share of the best expert's: 0 at the start, 1 from the end on."""
        return min(1.0, step / self.last)

    def due(self, step: int) -> dict[str, list[int]]:
        """{layer: experts to keep, in their present numbers} of the layers that lose any now; the others count as dropped."""
        keep = {}
        for name, found in self.proficiency.items():
            if found is None or len(found) == 1:
                continue
            stay = [e for e, value in enumerate(found.tolist()) if value >= self.threshold(step) * float(found.max())]
            if step >= self.last:
                stay = [int(found.argmax())]
            if len(stay) < len(found):
                keep[name] = stay
                self.alive[name] = [self.alive[name][e] for e in stay]
                self.proficiency[name] = found[stay] / found[stay].sum()
        return keep
