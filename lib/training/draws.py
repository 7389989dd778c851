"""Random numbers of a model that sees a share of a batch: those that it would draw for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DrawsOfWholeBatch(TorchFunctionMode):
    """Draws random numbers for the whole batch and hands out those of a share.

    The generators of all ranks start a step alike and stay alike, since each draws everything.
    Known are the calls by which routers, MoE layers, masked autoencoders and timm's DropPath draw:
    a first axis is that of images, or of their tokens or members, and a number without axes is one
    for all ranks.

    share: of a batch of so many images. members: of an ensemble, which repeats it as often.
    """

    def __init__(self, share: slice, images: int, members: int):
        super().__init__()
        self.share, self.images, self.members = share, images, members

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.rand:
            shape = tuple(args[0]) if args and not isinstance(args[0], int) else args
            return self._mine(shape, lambda whole: torch.rand(whole, **kwargs))
        if func is torch.randn_like:
            like = args[0]
            return self._mine(like.shape, lambda whole: torch.randn_like(like.new_empty(whole)))
        if func is torch.Tensor.bernoulli_:
            mask, *chance = args
            drawn = self._mine(
                mask.shape, lambda whole: mask.new_empty(whole).bernoulli_(*chance, **kwargs)
            )
            return mask.copy_(drawn)
        return func(*args, **kwargs)

    def _mine(self, shape: Sequence[int], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Draws a tensor of this rank's shape, (rows of its images, ...), as a part of all."""
        mine = self.share.stop - self.share.start
        if not shape or not mine or shape[0] % mine:
            return draw(tuple(shape))
        rows = shape[0] // mine  # an image
        members = self.members if rows % self.members == 0 else 1  # before the batch is repeated
        whole = draw((rows * self.images, *shape[1:]))
        by_image = whole.view(members, self.images, rows // members, *shape[1:])
        return by_image[:, self.share].reshape(tuple(shape))
