"""The source of Python's standard library as bytes to learn from. It knows no model."""

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
# Tests, third-party packages, and tables: a character map or a pickled grammar does not read like a program.
SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3")
)
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes of other files for validation."""

    train: Bytes
    held_out: Bytes


def standard_library() -> Path:
    """The directory of the running Python's standard library."""
    return Path(os.__file__).parent


def read(folder: Path, *, max_bytes: int) -> Text:
    """Read the `.py` files under `folder` and hold one in ten of them out.

    Meaning: files are read in the order of the checksums of their paths until `max_bytes` are read, the last one cut
      short; a file is held out if its checksum is a multiple of ten.
    Why: the order mixes packages, so the first `max_bytes` are a fair sample. Splitting by file keeps a held-out window
      from continuing one that was trained on, and the split does not change when other files come or go.
    Errors: ConfigError if either part has less than two bytes.
    Losses are comparable within one release of Python only: another one has other files.
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
            f"train on and {len(held_out)} to hold out; each part needs at least 2."
        )
    return Text(train=np.frombuffer(train, np.uint8), held_out=np.frombuffer(held_out, np.uint8))


class Batches(Iterator[Windows]):
    """An endless iterator of batches of random windows. It has a state, so that a run resumes exactly.

    Meaning: `rows` windows of `context + 1` bytes that start anywhere in `text`, with repetition.
    Args:
      part: (index, count): which part of the rows of each batch to return; by default all of them.
    Errors: ConfigError if the rows do not divide by the count; at the first batch, if `text` is shorter than a window.
    """

    def __init__(self, text: Bytes, *, rows: int, context: int, seed: int, part: tuple[int, int] = (0, 1)) -> None:
        index, parts = part
        if rows % parts:
            raise sc.ConfigError(f"{rows} rows do not divide by {parts} processes.")
        self.text, self.rows, self.context = text, rows, context
        self._mine = slice(index * rows // parts, (index + 1) * rows // parts)
        self._generator = np.random.default_rng(seed)

    def __next__(self) -> Windows:
        starts = self._generator.integers(0, _num_starts(self.text, self.context), self.rows)
        return _cut(self.text, starts[self._mine], self.context)

    def get_state(self) -> dict[str, Any]:  # Any: the state of numpy's generator, names and integers
        """The position, for `set_state`."""
        return dict(self._generator.bit_generator.state)

    def set_state(self, state: Mapping[str, Any]) -> None:  # Any: as above
        """Continue with the batch that followed when `get_state` returned `state`."""
        self._generator.bit_generator.state = state


def validation_batches(text: Bytes, *, rows: int, context: int, num_batches: int) -> tuple[Windows, ...]:
    """Cut a fixed set of windows, evenly spaced over all of `text`.

    They do not depend on a seed, so every run is validated on the same bytes.
    Errors: ConfigError if `text` is shorter than one window.
    """
    starts = np.linspace(0, _num_starts(text, context) - 1, rows * num_batches).astype(np.int64)
    return tuple(_cut(text, part, context) for part in np.split(starts, num_batches))


def bigram_loss(train: Bytes, held_out: Sequence[Windows]) -> float:
    """The loss of a bigram model, which looks at one byte only.

    Meaning: the mean of -log((n[a, b] + 1) / (n[a] + 256)) over the neighbours a, b in the windows `held_out`, where
      n[a, b] counts how often b follows a in `train`, and n[a] how often any byte does.
    Why: a baseline. A model that uses its context must do better on the same windows.
    Units: nats per byte.
    """
    pairs = train[:-1].astype(np.int64) * NUM_BYTES + train[1:]
    counts = np.bincount(pairs, minlength=NUM_BYTES**2).reshape(NUM_BYTES, NUM_BYTES) + 1.0
    cross_entropy: Float64[np.ndarray, "256 256"] = -np.log(counts / counts.sum(axis=1, keepdims=True))
    windows = np.concatenate([batch["tokens"] for batch in held_out])
    return float(cross_entropy[windows[:, :-1], windows[:, 1:]].mean())


def _checksum(path: Path) -> int:
    """The same on every machine and in every process, unlike `hash`."""
    return zlib.crc32(path.as_posix().encode())


def _num_starts(text: Bytes, context: int) -> int:
    """The number of positions at which a window of `context + 1` bytes can start."""
    if len(text) <= context:
        raise sc.ConfigError(f"A window of {context} + 1 bytes does not fit into {len(text)} bytes of text.")
    return len(text) - context


def _cut(text: Bytes, starts: np.ndarray, context: int) -> Windows:
    """Copy the windows that start at `starts`."""
    return {"tokens": text[starts[:, None] + np.arange(context + 1)[None]].astype(np.int32)}
