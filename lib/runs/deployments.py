"""Reads the file that names a cluster, and starts it: one of Dask's own deployment classes.

    kind: slurm          # local, ssh, slurm or kubernetes
    wait: 2h             # for the first worker (default: 10m)
    arguments:           # of the class, by its own names
      n_workers: 8
      cores: 8

Examples with what each needs lie in `clusters`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_SECONDS = 600.0
KEYS = ("kind", "wait", "arguments")
# arguments that this project gives, or that no file can hold
OURS = {"self", "asynchronous", "loop", "job_cls", "scheduler_cls", "scheduler", "create_mode"}


@dataclass(frozen=True)
class Kind:
    """Holds a kind of deployment: the module and class, where else its arguments are named, and
    the extra that brings its package."""

    module: str
    name: str
    also: tuple[str, ...] = ()  # "module:name" of callables that the class hands arguments to
    extra: str = "cluster"

    def start(self) -> Any:
        """Imports the class. Raises ValueError where its package is not installed."""
        return self._imported(f"{self.module}:{self.name}")

    def arguments(self) -> list[str]:
        """Lists the names of the arguments that the class takes."""
        names: set[str] = set()
        for place in (f"{self.module}:{self.name}", *self.also):
            parameters = inspect.signature(self._imported(place)).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        return sorted(names - OURS)

    def _imported(self, place: str) -> Any:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ValueError(
                f"a cluster of {self.name} needs the package {module.partition('.')[0]}, which is "
                f'not installed ({error}): pip install -e ".[{self.extra}]"'
            ) from error


KINDS = {
    "local": Kind("distributed", "LocalCluster", ("distributed:Nanny", "distributed:Worker")),
    "ssh": Kind("distributed", "SSHCluster"),
    "slurm": Kind(
        "dask_jobqueue",
        "SLURMCluster",
        (
            "dask_jobqueue.core:JobQueueCluster",
            "dask_jobqueue.slurm:SLURMJob",
            "dask_jobqueue.core:Job",
        ),
    ),
    "kubernetes": Kind("dask_kubernetes.operator", "KubeCluster", (), "kubernetes"),
}


@dataclass(frozen=True)
class Deployment:
    """Holds what a file says. wait: seconds that the first worker is given to come."""

    file: Path
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    wait: float = WAIT_SECONDS

    @property
    def workers(self) -> int:
        """Returns the number of worker processes that the file asks for."""
        given = self.arguments
        if self.kind == "ssh":
            per_host = given.get("worker_options", {}).get("n_workers", 1)
            return (len(given["hosts"]) - 1) * per_host  # the first host has the scheduler
        if self.kind == "kubernetes" and "custom_cluster_spec" in given:
            return given["custom_cluster_spec"]["spec"]["worker"]["replicas"]
        return given["n_workers"]


def read(file: Path) -> Deployment:
    """Reads and checks a file. Raises FileNotFoundError, or ValueError naming what is wrong in it
    and what is valid."""
    import yaml

    if not file.is_file():
        raise FileNotFoundError(
            f"no cluster file at {file}: give a YAML file, such as those of the folder clusters"
        )
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no {' and '.join(KEYS)}: see the folder clusters")
    _refuse_unknown(content, KEYS, f"{file}: unknown key")
    kind, arguments = content.get("kind"), content.get("arguments") or {}
    if kind not in KINDS:
        raise ValueError(f"{file}: kind {kind!r} is unknown: valid are {', '.join(KINDS)}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{file}: arguments must be names with values, of {KINDS[kind].name}")
    valid = KINDS[kind].arguments()
    _refuse_unknown(arguments, valid, f"{file}: {KINDS[kind].name} has no argument")
    deployment = Deployment(file, kind, arguments, _seconds(content, file))
    try:
        asked = deployment.workers
    except (KeyError, TypeError) as error:
        needed = {"ssh": "hosts", "kubernetes": "n_workers (or replicas in a custom_cluster_spec)"}
        raise ValueError(
            f"{file}: the number of workers is not given: set {needed.get(kind, 'n_workers')} "
            "among the arguments"
        ) from error
    if not isinstance(asked, int) or asked < 1:
        raise ValueError(f"{file}: it asks for {asked} workers, and at least one is needed")
    return deployment


def _refuse_unknown(given: dict[str, Any], valid: Any, what: str) -> None:
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), list(valid), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{what} {name!r}{hint}: valid are {', '.join(valid)}")


def _seconds(content: dict[str, Any], file: Path) -> float:
    from .fill import seconds_of

    return seconds_of(str(content["wait"]), f"{file}: wait") if "wait" in content else WAIT_SECONDS


@contextlib.contextmanager
def started(deployment: Deployment) -> Iterator[Any]:
    """Starts the cluster of a file for the time of a with block; yields Dask's cluster.

    Raises ValueError with the words of the class where it does not start.
    """
    kind = KINDS[deployment.kind]
    start = kind.start()
    try:
        cluster = start(**deployment.arguments)
    except Exception as error:  # each class has its own kinds: no sbatch, no ssh, no permission
        raise ValueError(
            f"{deployment.file}: {kind.name} did not start ({type(error).__name__}: {error})"
        ) from error
    with cluster:
        yield cluster
