"""A logger that keeps metrics as a table of comma-separated values, for spreadsheets."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from stepc.runner.lines import cut, whole_lines


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
        cut(self.path, lambda line: True)
        head = next(csv.reader(whole_lines(self.path)), [])
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
        cut(self.path, lambda line: line.startswith("step") or int(line.partition(",")[0]) <= step)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        self._file.close()

    def _widen(self, new: list[str]) -> None:
        self._file.close()
        rows = list(csv.reader(whole_lines(self.path)))[1:]
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
