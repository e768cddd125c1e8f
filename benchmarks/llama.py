"""A decoder like Llama 3 (grouped queries, rotary positions, RMSNorm, SwiGLU, an untied head), and its step by hand.

Layers are stacked, scanned over and rematerialised; it computes in bfloat16 on float32 parameters. It may have experts
as Mixtral does, of which each token is sent to two, and ring attention along an axis of the sequence. By hand it is
sharded as most trainers in JAX are: parameters over the axes of the rows and of the model (fully sharded data
parallelism and tensor parallelism), constraints on activations and on the parameters of each layer, gradients added up
in a `lax.scan`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
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
ATTENTION = {name: spec for name, spec in RULES.items() if not name.endswith(("gate", "up", "down"))}


@dataclass(frozen=True)
class Sharding:
    """How a decoder is sharded: the rules of `tp`, all of it by hand, the axes of the rows, activations."""

    rules: Mapping[str, P]
    by_hand: Mapping[str, P]
    rows: tuple[str, ...] = ("data",)
    activations: Mapping[str, P] = field(default_factory=dict)  # their dimensions but the rows; "sent": all of them

    def constrained(self, value: jax.Array, what: str, mesh: Mesh) -> jax.Array:
        """By hand: an activation, or a parameter as `tp` shards it."""
        rows = self.rows if len(self.rows) > 1 else self.rows[0]
        match what:
            case "sent":
                spec = self.activations.get("sent", P())
            case "stream" | "scores":
                spec = P(rows, *self.activations.get(what, P(None)))
            case _:
                # The parameters of one layer have no dimension of layers.
                spec = P(*tuple(self.rules.get(what, P()))[what.startswith("layers/") :])
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))

    def inside(self, value: jax.Array, what: str) -> jax.Array:
        """In a loss of stepc, which is called for the rows of one device: activations along the other axes."""
        spec = self.activations.get(what)
        if spec is None or what == "scores":
            return value
        return jax.lax.with_sharding_constraint(value, spec if what == "sent" else P(None, *spec))


FULLY_SHARDED = Sharding(RULES, BY_HAND, activations={"scores": P(None, "model")})
# Mixtral: an expert on each part along `model`, which shards attention too.
ALONG_MODEL = Sharding(
    {**ATTENTION, **{f"layers/{name}": P(None, "model") for name in ("gate", "up", "down")}},
    {**BY_HAND, "router": P(None, "data"), "gate": P(None, "model", "data"), "up": P(None, "model", "data"),
     "down": P(None, "model", None, "data")},
    activations={"scores": P(None, "model"), "sent": P("model")},
)  # fmt: skip
# Mixtral: an expert on each part along `data`, where the rows are; XLA exchanges tokens. Replicas have experts alike.
EXPERTS = {
    **ATTENTION, "layers/gate": P(None, "data", None, "model"), "layers/up": P(None, "data", None, "model"),
    "layers/down": P(None, "data", "model"),
}  # fmt: skip
ALONG_ROWS = Sharding(
    EXPERTS, {name.removeprefix("layers/"): spec for name, spec in EXPERTS.items()}, ("replica", "data"),
    activations={"scores": P(None, "model"), "sent": P("data", "replica")},
)  # fmt: skip
# Ring attention: the sequence along `seq`, parameters along `data` alone.
WITHOUT_MODEL = {name: P(*(axis if axis == "data" else None for axis in spec)) for name, spec in BY_HAND.items()}
RING = Sharding({}, WITHOUT_MODEL, activations={"stream": P("seq"), "scores": P("seq")})


@dataclass(frozen=True)
class Llama:
    """The size of a decoder; with `experts`, those of each layer."""

    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int = 128_256
    context: int = 4096
    experts: int = 0

    def shapes(self) -> dict[str, Any]:
        """The parameters, as shapes."""

        def one(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        layers, width, hidden = self.layers, self.width, self.hidden
        narrow = width // self.heads * self.key_heads
        stack = {
            "q": one(layers, width, width), "k": one(layers, width, narrow), "v": one(layers, width, narrow),
            "o": one(layers, width, width), "norms": one(layers, 2, width),
        }  # fmt: skip
        experts = (self.experts,) if self.experts else ()
        stack |= {name: one(layers, *experts, width, hidden) for name in ("gate", "up")}
        stack["down"] = one(layers, *experts, hidden, width)
        if experts:
            stack["router"] = one(layers, width, self.experts)
        vocabulary = self.vocabulary
        return {
            "embedding": one(vocabulary, width),
            "head": one(width, vocabulary),
            "norm": one(width),
            "layers": stack,
        }

    def loss(
        self, constrain: Callable[[jax.Array, str], jax.Array] = lambda value, _: value, ring: Mesh | None = None
    ) -> Callable[[Any, Any], jax.Array]:
        """The mean cross-entropy of the next token; `constrain` a value by its name; with ring attention on a mesh."""
        attention = partial(jax.nn.dot_product_attention, is_causal=True) if ring is None else ring_attention(ring)

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
            mixed = attention(query, key, value)
            stream = constrain(stream + mixed.reshape(stream.shape) @ layer["o"], "stream")
            normed = norm(stream, layer["norms"][1])
            if self.experts:
                return constrain(stream + mixture(normed, layer, constrain), "stream"), None
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
            return mean_cross_entropy(scores, labels)

        return loss


def mean_cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of labels that are compared with every token, as trainers for TPUs do.

    One that is an index, as in optax, is a scatter in the gradient: as large as the scores, if a device has one row.
    """
    is_label = jax.lax.broadcasted_iota(labels.dtype, scores.shape, 2) == labels[..., None]
    return (jax.nn.logsumexp(scores, axis=-1) - jnp.where(is_label, scores, 0).sum(-1)).mean()


