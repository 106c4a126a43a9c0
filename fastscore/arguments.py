"""Arguments that are no numbers where numbers are meant."""


def check_number(argument: str, value: object, such_as: str) -> None:
    """Raise TypeError, naming the argument, where `value` is not one number; those of NumPy and torch are."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument}: {value!r:.80}, where a number is meant, such as {such_as}") from None
