"""Checks the arguments of one call and refuses all faults in one message. It knows no argument by name."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import jax
import numpy as np

from stepc.errors import ConfigError, FieldTypeError


@dataclass
class ArgumentFaults:
    """What is wrong with the arguments of `function`.

    Each method looks at one argument. `refuse` raises a FieldTypeError if all faults are wrong types, and a ConfigError
    if a value is wrong.
    """

    function: str
    _facts: list[tuple[str, str]] = field(default_factory=list, init=False)
    _has_wrong_value: bool = field(default=False, init=False)
    _remedies: list[str] = field(default_factory=list, init=False)

    def refuse(self) -> None:
        """Raise for what was found, if anything was."""
        if self._facts:
            kind = ConfigError if self._has_wrong_value else FieldTypeError
            remedies = "\n".join(dict.fromkeys(self._remedies)) or None
            raise kind(f"Invalid arguments to `{self.function}`.", facts=self._facts, suggestion=remedies)

    def wrong_type(self, name: str, expected: str, got: object) -> None:
        # The text of a tree of arrays has as many lines as the model has leaves, and is read from the devices.
        has_arrays = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(got))
        shown = f"{type(got).__name__} of arrays" if has_arrays else repr(got)
        self._facts.append((name, f"expected {expected}, got {shown}"))

    def mistaken(self, name: str, expected: str, got: str, remedy: str) -> None:
        """Something that was recognised: `got` says what it is, and the remedy is certain."""
        self._facts.append((name, f"expected {expected}, got {got}"))
        self._remedies.append(remedy)

    def wrong_value(self, name: str, expected: str, got: object) -> None:
        self.wrong_type(name, expected, got)
        self._has_wrong_value = True

    def count(self, name: str, got: object, *, least: int = 1, optional: bool = False) -> None:
        """An integer of at least `least`, which is 0 or 1."""
        expected = ("a positive integer" if least else "a non-negative integer") + " or None" * optional
        if got is None and optional:
            return
        if type(got) is not int:
            self.wrong_type(name, expected, got)
        elif got < least:
            self.wrong_value(name, expected, got)

    def number(
        self, name: str, got: object, expected: str, is_valid: Callable[[float], bool], *, optional: bool = False
    ) -> None:
        """A number that is valid."""
        if got is None and optional:
            return
        if not isinstance(got, int | float) or isinstance(got, bool):
            self.wrong_type(name, expected, got)
        elif not is_valid(got):
            self.wrong_value(name, expected, got)

    def seconds(self, name: str, got: object) -> None:
        """A positive time, or None."""
        self.number(name, got, "a positive number or None", lambda seconds: seconds > 0, optional=True)

    def choice(self, name: str, got: object, choices: Collection[str]) -> None:
        """One of some texts."""
        *first, last = (f'"{choice}"' for choice in choices)
        expected = f"{', '.join(first)} or {last}"
        if not isinstance(got, str):
            self.wrong_type(name, expected, got)
        elif got not in choices:
            self.wrong_value(name, expected, got)

    def instance(self, name: str, got: object, kind: type | tuple[type, ...], expected: str) -> bool:
        """A value of a type; whether it is one."""
        is_instance = isinstance(got, kind)
        if not is_instance:
            self.wrong_type(name, expected, got)
        return is_instance

    def callable_(self, name: str, got: object, expected: str, *, optional: bool = False) -> None:
        """Something to call."""
        if not (callable(got) or got is None and optional):
            self.wrong_type(name, expected, got)
