"""The public functions one after the other, as a user calls them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from small_classifier import CLASSES, images_and_labels, loader, vit

import lib

SPEC = lib.MoESpec(layers=2, experts=4, router="token", gate="renormalised")


def test_a_day_of_a_model():
    images, _ = images_and_labels()
    train, val = loader(), loader(batch=20)
    dense = lib.finetune(vit(), train, val, epochs=2, lr=1e-3)
    pruned = lib.prune(dense, train, keep=0.5)
    extracted = lib.extract(dense, train, active=0.5, count=3)
    mixture = lib.upcycle(dense, SPEC)
    tuned = lib.finetune(mixture, train, val, epochs=1, teacher=dense)
    dropped = lib.drop_experts(tuned, train, keep=0.5)
    again = lib.finetune(lib.prune(dropped, train, parts=("experts",), score="taylor"), train)
    models = (dense, pruned, extracted, mixture, tuned, dropped, again)
    with torch.no_grad():
        outputs = [model(images) for model in models]
    assert all(out.shape == (40, 5) and out.isfinite().all() for out in outputs)
    # renormalised upcycling leaves the function as it is, and every other step changes it
    torch.testing.assert_close(outputs[3], outputs[0], atol=1e-5, rtol=0)
    for one, other in ((0, 1), (0, 2), (3, 4), (4, 5), (5, 6)):
        assert not torch.allclose(outputs[one], outputs[other], atol=1e-4)
    size = [sum(p.numel() for p in model.parameters()) for model in models]
    assert size[1] < size[0] < size[3] == size[4] and size[6] < size[5] < size[4]
    # what was done to a model is told by it
    assert len(again.finetuning) == 3 + 2 + 3 and len(again.dropping) == 2
    assert len(again.pruning) == 4 and len(extracted.extraction) == 2


def test_the_day_in_the_readme(tmp_path, monkeypatch):
    """The block is run as it stands there, on a small model in the place of the large one."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    [day] = (code for code in blocks if "lib.prune(" in code)
    day, replaced = re.subn(r"^vit = timm.create_model\(.*$", "vit = small_vit", day, flags=re.M)
    assert replaced == 1
    monkeypatch.chdir(tmp_path)
    batches = {"train": loader(), "val": loader(batch=20), "test": loader(batch=20)}
    names = [f"class {number}" for number in range(CLASSES)]
    world = {"small_vit": vit(), "names": names, **batches}
    exec(day.replace("batches=(1, 32)", "batches=(1,)"), world)
    images, _ = images_and_labels()
    with torch.no_grad():
        assert torch.equal(world["again"](images), world["small"].eval()(images))
    assert world["again"].class_names == names and list(world["table"].index)[0] == "dense"
