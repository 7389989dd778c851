"""Packed images and weights are read as those that they were made of."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lib.inputs import packed, sources, weights
from lib.inputs.splits import load_splits
from lib.spec import DataSpec

SPEC = DataSpec(train=40, val=20, test=10)


def test_packed_images_are_the_same_and_only_the_rows_asked_for(home):
    whole, opened = load_splits(SPEC), sources.sources_of(SPEC.name, "label", home)
    splits = (whole.train, whole.val, whole.test)
    rows = {int(row) for split in splits for row in split.rows}
    file = packed.file_of(home, SPEC.name)
    packed.write(file, {"label": opened}, {"train": rows})
    assert 70 * 28 * 28 < file.stat().st_size < 70 * 28 * 28 + 60_000
    sources.forget()
    again = load_splits(SPEC)
    assert again.class_names == whole.class_names and again.channels == 1
    index = torch.arange(10)
    for split, original in zip((again.train, again.val, again.test), splits, strict=True):
        assert (split.labels == original.labels).all() and (split.rows == original.rows).all()
        assert torch.equal(split.batch(index, SPEC), original.batch(index, SPEC))
    other = next(row for row in range(5000) if row not in rows)
    with pytest.raises(ValueError, match=f"no image of row {other}, split train"):
        again.train.source.image(other)
    with pytest.raises(ValueError, match="no label column 'coarse', only label"):
        sources.sources_of(SPEC.name, "coarse", home)


def test_images_of_many_shapes_and_two_label_columns(home):
    shapes = [(3, 4, 5), (3, 2, 2), (3, 6, 1)]
    images = [torch.randint(0, 256, shape).to(torch.uint8) for shape in shapes]
    fine = sources.Source(torch.tensor([0, 1, 2]).numpy(), images.__getitem__, 3)
    coarse = sources.Source(torch.tensor([0, 0, 1]).numpy(), images.__getitem__, 3)
    opened = {"fine": ({"train": fine}, ["a", "b", "c"]), "coarse": ({"train": coarse}, ["x", "é"])}
    packed.write(packed.file_of(home, "hub:me/mine"), opened, {"train": [0, 2]})
    for label, (stored, names) in opened.items():
        again, class_names = sources.sources_of("hub:me/mine", label, home)
        assert again["train"].labels.tolist() == stored["train"].labels.tolist()
        assert class_names == names
        assert all(torch.equal(again["train"].image(row), images[row]) for row in (0, 2))


def test_packed_weights_come_first(tmp_path, monkeypatch):
    there = tmp_path / "there"
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    state = {"a": torch.rand(3).half(), "n": torch.arange(3)}
    save_file(state, tmp_path / "mine.safetensors")
    weights.pack(there, "file:mine.safetensors", "vit")
    monkeypatch.setenv("MOE_WEIGHTS", str(there))
    again = weights.fetch("file:mine.safetensors", "vit")
    assert again["a"].dtype == torch.float32 and torch.equal(again["a"], state["a"].float())
    assert torch.equal(again["n"], state["n"])
    with pytest.raises(FileNotFoundError):
        weights.fetch("file:mine.safetensors", "another")
