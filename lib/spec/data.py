"""What a run is: a frozen, validated, hashable description.

A `RunSpec` says everything that decides a result: data, backbone, surgery, training, seed, dtype
and threads. Its `id` names the record that the run leaves. Two rules keep old records valid while
the project grows:

- fields at their default value stay out of the hash, so a new field with a default that means "as
  before" changes no id;
- each class carries a `semantics` number that is always hashed; it is bumped when a change to the
  code would alter results.

Axis letters, here and in all of `lib`: **B** images, **N** tokens of an image, **T** = B*N, **D**
width, **H** expert hidden width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Positive, Spec


class DataSpec(Spec):
    """Images and how many of them. Subsets are class-balanced and depend on `subset_seed` alone."""

    # mnist5k | a folder under MOE_DATA: parquet, classes, GEO-Bench, MIT Indoor | hub:owner/name
    name: str = "mnist5k"
    image_size: Positive = 28  # side in pixels that the model sees
    # training images; None = all that are left after the validation split
    train: Positive | None = None
    val: Positive | None = None  # validation images; None = the whole validation split
    test: Positive | None = None  # test images; None = all
    label: str = "label"  # label column; CIFAR-100 has fine_label and coarse_label
    # training images only; auto: flip_crop and the CIFAR-10 policy of AutoAugment (1805.09501)
    augment: Literal["none", "flip", "shift", "flip_crop", "resized_crop", "auto"] = "none"
    subset_seed: int = 0  # chooses the subset; not the training seed
    # first class and one past the last that are kept and
    classes: tuple[Annotated[int, Field(ge=0)], Positive] | None = None


def class_groups(classes: int, experts: int) -> tuple[tuple[int, ...], ...]:
    """The classes of each expert, in index order: 67 over 4 are 17, 17, 17 and 16. Fewer classes
    than experts go round."""
    if classes < 1 or experts < 1:
        raise ValueError(f"classes={classes} over experts={experts}: both must be at least 1")
    if classes < experts:
        return tuple((e % classes,) for e in range(experts))
    size, rest = divmod(classes, experts)
    starts = [e * size + min(e, rest) for e in range(experts + 1)]
    return tuple(tuple(range(*ends)) for ends in zip(starts, starts[1:], strict=False))
