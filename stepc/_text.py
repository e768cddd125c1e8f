"""Sizes, times and tables as text, and how to split it. It imports nothing of stepc, so that errors can use it."""

import re
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


def by_pattern(texts: Sequence[str], *, most: int) -> tuple[list[tuple[str, int]], int]:
    """At most so many of these texts, each with how many it stands for; and how many more there are.

    If there are more, those that differ only in the numbers of a path become one, `layers/*/w`. A path is in backticks,
    has a slash, or is the first word.
    """
    if len(texts) <= most:
        return [(text, 1) for text in texts], 0
    groups: dict[tuple[str, ...], list[list[str]]] = {}  # the numbers in the paths, by the text between them
    for text in texts:
        between, numbers = _numbers_in_paths(text)
        groups.setdefault(between, []).append(numbers)
    each: list[tuple[str, int]] = []
    for (first, *between), like in groups.items():
        shown = [same[0] if len(set(same)) == 1 else "*" for same in zip(*like, strict=True)]
        each.append((first + "".join(map(str.__add__, shown, between)), len(like)))
    return each[:most], sum(times for _, times in each[most:])


def _numbers_in_paths(text: str) -> tuple[tuple[str, ...], list[str]]:
    between: list[str] = []
    numbers: list[str] = []
    end = 0
    for path in _PATH.finditer(text):
        for number in _NUMBER.finditer(text, *path.span()):
            between.append(text[end : number.start()])
            numbers.append(number[0])
            end = number.end()
    return (*between, text[end:]), numbers


_NUMBER = re.compile(r"\d+")
_PATH = re.compile(r"`[^`\s]+`|[^\s`\0]+/[^\s`\0]+|^[^\s`\0]*[^\W\d][^\s`\0]*")


def few_rows(rows: Sequence[Sequence[str]], *, most: int = 24) -> list[Sequence[str]]:
    """Rows that begin with the path of a leaf, at most so many: those that differ only in a number of it are one."""
    shown, num_left = by_pattern(["\0".join(row) for row in rows], most=most)
    found: list[Sequence[str]] = []
    for text, times in shown:
        path, *cells = text.split("\0")
        found.append((f"{path} ({times:,} leaves)" if times > 1 else path, *cells))
    width = len(rows[0]) if rows else 0
    return [*found, (f"and {num_left:,} more", *[""] * (width - 1))] if num_left else found


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
