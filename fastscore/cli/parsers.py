"""How a command line is read: errors of one line, that say what may be meant."""

import argparse
import difflib
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others here."""

    @property
    def options(self) -> frozenset[str]:
        """Every option, as it is typed."""
        return frozenset(self._option_string_actions)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what a command has no option of is an error at once, which says what may be meant."""
        typed = list(args if self.get_default("parser") is self else ())  # of a command
        for word in itertools.takewhile(lambda word: word != "--", typed):
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self.options:
                self.error(f"{option}: there is no such option{_meant(option, self.options)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = _meant(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{meant}") from None

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        self.exit(2, f"fastscore: error: {message} (see {self.prog} --help)\n")


def _meant(word: str, known: Iterable[str]) -> str:
    """What is said of the one of `known` that a word may be a slip of; empty where it is like none."""
    named = {name.lstrip("-"): name for name in known}  # hyphens are alike in all of them
    close = difflib.get_close_matches(word.lstrip("-"), named, 1)
    return f"; did you mean {named[close[0]]}?" if close else ""


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], None], usage: str, text: str,
                description: str, examples: str) -> Parser:
    """A command of `fastscore`: run is called with its arguments. usage: what it cannot do without; text: of one line;
    examples: a command a line."""
    lines = "".join(f"\n  {line}" for line in examples.strip().splitlines())
    command: Parser = commands.add_parser(name, usage=f"fastscore {name} {usage}[options]", help=text,
                                          description=description, epilog=f"examples:{lines}",
                                          formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    command.set_defaults(run=run, command=name, parser=command)
    return command


def add_json(command: argparse.ArgumentParser, what: str) -> None:
    """--json."""
    command.add_argument("--json", action="store_true", help=f"print {what} as JSON instead of a table")
