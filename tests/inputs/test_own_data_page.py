"""The page for users' own data: its example runs, and its layouts are those that are read."""

from __future__ import annotations

import re

from data_folders import encoded, put

from lib import paths
from lib.inputs.rows import SPLIT_OF_NAME

PAGE = (paths.ROOT / "book" / "own_data.md").read_text()


def test_the_example_runs(home, monkeypatch, capsys, tmp_path):
    files = {f"birds/{c}/{n}.png": encoded(n + 90 * c, (16, 16)) for c in (0, 1) for n in range(20)}
    put(home, files)
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    # the same text with less to compute
    code = code.replace("image_size=56", "image_size=16").replace("epochs=5.0", "epochs=0.5")
    smaller = "patch=8, width=16, depth=2, heads=2"
    exec(compile(code.replace("patch=8", smaller), "own_data.md", "exec"), {})
    assert re.fullmatch(r"\{'dense': [\d.]+, 'mixture': [\d.]+\}\n", capsys.readouterr().out)


def test_split_names_are_those_that_are_read():
    [rule] = re.findall(r"1\. A split is called (.*?)\. Other", PAGE)
    words = set(re.findall(r"`(\w+)`", rule))
    assert words <= set(SPLIT_OF_NAME)
