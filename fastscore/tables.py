"""Records as tables: of HTML, for notebooks, and of pandas, which is imported where it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastscore.arguments import needed
from fastscore.wording import counted

Record = Mapping[str, Any]


class Table(ABC):
    """What notebooks show as a table, and pandas takes as one."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows."""

    @property
    @abstractmethod
    def _remarks(self) -> Sequence[str]:
        """What is said below them."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {counted(len(self.records()), 'row')}; {next(iter(self._remarks), '')}>"

    def to_pandas(self) -> Any:
        """A DataFrame of `records()`. Raises ImportError, naming the way out, without pandas."""
        return frame(self.records())

    def _repr_html_(self) -> str:
        return html(self.records(), *self._remarks)


def html(records: Sequence[Record], *notes: str) -> str:
    """A table of records with the same keys, which are its headings, and a line for each note. All of it is escaped."""
    parts = []
    if records:
        head = "".join(f"<th>{escape(str(key).replace('_', ' '))}</th>" for key in records[0])
        rows = "".join("<tr>" + "".join(f"<td>{escape(_shown(value))}</td>" for value in record.values()) + "</tr>"
                       for record in records)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    return "".join([*parts, *(f"<p>{escape(note)}</p>" for note in notes)])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def frame(records: Iterable[Record]) -> Any:
    """A pandas.DataFrame, a row for each record. Raises ImportError, naming the way out, without pandas."""
    return needed("pandas", "to_pandas needs pandas", "pandas").DataFrame(list(records))
