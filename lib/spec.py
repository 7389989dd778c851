"""What a run is: a frozen, validated, hashable description.

A `RunSpec` says everything that decides a result: data, backbone, surgery, training, seed, dtype and threads. Its `id`
names the record that the run leaves. Two rules keep old records valid while the project grows:

- fields at their default value stay out of the hash, so a new field with a default that means "as before" changes no id;
- each class carries a `semantics` number that is always hashed; it is bumped when a change to the code would alter results.

Axis letters, here and in all of `lib`: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** expert hidden
width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .basespec import Positive, Share, Spec
from .cutspec import DropSpec, ExtractSpec, PruneSpec

__all__ = ["BackboneSpec", "DataSpec", "DropSpec", "ExtractSpec", "MaskSpec", "MoESpec", "Positive", "PruneSpec", "RunSpec",
           "Share", "Spec", "TrainSpec", "class_groups"]

class DataSpec(Spec):
    """Images and how many of them. Subsets are class-balanced and depend on `subset_seed` alone."""

    name: str = "mnist5k"  # mnist5k | a folder under MOE_DATA: parquet, classes, GEO-Bench, MIT Indoor | hub:owner/name
    image_size: Positive = 28  # side in pixels that the model sees
    train: Positive | None = None  # training images; None = all that are left after the validation split
    val: Positive | None = None  # validation images; None = the whole validation split
    test: Positive | None = None  # test images; None = all
    label: str = "label"  # label column; CIFAR-100 has fine_label and coarse_label
    augment: Literal["none", "flip", "shift", "flip_crop", "resized_crop", "auto"] = "none"  # training images only; auto:
    # flip_crop and the CIFAR-10 policy of AutoAugment (1805.09501)
    subset_seed: int = 0  # chooses the subset; not the training seed
    classes: tuple[Annotated[int, Field(ge=0)], Positive] | None = None  # first class and one past the last that are kept and
    # numbered anew from 0; None = all


def class_groups(classes: int, experts: int) -> tuple[tuple[int, ...], ...]:
    """The classes of each expert, in index order: 67 over 4 are 17, 17, 17 and 16. Fewer classes than experts go round."""
    if classes < 1 or experts < 1:
        raise ValueError(f"classes={classes} over experts={experts}: both must be at least 1")
    if classes < experts:
        return tuple((e % classes,) for e in range(experts))
    size, rest = divmod(classes, experts)
    starts = [e * size + min(e, rest) for e in range(experts + 1)]
    return tuple(tuple(range(*ends)) for ends in zip(starts, starts[1:], strict=False))


class BackboneSpec(Spec):
    """A timm model and its starting weights."""

    name: str = "vit_tiny_patch16_224"  # timm architecture
    weights: str | None = None  # None = random | dinov2-s14-saliency | timm | file:NAME or pth:NAME@SHA256 in MOE_WEIGHTS
    patch: Positive | None = None  # pixels; None = the architecture's own (as are the next three)
    width: Positive | None = None  # D
    depth: Positive | None = None  # blocks
    heads: Positive | None = None  # attention heads; must divide the width
    hidden: Positive | None = None  # H of the MLPs
    drop_path: Share = 0.0  # largest stochastic-depth rate; timm lets it grow linearly over the blocks

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.hidden and not self.width:
            raise ValueError(f"hidden={self.hidden} is set as a ratio to the width: set width, too")
        return self


class MoESpec(Spec):
    """MoE layers in place of the MLPs of the last `layers` blocks, or of named ones (ViMoE, section 3; `semantics` guards its
    meaning)."""

    layers: Positive = 1  # L: blocks counted from the last one
    blocks: tuple[Positive, ...] | None = None  # numbers of the L blocks, 1 at the input, rising; None = the last ones
    experts: Positive = 8  # E, the shared expert not counted
    top_k: Positive = 1  # K
    router: Literal["token", "image", "all", "expert_choice", "priority", "manual", "soft"] = "image"
    # image: one decision from the class token; all: no router; token with top_k = experts: the dense softmax mixture
    pool: Literal["class", "mean"] = "class"  # what an image-level router reads; mean for models without class token
    shared: bool = False  # one more expert that every token passes, added with weight 1
    gate: Literal["printed", "renormalised"] = "printed"  # printed: softmax weight as is; renormalised: sums to 1
    capacity_factor: Annotated[float, Field(gt=0)] | None = None  # slots per expert over K*T/E; None = no dropping
    noise: Annotated[float, Field(ge=0)] = 0.0  # std of logit noise in training, in units of 1/E (V-MoE: 1)
    balance: Literal["none", "switch", "loss_free"] = "switch"  # auxiliary loss, or bias updates without a loss
    balance_weight: Annotated[float, Field(ge=0)] = 0.01  # of the switch loss (ViMoE: 0.01)
    bias_rate: Annotated[float, Field(gt=0)] = 1e-3  # step of the loss-free bias
    z_weight: Annotated[float, Field(ge=0)] = 0.0  # of the router z-loss (ST-MoE: 1e-3)
    router_std: Annotated[float, Field(ge=0)] = 0.02  # normal initialisation of the router
    batch_priority: bool = False  # with capacity_factor: the surest tokens first (V-MoE), not the first ones
    group: Literal["image", "batch"] = "image"  # tokens that compete under expert_choice and priority
    choices: Annotated[float, Field(gt=0)] = 1.0  # expert_choice: experts that a token gets on average
    slots: Positive = 1  # soft: slots an expert
    groups: tuple[tuple[int, ...], ...] | None = None  # manual: the classes of each expert, in the order of the experts
    fresh_experts: bool = False  # experts drawn anew instead of copied; copies stay alike where nothing tells them apart
    copy_noise: Annotated[float, Field(ge=0)] = 0.0  # normal noise on copied experts, in standard deviations of each weight
    balance_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None  # switch: one a MoE layer, from the input on;
    # in place of balance_weight
    sharpness_weight: Annotated[float, Field(ge=0)] = 0.0  # Durham: of the loss that sharpens the gate of a token
    variation_weight: Annotated[float, Field(ge=0)] = 0.0  # Durham: of the loss that varies an expert's use over images
    guard: Annotated[float, Field(gt=0)] = 1e-2  # added to the variances of these two; a tiny one lets them explode
    deviation: bool = False  # standard deviation instead of variance in the second one (our control)
    expert_dropout: Share = 0.0  # chance that an image passes a layer without its routed experts, in training
    members: Positive = 1  # M of an efficient ensemble (E3): the experts split into M groups, predictions averaged
    compete_rate: Annotated[float, Field(gt=0, le=1)] | None = None  # share of training steps in which the experts with the
    # largest response win (CompeteSMoE); None = never
    compete_weight: Annotated[float, Field(ge=0)] = 1.0  # with compete_rate: of the loss that pulls the router after them

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} needs at least {self.top_k} experts, got experts={self.experts}")
        if self.blocks is not None and (list(self.blocks) != sorted(set(self.blocks)) or len(self.blocks) != self.layers):
            raise ValueError(f"blocks={self.blocks} must be layers={self.layers} different numbers in rising order")
        if self.balance_weights is not None and (len(self.balance_weights) != self.layers or self.balance != "switch"):
            raise ValueError(f"balance_weights has {len(self.balance_weights)} values: it takes layers={self.layers}, with "
                             f"balance='switch', got balance={self.balance!r}")
        if self.copy_noise and self.fresh_experts:
            raise ValueError("copy_noise is added to copies; fresh_experts=True makes none: set one of them")
        if self.router == "all" and self.top_k != self.experts:
            raise ValueError(f"router='all' sends each token to every expert: set top_k={self.experts}, got {self.top_k}")
        if self.router == "all" and self.balance == "loss_free":
            raise ValueError("balance='loss_free' moves a router's choice; router='all' has none: set balance='none'")
        if self.capacity_factor is not None and self.router != "token":
            raise ValueError(f"capacity_factor is for router='token'; router={self.router!r} never drops tokens")
        if self.batch_priority and self.capacity_factor is None:
            raise ValueError("batch_priority=True orders tokens for full experts: it needs a capacity_factor")
        if self.choices > self.experts:
            raise ValueError(f"choices={self.choices} is more than experts={self.experts}: a token cannot have an expert twice")
        if self.router in ("priority", "manual") and self.top_k != 1:
            raise ValueError(f"router={self.router!r} gives a token one expert: set top_k=1, got {self.top_k}")
        if (self.router == "manual") != (self.groups is not None):
            raise ValueError("groups, the classes of each expert, go with router='manual' and with no other")
        if self.groups is not None and len(self.groups) != self.experts:
            raise ValueError(f"groups names {len(self.groups)} experts, experts={self.experts}")
        if self.balance == "loss_free" and self.router not in ("token", "image"):
            raise ValueError(f"balance='loss_free' moves a top-k choice; router={self.router!r} has none")
        if self.router == "soft" and (self.shared or self.expert_dropout):
            raise ValueError("router='soft' has no shared expert and no expert_dropout")
        if self.members > 1 and (self.router != "token" or self.experts % self.members or self.compete_rate):
            raise ValueError(f"members={self.members} must divide experts={self.experts}, with router='token', no compete_rate, "
                             f"got {self.router!r}")
        if self.top_k > self.experts // self.members:
            raise ValueError(f"top_k={self.top_k} is more than the {self.experts // self.members} experts of each of "
                             f"members={self.members}")
        if self.compete_rate is not None and (self.router != "token" or self.noise):
            raise ValueError("compete_rate compares responses to single tokens, without noise: set router='token', noise=0")
        return self


class MaskSpec(Spec):
    """Masked-autoencoder pretraining (MAE, 2111.06377): what is hidden, and the decoder that fills it in."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of the patches that is hidden
    width: Positive = 192  # of the decoder
    depth: Positive = 4  # decoder blocks
    heads: Positive = 6  # decoder attention heads; must divide the decoder width

    @model_validator(mode="after")
    def _consistent(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"decoder width={self.width} must be a multiple of heads={self.heads} and of 4 (its fixed "
                             "two-dimensional position table)")
        return self


