# Each target sets itself up. Without make: create a virtual environment, `pip install -r requirements.txt`, and type what the
# target says. PROFILE, MOE_DATA and MOE_CACHE are taken from the environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: book sphinx test browser faults bench bench-full clean

book: $(READY)
	$(BIN)/jupyter-book build book

# the same pages by plain Sphinx, into _build/sphinx, for the day on which Jupyter Book 1 can no longer be installed: book/conf.py
# is then kept, and `book` calls sphinx-build
sphinx: book/conf.py
	$(BIN)/sphinx-build --quiet -d _build/sphinx/doctrees book _build/sphinx/html

book/conf.py: $(READY) _config.yml $(wildcard book/_static/*)
	$(BIN)/jupyter-book config sphinx book
	sed "s/'jupyter_book', //" conf.py > $@
	rm conf.py

# three processes on two cores: many tests wait for the processes that they start
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# opens every page of the book that was built last in Chromium: apt-get install --no-install-recommends chromium
browser: $(READY)
	$(BIN)/python -m pytest tests/browser/check_*.py

# 50 kills each of grids, pools and builds, flipped bytes, full disks, rival builds: an hour or so; some of it: PARTS="pool disk"
faults: $(READY)
	$(BIN)/python tests/faults/stress.py $(PARTS)

# one table of ratios, under five minutes on two quiet cores; the full one takes far longer. Layers of other libraries: pip install -e .[bench]
bench: $(READY)
	$(BIN)/python -m benchmarks

bench-full: $(READY)
	$(BIN)/python -m benchmarks --full

# nothing is compiled ahead: Python compiles what is imported, and all modules of torch would take a minute
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

# the pages and executed notebooks; not the environment, the cache or the records
clean:
	rm -rf _build book/notebooks book/status_table.md book/verdicts_table.md book/coverage_table.md book/scale_table.md book/dense_models_table.md book/state.md book/front.md book/contradictions_table.md book/claims.json book/conf.py
