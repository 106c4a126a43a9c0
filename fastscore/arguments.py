"""Arguments of another type than is meant, or out of their range, and packages that are not there: what several
functions refuse alike."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any


def check_number(argument: str, value: object, such_as: str) -> None:
    """Raise TypeError, naming the argument, where `value` is not one number; those of NumPy and torch are."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument}: {value!r:.80}, where a number is meant, such as {such_as}") from None


def check_whole(argument: str, value: object, such_as: str) -> None:
    """Raise TypeError, naming the argument, where `value` is no whole number."""
    check_number(argument, value, such_as)
    if not hasattr(value, "__index__"):
        raise TypeError(f"{argument}: {value!r:.80}, where a whole number is meant, such as {such_as}")


def check_flag(argument: str, value: object) -> None:
    """Raise TypeError, naming the argument, where `value` is neither a bool nor None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{argument}: {value!r:.80}, where True, False or None is meant")


def check_callable(argument: str, value: object, call: str) -> None:
    """Raise TypeError, naming the argument and how it is called, where `value` cannot be called."""
    if not callable(value):
        raise TypeError(f"{argument}: {value!r:.80}, where a function {call} is meant")


def check_path(argument: str, value: object, otherwise: str = "") -> None:
    """Raise TypeError, naming the argument, and what to do `otherwise`, where `value` is no path."""
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"{argument}: {type(value).__name__}, where a path is meant, as text or a pathlib.Path"
                        f"{otherwise}")


@contextmanager
def in_users_code(said: str) -> Iterator[None]:
    """Adds a note to an exception that the user's own code raises in the block: which code that is (from Python 3.11
    on; it is the user's, and comes through as it is)."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(said)
        raise


def check_fraction(fraction: float) -> None:
    """Raise TypeError for no number, ValueError for one that is no share of channels to remove, 0 <= fraction < 1."""
    check_number("fraction", fraction, "0.3")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction}; it is the share of channels to remove, 0 <= fraction < 1")


def needed(package: str, said: str, install: str) -> Any:
    """A package that only some need. Raises ImportError where there is none: what is `said`, why, and what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{said} ({error}): pip install {install}") from error
