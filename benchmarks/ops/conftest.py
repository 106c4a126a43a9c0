"""Benchmarks of one group stand in one table; `pytest benchmarks` prints them."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[[str, Callable[[], object], int], None]:
    """measure(group, function, bytes): times `function` and notes its GB/s."""
    def run(group: str, function: Callable[[], object], size: int) -> None:
        benchmark.group = group
        function()  # compiles, allocates
        benchmark(function)
        if benchmark.stats is not None:  # None under --benchmark-disable
            benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 2)
    return run
