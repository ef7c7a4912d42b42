# make demo   set everything up in .venv and ask the bundled model about held-out images
# make test   lint, types, import rules, then the whole test suite
# make accuracy, make accuracy-video, make bench   regenerate the committed figures under benchmarks/results
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint accuracy accuracy-video bench clean

demo: .venv/installed
	$(BIN)/vlmprune demo

test: .venv/installed lint
	$(BIN)/pytest --numprocesses auto

# Linted as installed: there the mapped folders lie inside the package, as every tool expects.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/lint .
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vlmprune
	cd build/lint && ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache
	@rm -rf build

accuracy: .venv/installed
	$(BIN)/vlmprune sweep benchmarks/sweep.yaml
	$(BIN)/vlmprune report benchmarks/results/accuracy

accuracy-video: .venv/installed
	$(BIN)/vlmprune sweep benchmarks/sweep-video.yaml --no-timing
	$(BIN)/vlmprune report benchmarks/results/accuracy-video

bench: .venv/installed
	$(BIN)/python benchmarks/kernels.py

clean:
	rm -rf .venv out build *.egg-info

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vlmprune needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable '.[dev]'
	@touch $@
