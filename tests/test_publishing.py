"""What goes with the book when it is given on: licence, citation, changes, the worked change, the
workflow of its pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
import zipfile
from datetime import date
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_citation_says_what_the_package_says():
    needed = {"cff-version", "message", "title", "authors"}
    assert needed <= set(CITATION) and CITATION["cff-version"] == "1.2.0"
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["title"] == yaml.safe_load((ROOT / "_config.yml").read_text())["title"]
    # an entity, and no invented person
    assert CITATION["authors"] == [{"name": f"The authors of {CITATION['title']}"}]


def test_the_newest_version_of_the_changelog_is_the_cited_one():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^]]+)\](?: - (\S+))?$", changelog, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1] == (PROJECT["version"], CITATION["date-released"])
    assert date.fromisoformat(versions[1][1])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    assert set(re.findall(r"^### (.+)$", changelog, re.MULTILINE)) <= kinds


def test_the_licence_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith(f"{PROJECT['license']} License\n")
    [author] = PROJECT["authors"]
    assert f"Copyright (c) {CITATION['date-released'][:4]} {author['name']}\n" in text
    for name in PROJECT["license-files"]:
        assert (ROOT / name).is_file()


def test_pictures_in_records_are_those_that_the_notice_names():
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    with_pictures = []
    for file in (ROOT / "data" / "results").glob("*/*.npz"):
        with zipfile.ZipFile(file) as arrays:
            if "picture.npy" in arrays.namelist():
                with_pictures.append(file)
    assert with_pictures and {file.parent.name for file in with_pictures} == {"durham"}
    assert "masked pretraining in data/results/durham" in notice
    for file in with_pictures:
        data = json.loads(file.with_suffix(".json").read_text())["spec"]["data"]
        assert data["name"] == "cifar100" and f"at {data['image_size']} pixels" in notice


# ---- the worked change


def test_the_change_in_contributing_applies_and_passes_its_test(tiny):
    [change] = re.findall(r"^```diff\n(.*?)^```$", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    (tiny.root / "hash.diff").write_text(change)
    applied = subprocess.run(
        ["git", "apply", "hash.diff"],
        cwd=tiny.root,
        capture_output=True,
        text=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tiny.root.parent)},
    )
    assert applied.returncode == 0, applied.stderr
    test = "tests/routers/test_hash.py"
    done = tiny.call("-m", "pytest", "-q", "-p", "no:cacheprovider", test)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_files_and_targets_that_contributing_names_are_there():
    named = re.findall(r"(?:lib|tests|notebooks|book|benchmarks|data)/[\w./]+\w", CONTRIBUTING)
    made = {"book/conf.py", "lib/routers/hash.py", "tests/routers/test_hash.py"}
    assert [path for path in named if not (ROOT / path).exists() and path not in made] == []
    assert set(re.findall(r"\bmake ([a-z]+)", CONTRIBUTING)) == {"test", "book", "sphinx"}


# ---- the workflow


@pytest.mark.parametrize("name", sorted(WORKFLOW["jobs"]))
def test_a_job_of_the_workflow_has_the_form_that_is_asked_for(name):
    job = WORKFLOW["jobs"][name]
    known = {"name", "needs", "runs-on", "timeout-minutes", "permissions", "environment", "steps"}
    assert set(job) <= known and {"runs-on", "steps"} <= set(job)
    needs = job.get("needs", [])
    assert set([needs] if isinstance(needs, str) else needs) <= set(WORKFLOW["jobs"]) - {name}
    assert set(job.get("permissions", {}).values()) <= {"read", "write", "none"}
    for step in job["steps"]:
        assert set(step) <= {"id", "name", "uses", "with", "run"}
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
            assert all(isinstance(value, str) for value in step.get("with", {}).values())


def test_the_workflow_builds_by_make_and_publishes_what_is_built():
    assert set(WORKFLOW) == {"name", "on", "permissions", "concurrency", "jobs"}
    assert set(WORKFLOW["on"]) == {"push", "workflow_dispatch"}
    build, deploy = (WORKFLOW["jobs"][name] for name in ("build", "deploy"))
    commands = [step["run"].split() for step in build["steps"] if "run" in step]
    assert commands == [["make", "book"]] and re.search(r"^book: ", MAKEFILE, re.MULTILINE)
    [upload] = [s for s in build["steps"] if "upload-pages-artifact" in s.get("uses", "")]
    assert upload["with"]["path"] == "_build/html"
    # what a deployment by deploy-pages needs
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}
    assert deploy["needs"] == "build" and deploy["environment"]["name"] == "github-pages"
    [step] = deploy["steps"]
    assert f"steps.{step['id']}.outputs.page_url" in deploy["environment"]["url"]
    [setup] = [s for s in build["steps"] if "setup-python" in s.get("uses", "")]
    assert PROJECT["requires-python"] == f">={setup['with']['python-version']}"
    comments = re.findall(r"uses: \S+  # v\d+\.\d+\.\d+$", _text(), re.MULTILINE)
    assert len(comments) == _text().count("uses:")


def _text() -> str:
    return (ROOT / ".github" / "workflows" / "pages.yml").read_text()
