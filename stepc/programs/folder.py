"""Where a run of `stepc train` lies: its folder is made, found again or refused; it must not know what is trained."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

import stepc as sc

ABOUT, METRICS, PICTURE, SAMPLE, KEPT = "job.json", "metrics.jsonl", "loss.png", "sample.txt", "checkpoints"


@dataclass(frozen=True)
class Folder:
    """The files of one run. Its `job.json` says of which: a run goes on only as what it began as."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Every loss, and what happened."""
        return self.path / METRICS

    @property
    def picture(self) -> Path:
        """The losses, drawn."""
        return self.path / PICTURE

    @property
    def checkpoints(self) -> Path:
        """What a second run of the same command goes on from."""
        return self.path / KEPT

    def is_finished(self) -> bool:
        """Whether the run ended as it was to end: the sample is the last thing that is written."""
        return (self.path / SAMPLE).exists()

    def finish(self, sample: str) -> None:
        """Write the sample."""
        (self.path / SAMPLE).write_text(sample, encoding="utf-8")

    def begin(self, about: Mapping[str, object]) -> None:
        """Make the folder if it is not there, and drop the log of a run that died before its first checkpoint.

        Errors: ConfigError if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise sc.ConfigError(f"The folder {self.path} cannot be made: {error.strerror}.") from error
        (self.path / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if not self.has_checkpoint():
            self.metrics.unlink(missing_ok=True)

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return self.checkpoints.is_dir() and any(one.name.isdecimal() for one in self.checkpoints.iterdir())


def found(wanted: Path | None, about: Mapping[str, object], *, fresh: bool) -> Folder:
    """The folder of a run that goes on or begins; nothing is made yet.

    Args:
      about: what makes a run this one, and no other.
      fresh: forget the run that is there.
    Errors: ConfigError if the folder holds another run, or what is no run.
    """
    if wanted is None:
        return Folder(_unused())
    if not wanted.exists() or wanted.is_dir() and not any(wanted.iterdir()):
        return Folder(wanted)
    if not (wanted / ABOUT).is_file():
        raise sc.ConfigError(
            f"{wanted} exists and holds no run of `stepc train`; a run never overwrites what is there.",
            suggestion="Name another folder, or none for one named after the date and time.",
        )
    if fresh:
        for name in (METRICS, PICTURE, SAMPLE):
            (wanted / name).unlink(missing_ok=True)
        shutil.rmtree(wanted / KEPT, ignore_errors=True)
        (wanted / ABOUT).unlink()
        return Folder(wanted)
    saved = json.loads((wanted / ABOUT).read_text(encoding="utf-8"))
    facts = [
        (name, f"began with {saved.get(name, 'nothing')}, asked for {about.get(name, 'nothing')}")
        for name in [*about, *(one for one in saved if one not in about)]
        if saved.get(name) != about.get(name)
    ]
    if facts:
        remedy = "Ask for what it began with, name another folder, or forget it with --fresh."
        raise sc.ConfigError(f"{wanted} holds another run.", facts=facts, suggestion=remedy)
    return Folder(wanted)


def _unused() -> Path:
    """A folder named after the date and time, that this call has made: to ask first, and then to make, is a race."""
    now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in count(1):
        folder = Path("runs", now if number == 1 else f"{now}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("counting does not end")
