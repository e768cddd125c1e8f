"""Meshes of devices that this machine does not have, to compile for. It must not know what is compiled."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

from stepc.errors import ConfigError, did_you_mean

_NAME = re.compile(r"(tpu|gpu):([a-z]\w*):(\d+(?:x\d+)*)")
_TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x")  # where libtpu is, it knows better
_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}


@dataclass(frozen=True)
class _GPU:
    """What XLA needs to know about a GPU to compile for it, from the specs in XLA's target_config/specs."""

    text: str
    compute_capability: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int


_GPUS = MappingProxyType(
    {
        "a100": _GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936, 166912),
        "h100": _GPU("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472, 232448),
        "h200": _GPU("NVIDIA H200", 9, 132, 128, 1.98, 151397597184, 4800000000000, 52428800, 233472, 232448),
    }
)


def topology(name: str, **axes: int) -> Mesh:
    """Make a mesh of devices that this machine does not have, to compile for.

    Meaning: the devices of a pod, as XLA's compilers describe them, arranged as a mesh with these axes.
    Why: shows collectives, memory and aliases of a step on 4,096 chips from a laptop, before you pay for the pod.

    Args:
      name: "tpu:v5e:16x16" is the generation and the shape in chips; "gpu:h100:32x8" is 32 hosts of 8 GPUs.
      axes: the size of each mesh axis, in order; by default one axis, `data`, with all devices.
    Errors: ConfigError if the compiler for the platform is not installed, with the command that installs it; if the
      platform has no such topology; if the product of the sizes is not the number of devices.
    Nothing can run on such a mesh: pass shapes, `jax.ShapeDtypeStruct`, to `init` and `lower`. On a machine without a
    GPU, JAX loads its CUDA plugin only after `jax.config.update("jax_platforms", "cpu")`.
    Example:
      >>> topology("tpu:v5e:16x16", data=64, model=4)  # doctest: +SKIP
      Mesh('data': 64, 'model': 4, axis_types=(Auto, Auto))

    Source: ours, over `jax.experimental.topologies`.
    """
    read = _NAME.fullmatch(name)
    if read is None:
        facts = (("expected", '"tpu:v5e:16x16" or "gpu:h100:32x8": platform, generation, shape'), ("got", repr(name)))
        raise ConfigError(f"Invalid topology name {name!r}.", facts=facts)
    platform, generation, shape = read.groups()
    _check_plugin(name, platform, generation)
    devices = _tpus(name, generation, shape) if platform == "tpu" else _gpus(name, generation, shape)
    axes = axes or {"data": len(devices)}
    if prod(axes.values()) != len(devices):
        product = " × ".join(f"{axis}={size}" for axis, size in axes.items())
        total = f" = {prod(axes.values())}" if len(axes) > 1 else ""
        raise ConfigError(f"{name} has {len(devices)} devices; the mesh asks for {product}{total}.")
    if platform == "tpu":
        arranged = mesh_utils.create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
        return Mesh(arranged, tuple(axes))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * len(axes), devices=devices)


def _check_plugin(name: str, platform: str, generation: str) -> None:
    """Check before JAX does, which reports a missing plugin as a missing device. A misspelt name comes first."""
    if platform == "gpu":
        _check_generation(name, generation, tuple(_GPUS))
    if any(find_spec(plugin.partition(".")[0]) and find_spec(plugin) for plugin in _PLUGINS[platform]):
        return
    if platform == "tpu":
        _check_generation(name, generation, _TPUS)
    version = jax.__version__
    needed, command = {
        "tpu": ("libtpu, the compiler for TPUs", f"pip install 'jax[tpu]=={version}'"),
        "gpu": ("JAX's CUDA plugin", f"pip install jax-cuda13-pjrt=={version}"),
    }[platform]
    raise ConfigError(
        f"{name} needs {needed}, which is not installed. The devices themselves are not needed.",
        suggestion=f"Install it with: {command}",
    )


def _check_generation(name: str, generation: str, known: tuple[str, ...]) -> None:
    if generation not in known:
        facts = (("known", ", ".join(known)), ("got", generation))
        what = f"{name}: unknown {name.partition(':')[0].upper()} {generation!r}."
        raise ConfigError(what, facts=facts, suggestion=did_you_mean(generation, known))


def _tpus(name: str, generation: str, shape: str) -> list[Any]:  # Any: jaxlib has no public type for a device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{shape}")
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"libtpu has no topology {name}: {str(error).partition(': ')[2] or error}") from error
    return list(found.devices)


def _gpus(name: str, generation: str, shape: str) -> list[Any]:
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) > 2 or not all(sizes):
        raise ConfigError(f"{name}: the shape must be hosts x GPUs per host, such as 32x8, or a number of GPUs.")
    hosts, per_host = (1, *sizes) if len(sizes) == 1 else sizes
    jax.devices("cpu")  # JAX discovers its plugins when it first looks for devices
    config = _target_config(_GPUS[generation])
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x{hosts}x{per_host}")
    except NotImplementedError as error:  # without CUDA libraries the plugin loads only if JAX is not to use it
        raise ConfigError(
            f"{name}: JAX did not load its CUDA plugin, because it looked for a GPU and found no CUDA libraries.",
            suggestion='Call jax.config.update("jax_platforms", "cpu") before anything asks for devices.',
        ) from error
    return list(found.devices)


def _target_config(gpu: _GPU) -> str:
    """A GpuTargetConfigProto in text format."""
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_bytes_per_core,
        "shared_memory_per_block_optin": gpu.shared_bytes_per_block,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": gpu.memory_bytes_per_second,
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    rows = " ".join(f"{key}: {value}" for key, value in numbers.items())
    capability = f"cuda_compute_capability {{ major: {gpu.compute_capability} }}"
    about = f'platform_name: "CUDA" device_description_str: "{gpu.text}"'
    return f"gpu_device_info {{ {rows} {capability} }} {about}"
