"""Whether the copies of a state that lie on several devices are the same, to the last bit. Knows no process."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepc.language.state import leaves_by_path

SPREAD = 2654435761  # an odd number near 2**32 times the golden ratio: neighbours get weights that are far apart


def digests(state: Any) -> dict[str, list[int]]:  # Any: a state
    """For each leaf that is whole on every device, by path: its digest on each device of this process.

    Meaning: the sum of bits times an odd weight of their place, modulo 2**32: whatever one number is changed to, it
      is another sum.
    Units: it reads the state once, on the devices; nothing but the digests leaves them.
    Leaves that are spread over devices are left out: no other device has the same part.
    """
    found = [
        (path, [_digest(shard.data) for shard in bare.addressable_shards])
        for path, leaf in leaves_by_path(state)
        if (bare := _bare(leaf)).sharding.is_fully_replicated
    ]
    return {path: [int(np.asarray(one)) for one in row] for path, row in found}


def _bare(leaf: Any) -> jax.Array:  # Any: an array, or a typed key
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).reshape(-1)
    weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(SPREAD) | jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)
