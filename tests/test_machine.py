"""Cores that this process may use, wherever they are counted, and versions that may be absent."""

from __future__ import annotations

import os

import pytest

from lib import machine
from lib.pages import manifest
from lib.runs import environment, processes
from lib.spec import RunSpec


@pytest.mark.parametrize("here", ("affinity", "no affinity, as on macOS"))
def test_all_count_the_cores_that_this_process_may_use(here, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    if here == "affinity":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8}, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    expected = 3 if here == "affinity" else 64
    assert machine.cores() == expected
    assert manifest.machine()["cores"] == expected
    assert processes.pool()._max_workers == expected


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    assert machine.version_of("no-such-package") == "not installed"
    assert machine.version_of("torch")[0].isdigit()
    absent = machine.metadata.PackageNotFoundError
    monkeypatch.setattr(machine.metadata, "version", lambda _: (_ for _ in ()).throw(absent))
    assert environment.environment(RunSpec())["datasets"] == "none"  # as records have it
