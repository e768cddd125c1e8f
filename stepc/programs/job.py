"""What `stepc train` can be asked for, as one frozen value; it must not import what only the demo extra installs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import stepc as sc
from stepc.programs.gpt import Size

Value = TypeVar("Value")
# How a value is read from a word of the command line.
Reader: TypeAlias = Callable[[str], int | float | Path]


def _option(
    default: Value,
    unit: str,
    meaning: str,
    *,
    reader: Reader = int,
    least: int = 1,
    below: float = math.inf,
    shown: str = "",
) -> Value:
    """A field with all that the command line says about it."""
    about = {"unit": unit, "meaning": meaning, "reader": reader, "least": least, "below": below}
    return field(default=default, metadata={**about, "shown": shown or str(default)})


def _flag(meaning: str) -> Any:  # Any: to a type checker, a field is what it holds
    """A field that is false unless it is named."""
    return field(default=False, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Job:
    """Train a small GPT on the standard library's source. The fields are the options of `stepc train`.

    Errors: ConfigError that names every field whose value is out of range.
    """

    steps: int = _option(1000, "STEPS", "how many optimizer steps")
    batch: int = _option(16, "ROWS", "rows in the batch of one step; a multiple of k * devices")
    k: int = _option(4, "PARTS", "microbatches in one step, one after another")
    devices: int = _option(
        2, "DEVICES", "data-parallel devices of a process; simulated on a CPU, else at most those there"
    )
    seed: int = _option(0, "SEED", "of parameters, batches and sample", least=0)
    out: Path | None = _option(
        None,
        "FOLDER",
        "for metrics, picture and checkpoints; a run that is there goes on",
        reader=Path,
        shown="runs/<date>-<time>",
    )
    fresh: bool = _flag("forget the run in that folder, and begin anew")
    learning_rate: float = _option(1e-2, "RATE", "of adamw, at its peak", reader=float, least=0)
    dropout: float = _option(
        0.0, "RATE", "share of what each half of a block adds that training loses", reader=float, least=0, below=1.0
    )
    bf16: bool = _flag("compute the loss in bfloat16; parameters, gradients and validation stay in float32")
    distributed: bool = _flag("join the other processes of a SLURM, MPI or Kubernetes job")
    layers: int = _option(4, "BLOCKS", "transformer blocks")
    width: int = _option(64, "FEATURES", "features per position; a multiple of heads")
    heads: int = _option(4, "HEADS", "attention heads per block")
    context: int = _option(128, "BYTES", "how many bytes the model sees at once")
    text_bytes: int = _option(8_000_000, "BYTES", "how much source to read at most")
    validation_batches: int = _option(8, "BATCHES", "of 32 windows of held-out text, to be judged by")
    sample_bytes: int = _option(200, "BYTES", "how much to write at the end")

    def __post_init__(self) -> None:
        faults = []
        for one in fields(self):
            value = self.__dict__[one.name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least, below = one.metadata["least"], one.metadata["below"]
            if not least <= value < below:
                bound = "" if below == math.inf else f" and below {below:g}"
                faults.append((one.name, f"expected at least {least}{bound}, got {value}"))
        if faults:
            raise sc.ConfigError("A job cannot have these numbers.", facts=faults)
        _ = self.size  # checks its own numbers

    @property
    def identity(self) -> dict[str, object]:
        """What makes a run of it this one, and no other: all but where it lies."""
        return {
            one.name: self.__dict__[one.name] for one in fields(self) if one.name not in ("out", "fresh", "distributed")
        }

    @property
    def size(self) -> Size:
        """The size of the model."""
        return Size(layers=self.layers, width=self.width, heads=self.heads, context=self.context)
