"""Files of one line a step: cut at the step that a run goes on from, torn last lines dropped. It knows no format."""

from collections.abc import Callable
from pathlib import Path


def whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; one that a dying process left half-written is not among them."""
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    return text.splitlines(keepends=True) if text.endswith("\n") else text.splitlines(keepends=True)[:-1]


def cut(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Leave only the lines that are kept, in one move: a process that dies here leaves the old file or the new."""
    lines = whole_lines(path)
    if kept := [line for line in lines if is_kept(line)]:
        if "".join(kept).encode() == path.read_bytes():
            return
    elif not path.exists():
        return
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)
