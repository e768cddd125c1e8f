"""What named devices can do at most, with the source of each number; it must not know any program."""

from dataclasses import dataclass
from types import MappingProxyType


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
