"""Numbers in sentences."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """"1 row", "1,024 rows"; many: where it is not `one` with an s, as "passes"."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
