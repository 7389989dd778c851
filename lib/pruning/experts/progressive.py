"""Dropping of experts during one finetuning run, until each MoE layer has one.

Source: Chen et al. 2022, 2206.00277.

    drop = ProgressiveDrop(model, steps)
    ... after step t:  drop.after(t, tape)
    drop.finish()

While it runs, dropped experts are masked in the router and keep their place, so that the optimiser
goes on as it is; at the end they leave the layer.

Axis letters: **E** experts of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.moe import RoutingTape
from ...routers.base import Routing
from ...routers.survivor import SurvivorRouter
from ...routers.top_k import TopKRouter
from .dropping import drop_experts, routed


class ProgressiveDrop:
    """Drops experts of low proficiency, under a threshold that grows until one a layer is left.

    Proficiency in a step: hit rate times mean gate weight, that is an expert's sum of gates, as a
    share of its layer's sum; averaged over steps with weight `decay` on the past. After step t an
    expert goes if its proficiency is below t / (end * steps) of the best in its layer; from step
    end * steps on, or the last one, the best stays alone, of equals the one with the lower number.
    Simplified against the paper, which compares with a fixed threshold at the ends of windows and
    drops the rest by force.

    model: its top-1 routers are replaced until `finish`. steps: of the whole run. end: share of the
    steps after which one expert a layer is left (paper: half). decay: from 0 to below 1. Raises
    ValueError for these out of range, for a router that is no top-1 TopKRouter, and as `routed`;
    nothing is changed when it raises.
    """

    def __init__(self, model: nn.Module, steps: int, *, end: float = 0.5, decay: float = 0.9):
        if steps < 1 or not 0 < end <= 1 or not 0 <= decay < 1:
            raise ValueError(
                f"steps={steps} must be at least 1, end={end} above 0 and at most 1, "
                f"decay={decay} at least 0 and below 1"
            )
        self.model, self.decay = model, decay
        self.last_step = min(end * steps, steps - 1)  # steps count from 0
        layers = routed(model)
        for name, layer in layers.items():
            if type(layer.router) is not TopKRouter or layer.router.top_k != 1:
                raise ValueError(
                    f"{name} has a {type(layer.router).__name__} with "
                    f"top_k={getattr(layer.router, 'top_k', None)}: dropping until one expert is "
                    "left needs a TopKRouter with top_k=1"
                )
        self._routers_before = {name: layer.router for name, layer in layers.items()}
        for layer in layers.values():
            layer.router = SurvivorRouter.of(layer.router)
        self.routers = {name: layer.router for name, layer in layers.items()}
        self.proficiency: dict[str, Tensor | None] = dict.fromkeys(layers)

    def threshold(self, step: int) -> float:
        """Computes the least proficiency after step `step` (from 0), as a share of the best one's.

        It is 0 at the start, and 1 from the end on.
        """
        return step / self.last_step if step < self.last_step else 1.0

    def after(self, step: int, tape: RoutingTape) -> None:
        """Takes in one training step of all layers, and masks the experts that are due."""
        for name, routing in tape:
            self.update(name, routing)
            self.mask(name, step)

    def update(self, name: str, routing: Routing) -> None:
        """Takes in one training step of a layer; its proficiencies, (E,), sum to one."""
        weight = routing.weight.detach().double().cpu()
        gates = torch.zeros(routing.experts, dtype=torch.float64).index_add(
            0, routing.expert.cpu(), weight
        )
        alive = self.routers[name].alive.cpu()
        share = gates / gates.sum() if gates.sum() > 0 else alive.double() / alive.sum()
        old = self.proficiency[name]
        self.proficiency[name] = (
            share if old is None else self.decay * old + (1 - self.decay) * share
        )

    def mask(self, name: str, step: int) -> None:
        """Masks a layer's experts that are due after `step`; their share goes to the others."""
        proficiency, alive = self.proficiency[name], self.routers[name].alive
        stay = proficiency >= self.threshold(step) * proficiency.max()
        if step >= self.last_step:
            stay = torch.arange(len(proficiency)) == int(proficiency.argmax())
        alive &= stay.to(alive.device)  # once dead, always dead
        of_alive = proficiency.masked_fill(~alive.cpu(), 0.0)
        self.proficiency[name] = of_alive / of_alive.sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the proficiencies so far; who is alive stands in the routers' own state."""
        return {name: value for name, value in self.proficiency.items() if value is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state_dict` gave."""
        self.proficiency = dict.fromkeys(self.proficiency) | state

    def finish(self) -> nn.Module:
        """Drops the masked experts, and puts the first kind of router back; returns the model."""
        keep = {name: router.alive.nonzero()[:, 0] for name, router in self.routers.items()}
        for name, router in self._routers_before.items():
            layer = self.model.get_submodule(name)
            layer.router = router.train(layer.training)  # modes that changed passed it by
        return drop_experts(self.model, keep, "reroute")
