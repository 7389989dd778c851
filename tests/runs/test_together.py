"""The command line on several ranks."""

from __future__ import annotations

import pytest

from lib import __main__ as command_line

SPECS = """import lib
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec, TrainSpec

p = lib.profile("{key}", profile, width=width, scale=scale, layers=layers)


def grid(p):
    data, backbone = DataSpec(train=36, val=20, test=20), BackboneSpec(patch=7, width=16, depth=1)
    train, moe = TrainSpec(epochs=p.scale, batch=12), MoESpec(layers=1, experts=2, router="token")
    run = RunSpec(data=data, backbone=backbone.but(heads=2), train=train, moe=moe, threads=1)
    return {{"runs": [run.but(seed=seed) for seed in p.layers]}}
"""


def test_a_launcher_starts_the_command_on_every_rank_and_one_record_a_run_is_filed(tiny):
    tiny.notebook("a/one", "print(1)", specs=SPECS)
    done = tiny.call(
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "-m", "lib", "run", "a/one", "--records"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a/one, quick: all 2 records are there") == 1
    records = list((tiny.root / "cache" / "records").rglob("*.json"))
    assert len(records) == 2 and all('"ranks": 2' in file.read_text() for file in records)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fill"], "by `run PAGE --records` alone"),
        (["run", "vimoe/routing"], "by `run PAGE --records` alone"),
        (["run", "vimoe/routing", "--records", "--workers", "2"], "2 ranks compute one run at a"),
    ],
    ids=["fill", "a notebook", "workers"],
)
def test_what_ranks_do_not_do_together_is_refused(monkeypatch, capsys, command, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line.main(command) == 2
    assert message in capsys.readouterr().err
