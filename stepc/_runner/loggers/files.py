"""Files of one line a step: cut at the step that a run goes on from, torn last lines dropped. It knows no format."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from stepc.errors import ConfigError


def complete_lines(path: Path) -> list[str]:
    """The lines that were written to their end; one that a dying process left half-written is not among them."""
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    return text.splitlines(keepends=True) if text.endswith("\n") else text.splitlines(keepends=True)[:-1]


def truncate_lines(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Leave only the lines that are kept, in one move: a process that dies here leaves the old file or the new."""
    lines = complete_lines(path)
    if kept := [line for line in lines if is_kept(line)]:
        if "".join(kept).encode() == path.read_bytes():
            return
    elif not path.exists():
        return
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)


RESERVED = ("step", "nonfinite", "event")


class JSONL:
    """Write one JSON object per logged step.

    Meaning: `{"step": 3, "loss": 2.5}`; a number that JSON cannot hold becomes null and is named:
      `{"step": 3, "loss": null, "nonfinite": {"loss": "nan"}}`. An event is `{"step": 3, "event": "failure", …}`.
    Why: each line is complete as soon as it is written, so a run that dies leaves all but its last log.

    Args:
      path: the file; missing folders are made, and lines are added to a file that exists. A run that goes on from a
        checkpoint drops the steps after it; events stay.
    Errors: ConfigError from `log` if a metric is itself called "step", "nonfinite" or "event".
    Example:
      >>> with JSONL("runs/first/metrics.jsonl") as logger: logger.log({"loss": 2.5}, step=1)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        truncate_lines(self.path, lambda line: True)
        self._open()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        if taken := [name for name in RESERVED if name in metrics]:
            raise ConfigError(f"JSONL writes {' and '.join(map(repr, taken))} itself; a metric cannot have that name")
        values = {name: float(value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line = {"step": step, **values, **dict.fromkeys(nonfinite)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        """Write what happened."""
        self._file.write(json.dumps({**facts, "step": step, "event": name}) + "\n")

    def trim(self, step: int) -> None:
        """Drop the metrics of later steps."""
        self._file.close()
        truncate_lines(self.path, lambda line: _is_kept(line, step))
        self._open()

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        self._file.close()

    def _open(self) -> None:
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def __enter__(self) -> "JSONL":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_kept(line: str, step: int) -> bool:
    found = json.loads(line)
    return "event" in found or found["step"] <= step


class CSV:
    """Write one row per logged step: the step, then each metric in a column of its own.

    Args:
      path: the file; missing folders are made, and rows are added to a file that exists. A run that goes on from a
        checkpoint drops the rows after it.
    A metric that comes later gets a column at the end, and the file is written anew for it.
    Example:
      >>> with CSV("runs/first/metrics.csv") as logger: logger.log({"loss": 2.5}, step=1)  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        truncate_lines(self.path, lambda line: True)
        head = next(csv.reader(complete_lines(self.path)), [])
        self._columns = head or ["step"]
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        if not head:
            self._file.write(_line(self._columns))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        if new := [name for name in metrics if name not in self._columns]:
            self._widen(new)
        row = {"step": step, **metrics}
        self._file.write(_line([str(row.get(column, "")) for column in self._columns]))

    def trim(self, step: int) -> None:
        """Drop the rows of later steps."""
        self._file.close()
        truncate_lines(self.path, lambda line: line.startswith("step") or int(line.partition(",")[0]) <= step)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        self._file.close()

    def _widen(self, new: list[str]) -> None:
        self._file.close()
        rows = list(csv.reader(complete_lines(self.path)))[1:]
        self._columns += new
        wide = [_line(self._columns), *(_line([*row, *[""] * len(new)]) for row in rows)]
        self.path.write_text("".join(wide), encoding="utf-8")
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def __enter__(self) -> "CSV":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(cells: list[str]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow(cells)
    return written.getvalue()
