"""The least time that a program needs on a named device, from the peaks in its data sheet."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from stepc._text import readable_seconds
from stepc.errors import ConfigError, did_you_mean
from stepc.inspect.collectives import Collective
from stepc.inspect.cost import Cost
from stepc.inspect.memory import Memory


@dataclass(frozen=True)
class Device:
    """The peaks of one device, from its maker's data sheet.

    Attributes:
      name: as in `sc.topology`, without the shape.
      kind: `device.device_kind` in JAX, or its beginning.
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
# Google gives link speeds in bits per second, or in bytes per second both ways; these are bytes one way.
_ROWS = (
    Device("tpu:v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, f"{_TPU}v5e"),
    Device("tpu:v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, f"{_TPU}v5p"),
    Device("tpu:v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1600e9, 400e9, f"{_TPU}v6e"),
    Device("gpu:a100", "NVIDIA A100-SXM4-80GB", 312e12, 80 * 10**9, 2039e9, 300e9, f"{_NVIDIA}a100/"),
    Device("gpu:h100", "NVIDIA H100 80GB HBM3", 989e12, 80 * 10**9, 3350e9, 450e9, f"{_NVIDIA}h100/"),
    Device("gpu:h200", "NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9, f"{_NVIDIA}h200/"),
)
DEVICES = MappingProxyType({row.name: row for row in _ROWS})


@dataclass(frozen=True)
class Roofline:
    """The least time that a program needs on a device, if nothing but the peaks of the device limited it.

    Attributes:
      compute_seconds: flops / peak flops in bfloat16. Products in float32 take longer.
      memory_seconds: bytes moved / peak bandwidth.
      collective_seconds: of all collectives, each in a ring at the full speed of all links of a device.
      total_bytes: what the program holds in memory at once.
    """

    device: Device
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    total_bytes: int

    @property
    def overlapped_seconds(self) -> float:
        """The longest of the three: every collective is hidden behind compute."""
        return max(self.compute_seconds, self.memory_seconds, self.collective_seconds)

    @property
    def exposed_seconds(self) -> float:
        """With no collective hidden behind compute."""
        return max(self.compute_seconds, self.memory_seconds) + self.collective_seconds

    @property
    def bound(self) -> str:
        """What limits the program: "compute", "memory" or "communication"."""
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "communication": self.collective_seconds,
        }
        return max(times, key=lambda name: times[name])

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.total_bytes <= self.device.memory_bytes

    def __str__(self) -> str:
        share = self.total_bytes / self.device.memory_bytes
        shown = "less than 1%" if share < 0.01 else f"{share:.0%}"
        fits = f"uses {shown} of its memory" if self.fits else f"does not fit: needs {share:.0%} of its memory"
        return (
            f"{self.device.name}: estimated {readable_seconds(self.overlapped_seconds)} (collectives overlapped) to "
            f"{readable_seconds(self.exposed_seconds)} (not overlapped), {self.bound}-bound; {fits}"
        )


def roofline(cost: Cost, memory: Memory, collectives: Iterable[Collective], device: str | Device) -> Roofline | None:
    """Estimate the least time of a program on a device; None if a loop has no known trip count.

    Meaning: max(flops / peak, bytes / bandwidth), and 2 (n - 1) / n * bytes / links for an all-reduce over n devices,
      half of that for a gather, scatter or all-to-all, bytes / links for a permute.
    Why: says whether a step is compute-, memory- or communication-bound on a device that you do not have.

    Args:
      device: a name such as "tpu:v5e" or "gpu:h100", one of `stepc.inspect.DEVICES`, or a `Device` of your own.
    Units:  seconds.
    Errors: ConfigError for a name that is not in the table.
    An estimate: peaks are from data sheets, no program reaches them, and latency is not included.
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
        collective_seconds=sum(wire_bytes(one) * (one.executions or 0) for one in rows) / row.link_bytes_per_second,
        total_bytes=memory.total,
    )


def device_named(device: str) -> Device:
    """The row of this name, with or without a shape: "tpu:v5e:16x16" is "tpu:v5e"."""
    name = ":".join(device.split(":")[:2])
    if name not in DEVICES:
        facts = (("known", ", ".join(DEVICES)), ("got", device))
        raise ConfigError(f"Unknown device {device!r}.", facts=facts, suggestion=did_you_mean(name, DEVICES))
    return DEVICES[name]


def device_of(kind: str) -> Device | None:
    """The row of a JAX `device_kind`, or None: `TPU v5 lite` is tpu:v5e, `TPU v5` is tpu:v5p."""
    exact = [row for row in _ROWS if row.kind == kind]
    prefixed = [row for row in _ROWS if row.kind.startswith("NVIDIA") and kind.startswith(row.kind)]
    return next(iter((*exact, *prefixed)), None)


def wire_bytes(row: Collective) -> float:
    """What one device sends in one execution, if its group is a ring."""
    if row.kind in ("collective-permute", "collective-broadcast"):
        return float(row.bytes)
    # An all-reduce is a reduce-scatter and an all-gather: the array passes around the ring twice.
    rounds = 2 if row.kind == "all-reduce" else 1
    return rounds * row.bytes * (row.group_size - 1) / row.group_size
