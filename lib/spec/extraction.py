"""Extraction: what becomes of the MLPs of a trained model.

Experts from clusters of tokens (MoEE, 2505.15414), experts from clusters of neurons (MoEfication,
2110.01786), or narrower MLPs (static pruning).

Axis letters: **D** width, **H** hidden width, **E** experts, **K** clusters.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import MOST_EXPERTS, Guard, Positive, Share, Size, Spec


class ClusterSpec(Spec):
    """Says what is clustered; one expert is made of each cluster."""

    # tokens: by what they activate (MoEE). neurons: by their input weights, in balanced k-means
    # (MoEfication). nothing: one narrow MLP for all tokens, which is static pruning
    of: Literal["tokens", "neurons", "nothing"] = "tokens"
    # of tokens; random: they are dealt to clusters of the sizes that k-means finds; directions:
    # random directions are the centres
    method: Literal["hdbscan", "kmeans", "random", "directions"] = "hdbscan"
    # of tokens: their hidden activations, or the MLP's input, which is what a router can see
    space: Literal["hidden", "input"] = "hidden"
    count: Annotated[int, Field(ge=2, le=MOST_EXPERTS)] = 8  # K; HDBSCAN finds its own
    # HDBSCAN: share of the tokens that makes a cluster
    smallest_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    neighbours: Positive = 5  # HDBSCAN: min_samples
    components: Size | None = None  # principal components that are clustered; None = all
    # tokens of a layer that are clustered, at most; the others join the nearest centre, with
    # HDBSCAN only if its noise does
    sample: Positive = 4000
    # HDBSCAN: what becomes of tokens in no cluster. left_out: they take no part. nearest: they join
    # the cluster whose mean is nearest, and its centre
    noise: Literal["left_out", "nearest"] = "left_out"
    # with: it is clustered like any token. left_out: only patch tokens are clustered, and it is
    # routed like any. apart: it is a cluster of its own, and the others are clustered
    class_token: Literal["with", "left_out", "apart"] = "with"

    @model_validator(mode="after")
    def _no_idle_fields(self):
        used = {"neurons": {"of", "count"}, "nothing": {"of"}}.get(self.of)
        fields = type(self).model_fields.items()
        changed = {name for name, field in fields if getattr(self, name) != field.default}
        if used is not None and changed - used:
            idle = sorted(changed - used)
            raise ValueError(
                f"of={self.of!r} clusters no tokens, so {', '.join(idle)} would say nothing: leave "
                "them at their defaults"
            )
        if self.noise != "left_out" and self.method != "hdbscan":
            raise ValueError(
                f"noise={self.noise!r} is for tokens that HDBSCAN leaves in no cluster, and "
                f"method={self.method!r} leaves none: set method='hdbscan', or noise='left_out'"
            )
        if self.class_token != "with" and self.method not in ("hdbscan", "kmeans"):
            raise ValueError(
                f"class_token={self.class_token!r} needs clusters that are found among the other "
                f"tokens, and method={self.method!r} is a control that deals all tokens: set "
                "method='hdbscan' or 'kmeans', or class_token='with'"
            )
        return self


class NeuronSpec(Spec):
    """Says which hidden neurons an expert keeps, and how many."""

    # percent of the variance over an expert's tokens that its neurons hold, 80-99 in MoEE; or
    variance_percent: Annotated[float, Field(gt=0, le=100)] | None = None
    # share of a layer's neurons that a token passes
    active: Annotated[float, Field(gt=0, le=1)] | None = None
    # share of a layer's neurons that every token passes, out of `active`
    common: Share = 0.0
    # tokens whose statistics choose and correct an expert's neurons: those of its cluster, or those
    # that the router sends to it
    statistics: Literal["cluster", "routed"] = "cluster"
    # weighted: variance times the squared norm of the neuron's output weights. update: what
    # removing it adds to the error once the others make up for it (Optimal Brain Surgeon)
    score: Literal["variance", "weighted", "update"] = "variance"
    # where `active` holds. layer: in each expert. cluster: in the mean over a layer's tokens; its
    # clusters share the neurons out. model: in the mean over layers, which share them out, too
    budget: Literal["layer", "cluster", "model"] = "layer"

    @model_validator(mode="after")
    def _consistent(self):
        if (self.variance_percent is None) == (self.active is None):
            raise ValueError(
                "give one of variance_percent and active, got "
                f"variance_percent={self.variance_percent}, active={self.active}"
            )
        if self.active is None and (self.common or self.budget != "layer"):
            raise ValueError(
                f"common={self.common} and budget={self.budget!r} need active, not "
                "variance_percent: they share out a given number of neurons"
            )
        if self.active is not None and self.common >= self.active:
            raise ValueError(
                f"common={self.common} must be below active={self.active}: the rest is the "
                "clusters'"
            )
        if self.budget == "model" and self.common:
            raise ValueError(
                "common is a share of each layer's neurons, and budget='model' gives a layer as "
                "many as it needs: set budget='layer' or 'cluster'"
            )
        return self


class CorrectionSpec(Spec):
    """Says what makes up for the output of the removed neurons."""

    # mean: their mean output, as a bias (VBP). ridge: its best linear prediction from the neurons
    # that stay, in closed form (CORP)
    method: Literal["none", "mean", "ridge"] = "none"
    # of ridge regression, in units of the mean variance of the neurons that stay
    penalty: Guard = 1e-3
    pooled: Share = 0.0  # weight of all tokens' covariance in that of a cluster
    # layer after layer, each on what the changed layers before it give, towards the dense model's
    # residual stream
    sequential: bool = False
    # sequential: share of the residual stream's error so far that a layer is asked to make up for;
    # most of it is noise to the layer, and a regression on few tokens fits noise
    catch_up: Annotated[float, Field(ge=0, le=1)] = 1.0
    # penalty of a ridge regression that fits the classifier anew, towards the dense model's logits,
    # once all layers are changed; in units of the mean variance of its inputs. None = it stays
    head: Guard | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if self.catch_up != 1 and not self.sequential:
            raise ValueError(
                f"catch_up={self.catch_up} is a share of the error that changed layers have left "
                "behind: set sequential=True"
            )
        return self


class CalibrationSpec(Spec):
    """Says which tokens all statistics are taken on."""

    images: Positive = 1000  # class-balanced training images
    tokens_per_image: Positive = 10  # drawn at random at each MLP
    tokens: Positive = 10_000  # of a layer, at most; a layer's report says how many there were


class ExtractSpec(Spec):
    """Says how the MLPs of a trained model become experts, or narrower MLPs.

    The defaults are the faithful reading of MoEE (2505.15414); everything else is a rival, a
    control, or ours.
    """

    neurons: NeuronSpec
    clusters: ClusterSpec = ClusterSpec()
    # by which measure a token goes to an expert's centre, its mean input; trained: MoEfication's;
    # random and oracle are controls
    router: Literal["cosine", "centred", "nearest", "random", "oracle", "trained"] = "cosine"
    correction: CorrectionSpec = CorrectionSpec()
    # of experts. copies: weights of their own. shared: sets of neurons of one store. inputs: such
    # sets of one store of input weights, with output weights of their own
    storage: Literal["copies", "shared", "inputs"] = "copies"
    calibration: CalibrationSpec = CalibrationSpec()

    @property
    def static(self) -> bool:
        """Whether the layers stay plain MLPs."""
        return self.clusters.of == "nothing"

    @model_validator(mode="after")
    def _neurons_fit_clusters(self):
        of, neurons, correction = self.clusters.of, self.neurons, self.correction
        routed = self.router != "cosine" or neurons.statistics != "cluster"
        if of == "nothing" and (routed or neurons.common or correction.pooled):
            raise ValueError(
                "clusters.of='nothing' makes one MLP for all tokens, without a router and without "
                "clusters that have something in common: leave router, neurons.statistics, "
                "neurons.common and correction.pooled at their defaults"
            )
        if neurons.budget == "cluster" and of != "tokens":
            raise ValueError(
                "neurons.budget='cluster' shares the neurons of a layer out over clusters of "
                f"tokens: set clusters.of='tokens', not {of!r}"
            )
        if of == "neurons" and neurons.active is None:
            raise ValueError(
                "clusters.of='neurons' lets a token pass a share of the experts: set "
                "neurons.active, not variance_percent"
            )
        corrected = correction.method != "none" or correction.sequential or correction.head
        if of == "neurons" and (neurons.common or corrected):
            raise ValueError(
                "clusters.of='neurons' removes no neuron, so there is nothing to correct and no "
                "common part: leave correction and neurons.common as they are"
            )
        if of == "neurons" and self.router not in ("trained", "cosine"):
            raise ValueError(
                f"router={self.router!r} is for clusters of tokens; clusters.of='neurons' takes "
                "'trained' or 'cosine'"
            )
        if of != "neurons" and self.router == "trained":
            raise ValueError(
                f"router='trained' learns which clusters of neurons a token activates, and "
                f"clusters.of={of!r} has none: set clusters.of='neurons', or another router"
            )
        return self

    @model_validator(mode="after")
    def _storage_fits(self):
        if self.storage == "shared" and self.correction.method == "ridge":
            raise ValueError(
                "storage='shared' is for experts that differ by neurons and bias alone, and "
                "correction.method='ridge' gives each its own output weights: set "
                "storage='inputs', or the method to none or mean"
            )
        if self.storage != "copies" and self.clusters.of != "tokens":
            raise ValueError(
                f"storage={self.storage!r} is for experts that share neurons, and with "
                f"clusters.of={self.clusters.of!r} none do: set storage='copies'"
            )
        return self

    @model_validator(mode="after")
    def _score_fits(self):
        if self.neurons.score != "update":
            return self
        if self.correction.method != "ridge" or self.neurons.active is None:
            raise ValueError(
                "neurons.score='update' is the error that ridge regression leaves, with so many "
                "neurons: set correction.method='ridge' and neurons.active"
            )
        if self.neurons.budget == "model" and not self.correction.sequential:
            raise ValueError(
                "neurons.score='update' with budget='model' ranks errors in units of the residual "
                "stream, which is followed in sequence only: set correction.sequential=True, or "
                "another budget"
            )
        return self
