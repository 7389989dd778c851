"""The pages without Jupyter Book: the settings it would use, given to Sphinx alone."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# as sphinx-build on a machine where Jupyter Book cannot be installed
SPHINX = """
import sys

sys.modules["jupyter_book"] = None
from sphinx.cmd.build import main

sys.exit(main(["-q", "-W", "-d", "_build/sphinx/doctrees", "book", "_build/sphinx/html"]))
"""


def test_sphinx_alone_builds_the_same_pages(tiny):
    static = tiny.root / "book" / "_static"
    shutil.copytree(ROOT / "book" / "_static", static, dirs_exist_ok=True)
    assert (built := tiny.build("-W")).returncode == 0, built.stderr
    makefile = (ROOT / "Makefile").read_text()
    [recipe] = re.findall(r"^book/conf\.py: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    environment = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for line in recipe.replace("$(BIN)/", "").replace("$@", "book/conf.py").splitlines():
        run = f"import subprocess; subprocess.run({line.strip()!r}, shell=True, check=True)"
        done = tiny.call("-c", run, **environment)
        assert done.returncode == 0, done.stderr
    assert "jupyter_book" not in (tiny.root / "book" / "conf.py").read_text()
    assert str(tiny.root) not in (tiny.root / "book" / "conf.py").read_text()

    done = tiny.call("-c", SPHINX)
    assert done.returncode == 0, done.stderr
    assert "2 in the book, 0 to run" in done.stdout  # notebooks are those of the other build
    one, other = (tiny.root / "_build" / name for name in ("html", "sphinx/html"))
    pages = sorted(path.relative_to(one) for path in one.rglob("*.html"))
    assert pages == sorted(path.relative_to(other) for path in other.rglob("*.html"))
    for page in pages:
        if page.name != "index.html":  # leads to the first page, in different words
            assert (one / page).read_text() == (other / page).read_text(), page
    assert "intro.html" in (other / "index.html").read_text()
