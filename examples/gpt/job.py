"""The options of the demo as one frozen value; it must not import what only the extra "demo" installs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import stepc as sc
from examples.gpt.model import Size

Value = TypeVar("Value")


def _option(
    default: Value,
    unit: str,
    help: str,
    *,
    type: Callable[[str], int | float | Path] = int,
    least: int = 1,
    below: float = math.inf,
    shown: str = "",
) -> Value:
    """A field with everything that the command line says about it."""
    about = {"unit": unit, "help": help, "type": type, "least": least, "below": below}
    return field(default=default, metadata={**about, "shown": shown or str(default)})


def _flag(help: str) -> Any:  # Any: to a type checker, a field is what it holds
    return field(default=False, metadata={"help": help})


@dataclass(frozen=True)
class Job:
    """One training job. Its fields are the options of `python -m examples.gpt`.

    Errors: ConfigError that names every field whose value is out of range.
    """

    steps: int = _option(1000, "STEPS", "number of optimizer steps")
    batch: int = _option(16, "ROWS", "rows in the batch of one step, a multiple of k * devices")
    k: int = _option(4, "COUNT", "microbatches per step, one after another")
    devices: int = _option(
        2, "DEVICES", "data-parallel devices per process: simulated on a CPU, else at most those that exist"
    )
    seed: int = _option(0, "SEED", "seed of parameters, batches and sample", least=0)
    out: Path | None = _option(
        None,
        "DIRECTORY",
        "directory for metrics, curve and checkpoints; a run that it holds is resumed",
        type=Path,
        shown="runs/<date>-<time>",
    )
    fresh: bool = _flag("delete the run in that directory and start over")
    learning_rate: float = _option(1e-2, "RATE", "peak learning rate of adamw", type=float, least=0)
    dropout: float = _option(
        0.0, "RATE", "dropout rate of what each half of a block adds", type=float, least=0, below=1.0
    )
    bf16: bool = _flag("compute the loss in bfloat16; parameters, gradients and validation stay in float32")
    distributed: bool = _flag("join the other processes of a SLURM, Open MPI or Kubernetes job")
    layers: int = _option(4, "BLOCKS", "transformer blocks")
    width: int = _option(64, "FEATURES", "features per position, a multiple of heads")
    heads: int = _option(4, "HEADS", "attention heads per block")
    context: int = _option(128, "BYTES", "bytes that the model sees at once")
    text_bytes: int = _option(8_000_000, "BYTES", "bytes of source to read, at most")
    validation_batches: int = _option(8, "BATCHES", "validation batches of 32 windows of held-out text")
    sample_bytes: int = _option(200, "BYTES", "bytes to generate at the end")

    def __post_init__(self) -> None:
        faults = []
        for option in fields(self):
            value = self.__dict__[option.name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least, below = option.metadata["least"], option.metadata["below"]
            if not least <= value < below:
                bound = "" if below == math.inf else f" and below {below:g}"
                faults.append((option.name, f"expected at least {least}{bound}, got {value}"))
        if faults:
            raise sc.ConfigError("Invalid options.", facts=faults)
        _ = self.size  # checks its own numbers

    @property
    def identity(self) -> dict[str, object]:
        """What makes a run this one and no other: everything but where it is stored and who takes part."""
        left_out = ("out", "fresh", "distributed")
        return {option.name: self.__dict__[option.name] for option in fields(self) if option.name not in left_out}

    @property
    def size(self) -> Size:
        """The size of the model."""
        return Size(layers=self.layers, width=self.width, heads=self.heads, context=self.context)
