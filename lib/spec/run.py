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

from typing import ClassVar, Literal

from pydantic import model_validator

from .backbone import BackboneSpec
from .base import Positive, Spec
from .data import DataSpec
from .extraction import ExtractSpec
from .moe import MoESpec
from .pruning import DropSpec, PruneSpec
from .training import TrainSpec


class RunSpec(Spec):
    """One run: what goes in. `runs.collect` turns it into a record."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"study", "keep", "publish"})

    # folder of data/results that the record is filed under; not part of the id
    study: str = "foundations"
    data: DataSpec = DataSpec()
    backbone: BackboneSpec = BackboneSpec()
    moe: MoESpec | None = None  # surgery before training; None = the model as it is
    # what is cut out after that; a child of this run starts from the cut model
    prune: PruneSpec | None = None
    # experts cut out of the parent's MLPs; a child of this run starts from them
    extract: ExtractSpec | None = None
    # experts of the parent that go; a child of this run starts without them
    drop: DropSpec | None = None
    train: TrainSpec | None = None  # None = evaluate only
    # a parent whose final weights this run starts from (after its own surgery)
    init: RunSpec | None = None
    seed: int = 0  # head, router, data order, augmentation, drop path
    # of activations (autocast); weights stay float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"  # where it runs; set by the profile, never detected
    threads: Positive = 2  # of torch; part of the spec because it changes rounding
    fresh_routers: bool = False  # draw the routers anew after the parent's weights are loaded
    experts_off: bool = False  # also the test accuracy with all routed experts off
    colour_probe: bool = False  # also the routing of a two-colour checkerboard
    depth_probe: bool = False  # also kNN and a linear probe on the features after each block
    cam_probe: bool = False  # also GradCAM of the fixed probe images
    # also the resident set of training steps, measured in a process of their own
    resident: bool = False
    keep: bool = False  # keep the final weights in the cache; not part of the id
    publish: bool = False  # file the record under data/results, to be committed; not part of the id

    @property
    def reduced(self) -> bool:
        """Whether whole experts were taken out in this run or in one that it starts from."""
        mine = self.drop is not None or (
            self.train is not None and self.train.single_expert_at is not None
        )
        return mine or (self.init is not None and self.init.reduced)

    @property
    def extracted(self) -> bool:
        """Whether experts were cut out of MLPs in this run or in one that it starts from."""
        return self.extract is not None or (self.init is not None and self.init.extracted)

    @property
    def narrowed(self) -> bool:
        """Whether this run or one that it starts from was cut physically."""
        mine = self.prune is not None and self.prune.structured
        return mine or (self.init is not None and self.init.narrowed)

    def describe(self) -> str:
        """The run in one line for a reader: data, model, weights, budget."""
        data, back, train = self.data, self.backbone, self.train
        start = f"weights of run {self.init.id}" if self.init else back.weights or "random weights"
        size = f" of width {back.width} and depth {back.depth}" if back.width and back.depth else ""
        parts = [
            f"{data.name} at {data.image_size} px",
            f"{data.train or 'all'} training images",
            f"`{back.name}`{size} from {start}",
        ]
        if train is not None:
            parts += [
                f"{train.epochs:g} epochs",
                f"batch {train.batch}",
                f"peak learning rate {train.lr:g}",
            ]
        return ", ".join([*parts, self.dtype]) + (
            " on a graphics card" if self.device == "cuda" else ""
        )

    @model_validator(mode="after")
    def _init_fits(self):
        if self.init is not None and self.backbone.but(drop_path=0.0) != self.init.backbone.but(
            drop_path=0.0
        ):
            raise ValueError("init must have the same backbone as the run that starts from it")
        if self.init is not None and self.init.moe is not None:
            fixed = [
                getattr(moe, name, None)
                for moe in (self.moe, self.init.moe)
                for name in ("layers", "experts", "shared", "members")
            ]
            if fixed[:4] != fixed[4:]:
                raise ValueError(
                    "init already has MoE layers: moe must have the same layers, experts, shared and members, "
                    f"{fixed[4:]}, got {fixed[:4]}; a second surgery is not defined"
                )
        if self.train is not None and self.train.mask is not None and self.init is not None:
            raise ValueError(
                "pretraining with a mask starts from random or named weights, not from init"
            )
        if self.train is not None and self.train.mask is not None and self.train.layer_decay != 1.0:
            raise ValueError(
                f"layer_decay={self.train.layer_decay} counts layers from a head; pretraining with a mask has none"
            )
        if self.init is not None and self.init.prune is not None and not self.init.prune.structured:
            raise ValueError(
                "init was pruned by masks, which a further stage would lose: prune in the last stage"
            )
        if self.prune is not None and self.train is not None and self.train.mask is not None:
            raise ValueError(
                "pruning scores a classifier; pretraining with a mask has no labels to score by"
            )
        if self.drop is not None and (
            self.init is None or self.init.moe is None or self.moe is None or self.prune is not None
        ):
            raise ValueError(
                "drop takes experts out of a parent's mixture, and nothing else is cut in the same run: set init to "
                "a run with moe, moe to the same layers, prune to None"
            )
        if (
            self.drop is not None
            and self.drop.compares
            and (self.init.init is None or self.init.init.moe is None)
        ):
            raise ValueError(
                f"drop.score={self.drop.score!r} compares with the model before finetuning: init needs an init "
                "with moe of its own, since without trained routers there is no norm to compare with"
            )
        if self.init is not None and self.init.reduced and self.init.moe.members > 1:
            raise ValueError(
                "init dropped experts of an ensemble; a further stage is not defined: drop in the last one"
            )
        if (
            self.train is not None
            and self.train.single_expert_at
            and (
                self.moe is None
                or not self.moe.takes("single_expert_at")
                or self.moe.members > 1
                or self.moe.top_k > 1
                or self.train.ema
            )
        ):
            raise ValueError(
                "single_expert_at drops all experts but one: it needs moe with router='token', top_k=1, members=1, "
                "and train without ema"
            )
        if self.extract is not None and (
            self.init is None
            or self.init.extracted
            or self.moe is not None
            or self.prune is not None
        ):
            raise ValueError(
                "extract cuts experts out of a trained model of plain MLPs, and nothing else is cut in the same "
                "run: set init to that model's run, moe and prune to None"
            )
        if self.train is not None and self.train.distil_logits and self.init is None:
            raise ValueError("distil_logits needs a parent to learn from: set init")
        if (
            self.train is not None
            and self.train.distil != "none"
            and (self.init is None or self.init.moe is None)
        ):
            raise ValueError(
                f"distil={self.train.distil!r} needs a parent with gates: set init to a run with moe"
            )
        return self
