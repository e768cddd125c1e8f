"""Whether the data of a run that goes on is the data it began with: a batch is read again. It knows no iterator."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from stepc.errors import BatchError, ResumeError
from stepc.language.kinds import Batch
from stepc.language.state import leaves_by_path
from stepc.runner.feed import Broken, End, Item, Source

OTHER_DATA = "Either give that data (its seed, order and length), or say Checkpoints(…, check_data=False)."


@dataclass(frozen=True)
class Seen:
    """The last batch before a checkpoint: where the data stood before it, and the batch in a number."""

    before: Any  # Any: see Positioned
    crc32: int


def seen(item: Item | None) -> Seen | None:
    """What to remember of a batch; None of one that cannot be found again."""
    return None if item is None or item.before is None else Seen(item.before, digest(item.batch))


def digest(batch: Batch) -> int:
    """The CRC-32 of the paths, dtypes, shapes and bytes of its leaves."""
    found = 0
    for path, leaf in leaves_by_path(batch):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found = zlib.crc32(array.tobytes(), zlib.crc32(f"{path} {array.dtype}{array.shape}".encode(), found))
    return found


def check_data(source: Source, last: Seen, *, after: Any, step: int, tell: Callable[[str], None]) -> None:
    """Read the last batch before a checkpoint again, then stand after it.

    Why: an iterator goes to a place it is given also with another seed, another order or another length, and would
      give other batches from there on without a word.

    Args:
      after: where the data stands for the next step.
      step: that of the checkpoint.
      tell: hears why the batch could not be compared.
    Errors: ResumeError if it is another batch.
    """
    go_to(source, last.before, step=step)
    found = source.read()
    source.num_reads = source.num_given = 0
    go_to(source, after, step=step)
    match found:
        case Item():
            now = digest(found.batch)
            if now != last.crc32:
                raise ResumeError(
                    "This data is not the data of the checkpoint: the batch that led to it is another one.",
                    facts=[("step", str(step)), ("CRC-32", f"saved {last.crc32:08x}, now {now:08x}")],
                    suggestion=OTHER_DATA,
                )
        case End():
            tell("the data ends before it")  # and so will the run, with nothing trained on other data
        case Broken(error=BatchError()):
            pass  # of another shape: that is said, leaf by leaf, when the next batch is read
        case Broken():
            tell(f"{type(found.error).__name__}: {found.error}")
        case _:
            assert_never(found)


def go_to(source: Source, position: Any, *, step: int) -> None:  # Any: see Positioned
    """Let the data stand where it stood after a step.

    Errors: ResumeError from whatever it raises.
    """
    try:
        source.go_to(position)
    except Exception as error:  # the iterator's own, IndexError and ValueError among them
        raise ResumeError(
            f"The data cannot go back to where it stood: {type(error).__name__}: {error}",
            facts=[("step", str(step))],
            suggestion="Give the data of that run, or name another directory for the checkpoints.",
        ) from error
