"""Loggers: what `run` calls with metrics and events. Those that own something are closed by `with` or `close()`."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class AbstractLogger(ABC):
    """A logger that must be closed. Closing twice is harmless."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left, and release what the logger owns."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
