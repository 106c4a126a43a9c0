# What a contributor runs. `pytest` runs lint and type too: tests/docs/test_lint.py takes them from here.
PYTHON ?= python

.PHONY: build lint type test bench

build:
	$(PYTHON) setup.py build_ext --inplace

lint:
	$(PYTHON) -m ruff check .
	clang-format --dry-run --Werror csrc/*.* csrc/*/*.*

type:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

bench:
	$(PYTHON) -m benchmarks.ops.bandwidth
	$(PYTHON) -m benchmarks.peers
