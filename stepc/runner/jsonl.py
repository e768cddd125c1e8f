"""A logger that keeps metrics as lines of JSON, for programs to read; it must not know what they mean."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from stepc.errors import ConfigError
from stepc.runner.lines import cut

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
        cut(self.path, lambda line: True)
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
        cut(self.path, lambda line: _is_kept(line, step))
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
