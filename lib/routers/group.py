"""Routes the members of an efficient ensemble (E3; Allingham et al. 2022, 2110.03360), each among
the experts of its own group.

Axis letters: **M** members, **B** images, **N** tokens of an image, **E** experts, **D** width,
**K** experts a token; **R** rows that a router decides on, M*B*N or M*B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Router
from .top_k import TopKRouter


class GroupRouter(TopKRouter):
    """Chooses for the rows of M members, one after another, among the experts of each member's
    group.

    `group`: (E,) member that each expert belongs to. A member's probabilities are the softmax over
    its group and zero elsewhere, as M routers of E / M rows each would give (the paper's form).
    """

    def __init__(self, width: int, experts: int, top_k: int, members: int, **options):
        super().__init__(width, experts, top_k, **options)
        self.members = members
        self.register_buffer("group", torch.arange(members).repeat_interleave(experts // members))

    @classmethod
    def of(cls, router: TopKRouter, members: int) -> Self:
        """Makes the same router, parameter included, with the experts split into equal groups."""
        out = cls.like(router, members=members)
        out.group = torch.arange(members, device=router.weight.device).repeat_interleave(
            router.experts // members
        )
        return out

    @classmethod
    def with_settings(cls, settings: Mapping[str, Any], act: nn.Module | None) -> Self:
        """Makes the router; after dropping, the members need not divide what is left."""
        out = super().with_settings(settings, act)
        out.group = torch.empty(out.experts, dtype=torch.long)
        return out

    def reachable(self, rows: int) -> Tensor:
        """Says which experts each of R rows may reach, (R, E).

        Raises ValueError if R is no multiple of M.
        """
        if rows % self.members:
            raise ValueError(
                f"{rows} rows do not split among {self.members} members: "
                "run the model inside its Ensemble, which tiles the batch"
            )
        members = torch.arange(self.members, device=self.group.device)
        return (members.unsqueeze(1) == self.group).repeat_interleave(rows // self.members, dim=0)


def check_members(name: str, router: Router, members: int) -> None:
    """Raises ValueError if the router of layer `name` cannot be split among M members."""
    if type(router) is not TopKRouter:
        raise ValueError(
            f"{name} has a {type(router).__name__}: "
            "members are told apart by a mask on the logits of a TopKRouter"
        )
    if members < 1 or router.experts % members:
        valid = [m for m in range(1, router.experts + 1) if router.experts % m == 0]
        raise ValueError(
            f"members={members} does not divide the {router.experts} experts of {name}: "
            f"valid is {', '.join(map(str, valid))}"
        )
    if router.top_k > router.experts // members:
        raise ValueError(
            f"{name} sends a token to top_k={router.top_k} experts, a group has "
            f"{router.experts // members} ({router.experts} experts, members={members}): "
            "lower one of the two"
        )
