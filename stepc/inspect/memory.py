"""The memory that a compiled program needs on one device, as its compiler planned it."""

from dataclasses import dataclass

import jax

from stepc._text import readable_bytes


@dataclass(frozen=True)
class MemoryPart:
    """A part of the arguments or of the temporaries, as `of` says, and what it is for."""

    of: str
    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `aliased` is the part of `outputs` that reuses the buffers of donated `arguments`.

    `host` is what it holds in the memory of the host besides; on a CPU that counts as the device's.
    `parts` says what arguments and temporaries are for, where that is known.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    parts: tuple[MemoryPart, ...] = ()
    host: int = 0

    @property
    def total(self) -> int:
        """What the program holds at once: arguments + outputs - aliased + temporaries + code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def __str__(self) -> str:
        rows = {
            "arguments": self.arguments,
            "outputs": self.outputs,
            "aliased": -self.aliased,
            "temporaries": self.temporaries,
            "code": self.code,
            "total": self.total,
        }
        lines: list[tuple[str, int]] = []
        for name, bytes_ in rows.items():
            lines += [(name, bytes_), *((f"  {part.name}", part.bytes) for part in self.parts if part.of == name)]
        lines += [("host", self.host)] if self.host else []
        width = max(12, *(len(name) for name, _ in lines))
        return "\n".join(f"{name:<{width}}{readable_bytes(bytes_):>10}" for name, bytes_ in lines)


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Return how much memory a program needs on one device.

    Meaning: XLA's `memory_analysis`, without its peak, which leaves out the temporaries on the CPU.
    Why: shows whether a donation is used and what a change costs, without running anything.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.
    Units:  bytes on one device.
    Errors: ValueError if the backend has no memory analysis.
    `total` does not include the memory of the host. It is an upper bound if not all temporaries are alive at once.
    Source: ours.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("The backend has no memory analysis for this executable.")
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes,
    )
