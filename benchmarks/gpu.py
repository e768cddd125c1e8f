"""How fast is a step of GPT-2 on one GPU: stepc, JAX by hand, `torch.compile`? What does the host do meanwhile?

GPT-2 of 124 million parameters as nanoGPT trains it: 12 layers of width 768, 12 heads, 50,304 tokens, context 1,024, no
biases, no dropout; AdamW with clipping. Parameters, stream, norms, softmax and loss are in float32, products in
bfloat16, as `torch.autocast` does it. A step has 524,288 tokens: 32 microbatches of 16 rows. Every variant makes the
same step of the same numbers: after one step the parameters are compared. JAX computes attention in two ways, XLA's own
and cuDNN's; PyTorch chooses its own (`scaled_dot_product_attention`).

A sample is some calls of a step. `host` is the time until the last one has returned: the rest of the step's time, the
host is free. `sc.run` is the first variant in a run, with host batches: the time between two requests for a batch.

MFU is the floating-point operations that the model needs (nanoGPT's count: 6 per parameter and token, and 12 per layer,
feature and position of attention), over the peak of the device in bfloat16. It needs one GPU and takes minutes; with
`--quick` tiny shapes run on any device. PyTorch is not a dependency: without it, or without CUDA, its row is left out.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from by_hand import by_hand
from measuring import (
    CPU_SECONDS,
    Step,
    arguments,
    begin,
    difference,
    finish,
    interleaved,
    plot,
    ratio,
    show,
    spreads,
)
from nanogpt import B2, EPSILON, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, Size, adamw, init, norm

import stepc as sc

GPT2 = Size(layers=12, heads=12, width=768, context=1024, vocabulary=50_304, rows=512)
TINY = Size(layers=2, heads=2, width=16, context=16, vocabulary=64, rows=8)
K = 32
TORCH, RUN = "torch.compile, fused AdamW", "sc.run"
HOST_SECONDS = 2  # the place in a `Times`
IN_FLIGHT = 4  # batches that a run has asked for before its times count
# Of the first step of AdamW, which is about the sign of the gradient: where that is nearly 0, bfloat16 decides.
TOLERANCE = 0.1


class Times(NamedTuple):
    """Of one step: wall time, processor time of all threads, and the time until the call has returned."""

    seconds: float
    cpu_seconds: float
    host_seconds: float


@dataclass(frozen=True)
class Variant:
    """A step with its state and batch.

    Args:
      params_of: the parameters of a state, in the layout of JAX.
      wait: until the device has done what it was asked for.
      temporary_bytes: of the compiled program, if it says.
    """

    step: Step
    state: Any  # Any: of any library
    batch: Any  # Any: as above
    params_of: Callable[[Any], Any]  # Any: a state; a tree of arrays
    wait: Callable[[Any], object] = jax.block_until_ready  # Any: state and metrics
    temporary_bytes: int | None = None


def loss(params: Any, batch: Any, *, heads: int, attention: str) -> jax.Array:
    """The mean cross-entropy of the next token; products in bfloat16."""
    tokens, targets = batch

    def product(one: jax.Array, other: jax.Array) -> jax.Array:
        return one.astype(jnp.bfloat16) @ other.astype(jnp.bfloat16)

    stream = params["wte"][tokens] + params["wpe"][None, : tokens.shape[1]]
    for layer in params["layers"]:
        qkv = jnp.split(product(norm(stream, layer["ln_1"]), layer["qkv"]), 3, axis=-1)
        query, key, value = (one.reshape(*one.shape[:2], heads, -1) for one in qkv)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=attention)
        stream = stream + product(mixed.reshape(stream.shape), layer["out"]).astype(jnp.float32)
        inside = jax.nn.gelu(product(norm(stream, layer["ln_2"]), layer["up"]), approximate=False)
        stream = stream + product(inside, layer["down"]).astype(jnp.float32)
    logits = product(norm(stream, params["ln_f"]), params["wte"].T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def stepc_step(size: Size, k: int, attention: str) -> sc.Step:
    source = sc.accumulate(k) @ sc.grad(partial(loss, heads=size.heads, attention=attention))
    return sc.compile(sc.update(adamw()) @ sc.clip(MAX_NORM) @ source)


def stepc_variant(size: Size, k: int, batch: Any, attention: str) -> Variant:
    """With stepc."""
    step = stepc_step(size, k, attention)
    state, batch = step.init(init(size)), step.put(batch)
    temporary = step.lower(state, batch).compile().memory().temporaries
    return Variant(step, state, batch, lambda state: state.params, temporary_bytes=temporary)


def hand_variant(size: Size, k: int, batch: Any, attention: str) -> Variant:
    """With `jax.jit`."""
    initial, step = by_hand(partial(loss, heads=size.heads, attention=attention), k, adamw())
    params = jax.tree.map(jnp.array, init(size))
    state, batch = jax.tree.map(jnp.array, (params, initial(params))), jax.tree.map(jnp.asarray, batch)
    compiled = step.lower(state, batch).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Variant(compiled, state, batch, lambda state: state[0], temporary_bytes=temporary)


def torch_variant(size: Size, k: int, batch: Any, *, quick: bool) -> dict[str, Variant]:
    """As nanoGPT trains on a GPU; nothing, and a line that says why, without one."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no row of PyTorch. Install it with `pip install torch`.\n")
        return {}
    torch, ours = importlib.import_module("torch"), importlib.import_module("nanogpt_torch")
    if not torch.cuda.is_available() and not quick:
        print(f"torch {torch.__version__} has no CUDA: no row of PyTorch.\n")
        return {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__} on {device}\n")
    torch.set_float32_matmul_precision("high")
    model = ours.GPT(**{name: value for name, value in asdict(size).items() if name != "rows"}).to(device)
    model.load(init(size))
    step = ours.make_step(
        model, learning_rate=LEARNING_RATE, b2=B2, epsilon=EPSILON, weight_decay=WEIGHT_DECAY, max_norm=MAX_NORM,
        compiled=True, fused=True, k=k, bfloat16=True,
    )  # fmt: skip
    tensors = tuple(torch.from_numpy(one.astype(np.int64)).to(device) for one in batch)
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    return {TORCH: Variant(step, model, tensors, lambda model: model.params(), lambda _: wait())}


