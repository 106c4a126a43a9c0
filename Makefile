# What a contributor runs. Tests run lint and type too: tests/docs/test_lint.py takes them from here.
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
	$(PYTHON) -m pytest -n 2 --dist loadfile

bench:
	$(PYTHON) -m benchmarks.ops.bandwidth
	$(PYTHON) -m benchmarks.peers
