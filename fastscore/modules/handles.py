"""Changes of modules in place that can be taken back, or left."""

from abc import ABC, abstractmethod
from typing import Any, TypeVar

H = TypeVar("H", bound="Handle")


class Handle(ABC):
    """Modules are changed until `remove`, or the end of a block."""

    @abstractmethod
    def remove(self) -> None:
        """Give the modules back what they had."""

    @abstractmethod
    def make_permanent(self) -> None:
        """Let the modules be what they are now for good."""

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()
