"""One run on several devices: a process a device, called a rank, takes its share of every batch.

All ranks compute what one process computes, up to rounding. Each runs the model on its share; the
outputs and routings of all shares are joined, with their gradients, and every rank computes the
losses of the whole batch from them. So a loss may be any function of the whole batch (products of
mean loads, variances over images), shares may be of unequal size, and the sum of the ranks'
gradients is the gradient of one process.

The ranks exchange something only after a roll call, at which a rank says whether it has fallen out
of the run: an error of one becomes an error of all, at once and in step.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import RunSpec
from .draws import DrawsOfWholeBatch

# Others wait while rank 0 measures alone, for hours. A rank that dies closes its connections, which
# ends the wait of all others at once: this is for one that hangs.
PATIENCE = datetime.timedelta(days=2)


class LostRank(BaseException):
    """A rank is gone: nothing more can be exchanged, and this process is to end.

    No Exception: it is no failure of the run, which would be filed, and nothing may go on.
    """


class RankFailed(RuntimeError):
    """Another rank fell out of the run that is under way; all are in step for the next one."""


class One:
    """A process on its own: whatever `Ranks` does for several is left out."""

    count, rank = 1, 0

    def share_of(self, images: int) -> slice:
        """Returns which images of a batch are this rank's."""
        return slice(0, images)

    def take(self, images: int) -> None:
        """Begins a step whose batch has so many images, over all ranks."""

    def images_of_step(self, images: int) -> int:
        """Counts the images of a step over all ranks. images: of this one."""
        return images

    def draws(self, members: int = 1) -> contextlib.AbstractContextManager:
        """Lets a model draw inside for its share what one process would draw for it."""
        return contextlib.nullcontext()

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """Joins tensors of all ranks along their first axis, in the order of the ranks."""
        return list(shares)

    def mean(self, value: Tensor) -> Tensor:
        """Computes the mean over the images of all ranks from that over this rank's, a number."""
        return value

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums the gradients of all ranks."""

    def turns(self, pieces: Sequence) -> Sequence:
        """Lists the pieces of some work that are this rank's."""
        return pieces

    def in_order(self, results: list) -> list:
        """Puts the results of all ranks' turns into the order of the pieces of work."""
        return results

    def from_first(self, value: Any = None) -> Any:
        """Returns the value of rank 0, whatever others give."""
        return value

    @contextlib.contextmanager
    def taking_part(self) -> Iterator[None]:
        """Ends a run for all ranks alike: none is done before all are, and one's error is all's."""
        yield


