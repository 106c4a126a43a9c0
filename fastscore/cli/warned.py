"""What fastscore warns of, on the command line: one line, without the line of code that it comes from."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastscore.cli import processes

_PACKAGE = Path(__file__).parents[1]


@contextmanager
def in_one_line(spelled: Callable[[str], str]) -> Iterator[None]:
    """Within, fastscore's own warnings are lines on stderr; of several processes, the first says them. Others stay as
    they are.

    spelled: a text with options as they are typed.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
            if not Path(filename).is_relative_to(_PACKAGE):
                show(message, category, filename, *rest)
            elif processes.rank_and_world_size()[0] == 0:
                print(f"fastscore: warning: {spelled(str(message))}", file=sys.stderr)

        warnings.showwarning = tell  # type: ignore[assignment]
        yield
