"""What a compiled program needs: bytes on a device, multiplications, and bytes moved."""

from dataclasses import dataclass

import jax

from stepc._units import readable
from stepc.inspect.cost import flops, traffic, uncounted
from stepc.inspect.hlo import parse, text_of


@dataclass(frozen=True)
class MemoryPart:
    """A part of the arguments or of the temporaries, and what it is for."""

    of: str
    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `aliased` is the part of `outputs` that is written over `arguments`.

    `parts` says what arguments and temporaries are for, where that is known.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    parts: tuple[MemoryPart, ...] = ()

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
        lines = [(name, name, bytes_) for name, bytes_ in rows.items()]
        lines += [(part.of, f"  {part.name}", part.bytes) for part in self.parts]
        ordered = sorted(lines, key=lambda line: list(rows).index(line[0]))
        width = max(len(name) for _, name, _ in ordered)
        return "\n".join(f"{name:<{max(width, 12)}}{readable(bytes_):>10}" for _, name, bytes_ in ordered)


@dataclass(frozen=True)
class Cost:
    """Work on one device; None is unknown, because of a loop that does not say how often it turns.

    Attributes:
      flops: of matrix products and convolutions, loops multiplied out.
      bytes: moved to and from the main memory, loops multiplied out; a bound from above.
      uncounted: the custom calls, whose work no text shows.
    """

    flops: int | None
    bytes: int | None
    uncounted: tuple[str, ...]

    @property
    def intensity(self) -> float | None:
        """Flops for each byte moved; None if either is unknown, or nothing is moved."""
        return self.flops / self.bytes if self.flops is not None and self.bytes else None

    def __str__(self) -> str:
        rows = {
            "flops": "unknown" if self.flops is None else f"{self.flops:,}",
            "bytes moved": "unknown" if self.bytes is None else readable(self.bytes),
            "flops a byte": "unknown" if self.intensity is None else f"{self.intensity:.1f}",
            **({"not counted": ", ".join(self.uncounted)} if self.uncounted else {}),
        }
        return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Return how much memory a program needs on one device.

    Meaning: XLA's `memory_analysis`, without its peak, which leaves out the temporaries on the CPU.
    Why: whether a donation is used, and what a change costs, without running anything.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.
    Units:  bytes on one device.
    Errors: ValueError if the backend has no analysis.
    Host memory is not in it. `total` is a bound if temporaries are not all alive together.
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
    )


def cost(compiled: jax.stages.Compiled | str) -> Cost:
    """Return how much a program multiplies and moves on one device.

    Meaning: the flops of its matrix products and convolutions, and the bytes that its instructions read and write,
      each times how often it runs.
    Why: XLA's own sum counts the body of a loop once, so it does not see accumulation or layers.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.
    Units:  flops on one device; a multiplication and an addition are two.
    Errors: ValueError if the backend prints no HLO.
    `flops` is None if a product stands in a loop of unknown length. A branch counts as if it were always
    taken. Element-wise work, and a product of two vectors on the CPU, are not counted.
    Source: ours.
    """
    module = parse(text_of(compiled))
    return Cost(flops(module), traffic(module), uncounted(module))
