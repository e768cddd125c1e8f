"""What named devices can do at most, with the source of each number; it must not know any program."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from stepc.errors import ConfigError, did_you_mean
from stepc.inspect.collectives import Collective
from stepc.inspect.memory import Cost, Memory


@dataclass(frozen=True)
class Device:
    """The peaks of one device, from its maker's data sheet.

    Attributes:
      name: as in `sc.topology`, without the shape.
      kind: what jax calls it, `device.device_kind`, or how that begins.
      flops_per_second: of dense matrix products in bfloat16.
      memory_bytes: of its high-bandwidth memory.
      memory_bytes_per_second: to and from that memory.
      link_bytes_per_second: to other devices of its pod or host, in one direction, over all links together.
      source: where the numbers are from.
    """

    name: str
    kind: str
    flops_per_second: float
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    source: str


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# Google gives the links as bits a second, or as bytes a second in both directions; here they are bytes in one.
_ROWS = (
    Device("tpu:v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, f"{_TPU}v5e"),
    Device("tpu:v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, f"{_TPU}v5p"),
    Device("tpu:v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1600e9, 400e9, f"{_TPU}v6e"),
    Device("gpu:a100", "NVIDIA A100-SXM4-80GB", 312e12, 80 * 10**9, 2039e9, 300e9, f"{_NVIDIA}a100/"),
    Device("gpu:h100", "NVIDIA H100 80GB HBM3", 989e12, 80 * 10**9, 3350e9, 450e9, f"{_NVIDIA}h100/"),
    Device("gpu:h200", "NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9, f"{_NVIDIA}h200/"),
)
DEVICES = MappingProxyType({row.name: row for row in _ROWS})


def device_of(kind: str) -> Device | None:
    """The row for what jax calls a device, or None: `TPU v5 lite` is tpu:v5e, `TPU v5` is tpu:v5p."""
    exact = [row for row in _ROWS if row.kind == kind]
    begun = [row for row in _ROWS if row.kind.startswith("NVIDIA") and kind.startswith(row.kind)]
    return next(iter((*exact, *begun)), None)


# Of n devices in a ring, each sends and receives so much of the whole array: a reduce-scatter and an all-gather.
_RING_TURNS = {"all-reduce": 2}


@dataclass(frozen=True)
class Roofline:
    """The least time that a program needs on a device, if nothing but the peaks of the device limited it.

    Attributes:
      compute_seconds: flops / peak flops in bfloat16. Products in float32 take longer.
      memory_seconds: bytes moved / peak bandwidth.
      exchange_seconds: of the collectives, each in a ring at the full speed of all links of a device.
      total_bytes: what the program holds at once.
    """

    device: Device
    compute_seconds: float
    memory_seconds: float
    exchange_seconds: float
    total_bytes: int

    @property
    def overlapped_seconds(self) -> float:
        """The longest of the three: if each ran beside the others."""
        return max(self.compute_seconds, self.memory_seconds, self.exchange_seconds)

    @property
    def exposed_seconds(self) -> float:
        """If nothing ran beside the collectives."""
        return max(self.compute_seconds, self.memory_seconds) + self.exchange_seconds

    @property
    def bound(self) -> str:
        """What limits it: "compute", "memory" or "links"."""
        times = {"compute": self.compute_seconds, "memory": self.memory_seconds, "links": self.exchange_seconds}
        return max(times, key=lambda name: times[name])

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.total_bytes <= self.device.memory_bytes

    def __str__(self) -> str:
        share = self.total_bytes / self.device.memory_bytes
        shown = "less than 1%" if share < 0.01 else f"{share:.0%}"
        fits = f"{shown} of its memory" if self.fits else f"does not fit: {share:.0%} of its memory"
        return (
            f"{self.device.name}: an estimate, {duration(self.overlapped_seconds)} (all overlapped) to "
            f"{duration(self.exposed_seconds)} (no exchange overlapped), bound by {self.bound}; {fits}"
        )


def roofline(cost: Cost, memory: Memory, collectives: Iterable[Collective], device: str | Device) -> Roofline | None:
    """Estimate the least time of a program on a device; None if the program does not say how often its loops turn.

    Meaning: max(flops / peak, bytes / bandwidth), and 2 (n - 1) / n * bytes / links for an all-reduce of n devices,
      half of that for a gather, scatter or all-to-all, once the bytes for a permute.
    Why: whether a step is bound by arithmetic, memory or links is known before the device is.

    Args:
      device: a name such as "tpu:v5e" or "gpu:h100" (`stepc.inspect.devices.DEVICES`), or a row of your own.
    Units:  seconds.
    Errors: ConfigError for a device that is not in the table.
    An estimate. Peaks are from data sheets, no program reaches them, and latency is not in it.
    Source: Williams, Waterman and Patterson, Roofline, 2009, https://doi.org/10.1145/1498765.1498785.
    """
    row = device_named(device) if isinstance(device, str) else device
    rows = tuple(collectives)
    if cost.flops is None or cost.bytes is None or any(one.executions is None for one in rows):
        return None
    return Roofline(
        device=row,
        compute_seconds=cost.flops / row.flops_per_second,
        memory_seconds=cost.bytes / row.memory_bytes_per_second,
        exchange_seconds=sum(wire_bytes(one) * (one.executions or 0) for one in rows) / row.link_bytes_per_second,
        total_bytes=memory.total,
    )


def device_named(device: str) -> Device:
    """The row of that name, with or without a shape: "tpu:v5e:16x16" is "tpu:v5e"."""
    name = ":".join(device.split(":")[:2])
    if name not in DEVICES:
        facts = (("known", ", ".join(DEVICES)), ("got", device))
        raise ConfigError("This device is not in the table.", facts=facts, suggestion=did_you_mean(name, DEVICES))
    return DEVICES[name]


def wire_bytes(row: Collective) -> float:
    """What one device sends in one execution, if its group is a ring."""
    if row.kind in ("collective-permute", "collective-broadcast"):
        return float(row.bytes)
    return _RING_TURNS.get(row.kind, 1) * row.bytes * (row.group_size - 1) / row.group_size


def duration(seconds: float) -> str:
    """Print a time with three digits: 1.25 ms, 340 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
