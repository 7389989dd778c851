"""Layers of other libraries compute what ours does where the benchmark says so."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import reference
import torch

from benchmarks import layers
from benchmarks.layers import Setting
from benchmarks.peers import INSTALL, PEERS, mixture_of_experts, st_moe

# capacity factors at which no token can be dropped: an expert has a slot for each of them
WITHOUT_DROPS = {"mixture-of-experts": mixture_of_experts, "st-moe-pytorch": st_moe}


@pytest.fixture
def small(monkeypatch):
    """Layers of width 16 and tokens for them; their first channel is one."""
    monkeypatch.setattr(layers, "D", 16)
    monkeypatch.setattr(layers, "H", 24)
    return lambda top_k, skewed=False: Setting(3, 7, 4, top_k, skewed)


def reference_of(layer, x):
    """The layer's formula by einsum: (B, N, D)."""
    weights = reference.gates(x, layer.router.weight, layer.router.top_k, gate="renormalised")
    e = layer.experts
    return reference.moe(x, weights, e.fc1.weight, e.fc1.bias, e.fc2.weight, e.fc2.bias)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_computes_the_reference_or_says_why_it_is_not_measured(peer, top_k, skewed, small):
    if peer.top_k not in (None, top_k):
        assert peer.why_not(top_k, "fp32") == f"computes K={peer.top_k} alone"
        return
    if not peer.installed:
        assert peer.why_not(top_k, "fp32") == INSTALL
        return
    setting = small(top_k, skewed)
    layer, x = layers.moe_layer(setting), layers.inputs(setting)
    make = WITHOUT_DROPS.get(peer.name)
    theirs = (make(layer, 2.0 * setting.experts) if make else peer.make(layer)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), reference_of(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_our_layer_of_the_benchmark_computes_the_reference(top_k, small):
    setting = small(top_k)
    layer, x = layers.moe_layer(setting), layers.inputs(setting)
    torch.testing.assert_close(layer(x), reference_of(layer, x), rtol=1e-4, atol=1e-5)


def test_a_peer_that_drops_tokens_is_marked(small):
    """Half of the slots that are needed: outputs of dropped tokens are zero or incomplete."""
    setting = small(2, True)
    layer, x = layers.moe_layer(setting), layers.inputs(setting)
    for peer in PEERS:
        assert peer.drops == (peer.name in WITHOUT_DROPS)
        if peer.drops and peer.installed:
            theirs = WITHOUT_DROPS[peer.name](layer, 0.5).eval()
            with torch.no_grad():
                assert not torch.allclose(theirs(x), reference_of(layer, x), atol=1e-2)


def test_a_peer_that_is_absent_gets_a_row_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {peer.name: peer.why_not(2, "fp32") for peer in PEERS}
    assert reasons.pop("mask loop") == ""
    assert set(reasons.values()) == {"not installed: pip install .[bench]"}


def test_dtypes_that_a_peer_is_not_measured_in_are_those_that_it_refuses(small):
    setting = small(2)
    for peer in PEERS:
        theirs = peer.make(layers.moe_layer(setting)) if peer.installed else None
        for dtype, of_torch in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            refused = peer.dtypes is not None and dtype not in peer.dtypes
            if refused:
                assert peer.why_not(2, dtype) == f"does not run in {dtype}"
            if theirs is not None:
                x = layers.inputs(setting).to(of_torch)
                with pytest.raises(RuntimeError) if refused else contextlib.nullcontext():
                    assert theirs.to(of_torch).eval()(x).shape == x.shape