class TrainSpec(Spec):
    """One stage of training. AdamW, warm-up and cosine per step, layer-wise learning-rate decay (timm)."""

    epochs: Annotated[float, Field(gt=0)] = 3.0  # passes over the training images; may be fractional
    batch: Positive = 64  # images a step
    lr: Annotated[float, Field(gt=0)] = 3e-4  # peak learning rate of the head
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # not on biases, norms and position embeddings
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # lr factor a block, from the head down (ViMoE: 0.65)
    warmup: Share = 0.1  # share of all steps
    label_smoothing: Share = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # largest gradient norm
    ema: Share | None = None  # decay of the weight average that is evaluated; None = no average
    mask: MaskSpec | None = None  # pretraining by reconstruction instead of classification
    trainable: Literal["all", "routers", "head", "no_attention"] = "all"  # routers, head: everything else is frozen
    distil: Literal["none", "choice", "probabilities"] = "none"  # the parent's gates as target: their argmax or softmax
    distil_logits: Annotated[float, Field(ge=0, le=1)] = 0.0  # weight of the parent's logits as target, the rest is the labels'
    single_expert_at: Annotated[float, Field(gt=0, le=1)] | None = None  # share of the steps in which experts are dropped one
    # after the other, until each MoE layer has one (2206.00277: 0.5); None = all stay


