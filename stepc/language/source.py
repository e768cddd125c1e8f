"""Where in the user's source a word was written, and how. It knows no word.

A word that is given a function cannot print it from its value: optax returns closures. So the text of the
argument is read from the call itself (the byte code keeps its columns), and kept for printing only.
"""

import ast
import linecache
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

_LONGEST_QUOTE = 60  # columns; a longer argument is printed by its name


@dataclass(frozen=True)
class Site:
    """A line of the user's source."""

    file: str
    line: int

    def __str__(self) -> str:
        # A notebook cell or a prompt has a file name that is nowhere.
        return f"{Path(self.file).name}:{self.line}" if Path(self.file).exists() else f"line {self.line}"


@dataclass(frozen=True)
class Quoted:
    """A value that prints as the source that made it. The text takes no part in `==` and `hash`."""

    value: Any  # Any: an optimizer or a loss, whose own type says nothing
    text: str = field(compare=False)

    def __repr__(self) -> str:
        return self.text


def site_of_caller() -> Site:
    """The line outside stepc that is being executed."""
    frame = _frame_of_caller()
    return Site(frame.f_code.co_filename, frame.f_lineno)


def quoted_argument(value: object, *, position: int, keyword: str, otherwise: str) -> Quoted:
    """`value`, printed as the argument was written in the call outside stepc that is being executed."""
    code = _code_of(_frame_of_caller())
    call = _parsed_call(code)
    if call is None:
        return Quoted(value, otherwise)
    named = [one.value for one in call.keywords if one.arg == keyword]
    starred = any(isinstance(one, ast.Starred) for one in call.args)
    given = named or ([] if starred else call.args[position : position + 1])
    text = ast.get_source_segment(code, given[0]) if given else None
    if text is None or len(text) > _LONGEST_QUOTE or "\n" in text:
        return Quoted(value, otherwise)
    return Quoted(value, text)


def _frame_of_caller() -> FrameType:
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        frame = frame.f_back
    return frame


def _is_ours(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    package = module.partition(".")[0]
    # The programs that come with stepc write pipelines as any user does. The checkers of annotations in our
    # tests put frames of their own between the user and us.
    if package == "stepc":
        return not module.startswith("stepc.programs")
    return package in ("beartype", "jaxtyping") or frame.f_code.co_filename.startswith("<@beartype")


def _code_of(frame: FrameType) -> str:
    """The text of the expression that the frame is evaluating; empty where it cannot be read."""
    line, end_line, start, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    if line is None or end_line is None or start is None or end is None:
        return ""
    lines = [text.encode() for text in linecache.getlines(frame.f_code.co_filename)[line - 1 : end_line]]
    if not lines:
        return ""
    lines[-1] = lines[-1][:end]  # first: on one line, the start moves the end
    lines[0] = lines[0][start:]
    return b"".join(lines).decode()


def _parsed_call(code: str) -> ast.Call | None:
    try:
        expression = ast.parse(code, mode="eval").body
    except SyntaxError:
        return None
    return expression if isinstance(expression, ast.Call) else None