class Ranks(One):
    """The ranks that a launcher has started (accelerate, torchrun), and this one's number.

    Collectives go through gloo in memory, and through NCCL on graphics cards. Gradients are summed
    here and not by DistributedDataParallel: the loss of a rank reaches all weights only through
    what was joined, an expert that nobody used gets a zero gradient, as in one process, and there
    is no wrapper around the modules that a RoutingTape knows.
    """

    def __init__(self):
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ValueError(
                "several ranks (WORLD_SIZE in the environment) need the package accelerate, which "
                'is not installed: pip install -e ".[ranks]"'
            ) from error
        with warnings.catch_warnings():  # of threads, which the spec of each run sets
            warnings.simplefilter("ignore")
            state = PartialState(cpu=True)
        self.state, self.count, self.rank = state, state.num_processes, state.process_index
        atexit.register(state.destroy_process_group)
        self.memory = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.cards: Any = None  # a group as well, from the first run on cards on
        self.images, self.share = 0, slice(0)

    # ---- exchanges

    def meet(self, brought: Any = None, failure: str | None = None) -> list[Any]:
        """Waits for the roll call of all ranks; returns what each has brought.

        failure: why this rank has fallen out of the run. Raises RankFailed if another one has,
        LostRank if one is gone.
        """
        everyone: list[Any] = [None] * self.count
        with _all_there():
            torch.distributed.all_gather_object(everyone, (failure, brought), group=self.memory)
        failed = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(everyone) if reason]
        if failed and failure is None:
            raise RankFailed("; ".join(failed))
        return [brought for _, brought in everyone]

    def agree(self, **facts: Any) -> None:
        """Raises ValueError, on all ranks, if one has other facts than rank 0 has; a fact may be a
        list, of which the first entry that differs is named."""
        everyone = self.meet(facts)
        for rank, theirs in enumerate(everyone):
            for name, fact in everyone[0].items():
                if theirs[name] != fact:
                    first, other = _difference(fact, theirs[name])
                    raise ValueError(
                        f"ranks disagree on the {name}: rank 0 has {first}, rank {rank} has "
                        f"{other}. Start all with one command, from one checkout, on one data set"
                    )

    def from_first(self, value: Any = None) -> Any:
        """Returns the value of rank 0, whatever others give, with its tensors in memory.

        Rank 0 itself keeps what it gave.
        """
        file = io.BytesIO()
        if self.rank == 0:
            torch.save(value, file)  # before the roll call: what cannot be saved is not awaited
        self.meet()
        message = [file.getvalue()]
        with _all_there():
            torch.distributed.broadcast_object_list(message, src=0, group=self.memory)
        if self.rank == 0:
            return value
        # from a process of this very run, never from a file
        return torch.load(io.BytesIO(message[0]), map_location="cpu", weights_only=False)

    @contextlib.contextmanager
    def taking_part(self) -> Iterator[None]:
        """Ends a run for all ranks alike: none is done before all are, and one's error is all's."""
        try:
            yield
            self.meet()
        except RankFailed:
            raise
        except Exception as error:
            self.meet(failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise

    def take_card(self) -> None:
        """Chooses this rank's graphics card for all that is computed on "cuda" from now on.

        Raises ValueError if its machine has too few.
        """
        check_cards()
        torch.cuda.set_device(self.state.local_process_index)
        self.meet()
        if self.cards is None:
            self.cards = torch.distributed.new_group(backend="nccl")

    def _group(self, device: torch.device) -> Any:
        return self.memory if device.type == "cpu" else self.cards

    # ---- a step of training

    def share_of(self, images: int) -> slice:
        """Returns which images of a batch are this rank's: consecutive ones; shares differ by one
        image at most.

        Where there are fewer images than ranks some get the first one, since few models run on
        none; nothing of it is joined.
        """
        share = self._joined_share(images)
        return share if share.start < share.stop else slice(0, 1)

    def take(self, images: int) -> None:
        """Begins a step whose batch has so many images, over all ranks."""
        self.images, self.share = images, self._joined_share(images)

    def _joined_share(self, images: int) -> slice:
        first, end = (images * rank // self.count for rank in (self.rank, self.rank + 1))
        return slice(first, end)

    def images_of_step(self, images: int) -> int:
        """Counts the images of a step over all ranks. images: of this one."""
        return self.images

    def mean(self, value: Tensor) -> Tensor:
        """Computes the mean over the images of all ranks from that over this rank's, a number."""
        (sums,) = self.whole([value.reshape(1) * (self.share.stop - self.share.start)])
        return sums.sum() / self.images

    def draws(self, members: int = 1) -> contextlib.AbstractContextManager:
        """Lets a model draw inside for its share what one process would draw for it.

        members: of an ensemble, which repeats the batch so many times.
        """
        return DrawsOfWholeBatch(self.share, self.images, members)

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """Joins tensors of all ranks along their first axis, in the order of the ranks.

        Floating ones come back as float32, with a gradient.
        """
        if self.share.start == self.share.stop:
            shares = [share[:0] for share in shares]
        shapes = self.meet([tuple(share.shape) for share in shares])
        joined: list[Tensor | None] = [None] * len(shares)
        for floating in (True, False):  # a message each: their types differ
            numbers = [n for n, t in enumerate(shares) if t.is_floating_point() == floating]
            if not numbers:
                continue
            of_kind = [shares[n].float() if floating else shares[n].long() for n in numbers]
            shapes_of_kind = [[of_rank[n] for n in numbers] for of_rank in shapes]
            for n, tensor in zip(
                numbers, _Joined.apply(self, shapes_of_kind, *of_kind), strict=True
            ):
                joined[n] = tensor
        return joined

    def sum_gradients(self, model: nn.Module) -> None:
        """Sums the gradients of all ranks, in one message; where no rank has one, there is none."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        here = [parameter.grad is not None for parameter in parameters]
        anywhere = [any(flags) for flags in zip(*self.meet(here), strict=True)]
        parameters = [p for p, moves in zip(parameters, anywhere, strict=True) if moves]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        )
        with _all_there():
            torch.distributed.all_reduce(flat, group=self._group(flat.device))
        sums = flat.split([parameter.numel() for parameter in parameters])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter)

    def gather(self, mine: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Returns the flat tensors of all ranks, of these lengths."""
        padded = mine.new_zeros(max(lengths))
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in lengths]
        with _all_there():
            torch.distributed.all_gather(everyone, padded, group=self._group(mine.device))
        return [tensor[:length] for tensor, length in zip(everyone, lengths, strict=True)]

    # ---- work that is dealt out piece by piece

    def turns(self, pieces: Sequence) -> Sequence:
        """Lists the pieces of some work that are this rank's."""
        return pieces[self.rank :: self.count]

    def in_order(self, results: list) -> list:
        """Puts the results of all ranks' turns into the order of the pieces of work."""
        of_ranks = self.meet(results)
        total = sum(map(len, of_ranks))
        return [of_ranks[n % self.count][n // self.count] for n in range(total)]


class _Joined(torch.autograd.Function):
    """The tensors of all ranks, one after the other.

    Every rank computes the same loss from them. So what comes back for this rank's rows is the
    whole gradient of that loss for them: nothing is exchanged, and nothing is divided.
    """

    @staticmethod
    def forward(ctx, ranks: Ranks, shapes: list[list[tuple[int, ...]]], *shares: Tensor):
        """shapes: by rank, of each of the tensors that it brings."""
        sizes = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
        flat = torch.cat([share.detach().reshape(-1) for share in shares])
        of_ranks = ranks.gather(flat, [sum(of_rank) for of_rank in sizes])
        pieces = [
            [piece.view(shape) for piece, shape in zip(flat.split(size), shape, strict=True)]
            for flat, size, shape in zip(of_ranks, sizes, shapes, strict=True)
        ]
        ctx.rows = []  # of each tensor, those of this rank
        for number in range(len(shares)):
            before = sum(of_rank[number][0] for of_rank in shapes[: ranks.rank])
            ctx.rows.append(slice(before, before + shapes[ranks.rank][number][0]))
        joined = tuple(torch.cat(of_tensor) for of_tensor in zip(*pieces, strict=True))
        ctx.mark_non_differentiable(*(t for t in joined if not t.is_floating_point()))
        return joined

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """Hands this rank the rows that are its own."""
        return None, None, *(g[rows] for g, rows in zip(gradients, ctx.rows, strict=True))


# ---- the ranks of this process

ONE = One()
_here: One = ONE


def of(spec: RunSpec, model: nn.Module) -> One:
    """Returns the ranks that train a run; most often this process is on its own.

    It is as well, with a warning, for what would depend on the number of ranks: where tokens of a
    batch compete for experts, and where a model normalises by the batch.
    """
    moe, reason = spec.moe, None
    if moe is not None and moe.capacity_factor is not None:
        reason = f"moe.capacity_factor={moe.capacity_factor:g} limits the tokens of a whole batch"
    elif moe is not None and moe.takes("group") and moe.group == "batch":
        reason = "with moe.group='batch' the tokens of a whole batch compete"
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        reason = "the model has batch normalisation"
    if reason is None or _here.count == 1:
        return _here
    warnings.warn(
        f"run {spec.id} is trained by rank 0 alone, while {_here.count - 1} wait: {reason}, and a "
        "rank would see its own share",
        stacklevel=2,
    )
    return ONE


@contextlib.contextmanager
def opened() -> Iterator[Ranks]:
    """Trains the runs of this process over all ranks, for the time of a with block."""
    global _here
    _here = _ranks()
    try:
        yield _here
    finally:
        _here = ONE


@functools.cache
def _ranks() -> Ranks:
    return Ranks()  # connections stay until the process ends


def check_cards() -> None:
    """Raises ValueError if this machine has fewer graphics cards than ranks."""
    cards, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if cards < wanted > 1:
        raise ValueError(
            f"device='cuda' gives each rank a card of its own: {wanted} ranks were started on a "
            f"machine with {cards}. Start as many as there are cards (--num_processes {cards})"
        )


# ---- small parts


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """Turns what a collective raises when a connection breaks into LostRank."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(
            f"another rank is gone ({' '.join(str(error).split())}): this one ends, too. Start all "
            "again: the run goes on from its checkpoint"
        ) from error


def _difference(first: Any, other: Any) -> tuple[Any, Any]:
    """Names what differs: of two lists the first entries that do, "none" where one is shorter."""
    if not isinstance(first, list):
        return first, other
    longest = max(len(first), len(other))
    pad = [[*values, *["none"] * (longest - len(values))] for values in (first, other)]
    return next((a, b) for a, b in zip(*pad, strict=True) if a != b)
