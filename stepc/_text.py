"""Sizes, times and tables as text, and how to split it. It imports nothing of stepc, so that errors can use it."""

from collections.abc import Iterable, Sequence


def readable_bytes(bytes_: int) -> str:
    """Print a number of bytes with a decimal unit: 128 B, 1.5 kB, 126.8 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(bytes_) >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_} B"


def readable_seconds(seconds: float) -> str:
    """Print a time with three digits: 1.25 ms, 340 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def aligned_table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Print rows as lines, each column as wide as its widest cell; no rows give no lines."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def indented_section(title: str, lines: Iterable[str]) -> str:
    """A title, and its lines below it, indented."""
    return "\n".join((title, *(f"  {line}".rstrip() for line in lines)))


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split a text at separators that are in no brackets and no quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
    return [*parts, text[start:]]
