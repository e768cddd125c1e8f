"""The directory of one run: created, resumed or refused, and its curve drawn. It does not know what is trained."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import stepc as sc

JOB, METRICS, CURVE, SAMPLE, CHECKPOINTS = "job.json", "metrics.jsonl", "loss.png", "sample.txt", "checkpoints"
TITLE = "A small GPT learns the source of Python's standard library, byte by byte"
TRAINING_COLOR, VALIDATION_COLOR, BIGRAM_COLOR = "#9bb8d3", "#c0392b", "#555555"


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. `job.json` identifies it: a run is resumed only with the options it began with."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Every logged loss, and every event."""
        return self.path / METRICS

    @property
    def curve(self) -> Path:
        """The losses, drawn."""
        return self.path / CURVE

    @property
    def checkpoints(self) -> Path:
        """What a second run of the same command resumes from."""
        return self.path / CHECKPOINTS

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return self.checkpoints.is_dir() and any(one.name.isdecimal() for one in self.checkpoints.iterdir())

    def is_finished(self) -> bool:
        """Whether the run came to its end: the sample is the last file that is written."""
        return (self.path / SAMPLE).exists()

    def begin(self, identity: Mapping[str, object]) -> None:
        """Create the directory if it does not exist, and delete the log of a run that died before its first checkpoint.

        Errors: ConfigError if it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise sc.ConfigError(f"Cannot create the directory {self.path}: {error.strerror}.") from error
        (self.path / JOB).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        if not self.has_checkpoint():
            self.metrics.unlink(missing_ok=True)

    def finish(self, sample: str) -> None:
        """Write the sample."""
        (self.path / SAMPLE).write_text(sample, encoding="utf-8")

    def draw_curve(self, *, bigram: float) -> None:
        """Draw both losses against the step, with the bigram's as a horizontal line.

        Why: the points come from the file of metrics, which also holds what was logged before an interruption.
        Units: nats per byte.
        """
        training, validation = self._points("loss"), self._points("validation_loss")
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # no global figure and no display, so a server and a test draw the same
        axes = figure.add_subplot()
        axes.axhline(bigram, color=BIGRAM_COLOR, linestyle="--", linewidth=1, label=f"bigram {bigram:.2f}")
        axes.plot(*training, color=TRAINING_COLOR, linewidth=1.2, label="training")
        last = f" {validation[1][-1]:.2f}" if validation[1] else ""
        axes.plot(
            *validation,
            marker="o",
            linestyle="none",
            color=VALIDATION_COLOR,
            clip_on=False,  # the first point is on the edge
            label=f"validation{last}",
        )
        axes.set(xlabel="step", ylabel="loss (nats per byte)", title=TITLE)
        axes.margins(x=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(self.curve)

    def _points(self, name: str) -> tuple[list[int], list[float]]:
        lines = map(json.loads, self.metrics.read_text(encoding="utf-8").splitlines())
        points = [(line["step"], line[name]) for line in lines if "event" not in line and line.get(name) is not None]
        return [step for step, _ in points], [loss for _, loss in points]


def open_run(wanted: Path | None, identity: Mapping[str, object], *, fresh: bool) -> RunDirectory:
    """The directory of a run to begin or to resume. Only a directory named after the time is created here.

    Args:
      identity: what makes a run this one and no other.
      fresh: delete the run that is there.
    Errors: ConfigError if the directory holds another run, or something else.
    """
    if wanted is None:
        return RunDirectory(_new_directory())
    if not wanted.exists() or wanted.is_dir() and not any(wanted.iterdir()):
        return RunDirectory(wanted)
    if not (wanted / JOB).is_file():
        raise sc.ConfigError(
            f"{wanted} exists and is not the directory of a run; a run never overwrites other files.",
            suggestion="Name another directory, or leave out --out for one named after the date and time.",
        )
    if fresh:
        for name in (METRICS, CURVE, SAMPLE):
            (wanted / name).unlink(missing_ok=True)
        shutil.rmtree(wanted / CHECKPOINTS, ignore_errors=True)
        (wanted / JOB).unlink()
        return RunDirectory(wanted)
    saved = json.loads((wanted / JOB).read_text(encoding="utf-8"))
    facts = [
        (name, f"began with {saved.get(name, 'nothing')}, now {identity.get(name, 'nothing')}")
        for name in [*identity, *(name for name in saved if name not in identity)]
        if saved.get(name) != identity.get(name)
    ]
    if facts:
        remedy = "Use the options it began with, name another directory, or delete the run with --fresh."
        raise sc.ConfigError(f"{wanted} holds a run with other options.", facts=facts, suggestion=remedy)
    return RunDirectory(wanted)


def _new_directory() -> Path:
    """A new directory named after the date and time. Checking first and creating later would be a race."""
    now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in count(1):
        directory = Path("runs", now if number == 1 else f"{now}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise AssertionError("count() is endless")
