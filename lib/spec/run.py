"""The description of one run: what decides its result, and what its lineage implies."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .backbone import BackboneSpec
from .base import FolderName, Seed, Spec
from .channels import ChannelSpec
from .data import DataSpec
from .extraction import ExtractSpec
from .moe import MoESpec
from .pruning import DropSpec, PruneSpec
from .training import TrainSpec


class RunSpec(Spec):
    """Describes one run: all that decides its result. `runs.collect` turns it into a record."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"study", "keep", "publish"})
    # fields that hold the rules of a step, in the order in which steps are carried out
    step_fields: ClassVar[tuple[str, ...]] = ("prune", "drop", "extract", "channels")

    # folder of data/results that the record is filed under; not part of the id
    study: FolderName = "foundations"
    data: DataSpec = DataSpec()
    backbone: BackboneSpec = BackboneSpec()
    moe: MoESpec | None = None  # MoE layers that are made of MLPs; None = the model as it is
    # neurons and head dimensions removed after that; a child of this run starts from what is left
    prune: PruneSpec | None = None
    # experts extracted from the parent's MLPs; a child of this run starts from them
    extract: ExtractSpec | None = None
    # experts of the parent that are dropped; a child of this run starts without them
    drop: DropSpec | None = None
    # the parent is evaluated with a part of its hidden neurons, chosen while it runs
    channels: ChannelSpec | None = None
    train: TrainSpec | None = None  # None = evaluate only
    # a parent whose final weights this run starts from, steps of its own included
    init: RunSpec | None = None
    seed: Seed = 0  # head, router, data order, augmentation, drop path
    # of activations (autocast); weights stay float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"  # where it runs; set by the profile, never detected
    # of torch; part of the spec because it changes rounding
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    fresh_routers: bool = False  # draw the routers anew after the parent's weights are loaded
    experts_off: bool = False  # also the test accuracy with all routed experts off
    colour_probe: bool = False  # also the routing of a two-colour checkerboard
    image_loads: bool = False  # also how many tokens of each test image chose each expert
    depth_probe: bool = False  # also kNN and a linear probe on the features after each block
    cam_probe: bool = False  # also GradCAM of the fixed probe images, taken in the last block
    cam_first: bool = False  # and that which is taken in the first block
    probe_pairs: bool = False  # the probe images are pairs of a class
    # also the resident set of training steps, measured in a process of their own
    resident: bool = False
    keep: bool = False  # keep the final weights in the cache; not part of the id
    publish: bool = False  # file the record under data/results, to be committed; not part of the id

    @property
    def steps(self) -> list[tuple[str, Spec]]:
        """Lists (field, rules) of the steps that are set, in the order of carrying them out."""
        steps = [(field, getattr(self, field)) for field in self.step_fields]
        return [(field, rules) for field, rules in steps if rules is not None]

    @property
    def lineage(self) -> list[RunSpec]:
        """Lists the run and those that it starts from, the nearest first."""
        return [self] if self.init is None else [self, *self.init.lineage]

    @property
    def needed_runs(self) -> list[RunSpec]:
        """Lists the runs whose final weights this run reads.

        They are its parent, and, for scores that compare two models, the parent's parent.
        """
        if self.init is None:
            return []
        compares = self.drop is not None and self.drop.compares
        return [self.init, self.init.init] if compares else [self.init]

    def on(self, device: str) -> RunSpec:
        """Returns the run, and all that it starts from, on a device."""
        return self.but(device=device, init=self.init and self.init.on(device))

    @property
    def reduced(self) -> bool:
        """Says whether whole experts were dropped in this run or in one that it starts from."""
        progressive = self.train is not None and self.train.single_expert_at is not None
        dropped = self.drop is not None or progressive
        return dropped or (self.init is not None and self.init.reduced)

    @property
    def extracted(self) -> bool:
        """Says whether this run or one that it starts from extracted experts from MLPs."""
        return self.extract is not None or (self.init is not None and self.init.extracted)

    @property
    def narrowed(self) -> bool:
        """Says whether this run or one that it starts from removed neurons physically."""
        removed = self.prune is not None and self.prune.structured
        return removed or (self.init is not None and self.init.narrowed)

    def describe(self) -> str:
        """Describes the run in one line for a reader: data, model, weights, budget."""
        data, back, train = self.data, self.backbone, self.train
        start = f"weights of run {self.init.id}" if self.init else back.weights or "random weights"
        size = f" of width {back.width} and depth {back.depth}" if back.width and back.depth else ""
        parts = [
            f"{data.title} at {data.image_size} px",
            data.training_images,
            f"`{back.name}`{size} from {start}",
        ]
        if train is not None:
            parts += [
                f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}",
                f"batch {train.batch}",
                f"peak learning rate {train.lr:g}",
            ]
        device = " on a graphics card" if self.device == "cuda" else ""
        return ", ".join([*parts, self.dtype]) + device

    @model_validator(mode="after")
    def _parent_fits(self):
        if self.init is None:
            return self
        mine, parents = self.backbone, self.init.backbone
        names = [name for name, value in mine if value != getattr(parents, name)]
        if names := [name for name in names if name != "drop_path"]:
            raise ValueError(
                "init must have the same backbone as the run that starts from it, and differs in "
                + ", ".join(
                    f"{name} ({getattr(parents, name)!r}, here {getattr(mine, name)!r})"
                    for name in names
                )
            )
        if self.init.moe is not None:
            fields = ("layers", "experts", "shared", "members")
            mine = [getattr(self.moe, name, None) for name in fields]
            parents = [getattr(self.init.moe, name) for name in fields]
            if mine != parents:
                raise ValueError(
                    "init already has MoE layers: moe must have the same layers, experts, shared "
                    f"and members, {parents}, got {mine}; MoE layers are made of MLPs once"
                )
        if self.init.prune is not None and not self.init.prune.structured:
            raise ValueError(
                "init was pruned by masks, which a further stage would lose: "
                "prune in the last stage"
            )
        if self.init.reduced and self.init.moe.members > 1:
            raise ValueError(
                "init dropped experts of an ensemble; a further stage is not defined: "
                "drop in the last one"
            )
        return self

    @model_validator(mode="after")
    def _experts_of_weights_fit(self):
        if not self.backbone.brings_experts or self.init is not None:
            return self
        moe = self.moe
        if moe is None or moe.router != "token" or moe.members > 1:
            given = "None" if moe is None else f"router={moe.router!r}, members={moe.members}"
            raise ValueError(
                f"weights={self.backbone.weights!r} has experts and routers of tokens: set moe to "
                f"its layers, with router='token', members=1, got moe={given}"
            )
        if moe.shared or moe.fresh_experts or moe.copy_noise:
            raise ValueError(
                f"weights={self.backbone.weights!r} brings its experts, so none is copied: leave "
                "moe.shared, moe.fresh_experts and moe.copy_noise at their defaults"
            )
        return self

    @model_validator(mode="after")
    def _probes_fit(self):
        routed = self.extracted or (self.moe is not None and self.moe.members == 1)
        if self.image_loads and not routed:
            raise ValueError(
                "image_loads counts the tokens of each test image by expert, and this run has "
                "no single model with experts: set moe with members=1, or leave image_loads False"
            )
        if self.probe_pairs and not (routed or self.cam_probe):
            raise ValueError(
                "probe_pairs chooses the images whose routes and GradCAM a record keeps, and this "
                "run keeps neither: set moe with members=1 or cam_probe=True, or leave it False"
            )
        if self.cam_first and not self.cam_probe:
            raise ValueError(
                "cam_first=True adds the GradCAM of the first block to that of the last: "
                "set cam_probe=True, too"
            )
        return self

    @model_validator(mode="after")
    def _pretraining_fits(self):
        if self.train is None or self.train.mask is None:
            return self
        if self.init is not None:
            raise ValueError(
                "pretraining with a mask starts from random or named weights, not from init: "
                "set init to None, or train.mask to None"
            )
        if self.train.trainable == "head":
            raise ValueError(
                "pretraining with a mask has no head, so trainable='head' leaves nothing to "
                "train: set 'all', 'routers' or 'no_attention'"
            )
        if self.train.layer_decay != 1.0:
            raise ValueError(
                f"layer_decay={self.train.layer_decay} counts layers from a head; "
                "pretraining with a mask has none"
            )
        if self.prune is not None:
            raise ValueError(
                "pruning scores a classifier; pretraining with a mask has no labels to score by"
            )
        return self

    @model_validator(mode="after")
    def _drop_fits(self):
        if self.drop is None:
            return self
        from_mixture = self.init is not None and self.init.moe is not None
        if not from_mixture or self.moe is None or self.prune is not None:
            raise ValueError(
                "drop takes experts out of a parent's mixture, and nothing else is removed in the "
                "same run: set init to a run with moe, moe to the same layers, prune to None"
            )
        if self.drop.compares and (self.init.init is None or self.init.init.moe is None):
            raise ValueError(
                f"drop.score={self.drop.score!r} compares with the model before finetuning: init "
                "needs an init with moe of its own, since without trained routers there is no norm "
                "to compare with"
            )
        return self

    @model_validator(mode="after")
    def _progressive_drop_fits(self):
        if self.train is None or not self.train.single_expert_at:
            return self
        top_1 = self.moe is not None and self.moe.takes("single_expert_at") and self.moe.top_k == 1
        if not top_1 or self.moe.members > 1 or self.train.ema:
            raise ValueError(
                "single_expert_at drops all experts but one: it needs moe with router='token', "
                "top_k=1, members=1, and train without ema"
            )
        return self

    @model_validator(mode="after")
    def _extract_fits(self):
        if self.extract is None:
            return self
        from_mlps = self.init is not None and not self.init.extracted and self.moe is None
        if not from_mlps or self.prune is not None:
            raise ValueError(
                "extract takes experts from the MLPs of a trained model without MoE layers, and "
                "nothing else is removed in the same run: set init to that model's run, moe and "
                "prune to None"
            )
        return self

    @model_validator(mode="after")
    def _channels_fit(self):
        if self.init is not None and self.init.channels is not None:
            raise ValueError(
                "init was evaluated with a part of its neurons, which no run can start from: set "
                "init to the run that it started from"
            )
        if self.channels is None:
            return self
        others = (self.moe, self.prune, self.train)
        if self.init is None or self.init.extracted or any(part is not None for part in others):
            raise ValueError(
                "channels evaluates a trained model without MoE layers, and changes no weight: set "
                "init to that model's run, and moe, prune and train to None"
            )
        return self

    @model_validator(mode="after")
    def _distillation_fits(self):
        if self.train is None:
            return self
        targets = {"distil_logits": "prediction", "distil_stream": "residual stream"}
        for name, target in targets.items():
            weight = getattr(self.train, name)
            if weight and self.init is None:
                raise ValueError(f"{name} needs a parent to learn from: set init")
            if weight and self.moe is not None and self.moe.members > 1:
                raise ValueError(
                    f"{name}={weight} asks for one {target} an image, and "
                    f"moe.members={self.moe.members} make one each: set one of the two"
                )
        if self.train.distil != "none" and (self.init is None or self.init.moe is None):
            raise ValueError(
                f"distil={self.train.distil!r} needs a parent with gates: "
                "set init to a run with moe"
            )
        return self

    @model_validator(mode="after")
    def _gates_can_be_distilled(self):
        if self.train is None or self.train.distil == "none" or self.moe is None:
            return self
        asked = f"distil={self.train.distil!r}"
        if not self.moe.takes("router_std"):
            raise ValueError(
                f"{asked} teaches the logits of a router, and router={self.moe.router!r} has none "
                "that learn: set distil='none', or another router"
            )
        taught = self.init.moe
        if taught.per_image != self.moe.per_image:
            pair = (taught, self.moe)
            by_image, by_token = pair if taught.per_image else reversed(pair)
            raise ValueError(
                f"{asked} compares decisions one by one, and router={by_image.router!r} decides "
                f"for images, router={by_token.router!r} for tokens: set distil='none', or routers "
                "of one kind"
            )
        if self.train.single_expert_at:
            raise ValueError(
                f"{asked} asks for experts that single_expert_at drops: their probability is 0, "
                "and the divergence from a parent that uses them infinite. Set one of the two"
            )
        if self.train.distil == "probabilities" and self.moe.members > 1:
            raise ValueError(
                "distil='probabilities' compares all experts of a layer, and of members="
                f"{self.moe.members} each reaches its own group alone: the divergence is no "
                "number. Set distil='choice', or members=1"
            )
        if self.drop is not None and self.drop.missing == "reroute":
            raise ValueError(
                f"{asked} compares expert by expert, and drop.missing='reroute' takes rows out of "
                "the router: set drop.missing='zero_update', or distil in a run of its own"
            )
        return self
