"""What is found out of a name of timm, and what becomes of it in the file that the page reads."""

import json

import pytest
import timm

from benchmarks import timm_models
from lib.report import timm_models as page


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [
        ("vit_tiny_patch16_224", ["works"] * 3),
        ("mixer_s32_224", ["works with modules="] * 3),
        (
            "convnextv2_atto",
            ["works by whole copies", *["no known neurons: GlobalResponseNormMlp"] * 2],
        ),
        ("levit_128s", ["works by whole copies", *["no known neurons: LevitMlp"] * 2]),
        (
            "pvt_v2_b0",
            [
                "the MLP takes more than its tokens",
                *["no known neurons: MlpWithDepthwiseConv"] * 2,
            ],
        ),
    ],
)
def test_outcomes_of_a_model(name, outcomes):
    family = next(family for family, other in timm_models.names() if other == name)
    found = timm_models.outcomes_of(family, name)
    assert [found[method] for method in page.METHODS] == outcomes


def test_a_model_that_timm_cannot_build_is_counted_with_the_reason(monkeypatch):
    def broken(name):
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(timm, "create_model", broken)
    found = timm_models.outcomes_of("vit", "vit_tiny_patch16_224")
    assert found == dict.fromkeys(page.METHODS, "timm does not build it: RuntimeError")


def test_what_is_written_is_what_is_read(tmp_path):
    rows = [["vit", "vit_a", "works", "works", "no linear map"], ["vit", "vit_b", *["works"] * 3]]
    file = tmp_path / "two.json"
    file.write_text(timm_models.as_json(rows))
    outcomes = page.read(file)
    assert outcomes.values.tolist() == rows
    assert outcomes.attrs["timm"] == timm.__version__
    assert outcomes.attrs["goals"] == {"upcycling": 0.9, "pruning": 0.8, "extraction": 0.8}
    assert len(json.loads(file.read_text())["rows"]) == len(rows)


def test_every_name_is_that_of_one_family_that_timm_has():
    names = [name for _, name in timm_models.names()]
    assert len(names) == len(set(names)) and set(names) <= set(timm.list_models())
    assert {family for family, _ in timm_models.names()} == set(timm_models.FAMILIES)