class Called:
    """Calls in a bare loop: the host's part is over when the last one has returned."""

    def __init__(self, variant: Variant, state: Any, *, calls: int) -> None:
        self.variant, self.state, self.calls = variant, state, calls

    def __call__(self) -> Times:
        one = self.variant
        self.state, metrics = one.step(self.state, one.batch)  # warm caches
        one.wait((self.state, metrics))
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.state, metrics = one.step(self.state, one.batch)
        returned = time.perf_counter()
        one.wait((self.state, metrics))
        taken = (time.perf_counter() - start, time.process_time() - cpu_start, returned - start)
        return Times(*(one / self.calls for one in taken))


class InRun:
    """The same number of steps within `sc.run`, once as many steps are in flight as it allows."""

    def __init__(self, step: sc.Step, state: sc.State, batch: Any, *, calls: int) -> None:
        self.step, self.state, self.calls = step, state, calls
        self.batch = tuple(np.array(one) for one in batch)
        for one in self.batch:
            one.setflags(write=False)  # or `run` would copy it

    def __call__(self) -> Times:
        marks: list[tuple[float, float]] = []

        def batches() -> Iterator[Any]:
            for _ in range(IN_FLIGHT + self.calls + 1):
                marks.append((time.perf_counter(), time.process_time()))
                yield self.batch

        sc.run(self.step, self.state, batches())
        first, last = marks[IN_FLIGHT], marks[IN_FLIGHT + self.calls]
        seconds, cpu_seconds = ((after - before) / self.calls for before, after in zip(first, last, strict=True))
        return Times(seconds, cpu_seconds, seconds)


def model_flops(size: Size) -> int:
    """What a step needs if nothing is computed twice, by nanoGPT's count: the position embeddings are no products."""
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, init(size)))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - shapes["wpe"].size
    per_token = 6 * num_params + 12 * size.layers * size.width * size.context
    return per_token * size.rows * size.context


def peak_of(kind: str) -> float | None:
    """Dense products in bfloat16 per second, from the data sheet; None for a device that is not in the table."""
    rows = [row for row in sc.inspect.DEVICES.values() if kind.startswith(row.kind)]
    if not rows:
        known = ", ".join(row.kind for row in sc.inspect.DEVICES.values())
        print(f"The peak of {kind!r} is not known, so there is no MFU. Known are {known}.\n")
    return rows[0].flops_per_second if rows else None


def require_same(moved: Any, expected: Any, *, name: str) -> float:
    """Refuse to time variants whose step is another: the difference of two steps over their size, of all leaves."""
    distance = optax.tree.norm(jax.tree.map(np.subtract, moved, expected)) / optax.tree.norm(expected)
    if not distance <= TOLERANCE:
        raise ValueError(f"{name} makes another step: it differs by {distance:.1%} of its size.")
    return float(distance)


