"""The Python standard library's own source as bytes to learn from; it must not know any model."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64, Int32, UInt8

import stepc as sc

Bytes: TypeAlias = UInt8[np.ndarray, " _length"]
Windows: TypeAlias = dict[str, Int32[np.ndarray, "rows window"]]

NUM_BYTES = 256
# Tests, programs that others installed, and tables: a character map or a pickled grammar is not prose.
SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3")
)
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Text:
    """Bytes to learn from, and bytes of other files to be judged by."""

    train: Bytes
    held_out: Bytes


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(os.__file__).parent


def read(folder: Path, *, max_bytes: int) -> Text:
    """Read the `.py` files under `folder`, one in ten of them held out.

    Meaning: files are taken in the order of their paths' checksums until `max_bytes` are read, the last one
      cut short; a file is held out if its checksum is a multiple of ten.
    Why: the order mixes packages, so a cap leaves a fair sample; a split by file keeps a held-out window
      from being the continuation of one that was learned, and stays as it is when other files come or go.
    Errors: ConfigError if either part has less than two bytes.
    Another release of Python has other files, so a loss is comparable only within one release.
    """
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    paths = [path for path in paths if not SKIPPED.intersection(path.parts)]
    train, held_out = bytearray(), bytearray()
    for path in sorted(paths, key=lambda path: (_checksum(path), path)):
        part = held_out if _checksum(path) % HELD_OUT_ONE_IN == 0 else train
        part += (folder / path).read_bytes()[: max_bytes - len(train) - len(held_out)]
    if min(len(train), len(held_out)) < 2:
        raise sc.ConfigError(
            f"{len(paths)} Python files in {folder}, capped at {max_bytes} bytes, give {len(train)} bytes to "
            f"learn from and {len(held_out)} to hold out; each part needs at least 2."
        )
    return Text(train=np.frombuffer(train, np.uint8), held_out=np.frombuffer(held_out, np.uint8))


class Batches(Iterator[Windows]):
    """Draws batches of windows for ever, each in fresh memory; it knows where it is, so that a run goes on exactly.

    Meaning: `rows` windows of `context + 1` bytes that begin anywhere in `text`, with repetition.
    Args:
      part: (number, of how many), the part of the rows of each batch that is given; all by default.
    Errors: ConfigError if the rows do not divide; at the first batch, if `text` is shorter than one window.
    """

    def __init__(self, text: Bytes, *, rows: int, context: int, seed: int, part: tuple[int, int] = (0, 1)) -> None:
        number, parts = part
        if rows % parts:
            raise sc.ConfigError(f"{rows} rows do not divide by {parts} processes.")
        self.text, self.rows, self.context = text, rows, context
        self._mine = slice(number * rows // parts, (number + 1) * rows // parts)
        self._generator = np.random.default_rng(seed)

    def __next__(self) -> Windows:
        starts = self._generator.integers(0, _num_starts(self.text, self.context), self.rows)
        return _cut(self.text, starts[self._mine], self.context)

    def get_state(self) -> dict[str, Any]:  # Any: the state of numpy's generator: names and whole numbers
        """Where it is."""
        return dict(self._generator.bit_generator.state)

    def set_state(self, state: Mapping[str, Any]) -> None:  # Any: as above
        """Let the next batch be the one that followed there."""
        self._generator.bit_generator.state = state


def validation_batches(text: Bytes, *, rows: int, context: int, num_batches: int) -> tuple[Windows, ...]:
    """Cut a fixed set of windows, evenly spread over the whole of `text`.

    The same for every seed, so that two runs are judged by the same bytes.
    Errors: ConfigError if `text` is shorter than one window.
    """
    starts = np.linspace(0, _num_starts(text, context) - 1, rows * num_batches).astype(np.int64)
    return tuple(_cut(text, part, context) for part in np.split(starts, num_batches))


def bigram_loss(train: Bytes, held_out: Sequence[Windows]) -> float:
    """Judge the best guess that looks at one byte only.

    Meaning: the mean of -log((n[a, b] + 1) / (n[a] + 256)) over the neighbours a, b in the windows
      `held_out`, where n counts in `train` how often a stands before b, and before any byte.
    Why: a model that uses its context must do better, on the same windows.
    Units: nats per byte.
    """
    pairs = train[:-1].astype(np.int64) * NUM_BYTES + train[1:]
    counts = np.bincount(pairs, minlength=NUM_BYTES**2).reshape(NUM_BYTES, NUM_BYTES) + 1.0
    surprise: Float64[np.ndarray, "256 256"] = -np.log(counts / counts.sum(axis=1, keepdims=True))
    windows = np.concatenate([batch["tokens"] for batch in held_out])
    return float(surprise[windows[:, :-1], windows[:, 1:]].mean())


def _checksum(path: Path) -> int:
    """The same on every machine and in every process, which `hash` is not."""
    return zlib.crc32(path.as_posix().encode())


def _num_starts(text: Bytes, context: int) -> int:
    """How many places a window of `context + 1` bytes can begin at."""
    if len(text) <= context:
        raise sc.ConfigError(f"A window of {context} + 1 bytes does not fit into {len(text)} bytes of text.")
    return len(text) - context


def _cut(text: Bytes, starts: np.ndarray, context: int) -> Windows:
    """Copy the windows that begin at `starts`."""
    return {"tokens": text[starts[:, None] + np.arange(context + 1)[None]].astype(np.int32)}
