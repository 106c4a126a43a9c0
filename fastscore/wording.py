"""Numbers, and exceptions, in sentences."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """"1 row", "1,024 rows"; many: where it is not `one` with an s, as "passes"."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def said(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines and lines[0] else type(error).__name__
