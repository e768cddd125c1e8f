"""Steps written by hand whose collectives are known; run as a script, it saves what TPU and GPU compilers make of them.

python tests/inspect/by_hand.py        # needs the extra `pods`, no device; writes tests/inspect/dumps
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

# As wide as it takes for the TPU compiler to overlap a gather with a product.
K, LAYERS, WIDTH = 3, 2, 1024
AXES = {1: ("data",), 2: ("data", "model"), 3: ("data", "fsdp", "model")}
SIZES = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}
BYTES = WIDTH * WIDTH * 4
DUMPS = Path(__file__).parent / "dumps"
PODS = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100:1x8"}

# kind, bytes, axes, executions, in a loop
Facts: TypeAlias = tuple[str, int, tuple[str, ...], int, bool]


def layer(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.tanh(rows @ weights)


def gradient(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.grad(lambda weights: jnp.mean(layer(weights, rows) ** 2))(weights)


def microbatches(of_one: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    parts = rows.reshape(K, -1, WIDTH)
    return lax.scan(lambda total, part: (total + of_one(part), None), jnp.zeros((WIDTH, WIDTH)), parts)[0]


def none(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return weights - microbatches(lambda part: gradient(weights, part), rows)


def once(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return weights - lax.psum(microbatches(lambda part: gradient(weights, part), rows), "data")


def each(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return weights - microbatches(lambda part: jnp.tanh(lax.psum(gradient(weights, part), "data")), rows)


def layers(weights: jax.Array, rows: jax.Array) -> jax.Array:
    def through(part: jax.Array) -> jax.Array:
        return lax.scan(lambda h, _: (jnp.tanh(lax.psum(h @ weights, "model")), None), part, length=LAYERS)[0]

    return weights - microbatches(lambda part: through(part[:WIDTH]), rows)


def kinds(weights: jax.Array, rows: jax.Array) -> jax.Array:
    total = microbatches(lambda part: gradient(weights, part), rows)
    part = lax.psum_scatter(total, "data", scatter_dimension=0, tiled=True)
    whole = jnp.tanh(lax.all_gather(part * 0.1, "data", tiled=True))
    size = lax.axis_size("model")
    rotated = lax.ppermute(whole, "model", [(i, (i + 1) % size) for i in range(size)])
    return weights - lax.all_to_all(jnp.tanh(rotated), "model", 0, 0, tiled=True)


def overlapped(weights: jax.Array, rows: jax.Array) -> jax.Array:
    whole = lax.all_gather(weights[: WIDTH // lax.axis_size("data")] * 0.5, "data", tiled=True)
    meanwhile = layer(weights, layer(weights, rows[:WIDTH]))
    return whole + meanwhile


@dataclass(frozen=True)
class ByHand:
    """A step, and what it must send on a mesh of so many axes."""

    body: Callable[[jax.Array, jax.Array], jax.Array]
    facts: tuple[Facts, ...]
    ranks: tuple[int, ...] = (1, 2, 3)


STEPS = {
    "none": ByHand(none, ()),
    "once": ByHand(once, (("all-reduce", BYTES, ("data",), 1, False),)),
    "each": ByHand(each, (("all-reduce", BYTES, ("data",), K, True),)),
    "layers": ByHand(layers, (("all-reduce", BYTES, ("model",), K * LAYERS, True),), ranks=(2, 3)),
    "kinds": ByHand(
        kinds,
        (
            ("reduce-scatter", BYTES, ("data",), 1, False),
            ("all-gather", BYTES, ("data",), 1, False),
            ("collective-permute", BYTES, ("model",), 1, False),
            ("all-to-all", BYTES, ("model",), 1, False),
        ),
        ranks=(2, 3),
    ),
    "overlapped": ByHand(overlapped, (("all-gather", BYTES, ("data",), 1, False),)),
}


def mesh_of_rank(rank: int, devices: Sequence[object]) -> Mesh:
    return Mesh(np.array(devices[:8]).reshape(SIZES[rank]), AXES[rank])


def compiled(name: str, mesh: Mesh) -> jax.stages.Compiled:
    rows = P(mesh.axis_names[0])
    mapped = jax.shard_map(STEPS[name].body, mesh=mesh, in_specs=(P(), rows), out_specs=P(), check_vma=False)
    shapes = (
        jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((mesh.devices.shape[0] * K * WIDTH, WIDTH), jnp.float32),
    )
    placed = (jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, rows))
    return jax.jit(mapped, donate_argnums=0, in_shardings=placed).lower(*shapes).compile()


def without_paths(text: str) -> str:
    """The files stay, the folders they were in go."""
    return re.sub(r'"/[^"\n]*/([^"/\n]+)"', r'"\1"', text)


def main() -> None:
    import stepc as sc

    DUMPS.mkdir(exist_ok=True)
    for platform, pod in PODS.items():
        devices = list(sc.topology(pod).devices.flat)
        for name, step in STEPS.items():
            rank = step.ranks[len(name) % len(step.ranks)]
            text = compiled(name, mesh_of_rank(rank, devices)).as_text()
            (DUMPS / f"{platform}-{name}-{rank}.txt").write_text(without_paths(text or ""))


if __name__ == "__main__":
    main()
