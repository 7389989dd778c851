"""A saved model is tested again, against the predictions in its record."""

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lib.runs.collect import collect, model_of
from lib.runs.retest import restored_row
from lib.runs.store import Store
from lib.spec import BackboneSpec, DataSpec, RunSpec

TINY = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=None,
    threads=1,
    keep=True,
)


def test_the_saved_model_predicts_what_its_record_says(tmp_path):
    where = Store(tmp_path / "results", tmp_path / "cache")
    (record,) = collect({"run": [TINY]}, where=where)["run"]
    parameters = sum(weights.numel() for weights in model_of(TINY, where).parameters()) / 1e6
    whole = {"parameters (M)": parameters, "equal predictions (%)": 100.0, "images": 30}
    assert restored_row(record, where) == whole

    # a head that always says the class that the record says least often
    rarest = np.bincount(record.arrays["test_pred"], minlength=10).argmin()
    file = where.state(TINY.id)
    state = load_file(file)
    state["head.bias"] = torch.where(torch.arange(10) == rarest, 1e3, 0.0)
    save_file(state, file)
    share = 100 * float((record.arrays["test_pred"] == rarest).mean())
    assert restored_row(record, where)["equal predictions (%)"] == share < 100