class RunSpec(Spec):
    """One run: what goes in. `runs.collect` turns it into a record."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"study", "keep", "publish"})

    study: str = "foundations"  # folder of data/results that the record is filed under; not part of the id
    data: DataSpec = DataSpec()
    backbone: BackboneSpec = BackboneSpec()
    moe: MoESpec | None = None  # surgery before training; None = the model as it is
    prune: PruneSpec | None = None  # what is cut out after that; a child of this run starts from the cut model
    extract: ExtractSpec | None = None  # experts cut out of the parent's MLPs; a child of this run starts from them
    drop: DropSpec | None = None  # experts of the parent that go; a child of this run starts without them
    train: TrainSpec | None = None  # None = evaluate only
    init: RunSpec | None = None  # a parent whose final weights this run starts from (after its own surgery)
    seed: int = 0  # head, router, data order, augmentation, drop path
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations (autocast); weights stay float32
    device: Literal["cpu", "cuda"] = "cpu"  # where it runs; set by the profile, never detected
    threads: Positive = 2  # of torch; part of the spec because it changes rounding
    fresh_routers: bool = False  # draw the routers anew after the parent's weights are loaded
    experts_off: bool = False  # also the test accuracy with all routed experts off
    colour_probe: bool = False  # also the routing of a two-colour checkerboard
    depth_probe: bool = False  # also kNN and a linear probe on the features after each block
    cam_probe: bool = False  # also GradCAM of the fixed probe images
    resident: bool = False  # also the resident set of training steps, measured in a process of their own
    keep: bool = False  # keep the final weights in the cache; not part of the id
    publish: bool = False  # file the record under data/results, to be committed; not part of the id

    @property
    def reduced(self) -> bool:
        """Whether whole experts were taken out in this run or in one that it starts from."""
        mine = self.drop is not None or (self.train is not None and self.train.single_expert_at is not None)
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
        parts = [f"{data.name} at {data.image_size} px", f"{data.train or 'all'} training images",
                 f"`{back.name}`{size} from {start}"]
        if train is not None:
            parts += [f"{train.epochs:g} epochs", f"batch {train.batch}", f"peak learning rate {train.lr:g}"]
        return ", ".join([*parts, self.dtype]) + (" on a graphics card" if self.device == "cuda" else "")

    @model_validator(mode="after")
    def _init_fits(self):
        if self.init is not None and self.backbone.but(drop_path=0.0) != self.init.backbone.but(drop_path=0.0):
            raise ValueError("init must have the same backbone as the run that starts from it")
        if self.init is not None and self.init.moe is not None:
            fixed = [getattr(moe, name, None) for moe in (self.moe, self.init.moe)
                     for name in ("layers", "experts", "shared", "members")]
            if fixed[:4] != fixed[4:]:
                raise ValueError("init already has MoE layers: moe must have the same layers, experts, shared and members, "
                                 f"{fixed[4:]}, got {fixed[:4]}; a second surgery is not defined")
        if self.train is not None and self.train.mask is not None and self.init is not None:
            raise ValueError("pretraining with a mask starts from random or named weights, not from init")
        if self.train is not None and self.train.mask is not None and self.train.layer_decay != 1.0:
            raise ValueError(f"layer_decay={self.train.layer_decay} counts layers from a head; pretraining with a mask has none")
        if self.init is not None and self.init.prune is not None and not self.init.prune.structured:
            raise ValueError("init was pruned by masks, which a further stage would lose: prune in the last stage")
        if self.prune is not None and self.train is not None and self.train.mask is not None:
            raise ValueError("pruning scores a classifier; pretraining with a mask has no labels to score by")
        if self.drop is not None and (self.init is None or self.init.moe is None or self.moe is None or self.prune is not None):
            raise ValueError("drop takes experts out of a parent's mixture, and nothing else is cut in the same run: set init to "
                             "a run with moe, moe to the same layers, prune to None")
        if self.drop is not None and self.drop.compares and (self.init.init is None or self.init.init.moe is None):
            raise ValueError(f"drop.score={self.drop.score!r} compares with the model before finetuning: init needs an init "
                             "with moe of its own, since without trained routers there is no norm to compare with")
        if self.init is not None and self.init.reduced and self.init.moe.members > 1:
            raise ValueError("init dropped experts of an ensemble; a further stage is not defined: drop in the last one")
        if self.train is not None and self.train.single_expert_at and (
                self.moe is None or self.moe.router != "token" or self.moe.members > 1 or self.moe.top_k > 1 or self.train.ema):
            raise ValueError("single_expert_at drops all experts but one: it needs moe with router='token', top_k=1, members=1, "
                             "and train without ema")
        if self.extract is not None and (self.init is None or self.init.extracted or self.moe is not None
                                         or self.prune is not None):
            raise ValueError("extract cuts experts out of a trained model of plain MLPs, and nothing else is cut in the same "
                             "run: set init to that model's run, moe and prune to None")
        if self.train is not None and self.train.distil_logits and self.init is None:
            raise ValueError("distil_logits needs a parent to learn from: set init")
        if self.train is not None and self.train.distil != "none" and (self.init is None or self.init.moe is None):
            raise ValueError(f"distil={self.train.distil!r} needs a parent with gates: set init to a run with moe")
        return self
