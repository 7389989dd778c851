"""The form for export in ONNX: equal to the model in onnxruntime, with any number of images."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from changed_vits import CHANGED, LAYER, images
from small_models import images_for, small
from vits import D

import lib


def equal_in_onnxruntime(model, *inputs):
    """inputs: the first is traced, the others, if any, have other numbers of images."""
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},) if len(inputs) > 1 else None
    program = torch.onnx.export(
        lib.for_export(model), (inputs[0],), dynamo=True, dynamic_shapes=batch, verbose=False
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    for x in inputs:
        [out] = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            assert torch.allclose(model(x), torch.from_numpy(out), atol=1e-4)


@pytest.mark.parametrize("name", ["extracted: inputs", "pruned, then upcycled"])
def test_models(name):
    equal_in_onnxruntime(CHANGED[name](), images(), images(7, seed=9))


@pytest.mark.parametrize(
    "name",
    ["upcycled: image", "upcycled: expert_choice", "upcycled: priority", "upcycled: soft"],
)
def test_layers(name):
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randn(b, 6, D, generator=generator) for b in (4, 7)]
    equal_in_onnxruntime(CHANGED[name]().get_submodule(LAYER), *tokens)


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3"]
)
def test_attention_with_biases_masks_and_rotations(name):
    mixture = lib.upcycle(small(name), layers=1, experts=2, router="token")
    equal_in_onnxruntime(mixture, images_for(name))
