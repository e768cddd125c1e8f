"""A decoder like Llama 3 (grouped queries, rotary positions, RMSNorm, SwiGLU, an untied head), and its step by hand.

Layers are stacked, scanned over and rematerialised; it computes in bfloat16 on float32 parameters. By hand it is
sharded as most trainers in JAX are: parameters over `data` and `model` (fully sharded data parallelism and tensor
parallelism), constraints on activations and on the parameters of each layer, gradients added up in a `lax.scan`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Along `model`, as `tp` takes it; and the dimension that is sharded along `data` by hand.
RULES = {
    "embedding": P("model"), "head": P(None, "model"),
    "layers/q": P(None, None, "model"), "layers/k": P(None, None, "model"), "layers/v": P(None, None, "model"),
    "layers/o": P(None, "model"), "layers/gate": P(None, None, "model"), "layers/up": P(None, None, "model"),
    "layers/down": P(None, "model"),
}  # fmt: skip
BY_HAND = {
    "embedding": P("model", "data"), "head": P("data", "model"), "norm": P("data"), "norms": P(None, None, "data"),
    "q": P(None, "data", "model"), "k": P(None, "data", "model"), "v": P(None, "data", "model"),
    "o": P(None, "model", "data"), "gate": P(None, "data", "model"), "up": P(None, "data", "model"),
    "down": P(None, "model", "data"),
}  # fmt: skip


@dataclass(frozen=True)
class Llama:
    """The size of a decoder."""

    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int = 128_256
    context: int = 4096

    def shapes(self) -> dict[str, Any]:
        """The parameters, as shapes."""

        def one(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        layers, width, hidden = self.layers, self.width, self.hidden
        narrow = width // self.heads * self.key_heads
        stack = {
            "q": one(layers, width, width), "k": one(layers, width, narrow), "v": one(layers, width, narrow),
            "o": one(layers, width, width), "gate": one(layers, width, hidden), "up": one(layers, width, hidden),
            "down": one(layers, hidden, width), "norms": one(layers, 2, width),
        }  # fmt: skip
        vocabulary = self.vocabulary
        return {
            "embedding": one(vocabulary, width),
            "head": one(width, vocabulary),
            "norm": one(width),
            "layers": stack,
        }

    def loss(self, constrain: Callable[..., Any] = lambda value, *_: value) -> Callable[[Any, Any], jax.Array]:
        """The mean cross-entropy of the next token; `constrain` a value to a spec: by hand."""

        def norm(stream: jax.Array, gain: jax.Array) -> jax.Array:
            wide = stream.astype(jnp.float32)
            return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(stream.dtype) * gain

        def heads(found: jax.Array, number: int) -> jax.Array:
            return found.reshape(*found.shape[:2], number, -1)

        def rotated(found: jax.Array) -> jax.Array:
            size = found.shape[-1] // 2
            angles = jnp.arange(found.shape[1])[:, None] * 500_000.0 ** (-jnp.arange(size) / size)
            sine, cosine = (of(angles)[:, None, :].astype(found.dtype) for of in (jnp.sin, jnp.cos))
            one, two = jnp.split(found, 2, axis=-1)
            return jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], axis=-1)

        def block(stream: jax.Array, stored: Any) -> tuple[jax.Array, None]:
            layer = {name: constrain(leaf.astype(jnp.bfloat16), f"layers/{name}") for name, leaf in stored.items()}
            normed = norm(stream, layer["norms"][0])
            query = rotated(heads(normed @ layer["q"], self.heads))
            key = rotated(heads(normed @ layer["k"], self.key_heads))
            value = heads(normed @ layer["v"], self.key_heads)
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
            stream = constrain(stream + mixed.reshape(stream.shape) @ layer["o"], "stream")
            normed = norm(stream, layer["norms"][1])
            hidden = jax.nn.silu(normed @ layer["gate"]) * (normed @ layer["up"])
            return constrain(stream + hidden @ layer["down"], "stream"), None

        def loss(params: Any, batch: Any) -> jax.Array:
            tokens, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
            outside = {
                name: constrain(params[name].astype(jnp.bfloat16), name) for name in ("embedding", "head", "norm")
            }
            stream = constrain(outside["embedding"][tokens], "stream")
            stream, _ = jax.lax.scan(jax.checkpoint(block), stream, params["layers"])
            scores = constrain((norm(stream, outside["norm"]) @ outside["head"]).astype(jnp.float32), "scores")
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        return loss


LLAMAS = {
    "8B": Llama(32, 4096, 14_336, 32, 8),
    "70B": Llama(80, 8192, 28_672, 64, 8),
}


def by_hand(model: Llama, optimizer: optax.GradientTransformation, mesh: Mesh, k: int) -> jax.stages.Compiled:
    """One step, compiled ahead of time. Parameters, moments and sums of gradients are sharded by `BY_HAND`."""

    def sharding(path: Any) -> NamedSharding:
        return NamedSharding(mesh, BY_HAND.get(path[-1].key if path and hasattr(path[-1], "key") else "", P()))

    def constrain(value: jax.Array, what: str) -> jax.Array:
        specs = {"stream": P("data"), "scores": P("data", None, "model")}
        spec = specs.get(what, RULES.get(what, P()))
        # The parameters of one layer have no dimension of layers.
        spec = P(*tuple(spec)[1:]) if what.startswith("layers/") else spec
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))

    def sharded(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(path)), tree
        )

    params = sharded(model.shapes())
    moments = sharded(jax.eval_shape(optimizer.init, params))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, moments))
    batch = tokens(model, mesh, k)
    loss = model.loss(constrain)

    def step(params: Any, state: Any, batch: Any) -> Any:
        split = NamedSharding(mesh, P(None, "data"))
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, k, *leaf.shape[1:]).swapaxes(0, 1), batch)
        parts = jax.lax.with_sharding_constraint(parts, split)

        def iteration(total: Any, part: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, part)
            total = jax.tree.map(jnp.add, total, (value, grads))
            return (total[0], jax.lax.with_sharding_constraint(total[1], shardings[0])), None

        if k == 1:
            value, grads = jax.value_and_grad(loss)(params, batch)
            grads = jax.lax.with_sharding_constraint(grads, shardings[0])
        else:
            zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings[0])
            (value, grads), _ = jax.lax.scan(iteration, (jnp.zeros(()), zeros), parts)
        grads = jax.tree.map(lambda leaf: leaf / k, grads)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value / k

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, NamedSharding(mesh, P())))
    return jitted.lower(params, moments, batch).compile()


def tokens(model: Llama, mesh: Mesh, k: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One row per microbatch and device along `data`."""
    rows = NamedSharding(mesh, P("data"))
    return {"tokens": jax.ShapeDtypeStruct((mesh.shape["data"] * k, model.context + 1), jnp.int32, sharding=rows)}