def mixture(tokens: jax.Array, layer: Any, constrain: Callable[[jax.Array, str], jax.Array]) -> jax.Array:
    """Each token is sent to two experts, each of which has room for a quarter more than its share of a row's tokens."""
    experts, room = layer["router"].shape[-1], tokens.shape[1] * 2 * 5 // (4 * layer["router"].shape[-1])
    weights, chosen = jax.lax.top_k(jax.nn.softmax((tokens @ layer["router"]).astype(jnp.float32)), 2)
    picked = jax.nn.one_hot(chosen, experts, dtype=jnp.int32)
    in_order = picked.reshape(picked.shape[0], -1, experts)
    places = (jnp.cumsum(in_order, axis=1) * in_order).sum(-1).reshape(chosen.shape) - 1
    places = jax.nn.one_hot(places, room, dtype=tokens.dtype)  # none for a token that finds no room
    picked = picked.astype(tokens.dtype)
    sent = constrain(jnp.einsum("btce,btcr,btd->ebrd", picked, places, tokens), "sent")
    hidden = jax.nn.silu(jnp.einsum("ebrd,edh->ebrh", sent, layer["gate"]))
    hidden = hidden * jnp.einsum("ebrd,edh->ebrh", sent, layer["up"])
    back = constrain(jnp.einsum("ebrh,ehd->ebrd", hidden, layer["down"]), "sent")
    return jnp.einsum("btce,btcr,btc,ebrd->btd", picked, places, weights.astype(tokens.dtype), back)


def ring_attention(mesh: Mesh, block: int = 1024) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Causal attention over a sequence that is sharded along `seq`: keys and values go round, and queries stay.

    Args:
      block: how many queries meet the keys of one device at once.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        size, here = jax.lax.axis_size("seq"), jax.lax.axis_index("seq")
        around = [(place, (place + 1) % size) for place in range(size)]
        rows, length, heads, width = query.shape
        grouped = (query * width**-0.5).reshape(rows, -1, block, key.shape[2], heads // key.shape[2], width)
        blocks = jnp.moveaxis(grouped, 1, 0)
        at = here * length + jnp.arange(length).reshape(-1, block)

        def turn(carry: Any, number: jax.Array) -> tuple[Any, None]:
            key, value, *found = carry
            keys_at = (here - number) % size * length + jnp.arange(length)

            def met(part: Any) -> Any:
                queries, at, total, weight, largest = part
                scores = jnp.einsum("bqkgd,bskd->bkgqs", queries, key).astype(jnp.float32)
                scores = jnp.where(at[:, None] >= keys_at, scores, -1e9)
                new = jnp.maximum(largest, scores.max(-1))
                kept, added = jnp.exp(largest - new), jnp.exp(scores - new[..., None])
                mixed = jnp.einsum("bkgqs,bskd->bkgqd", added.astype(value.dtype), value)
                return total * kept[..., None] + mixed, weight * kept + added.sum(-1), new

            found = jax.lax.map(jax.checkpoint(met), (blocks, at, *found))
            return (*(jax.lax.ppermute(one, "seq", around) for one in (key, value)), *found), None

        number, _, _, of_keys, group, _ = blocks.shape
        zeros = jnp.zeros((number, rows, of_keys, group, block), jnp.float32)
        start = (key, value, jnp.zeros((*zeros.shape, width), jnp.float32), zeros, zeros - 1e9)
        (_, _, total, weight, _), _ = jax.lax.scan(turn, start, jnp.arange(size))
        mixed = jnp.moveaxis(total / weight[..., None], (0, 4), (1, 2))  # rows, blocks, queries, heads, width
        return mixed.reshape(query.shape).astype(query.dtype)

    spec = P(None, "seq")
    return jax.shard_map(attend, mesh=mesh, axis_names={"seq"}, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


LLAMAS = {
    "8B": Llama(32, 4096, 14_336, 32, 8),
    "70B": Llama(80, 8192, 28_672, 64, 8),
    "Mixtral 8x7B": Llama(32, 4096, 14_336, 32, 8, vocabulary=32_000, experts=8),
    "8B, 131,072 tokens": Llama(32, 4096, 14_336, 32, 8, context=131_072),
}


def by_hand(
    model: Llama,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    k: int,
    how: Sharding = FULLY_SHARDED,
    ring: Mesh | None = None,
) -> jax.stages.Compiled:
    """One step, compiled ahead of time. Parameters, moments and sums of gradients are sharded as `how` says."""

    def sharding(path: Any) -> NamedSharding:
        return NamedSharding(mesh, how.by_hand.get(path[-1].key if path and hasattr(path[-1], "key") else "", P()))

    def constrain(value: jax.Array, what: str) -> jax.Array:
        return how.constrained(value, what, mesh)

    def sharded(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(path)), tree
        )

    params = sharded(model.shapes())
    moments = sharded(jax.eval_shape(optimizer.init, params))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, moments))
    batch = tokens(model, mesh, k, how.rows)
    loss = model.loss(constrain, ring)

    def step(params: Any, state: Any, batch: Any) -> Any:
        split = NamedSharding(mesh, P(None, how.rows))
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


def tokens(model: Llama, mesh: Mesh, k: int, axes: tuple[str, ...] = ("data",)) -> dict[str, jax.ShapeDtypeStruct]:
    """One row per microbatch and device along the axes of the rows."""
    shape = (prod(mesh.shape[axis] for axis in axes) * k, model.context + 1)
    return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(axes)))}
