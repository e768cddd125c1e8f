"""Where jax keeps compiled programs between processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

SMALL_TOO = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
WANTED = ("jax_compilation_cache_dir", *SMALL_TOO)


@contextmanager
def kept_programs(directory: str | Path | None) -> Iterator[None]:
    """Let jax keep compiled programs there while this is entered, also small ones; None changes nothing."""
    if directory is None:
        yield
        return
    before = {name: jax.config.values[name] for name in WANTED}
    try:
        _set({"jax_compilation_cache_dir": str(directory), **SMALL_TOO})
        yield
    finally:
        _set(before)


def _set(wanted: dict[str, object]) -> None:
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks for the directory once, at its first compilation
