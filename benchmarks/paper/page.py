"""Puts the tables that the other commands wrote into the page that talks about them.

    python -m benchmarks.paper.page

In docs/paper.md a comment `<!-- FILE.md: TITLE -->` stands before a table: that below the heading TITLE in
benchmarks/results/paper/FILE.md, or the file's first where no title is given.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "paper.md", ROOT / "benchmarks" / "results" / "paper"
PLACE = re.compile(r"^<!-- (?P<file>[\w-]+\.md)(: (?P<title>.+))? -->\n(\|.*\n)*", re.MULTILINE)


def table(text: str, title: str | None) -> str:
    """The first table below a heading (of the whole text without one). Raises ValueError where there is none."""
    below = text if title is None else text.partition(f"# {title}\n")[2]
    found = re.search(r"(^\|.*\n)+", below, re.MULTILINE)
    if found is None:
        raise ValueError(f"no table below the heading {title!r}")
    return found[0]


def refreshed(page: str, results: Path = RESULTS) -> str:
    """The page with its tables as they are in the files of `results`."""
    return PLACE.sub(lambda place: place[0].split("\n")[0] + "\n"
                     + table((results / place["file"]).read_text(), place["title"]), page)


def main() -> None:
    PAGE.write_text(refreshed(PAGE.read_text()))
    print(PAGE)


if __name__ == "__main__":
    main()
