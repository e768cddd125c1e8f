"""What goes wrong, and when: a `FaultPlan` wraps real data and a real step. The faults themselves are real ones."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc
from stepc._language.state import is_typed_key, key_data, leaves_by_path

ROWS = 4
TRUTH = np.float32([1.0, -2.0, 0.5])


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


@cache
def step() -> sc.Step:
    """One compiled step for all tests: it keeps nothing between calls."""
    return sc.compile(sc.update(optax.adam(0.05)) @ sc.clip(10.0) @ sc.grad(loss))


def fresh() -> sc.State:
    return step().init({"w": np.zeros(3, np.float32)}, seed=7)


def batch_of(number: int, *, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Batch `number`, counted from 1; its number is in it."""
    random = np.random.default_rng(number)
    x = np.float32(random.normal(size=(rows, 3)))
    return {"x": x, "y": x @ TRUTH, "n": np.full(rows, number, np.int32)}


@dataclass
class Batches:
    """Batches 1 to `num`, by an iterator that knows where it is."""

    num: int
    plan: "FaultPlan"
    given: int = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        number = self.given + 1
        if number > self.num:
            raise StopIteration
        batch = self.plan.batch(number)  # may raise: then the place stays
        self.given = number
        return batch

    def get_state(self) -> dict[str, int]:
        return {"given": self.given}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.given = state["given"]


@jax.jit
def absurd(x: jax.Array) -> jax.Array:
    """A program that needs 64 TiB: on CPU its call returns, and its result fails when it is read."""
    return x + jnp.sort(jax.lax.iota(jnp.float32, 2**44) * x)[-1]


@dataclass
class FaultPlan:
    """Faults by the number of the batch they befall.

    Kinds: "nan" is in the batch, so it comes again; "flip" makes what the step gives NaN, once, as a flipped bit may;
    "device" fails late, once, for want of memory, "callback" by a callback to the host; "device_always" and
    "callback_always"; "read" raises OSError once, "read_always"; "call" raises in the call of the step, before anything
    runs.
    """

    faults: Mapping[int, str] = field(default_factory=dict)
    happened: Counter[int] = field(default_factory=Counter)

    def batches(self, num: int) -> Batches:
        return Batches(num, self)

    def batch(self, number: int) -> Any:
        kind = self.faults.get(number)
        if kind == "read_always" or kind == "read" and not self.happened[number]:
            self.happened[number] += 1
            raise OSError(f"batch {number} cannot be read")
        batch = batch_of(number)
        if kind == "nan":
            batch["y"][1] = np.nan
        return batch

    def __call__(self, state: Any, batch: Any) -> Any:
        """A step, with faults: give this to `run`."""
        number = int(batch["n"][0])
        kind = self.faults.get(number)
        if kind == "call":
            raise TypeError("the step does not like this batch")
        new, metrics = step()(state, batch)
        name, _, always = (kind or "").partition("_")
        if name in POISONS and (always or not self.happened[number]):
            self.happened[number] += 1
            poison = POISONS[name](metrics["loss"])
            new = jax.tree.map(lambda leaf: _poisoned(leaf, poison), new)
            metrics = {**metrics, "loss": poison}
        return new, metrics


def _raise(number: np.ndarray) -> np.ndarray:
    raise ValueError("the host does not like this number")


_calling = jax.jit(lambda x: jax.pure_callback(_raise, jax.ShapeDtypeStruct((), jnp.float32), x))


def calling(x: jax.Array) -> jax.Array:
    """A program whose callback to the host raises, in the call: late, jax would keep the failure for its own exit."""
    return _calling(jax.block_until_ready(x))


@jax.jit
def flipped(x: jax.Array) -> jax.Array:
    return x * jnp.nan


POISONS = {"device": absurd, "callback": calling, "flip": flipped}


@jax.jit
def _poisoned(leaf: Any, poison: jax.Array) -> Any:
    """The leaf, made to depend on a value that fails."""
    if is_typed_key(leaf):
        return leaf
    return leaf + (poison * 0).astype(leaf.dtype)


def by_a_plain_loop(numbers: list[int]) -> sc.State:
    """The state after these batches, with no runner at all."""
    state = fresh()
    for number in numbers:
        state, _ = step()(state, batch_of(number))
    return jax.block_until_ready(state)


def digest(state: Any) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf."""
    found = hashlib.sha256()
    for path, leaf in leaves_by_path(state):
        array = np.asarray(key_data(leaf))
        found.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


class Remembering:
    """A logger that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[str, dict[str, str], int]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.told.append((step, dict(metrics)))

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        self.events.append((name, dict(facts), step))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.events]


def iterate(batches: Batches) -> Iterator[Any]:
    """The same by a generator, which ends when it fails."""
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
