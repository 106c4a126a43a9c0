"""Numbers, names and exceptions in sentences."""

from collections.abc import Sequence


def counted(number: int, one: str, many: str | None = None) -> str:
    """"1 row", "1,024 rows"; many: where it is not `one` with an s, as "passes"."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def and_like_it(names: Sequence[str]) -> str:
    """"fc", "fc and 2 like it"."""
    return f"{names[0]} and {len(names) - 1} like it" if names[1:] else names[0]


def and_more_layers(names: Sequence[str]) -> str:
    """"fc", "fc (and 2 more layers)"."""
    return f"{names[0]} (and {counted(len(names) - 1, 'more layer')})" if names[1:] else names[0]


def said(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines and lines[0] else type(error).__name__


def lasting(seconds: float) -> str:
    """So much time, roughly: "40 s", "3 min", "2.5 h"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 5940 else \
        f"{seconds / 3600:.1f} h"
