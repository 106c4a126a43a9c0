"""What the library says, in the words of the command line: of keyword arguments, and in warnings."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastscore.cli import processes

_PACKAGE = Path(__file__).parents[1]
# keyword, and its value where there is one: in quotes, or a word
_KEYWORD = re.compile(r"""(?<![\w./\\-])([a-z_]+)=(?:"([^"]*)"|'([^']*)'|(\w+(?:\.\w+)*))?(?![\w"'{(\[])""")
_OTHERWISE = {"calibration": "--images FOLDER"}  # keyword that the command line calls otherwise


def as_options(text: str, known: Collection[str], typed: Sequence[str] = ()) -> str:
    """`text` with options in place of the keyword arguments that it names: ablation="zero" is --ablation zero,
    compensate=False is --no-compensate.

    known: the options of the command; what is none of them stays as it is. typed: the words of the command line, whose
    own names stay, too (a file that is called seed=3.pth).
    """
    names = [word.partition("=")[2] if word.startswith("--") else word for word in typed]

    def option(found: re.Match[str]) -> str:
        keyword, *values = found.groups()
        name, value = f"--{keyword.replace('_', '-')}", next((each for each in values if each), "")
        asked = _OTHERWISE.get(keyword, name if value in ("", "True", "False") else f"{name} {value}")
        if value == "False":
            asked = f"--no-{name[2:]}" if f"--no-{name[2:]}" in known else f"no {name}"
        is_own = asked.removeprefix("no ").split()[0] in known and not any(f"{keyword}=" in word for word in names)
        return asked if is_own else found[0]

    return _KEYWORD.sub(option, text)


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
