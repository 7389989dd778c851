"""Experts cut out of the MLPs of a trained model.

Axis letters: **D** width, **H** hidden width, **E** experts, **K** clusters.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Positive, Share, Spec


class ExtractSpec(Spec):
    """Experts cut out of each MLP of a trained model by clusters of its tokens, or neurons cut out
    of it once for all.

    The defaults are the faithful reading of MoEE (2505.15414); everything else is a rival, a
    control, or ours.
    """

    # random: dealt, of kmeans' sizes; directions: centres are random directions; one: a static
    # layer; weights: balanced k-means of neurons
    clusters: Literal["hdbscan", "kmeans", "random", "directions", "one", "weights"] = "hdbscan"
    # what is clustered: activations, or what the router can see
    space: Literal["hidden", "input"] = "hidden"
    # clusters, or groups of neurons; hdbscan finds its own number
    count: Annotated[int, Field(ge=2)] = 8
    # hdbscan: share of the tokens that makes a cluster
    smallest: Annotated[float, Field(gt=0, lt=1)] = 0.01
    neighbours: Positive = 5  # hdbscan: min_samples
    components: Positive | None = None  # principal components that are clustered; None = all
    # trained: MoEfication's
    router: Literal["cosine", "centred", "nearest", "random", "oracle", "trained"] = "cosine"
    # of a cluster's variance that its neurons keep
    percent: Annotated[float, Field(gt=0, le=100)] | None = None
    # or: share of the neurons that a token passes
    active: Annotated[float, Field(gt=0, le=1)] | None = None
    # whose statistics an expert is cut by: the tokens of its cluster, or those that its router will
    # send it
    members: Literal["cluster", "routed"] = "cluster"
    common: Share = 0.0  # of all neurons that every token passes, out of `active`
    # weighted: times the squared norm of the neuron's output weights; update: what going without
    # the neuron costs once the others make up for it (Optimal Brain Surgeon)
    score: Literal["variance", "weighted", "update"] = "variance"
    # with active: the same share in each layer; there also shared out over its clusters, so that a
    # token passes that many in the mean; or layers ranked against each other, too
    budget: Literal["layer", "cluster", "model"] = "layer"
    # for what the removed neurons gave: nothing, their mean as a bias (VBP), or their best linear
    # prediction from the ones that stay, in closed form
    correct: Literal["none", "mean", "ridge"] = "none"
    # penalty, in units of the mean variance of the neurons that stay
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    pooled: Share = 0.0  # weight of all tokens' covariance in that of a cluster
    # layer after layer on what the cut layers before it give, against the dense model's residual
    # stream
    sequential: bool = False
    # sequential: how much of what the residual stream lacks by then a layer is asked to make up
    # for; most of it is noise to the layer, and a regression on few tokens fits noise
    catch_up: Annotated[float, Field(ge=0, le=1)] = 1.0
    # of experts: contiguous; sets of neurons of one store; or such sets of one store of input
    # weights, with output weights of their own
    storage: Literal["copies", "shared", "inputs"] = "copies"
    images: Positive = 1000  # calibration images, class-balanced
    per_image: Positive = 10  # tokens of each that are recorded
    # of each layer at most; the report of a layer says how many there were of these, the ones that
    # are clustered; the others join the nearest centre, with hdbscan none
    tokens: Positive = 10_000
    clustered: Positive = 4000

    @model_validator(mode="after")
    def _consistent(self):
        if (self.percent is None) == (self.active is None):
            raise ValueError(
                f"give one of percent and active, got percent={self.percent}, active={self.active}"
            )
        if self.active is not None and self.common >= self.active:
            raise ValueError(
                f"common={self.common} must be below active={self.active}: the rest is the clusters'"
            )
        if self.percent is not None and (
            self.common or self.budget == "model" or self.clusters == "weights"
        ):
            raise ValueError(
                "common, budget='model' and clusters='weights' need active, not percent"
            )
        if self.budget == "cluster" and (
            self.active is None or self.clusters in ("one", "weights")
        ):
            raise ValueError(
                "budget='cluster' shares the neurons of a layer out over clusters of tokens: set active, and let "
                f"clusters be some of these, not {self.clusters!r}"
            )
        if self.storage == "shared" and self.correct == "ridge":
            raise ValueError(
                "storage='shared' is for experts that differ by neurons and bias alone, and correct='ridge' gives "
                "each its own output weights: set storage='inputs', or correct to none or mean"
            )
        if self.storage != "copies" and self.clusters in ("one", "weights"):
            raise ValueError(
                f"storage={self.storage!r} is for experts that share neurons, and with clusters={self.clusters!r} "
                "none do: set storage='copies'"
            )
        if self.score == "update" and (self.correct != "ridge" or self.active is None):
            raise ValueError(
                "score='update' is the error that ridge regression leaves, with so many neurons: set "
                "correct='ridge' and active"
            )
        if self.score == "update" and self.budget == "model" and not self.sequential:
            raise ValueError(
                "score='update' with budget='model' ranks errors in units of the residual stream, which is taken "
                "along in sequence only: set sequential=True, or another budget"
            )
        if self.catch_up != 1 and not self.sequential:
            raise ValueError(
                f"catch_up={self.catch_up} is a share of what cut layers have left behind: set sequential=True"
            )
        if self.budget == "model" and self.common:
            raise ValueError(
                "common is a share of each layer's neurons, and budget='model' gives a layer as many as it needs: "
                "set budget='layer' or 'cluster'"
            )
        if (self.router == "trained") != (self.clusters == "weights" and self.router != "cosine"):
            raise ValueError(
                f"router={self.router!r} with clusters={self.clusters!r}: groups of neurons take 'trained' or "
                "'cosine', clusters of tokens any but 'trained'"
            )
        if self.clusters == "weights" and (
            self.correct != "none" or self.common or self.sequential
        ):
            raise ValueError(
                "clusters='weights' cuts no neuron away, so there is nothing to correct and no common part"
            )
        return self

    @property
    def static(self) -> bool:
        """Whether the layers stay plain MLPs."""
        return self.clusters == "one"