def measure(size: Size, k: int, attentions: list[str], *, rounds: int, calls: int, quick: bool) -> dict[str, Any]:
    """All variants in interleaved rounds."""
    random = np.random.default_rng(1)
    text = random.integers(0, size.vocabulary, (size.rows, size.context + 1)).astype(np.int32)
    batch = (text[:, :-1], text[:, 1:])
    variants: dict[str, Variant] = {}
    for attention in attentions:
        variants[f"stepc, attention of {attention}"] = stepc_variant(size, k, batch, attention)
        variants[f"by hand, attention of {attention}"] = hand_variant(size, k, batch, attention)
    variants |= torch_variant(size, k, batch, quick=quick)

    samples: dict[str, Callable[[], Times]] = {}
    expected, differences = None, {}
    for name, one in variants.items():
        state, metrics = one.step(one.state, one.batch)
        one.wait((state, metrics))
        moved = jax.tree.map(lambda leaf, start: np.asarray(leaf) - start, one.params_of(state), init(size))
        expected = moved if expected is None else expected
        differences[name] = require_same(moved, expected, name=name)
        samples[name] = Called(one, state, calls=calls)
    bare = next(iter(variants))
    step = variants[bare].step
    samples[RUN] = InRun(step, step.init(init(size)), batch, calls=calls)
    taken = interleaved(samples, rounds=rounds)
    base = TORCH if TORCH in samples else f"by hand, attention of {attentions[0]}"
    return {
        "base": base,
        "bare": bare,
        "differences": differences,
        "temporary_bytes": {name: one.temporary_bytes for name, one in variants.items()},
        "seconds": spreads(taken),
        "cpu_seconds": spreads(taken, CPU_SECONDS),
        "host_seconds": spreads({name: taken[name] for name in variants}, HOST_SECONDS),
        "ratio": {name: ratio(taken, name, base) for name in samples},
        "more_in_run": difference(taken, RUN, bare),
    }


def tell(found: dict[str, Any], size: Size, k: int, kind: str) -> None:
    """The table of all variants, and what the run costs."""
    peak, flops = peak_of(kind), model_flops(size)
    rows = [("", "step, ms", f"of {found['base']}", "tokens/s", "MFU", "host, ms", "CPU ms", "temporaries, MB")]
    for name, seconds in found["seconds"].items():
        mfu = "-" if peak is None else f"{flops / seconds.median / peak:.1%}"
        host, temporary = found["host_seconds"].get(name), found["temporary_bytes"].get(name)
        rows.append(
            (
                name, seconds.shown(1e3, 1), found["ratio"][name].shown(),
                f"{size.rows * size.context / seconds.median:,.0f}", mfu, "-" if host is None else host.shown(1e3, 1),
                found["cpu_seconds"][name].shown(1e3, 1), "-" if temporary is None else f"{temporary / 1e6:,.0f}",
            )
        )  # fmt: skip
        plot(name, found["ratio"][name], 1.0)
    show(f"GPT-2 on {kind}, k = {k}, {size.rows * size.context:,} tokens a step; median (quartiles)", rows)
    step, more = found["seconds"][found["bare"]].median, found["more_in_run"]
    print(
        f"  a step in `sc.run` takes {more.shown(1e3, 2)} ms more, {more.median / step:.2%} of the step\n", flush=True
    )


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--calls", type=int, default=3, help="steps in one sample (default: %(default)s)")
    parser.add_argument("--k", type=int, default=K, help=f"microbatches of the {GPT2.rows} rows (default: %(default)s)")
    parser.add_argument(
        "--attention", nargs="+", choices=("xla", "cudnn"), help="how JAX computes attention (default: both on a GPU)"
    )
    options = parser.parse_args()
    # PyTorch needs memory too: JAX takes what it uses, and not three quarters of it at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    has_gpu = jax.default_backend() == "gpu"
    if not has_gpu and not options.quick:
        parser.error(f"it needs a GPU, and JAX has found none: its backend is {jax.default_backend()!r}. See --quick.")
    setting = begin("a step of GPT-2 124M on one GPU: stepc, JAX by hand, torch.compile, and the host meanwhile")
    setting["device"] = kind = jax.devices()[0].device_kind
    size, k = (TINY, 2) if options.quick else (GPT2, options.k)
    rounds, calls = (2, 1) if options.quick else (options.rounds, options.calls)
    attentions = options.attention or (["xla", "cudnn"] if has_gpu and not options.quick else ["xla"])
    found = measure(size, k, attentions, rounds=rounds, calls=calls, quick=options.quick)
    tell(found, size, k, kind)
    finish("gpu", setting, found, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
