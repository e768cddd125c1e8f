"""Docstrings of the house template as definition lists: a part is a term, and so is each of its `Args`."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from sphinx.application import Sphinx

PART = re.compile(r"(Meaning|Why|Args|Attributes|Shapes|Units|Type|Errors|Example|Source):(?:\s+|$)(.*)")
ARGUMENT = re.compile(r"  (\w[\w, ]*): (.*)")


def as_definitions(lines: Iterable[str]) -> Iterator[str]:
    """The docstring in reStructuredText."""
    summary, _, rest = "\n".join(lines).strip().partition("\n\n")
    yield from (escaped(" ".join(summary.split())), "")
    for part, text in parts_of(rest.splitlines()):
        body = list(arguments(text)) if part in ("Args", "Attributes") else [text]
        if part == "Errors":
            body = [re.sub(r"(?<![\w.`])(\w+Error)\b", r"`\1`", text)]
        if part == "Example":
            body = [textwrap.dedent(text).strip("\n")]
        elif part not in ("Args", "Attributes"):
            body = ["\n\n".join(escaped(" ".join(one.split())) for one in body[0].split("\n\n"))]
        if part:
            yield from (part, textwrap.indent("\n".join(body), "  "), "")
        else:
            yield from (*body, "")


def parts_of(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each part with its text; what stands at the margin after a part, and belongs to none, has no name."""
    name, text = "", []
    for line in lines:
        part = PART.match(line)
        outside = part is None and name and line and not line.startswith(" ")
        if part or outside:
            if any(text):
                yield name, "\n".join(text)
            name, text = (part[1], [part[2]]) if part else ("", [line])
        else:
            text.append(line)
    if any(text):
        yield name, "\n".join(text)


def arguments(text: str) -> Iterator[str]:
    """A definition list of the arguments."""
    definitions: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if found := ARGUMENT.fullmatch(line):
            definitions.append((found[1], [found[2]]))
        elif line.strip() and definitions:
            definitions[-1][1].append(line.strip())
    for name, words in definitions:
        yield f"``{name}``\n  {escaped(' '.join(words))}\n"


def escaped(text: str) -> str:
    """Text with code between single backticks, as reStructuredText."""
    pieces = text.split("`")
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = f"``{piece}``"
        else:
            pieces[index] = re.sub(r"([\\*|_<])", r"\\\1", piece)
    return _beside_words("".join(pieces))


def _beside_words(text: str) -> str:
    """Literals that touch a word, such as `k`s: reStructuredText wants something between."""
    return re.sub(r"(``)(?=\w)(?<=\w``)", r"\1\\ ", text)


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = "\n".join(as_definitions(lines)).splitlines() if lines else []


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
