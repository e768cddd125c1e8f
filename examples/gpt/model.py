"""A small byte-level GPT as pure functions on a dict of arrays. It does not know how it is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer, Key, Scalar, UInt8

import stepc as sc

NUM_BYTES = 256
MASKED = -1e30  # finite: softmax of a row of -inf is NaN
EPSILON = 1e-5


class Layers(TypedDict):
    """The blocks, stacked: the first axis of every leaf has length `layers`."""

    attention_norm: Array
    qkv: Array
    out: Array
    mlp_norm: Array
    up: Array
    down: Array


class GPT(TypedDict):
    """The parameters: a plain dict at run time, so that any tool for pytrees works on it."""

    byte: Array
    position: Array
    layers: Layers
    norm: Array


Batch: TypeAlias = Mapping[str, Integer[Array, "batch window"]]
Loss: TypeAlias = Callable[[GPT, Batch], Scalar]
DropoutLoss: TypeAlias = Callable[[GPT, Batch, Key[Array, " batch"]], Scalar]
# A dropout mask: for each block, what attention and the MLP add to the stream; True is kept.
Kept: TypeAlias = Bool[Array, "layers 2 batch length width"]


@dataclass(frozen=True)
class Size:
    """The size of the model.

    Args:
      layers: number of transformer blocks.
      width: features per position, a multiple of `heads`.
      heads: attention heads per block.
      context: number of bytes that the model sees at once.
    Errors: ConfigError if a number is below 1, or if `width` is not a multiple of `heads`.
    """

    layers: int
    width: int
    heads: int
    context: int

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.context) < 1:
            raise sc.ConfigError(f"Every size must be at least 1, got {self}.")
        if self.width % self.heads:
            raise sc.ConfigError(f"width must be a multiple of heads, got width {self.width} and {self.heads} heads.")


def init(key: Key[Array, ""], size: Size) -> GPT:
    """Draw fresh parameters in float32.

    Meaning: normal with standard deviation 1 / sqrt(width); the two matrices of a block that write to the
      residual stream are smaller by sqrt(2 * layers), so that its variance does not grow with depth.
    Why: GPT-2's fixed 0.02 is small for a narrow model: at width 128, 300 steps end at 2.18 nats per byte with
      it, and at 2.00 with 0.05.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3
      (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
    """
    depth, width = size.layers, size.width
    qkv, out, up, down, byte, position = jax.random.split(key, 6)
    std = width**-0.5
    residual_std = std / (2 * depth) ** 0.5
    return {
        "byte": std * jax.random.normal(byte, (NUM_BYTES, width)),
        "position": std * jax.random.normal(position, (size.context, width)),
        "layers": {
            "attention_norm": jnp.ones((depth, width)),
            "qkv": std * jax.random.normal(qkv, (depth, width, 3 * width)),
            "out": residual_std * jax.random.normal(out, (depth, width, width)),
            "mlp_norm": jnp.ones((depth, width)),
            "up": std * jax.random.normal(up, (depth, width, 4 * width)),
            "down": residual_std * jax.random.normal(down, (depth, 4 * width, width)),
        },
        "norm": jnp.ones(width),
    }


def logits(
    params: GPT, tokens: Integer[Array, "batch length"], *, size: Size, kept: Kept | None = None, dropout: float = 0.0
) -> Float[Array, "batch length 256"]:
    """Score every byte as the next one, at every position.

    Meaning: a pre-norm transformer with learned positions and tied embeddings; position `i` sees positions `0..i`.
    Args:
      kept: the dropout mask; None keeps everything.
      dropout: the dropout rate. What is kept is divided by 1 - dropout, so that its mean does not change.
    Shapes: `length` is at most `size.context`.
    """
    length = tokens.shape[1]
    # int32, because the gather would promote a uint8 index, which strict promotion forbids.
    stream = params["byte"][tokens.astype(jnp.int32)] + params["position"][None, :length]
    causal = jnp.tril(jnp.ones((length, length), bool))

    def dropped(added: Float[Array, "batch length width"], kept: Bool[Array, "batch length width"]) -> Array:
        return jnp.where(kept, added / (1 - dropout), 0)

    def block(stream: Float[Array, "batch length width"], this: tuple[Layers, Array | None]) -> tuple[Array, None]:
        layer, kept = this
        mixed = _attention(_norm(stream, layer["attention_norm"]), layer, causal, heads=size.heads)
        stream = stream + (mixed if kept is None else dropped(mixed, kept[0]))
        inside = _mlp(_norm(stream, layer["mlp_norm"]), layer)
        return stream + (inside if kept is None else dropped(inside, kept[1])), None

    # Unrolled: with a loop, a step on a CPU took 1.4 to 2 times as long (width 128, 32 and 16 rows, 2 shared cores).
    stream, _ = lax.scan(block, stream, (params["layers"], kept), unroll=size.layers)
    return jnp.einsum("blw,vw->blv", _norm(stream, params["norm"]), params["byte"])


def make_loss(size: Size) -> Loss:
    """Return the loss of a model of this size: the mean cross-entropy of the next byte.

    Args:
      size: closed over, since a loss takes parameters and a batch only.
    Shapes: the batch is `{"tokens": [batch, context + 1]}`; each byte but the first is predicted.
    Units:  nats per byte.
    """

    def loss(params: GPT, batch: Batch) -> Scalar:
        return _cross_entropy(logits(params, batch["tokens"][:, :-1], size=size), batch)

    return loss


def make_dropout_loss(size: Size, *, dropout: float) -> DropoutLoss:
    """Return the loss of a model with dropout on the residual branches, drawn separately for each row.

    Meaning: `make_loss`, where each feature that a branch adds is 0 with probability `dropout`, and otherwise divided
      by 1 - dropout.
    Args:
      dropout: at least 0 and below 1.
    Shapes: the batch as in `make_loss`; one key per row, as `stepc.grad(loss, rng="example")` passes them.
    Units:  nats per byte.
    Source: Srivastava et al., "Dropout", 2014 (https://jmlr.org/papers/v15/srivastava14a.html)
    """

    def loss(params: GPT, batch: Batch, keys: Key[Array, " batch"]) -> Scalar:
        tokens = batch["tokens"][:, :-1]
        shape = (size.layers, 2, tokens.shape[1], size.width)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout, shape), out_axes=2)(keys)
        return _cross_entropy(logits(params, tokens, size=size, kept=kept, dropout=dropout), batch)

    return loss


def sample(params: GPT, prompt: bytes, *, length: int, key: Key[Array, ""], temperature: float, size: Size) -> bytes:
    """Continue `prompt` by `length` bytes, sampled one after another.

    Meaning: each byte is sampled from softmax(logits / temperature) given the last `size.context` bytes.
    Args:
      prompt: at least one byte; the model sees the last `size.context` of them.
      temperature: above 0; near 0, the most probable byte is taken.
    Errors: ConfigError if the prompt is empty or the temperature is not positive.
    There is no cache of keys and values: each byte recomputes the whole window.
    """
    if not prompt:
        raise sc.ConfigError("The prompt must have at least one byte.")
    if not temperature > 0:
        raise sc.ConfigError(f"The temperature must be above 0, got {temperature}.")
    seen = prompt[-size.context :]
    window = jnp.array(list(seen.ljust(size.context, b"\0")), jnp.uint8)
    drawn = _continue(params, window, jnp.int32(len(seen)), key, jnp.float32(temperature), size, length)
    return bytes(drawn.tolist())


@partial(jax.jit, static_argnames=("size", "length"))
def _continue(
    params: GPT,
    window: UInt8[Array, " context"],
    num_seen: Int32[Array, ""],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    size: Size,
    length: int,
) -> UInt8[Array, " length"]:
    """Slide a window of fixed size over the bytes; causality masks the positions after `num_seen`."""

    def draw(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        window, num_seen = carry
        scores = logits(params, window[None], size=size)[0, num_seen - 1]
        byte = jax.random.categorical(key, scores / temperature).astype(jnp.uint8)
        is_full = num_seen == size.context
        window = jnp.where(is_full, jnp.roll(window, -1), window)
        num_seen = jnp.where(is_full, num_seen, num_seen + 1)
        return (window.at[num_seen - 1].set(byte), num_seen), byte

    return lax.scan(draw, (window, num_seen), jax.random.split(key, length))[1]


def _cross_entropy(scores: Float[Array, "batch length 256"], batch: Batch) -> Scalar:
    """The mean cross-entropy of every byte but the first, in float32 whatever the compute dtype."""
    log_probabilities = jax.nn.log_softmax(scores.astype(jnp.float32))
    targets = batch["tokens"][:, 1:, None].astype(jnp.int32)
    return -jnp.take_along_axis(log_probabilities, targets, axis=-1).mean()


def _norm(
    stream: Float[Array, "batch length width"], scale: Float[Array, " width"]
) -> Float[Array, "batch length width"]:
    """Layer normalisation without an offset."""
    centred = stream - stream.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + EPSILON) * scale[None, None]


def _attention(
    stream: Float[Array, "batch length width"],
    layer: Layers,
    causal: Bool[Array, "length length"],
    *,
    heads: int,
) -> Float[Array, "batch length width"]:
    """Causal self-attention as einsums, with the softmax in float32 whatever the compute dtype.

    Why: `jax.nn.dot_product_attention` leaves a dimension of size 1 in a manual region, and XLA for TPU then misses a
      fusion, which costs 19 % more cycles (jax 0.10.2, libtpu 0.0.42.1).
    """
    batch, length, width = stream.shape
    split = (batch, length, 3, heads, width // heads)
    qkv = jnp.einsum("blw,wv->blv", stream, layer["qkv"]).reshape(split)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, MASKED).astype(jnp.float32)).astype(stream.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(stream.shape)
    return jnp.einsum("blw,wv->blv", mixed, layer["out"])


def _mlp(stream: Float[Array, "batch length width"], layer: Layers) -> Float[Array, "batch length width"]:
    """Two layers with GELU between them, four times as wide inside."""
    inside = jax.nn.gelu(jnp.einsum("blw,wv->blv", stream, layer["up"]))
    return jnp.einsum("blv,vw->blw", inside, layer["down"])
