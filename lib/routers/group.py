"""An efficient ensemble of sparse mixtures (E3; Allingham et al. 2022, 2110.03360): one network, M
predictions.

The experts of each MoE layer are split into M groups of E / M. The batch is tiled M times before
the first MoE layer, member m is routed among the experts of group m alone, and the members' class
probabilities are averaged. Patches, attention and all blocks before the first MoE layer are shared,
so the stored size is that of one model.

Axis letters: **M** members, **B** images, **N** tokens of an image, **C** classes, **E** experts,
**D** width, **K** experts a token; **R** rows that a router decides on, M*B*N or M*B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .top_k import TopKRouter


class GroupRouter(TopKRouter):
    """A top-k router whose rows come from M members, one after another, each restricted to the
    experts of its group.

    `group`: (E,) member that each expert belongs to. A member's probabilities are the softmax over
    its group and zero elsewhere, as M routers of E / M rows each would give (the paper's form).
    """

    def __init__(self, width: int, experts: int, top_k: int, members: int, **options):
        super().__init__(width, experts, top_k, **options)
        self.members = members
        self.register_buffer("group", torch.arange(members).repeat_interleave(experts // members))

    @classmethod
    def of(cls, router: TopKRouter, members: int) -> GroupRouter:
        """The same router, its parameter included, with the experts split into `members` runs of
        equal length."""
        out = cls.like(router, members)
        out.group = torch.arange(members, device=router.weight.device).repeat_interleave(
            router.experts // members
        )
        return out

    def reachable(self, rows: int) -> Tensor:
        """(R, E) which experts each row may reach. ValueError if R is no multiple of M."""
        if rows % self.members:
            raise ValueError(
                f"{rows} rows do not split among {self.members} members: run the model inside its Ensemble, which "
                "tiles the batch"
            )
        members = torch.arange(self.members, device=self.group.device)
        return (members.unsqueeze(1) == self.group).repeat_interleave(rows // self.members, dim=0)
