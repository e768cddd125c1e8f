"""Meshes of devices that are not there, to compile for; it must not know what is compiled."""

import importlib.util
import re
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

from stepc.errors import ConfigError

_NAME = re.compile(r"(tpu|gpu):([a-z]\w*):(\d+(?:x\d+)*)")
_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}


@dataclass(frozen=True)
class _GPU:
    """What XLA must know of a GPU to compile for it; from the device descriptions in XLA's target_config/specs."""

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
    """Make a mesh of devices that are not there, to compile for.

    Meaning: what XLA's own compilers know of a pod, its devices laid out as a mesh with these axes.
    Why: collectives, memory and aliases of a step on 4,096 chips, from a laptop, before the pod is paid for.

    Args:
      name: "tpu:v5e:16x16" is the generation and the shape in chips; "gpu:h100:32x8" is 32 hosts of 8 GPUs.
      axes: the size of each mesh axis, in order; by default all devices lie along one axis, `data`.
    Errors: ConfigError if the compiler for the platform is not installed, with the command that installs it; if the
      platform has no such topology; if the sizes do not multiply to the number of devices.
    Such a mesh compiles and runs nothing: give `init` and `lower` shapes, `jax.ShapeDtypeStruct`. Where no GPU is,
    jax loads its CUDA plugin only under `jax.config.update("jax_platforms", "cpu")`.
    Example:
      >>> topology("tpu:v5e:16x16", data=64, model=4)  # doctest: +SKIP
      Mesh('data': 64, 'model': 4, axis_types=(Auto, Auto))

    Source: ours, over `jax.experimental.topologies`.
    """
    read = _NAME.fullmatch(name)
    if read is None:
        facts = (("expected", '"tpu:v5e:16x16" or "gpu:h100:32x8": platform, generation, shape'), ("got", repr(name)))
        raise ConfigError(f"{name!r} is not the name of a topology.", facts=facts)
    platform, generation, shape = read.groups()
    _check_plugin(name, platform)
    devices = _tpus(name, generation, shape) if platform == "tpu" else _gpus(name, generation, shape)
    axes = axes or {"data": len(devices)}
    if prod(axes.values()) != len(devices):
        product = " x ".join(f"{axis}={size}" for axis, size in axes.items())
        raise ConfigError(f"{name} has {len(devices)} devices, and {product} is {prod(axes.values())}.")
    if platform == "tpu":
        laid = mesh_utils.create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
        return Mesh(laid, tuple(axes))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * len(axes), devices=devices)


def _check_plugin(name: str, platform: str) -> None:
    """Ask before jax does: it takes a missing plugin for a missing device."""
    if any(_is_importable(plugin) for plugin in _PLUGINS[platform]):
        return
    version = jax.__version__
    needed, command = {
        "tpu": ("libtpu, the compiler for TPUs", f"pip install 'jax[tpu]=={version}'"),
        "gpu": ("the CUDA plugin of jax", f"pip install jax-cuda13-pjrt=={version}"),
    }[platform]
    raise ConfigError(
        f"{name} needs {needed}, which is not installed. No such device is needed, and none will be used.",
        suggestion=f"Install it with: {command}",
    )


def _is_importable(module: str) -> bool:
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def _tpus(name: str, generation: str, shape: str) -> list[Any]:  # Any: devices of jaxlib, which has no public type
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{shape}")
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"libtpu has no topology {name}: {str(error).partition(': ')[2] or error}") from error
    return list(found.devices)


def _gpus(name: str, generation: str, shape: str) -> list[Any]:
    if generation not in _GPUS:
        facts = (("known", ", ".join(_GPUS)), ("got", generation))
        raise ConfigError(f"{name}: this GPU is not described here.", facts=facts)
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) > 2 or not all(sizes):
        raise ConfigError(f"{name}: the shape of GPUs is hosts x GPUs a host, such as 32x8, or GPUs alone, such as 8.")
    hosts, each = (1, *sizes) if len(sizes) == 1 else sizes
    jax.devices("cpu")  # jax finds its plugins when it first looks for devices
    described = _described(_GPUS[generation])
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=described, topology=f"1x{hosts}x{each}")
    except (
        NotImplementedError
    ) as error:  # the plugin refuses to load where it finds no CUDA, unless CUDA is not asked for
        raise ConfigError(
            f"{name}: jax did not load its CUDA plugin, because it looked for a GPU and found no CUDA libraries.",
            suggestion='Before anything looks for devices: jax.config.update("jax_platforms", "cpu")',
        ) from error
    return list(found.devices)


def _described(gpu: _GPU) -> str:
    """A GpuTargetConfigProto, as text."""
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
