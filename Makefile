# make demo         run everything on a simulated sample, in runs/demo
# make test         linters, types and tests, as CI runs them
# make slow         tests that take minutes
# make study        label studies on simulated scenes, in runs/study
# make study-docs   make study, and copy its figures and CSV tables to docs/study
# make docs         build the documentation: build/docs/index.html
# Each target first installs the package into .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.bocage-installed

.PHONY: demo docs study study-docs test slow lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bocage needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/bocage demo

study: $(STAMP)
	$(BIN)/bocage study demo

study-docs: $(STAMP)
	$(BIN)/bocage study demo --figures docs/study

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# A process more than cores, because many tests wait for other processes.
test: lint
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/site/pages.py build/docs-src
	$(BIN)/sphinx-build -E -W -q -b html -c docs/site build/docs-src build/docs
	@echo "documentation: build/docs/index.html"

# PART=K/N runs every N-th slow test, starting with the K-th.
slow: $(STAMP)
	$(BIN)/pytest -m slow -n 3 --dist worksteal $(if $(PART),--part $(PART))

clean:
	rm -rf runs/demo runs/study build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
