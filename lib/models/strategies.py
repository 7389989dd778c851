"""Further routing strategies: expert choice, priority, hand-made, and Soft MoE. All end in one `Routing`.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **E** experts, **S** slots, **G** groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .experts import Experts
from .moe import RoutedLayer
from .routing import LinearRouter, Routing, assign, capacity


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes its top C = c T / E tokens by softmax probability (2202.09368); a token may get 0 to E experts.

    choices: c, experts a token gets on average. group: "image" or "batch", the tokens that compete with each other. A batch
    as group makes an image's result depend on its neighbours, at evaluation too. gate: "printed", or "renormalised" over the
    experts that took a token.
    """

    def __init__(self, width: int, experts: int, *, choices: float = 1.0, group: str = "image", gate: str = "printed",
                 noise: float = 0.0, std: float = 0.02, generator: torch.Generator | None = None):
        super().__init__(width, experts, noise=noise, std=std, generator=generator)
        if group not in ("image", "batch"):
            raise ValueError(f"group={group!r} is unknown: tokens compete within an 'image' or within the 'batch'")
        if not 0 < choices <= experts:
            raise ValueError(f"choices={choices} must be above 0 and at most experts={experts}")
        self.choices, self.group, self.gate = choices, group, gate

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> a Routing in which every expert serves equally many tokens of each group."""
        b, n, d = x.shape
        probs, logits = self.scores(x.reshape(b * n, d))
        groups = b if self.group == "image" else 1
        size = b * n // groups
        slots = min(size, capacity(self.choices, 1, size, self.experts))
        scores = probs.view(groups, size, self.experts)
        taken = scores.detach().topk(slots, dim=1).indices  # (G, C, E): which tokens each expert takes
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, taken, True).view(b * n, self.experts)
        token, expert = chosen.nonzero(as_tuple=True)
        weight = probs[token, expert]
        if self.gate == "renormalised":
            weight = weight / (probs * chosen).sum(dim=-1)[token]
        ranked = probs.detach().masked_fill(~chosen, -1.0).sort(dim=-1, descending=True)
        choice = ranked.indices.masked_fill(ranked.values < 0, -1)
        return Routing(token, expert, weight, probs, logits, choice, torch.zeros_like(choice[:, 0]), (b, n))


class PriorityRouter(LinearRouter):
    """Top-1 with exactly equal loads: experts keep their highest-weighted tokens, a refused token goes to its next choice.

    Durham report, section 3. Unlike V-MoE's batch priority routing nothing is dropped. Both sides rank by the same
    probability, so the stable outcome is unique (see `balanced_match`). Loads are equal if E divides the number
    of tokens in a group ("image" or "batch"), and differ by what the last expert lacks otherwise.
    """

    def __init__(self, width: int, experts: int, *, group: str = "batch", gate: str = "printed", noise: float = 0.0,
                 std: float = 0.02, generator: torch.Generator | None = None):
        super().__init__(width, experts, noise=noise, std=std, generator=generator)
        if group not in ("image", "batch"):
            raise ValueError(f"group={group!r} is unknown: tokens compete within an 'image' or within the 'batch'")
        self.group, self.gate = group, gate

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> a Routing in which every token has one expert."""
        b, n, d = x.shape
        probs, logits = self.scores(x.reshape(b * n, d))
        groups = b if self.group == "image" else 1
        choice = balanced_match(probs.detach().view(groups, b * n // groups, self.experts)).view(b * n, 1)
        weight = probs.gather(1, choice)
        return assign(choice, weight / weight.detach() if self.gate == "renormalised" else weight, probs, logits, (b, n))


def balanced_match(scores: Tensor) -> Tensor:
    """scores: (G, n, E) -> (G, n) expert of each token, at most ceil(n / E) tokens an expert and group.

    Both sides rank by the same score, so the stable outcome is what the pairs give in falling order: each takes effect if its
    token has no expert and its expert has room; earlier tokens first among equals. A round gives out the best pair of each
    waiting token in that order until an expert runs full, so there are at most E rounds. (Deferred acceptance finds the same,
    but when preferences are alike its refusals come one by one, thousands of rounds.)
    """
    groups, size, experts = scores.shape
    room = torch.full((groups, experts), capacity(1.0, 1, size, experts), device=scores.device)
    place = torch.full((groups, size), -1, device=scores.device)
    while bool((place < 0).any()):
        value, best = scores.masked_fill(room.unsqueeze(1) == 0, -torch.inf).max(dim=-1)
        value = value.masked_fill(place >= 0, -torch.inf)
        order = value.argsort(dim=-1, descending=True, stable=True)
        asked = best.gather(1, order)
        asks = torch.nn.functional.one_hot(asked, experts) * (place.gather(1, order) < 0).unsqueeze(-1)
        number = asks.cumsum(dim=1).gather(2, asked.unsqueeze(-1)).squeeze(-1)  # which ask of its expert this is, from 1
        before_full = (number > room.gather(1, asked)).cumsum(dim=1) == 0
        served = asks * before_full.unsqueeze(-1)
        given = torch.where(served.any(dim=-1), asked, place.gather(1, order))
        place = place.scatter(1, order, given)
        room = room - served.sum(dim=1)
    return place


class ManualRouter(nn.Module):
    """Experts by hand: all tokens of an image go to the expert that its class is mapped to (Durham report, Table 6).

    experts_of: {class: expert}. The classes of a batch are handed over by whoever runs the model:

        with router.given(labels):
            logits = model(images)
    """

    def __init__(self, experts: int, experts_of: dict[int, int]):
        super().__init__()
        if not experts_of or set(experts_of.values()) - set(range(experts)):
            raise ValueError(f"the map {experts_of} must send classes to experts 0..{experts - 1}")
        if sorted(experts_of) != list(range(len(experts_of))):
            absent = sorted(set(range(max(experts_of) + 1)) - set(experts_of))
            raise ValueError(f"the map has no expert for class {', '.join(map(str, absent))}: every class needs one")
        self.experts, self.top_k = experts, 1
        self.register_buffer("table", torch.tensor([experts_of[c] for c in range(len(experts_of))]))
        self._labels: Tensor | None = None

    @contextmanager
    def given(self, labels: Tensor) -> Iterator[None]:
        """labels: (B,) classes of the images that run inside."""
        if labels.numel() and int(labels.max()) >= self.table.numel():
            raise ValueError(f"class {int(labels.max())} is not in the map, which ends at class {self.table.numel() - 1}")
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def forward(self, x: Tensor) -> Routing:
        """x: (B, N, D) -> one decision an image, with weight one."""
        b, n, _ = x.shape
        if self._labels is None or self._labels.shape != (b,):
            raise RuntimeError("manual routing needs the classes of this batch: run the model inside `with router.given(labels)`")
        choice = self.table[self._labels].unsqueeze(1)
        probs = torch.nn.functional.one_hot(choice[:, 0], self.experts).float()
        return assign(choice, torch.ones(b, 1, device=x.device), probs, torch.zeros_like(probs), (b, n))


@contextmanager
def labelled(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Inside, all manual routers of a model know the (B,) classes of the images that run."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ManualRouter):
                stack.enter_context(module.given(labels))
        yield


class SoftMoELayer(RoutedLayer):
    """Soft MoE (2308.00951): every slot of an expert gets a weighted mean of all tokens of its image, nothing is chosen.

    Unit-norm tokens times unit-norm slot vectors, times a learned scale, give logits (B, N, S); dispatch weights are their
    softmax over tokens, combine weights their softmax over slots. No drops and no auxiliary loss. `slots`: per expert.
    The tape gets a Routing whose probabilities are the combine weights summed by expert.
    """

    def __init__(self, experts: Experts, slots: int = 1, generator: torch.Generator | None = None):
        super().__init__()
        self.experts, self.slots = experts, slots
        self.phi = nn.Parameter(torch.empty(experts.width, experts.experts * slots))
        self.scale = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            self.phi.normal_(0.0, experts.width ** -0.5, generator=generator)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, N, D) -> dispatch and combine weights, both (B, N, S)."""
        with torch.autocast(x.device.type, enabled=False):
            unit = nn.functional.normalize(x.float(), dim=-1)
            logits = self.scale * unit @ nn.functional.normalize(self.phi.float(), dim=0)
        return logits.softmax(dim=1), logits.softmax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        dispatch, combine = self.weights(x)
        rows = (dispatch.transpose(1, 2).to(x.dtype) @ x).reshape(-1, d)  # (B*S, D)
        expert = torch.arange(self.experts.experts, device=x.device).repeat_interleave(self.slots).repeat(b).unsqueeze(1)
        ones = torch.ones(expert.shape, device=x.device)
        own = torch.nn.functional.one_hot(expert[:, 0], self.experts.experts).float()
        out = self.experts(rows, assign(expert, ones, own, torch.zeros_like(own), (rows.shape[0], 1)))
        if self.tape is not None:
            probs = combine.view(b * n, self.experts.experts, self.slots).sum(dim=-1)
            choice = probs.detach().argsort(dim=-1, descending=True)
            self.tape.write(self, assign(choice, probs.gather(1, choice), probs, torch.zeros_like(probs), (b, n)))
        return combine.to(out.dtype) @ out.view(b, -1, d)
