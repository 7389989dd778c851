"""What a run asks of the machine that computes it, as resources of Dask: a card, and memory.

A worker says what it has when it is started: `--resources "GPU=1,MEMORY=60e9"`. Memory is asked for
where workers say how much they have, a card always.
"""

from __future__ import annotations

from ..spec import RunSpec

CARD, MEMORY = "GPU", "MEMORY"  # names of the resources: a number of cards, bytes
# Python, torch and timm, with 5,000 small images (seen: 830 to 1,000 MiB)
START_BYTES = 1e9


def of(spec: RunSpec) -> dict[str, float]:
    """Returns what a run needs, {resource: amount}.

    MEMORY is the machine's, in bytes; what a run for a card holds there is not in it. Images that
    are kept decoded are not in it either: they depend on the data set. Raises ValueError for a
    model that cannot be built.
    """
    from .demand import memory_of  # numpy, which the command line does without

    if spec.device == "cuda":
        return {CARD: 1, MEMORY: START_BYTES}
    return {MEMORY: START_BYTES + memory_of(spec)}
