"""The table of compared models, its front and its words."""

import pandas as pd
import pytest

from lib.report import compared
from lib.report.style import png

# model: top-1 with its ends, difference with its ends, time at a batch of 1 and of 32
MODELS = {
    "dense": (80.0, 75.0, 84.0, 0.0, 0.0, 0.0, 4.0, 1.0),
    "static": (78.5, 73.0, 83.0, -1.5, -3.0, 0.25, 3.0, 0.5),
    "extracted": (78.0, 72.0, 82.0, -2.0, -4.0, -0.5, 5.0, 0.75),
}
COLUMNS = ["top1", "top1_low", "top1_high", "difference", "difference_low", "difference_high"]


@pytest.fixture
def frame():
    frame = pd.DataFrame.from_dict(MODELS, orient="index", columns=[*COLUMNS, "ms_1", "ms_32"])
    frame["ms_1_q10"], frame["ms_32_q10"] = frame.ms_1 / 2, frame.ms_32 / 2
    frame["params"], frame["macs"], frame["mb"] = 2_000_000, 30_000_000, 8.0
    frame.attrs |= {
        "batches": (1, 32),
        "intervals": "95% over the images",
        "repeats": 20,
        "device": "cpu",
        "threads": 2,
        "cores": 4,
        "load": (1.26, 1.0, 1.0),
    }
    return frame


def test_a_row_has_numbers_with_their_intervals_and_units(frame):
    first, static, _ = compared.rows(frame).to_dict("records")
    assert (
        first["top-1 (%)"] == "80.0 [75.0, 84.0]"
        and first["difference to the first (points)"] == ""
    )
    assert static == {
        "model": "static",
        "top-1 (%)": "78.5 [73.0, 83.0]",
        "difference to the first (points)": "-1.5 [-3.0, +0.2]",
        "parameters (10⁶)": 2.0,
        "MACs (10⁶)": 30.0,
        "file (MB)": 8.0,
        "ms an image, batch of 1": "3.00 (1.50)",
        "ms an image, batch of 32": "0.500 (0.250)",
    }


def test_the_front_has_what_nothing_beats_in_accuracy_and_time(frame):
    assert compared.fronts(frame) == {1: ["static", "dense"], 32: ["static", "dense"]}
    frame.loc["extracted", "ms_1"] = 2.0
    assert compared.fronts(frame)[1] == ["extracted", "static", "dense"]
    said = compared.in_words(frame)
    assert "batch of 1 no model beats extracted with 78.0% in 2 ms, static with 78.5% in" in said


def test_the_figure_joins_the_front_and_has_all_models(frame):
    fig = compared.draw(frame)
    for ax, times in zip(fig.axes, ([3.0, 4.0], [0.5, 1.0]), strict=True):
        assert ax.lines[0].get_xdata().tolist() == times
        assert [bar.get_label() for bar in ax.containers] == list(MODELS)
    assert png(fig).startswith(b"\x89PNG")


def test_the_caption_says_how_times_were_taken(frame):
    said = compared.machine(frame)
    assert "threads: 2, cores: 4," in said and "before: 1.3." in said and "20 passes" in said
