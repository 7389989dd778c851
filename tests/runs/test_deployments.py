"""Files that describe a cluster: what is refused, and what the examples lead to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lib import paths
from lib.runs import cluster, deployments

EXAMPLES = paths.ROOT / "clusters"


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("kind: [", "is no YAML"),
        ("- local", "holds no kind and wait and arguments"),
        ("kind: pbs", "kind 'pbs' is unknown: valid are local, ssh, slurm, kubernetes"),
        ("kind: local\nworkers: 3", "unknown key 'workers': valid are kind, wait, arguments"),
        ("kind: local\narguments: 3", "arguments must be names with values, of LocalCluster"),
        (
            "kind: local\narguments: {n_worker: 3}",
            r"LocalCluster has no argument 'n_worker' \(did you mean n_workers\?\): valid are",
        ),
        (
            "kind: slurm\narguments: {n_workers: 1, walltim: 1}",
            r"SLURMCluster has no argument 'walltim' \(did you mean walltime\?\): .*account.*queue",
        ),
        ("kind: slurm\narguments: {cores: 3}", "number of workers is not given: set n_workers"),
        ("kind: ssh\narguments: {}", "number of workers is not given: set hosts"),
        ("kind: ssh\narguments: {hosts: [a]}", "asks for 0 workers"),
        ("kind: local\nwait: 3 h\narguments: {n_workers: 1}", "wait '3 h' is no time"),
    ],
)
def test_a_file_that_is_refused(tmp_path, text, error):
    with pytest.raises(ValueError, match=error):
        deployments.read(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cluster file at .*folder clusters"):
        deployments.read(tmp_path / "cluster.yaml")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", None)
    with pytest.raises(ValueError, match=r"needs the package dask_kubernetes.*\[kubernetes\]"):
        deployments.read(EXAMPLES / "kubernetes.yaml")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"needs the package distributed.*\[cluster\]"):
        with cluster.opened("tcp://host:1"):
            pass


def test_a_cluster_that_does_not_start(tmp_path):
    """Without SLURM there is no sbatch."""
    text = "kind: slurm\narguments: {n_workers: 1, cores: nine, memory: 1GB}"
    with pytest.raises(ValueError, match="SLURMCluster did not start"):
        with cluster.opened(file=written(tmp_path, text)):
            pass


def test_the_job_script_of_slurm():
    from dask_jobqueue.slurm import SLURMJob

    deployment = deployments.read(EXAMPLES / "slurm.yaml")
    arguments = {k: v for k, v in deployment.arguments.items() if k != "n_workers"}
    script = SLURMJob("tcp://login:8786", name="one", **arguments).job_script().splitlines()
    for line in ("-p gpu", "--cpus-per-task=8", "--mem=56G", "-t 12:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in script
    exported = {line.split("=")[0] for line in script if line.startswith("export")}
    assert exported == {"export MOE_DATA", "export MOE_WEIGHTS", "export MOE_CACHE"}
    command = next(line for line in script if "dask_worker" in line).split()
    assert command[:4] == [
        "/srv/moe/.venv/bin/python",
        "-m",
        "distributed.cli.dask_worker",
        "tcp://login:8786",
    ]
    assert _options(command) == ("1", {"GPU": 1, "MEMORY": 60e9})
    assert deployment.workers == 8 and deployment.wait == 7200


def _options(command: list[str]) -> tuple[str, dict[str, float]]:
    """The threads and the resources that Dask's own command line reads of a worker's arguments."""
    from distributed.cli.dask_worker import main as dask_worker

    arguments = command[command.index("tcp://login:8786") :]
    given = dask_worker.make_context("dask worker", list(arguments)).params
    pairs = (pair.split("=") for pair in given["resources"].split(","))
    return str(given["nthreads"]), {name: float(amount) for name, amount in pairs}


def test_the_manifest_of_kubernetes():
    content = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    manifest = content["arguments"]["custom_cluster_spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    pod = manifest["spec"]["worker"]["spec"]
    [worker], [scheduler] = pod["containers"], manifest["spec"]["scheduler"]["spec"]["containers"]
    assert worker["args"][:2] == ["dask", "worker"] and scheduler["args"][:2] == [
        "dask",
        "scheduler",
    ]
    assert _options(["tcp://login:8786", *worker["args"][2:]]) == ("1", {"GPU": 1, "MEMORY": 60e9})
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": 1, "cpu": "8", "memory": "60Gi"}
    folders = {entry["name"]: entry["value"] for entry in worker["env"]}
    mounts = [mount["mountPath"] for mount in worker["volumeMounts"]]
    assert set(folders) == {"MOE_DATA", "MOE_WEIGHTS", "MOE_CACHE"}
    assert all(any(Path(f).is_relative_to(m) for m in mounts) for f in folders.values())
    assert {m["name"] for m in worker["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    service = manifest["spec"]["scheduler"]["service"]
    ports = {port["name"]: port["containerPort"] for port in scheduler["ports"]}
    assert {p["targetPort"]: p["port"] for p in service["ports"]} == ports
    assert service["selector"]["dask.org/cluster-name"] == manifest["metadata"]["name"]


@pytest.mark.parametrize("name", ["ssh", "slurm", "kubernetes"])
def test_an_example_says_that_it_was_not_run(name):
    head = (EXAMPLES / f"{name}.yaml").read_text().partition("\nkind:")[0]
    assert "Not run by the project's tests" in head
