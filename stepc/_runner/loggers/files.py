"""Loggers that write text files: a JSON object or a CSV row per logged step."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stepc._language.kinds import HostMetrics
from stepc._runner.loggers import AbstractLogger
from stepc.errors import ConfigError


class JSONL(AbstractLogger):
    """Write one JSON object per logged step.

    Meaning: `{"step": 3, "loss": 2.5}`. JSON has no NaN and no infinity: such a number becomes null and is named, as in
      `{"step": 3, "loss": null, "nonfinite": {"loss": "nan"}}`. An event is `{"step": 3, "event": "failure", …}`.
    Why: each line is complete as soon as it is written, so a run that dies loses at most its last one.

    Args:
      path: the file; missing folders are created, and an existing file is appended to. A run that resumes from a
        checkpoint drops the metrics after it and keeps the events.
    Errors: ConfigError from `log` if a metric is called "step", "nonfinite" or "event".
    Example:
      >>> with JSONL("runs/first/metrics.jsonl") as logger: logger.log({"loss": 2.5}, step=1)  # doctest: +SKIP
    """

    reserved = ("step", "nonfinite", "event")
    shows_arrays = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = LineFile(self.path)

    def log(self, metrics: HostMetrics, step: int) -> None:
        """Write the metrics of one step, arrays as lists."""
        _refuse_taken(self.reserved, metrics, of="JSONL")
        values = {
            name: value if isinstance(value, float) else np.asarray(value).tolist() for name, value in metrics.items()
        }
        finite = {name: _finite(value) for name, value in values.items()}
        line = {"step": step, **finite}
        if nonfinite := {name: str(value) for name, value in values.items() if value != finite[name]}:
            line["nonfinite"] = nonfinite
        self._file.append(_encode(line) + "\n")

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        """Write an event."""
        self._file.append(json.dumps({**facts, "step": step, "event": name}) + "\n")

    def trim(self, step: int) -> None:
        """Drop the metrics of later steps."""

        def is_kept(line: str) -> bool:
            found = json.loads(line)
            return "event" in found or found["step"] <= step

        self._file.trim(is_kept)

    def close(self) -> None:
        self._file.close()


class CSV(AbstractLogger):
    """Write one row per logged step: the step, then each metric in a column of its own.

    Args:
      path: the file; missing folders are created, and an existing file is appended to. A run that resumes from a
        checkpoint drops the rows after it.
    Errors: ConfigError from `log` if a metric is called "step".
    A metric that appears later gets a new last column, for which the file is rewritten.
    Example:
      >>> with CSV("runs/first/metrics.csv") as logger: logger.log({"loss": 2.5}, step=1)  # doctest: +SKIP
    """

    reserved = ("step",)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = LineFile(self.path)
        header = next(csv.reader(complete_lines(self.path)), [])
        self._columns = header or ["step"]
        if not header:
            self._file.append(_csv_line(self._columns))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        _refuse_taken(self.reserved, metrics, of="CSV")
        if new := [name for name in metrics if name not in self._columns]:
            self._columns += new
            rows = list(csv.reader(complete_lines(self.path)))[1:]
            self._file.replace(_csv_line(row) for row in (self._columns, *([*row, *[""] * len(new)] for row in rows)))
        row = {"step": step, **metrics}
        self._file.append(_csv_line([str(row.get(column, "")) for column in self._columns]))

    def trim(self, step: int) -> None:
        """Drop the rows of later steps."""
        self._file.trim(lambda line: line.startswith("step") or int(line.partition(",")[0]) <= step)

    def close(self) -> None:
        self._file.close()


def _refuse_taken(reserved: tuple[str, ...], metrics: Mapping[str, Any], *, of: str) -> None:
    if taken := [name for name in reserved if name in metrics]:
        names = " and ".join(map(repr, taken))
        raise ConfigError(f"{of} uses {names} itself: rename the metric.")


_encode = json.JSONEncoder(allow_nan=False).encode


def _finite(value: Any) -> Any:  # Any: a number, or lists of them
    if isinstance(value, list):
        return list(map(_finite, value))
    return value if math.isfinite(value) else None


def _csv_line(cells: list[str]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow(cells)
    return written.getvalue()


class LineFile:
    """A text file to which lines are appended. A last line that a dying process left incomplete is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._rewrite(complete_lines(path))
        self.file = path.open("a", buffering=1, encoding="utf-8")

    def append(self, line: str) -> None:
        """Write a line; it is in the file when this returns."""
        self.file.write(line)

    def trim(self, is_kept: Callable[[str], bool]) -> None:
        """Leave only some of the lines."""
        self.file.close()
        self.replace(line for line in complete_lines(self.path) if is_kept(line))

    def replace(self, lines: Iterable[str]) -> None:
        """Write the file anew."""
        self.file.close()
        self._rewrite(lines)
        self.file = self.path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        self.file.close()

    def _rewrite(self, lines: Iterable[str]) -> None:
        """In one rename: a process that dies here leaves either the old file or the new."""
        text = "".join(lines).encode()
        if not self.path.exists() or text != self.path.read_bytes():
            new = self.path.with_name(f"{self.path.name}.new")
            new.write_bytes(text)
            new.replace(self.path)


def complete_lines(path: Path) -> list[str]:
    """The lines of a file that end in a newline."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    return lines if text.endswith("\n") else lines[:-1]
