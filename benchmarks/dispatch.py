"""What does a call of a stepc step cost beyond the jitted function it calls?

One device, a trivial loss, sgd, states of 20 and 200 leaves: `step(state, batch)` against a bare call of the same
program, `jax.jit(step.function, donate_argnums=0)`; and against `jax.jit` of the same work by hand, on a state of the
same type, which takes no norm of the gradient. A sample is a loop of calls that is waited for at its end.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import (
    Repeated,
    arguments,
    begin,
    difference,
    finish,
    interleaved,
    require_equal,
    show,
    spreads,
)

import stepc as sc

LEAF_SIZE = 8
TARGET_MICROSECONDS = {20: 5.0, 200: 10.0}  # by leaves, beyond a bare call
LEARNING_RATE = 0.1


def loss(params: Any, batch: Any) -> jax.Array:
    """Linear, so that its gradient is a broadcast."""
    return batch["x"].mean() * sum(leaf.sum() for leaf in jax.tree.leaves(params))


@partial(jax.jit, donate_argnums=0)
def by_hand(state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    """The work of stepc's program, on stepc's own state."""
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    updates, opt_state = optax.sgd(LEARNING_RATE).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return sc.State(params, opt_state, state.step + 1, state.rng, state.placement), {"loss": value}


def measure(num_leaves: int, batch: Any, *, rounds: int, calls: int) -> dict[str, Any]:
    """Seconds per call of each, and their difference, round by round."""
    # Two leaves of the state are its step counter and its key; sgd keeps none.
    params = {f"leaf_{number:03}": np.zeros(LEAF_SIZE, np.float32) for number in range(num_leaves - 2)}
    step = sc.compile(sc.update(optax.sgd(LEARNING_RATE)) @ sc.grad(loss))
    bare = jax.jit(step.function, donate_argnums=0)
    ours, alike, theirs = step.init(params), step.init(params), step.init(params)
    if len(jax.tree.leaves(ours)) != num_leaves:
        raise ValueError(f"The state has {len(jax.tree.leaves(ours))} leaves, not {num_leaves}.")
    ours, _ = step(ours, batch)
    alike, _ = bare(alike, batch)
    theirs, _ = by_hand(theirs, batch)
    require_equal(ours.params, alike.params, name="the bare call")
    require_equal(ours.params, theirs.params, name="stepc")
    taken = interleaved(
        {
            "stepc": Repeated(step, ours, batch, calls=calls),
            "bare": Repeated(bare, alike, batch, calls=calls),
            "by hand": Repeated(by_hand, theirs, batch, calls=calls),
        },
        rounds=rounds,
    )
    return {
        "leaves": num_leaves,
        "batch": type(batch["x"]).__module__.partition(".")[0].replace("jaxlib", "jax"),
        "seconds_per_call": spreads(taken),
        "difference_seconds": difference(taken, "stepc", "bare"),
        "difference_to_by_hand_seconds": difference(taken, "stepc", "by hand"),
    }


def main() -> None:
    parser = arguments(__doc__, rounds=100)
    parser.add_argument("--calls", type=int, default=200, help="calls in one loop (default: %(default)s)")
    options = parser.parse_args()
    rounds, calls = (3, 20) if options.quick else (options.rounds, options.calls)
    setting = begin("the overhead of a call: stepc's step against jax.jit by hand")
    host = {"x": np.ones((8, 4), np.float32)}
    results = [
        measure(num_leaves, batch, rounds=rounds, calls=calls)
        for num_leaves in (20, 200)
        for batch in (jax.tree.map(jnp.asarray, host), host)
    ]
    rows = [("leaves", "batch", "stepc, us", "bare, us", "by hand, us", "to bare, us", "target", "to by hand, us")]
    for found in results:
        seconds, extra = found["seconds_per_call"], found["difference_seconds"]
        most = TARGET_MICROSECONDS[found["leaves"]]
        target = f"<= {most:.0f} {'met' if extra.median * 1e6 <= most else 'MISSED'}"
        shown = [seconds[name].shown(1e6, 1) for name in ("stepc", "bare", "by hand")]
        to_by_hand = found["difference_to_by_hand_seconds"].shown(1e6, 1)
        rows.append((str(found["leaves"]), found["batch"], *shown, extra.shown(1e6, 1), target, to_by_hand))
    show(f"microseconds a call, loops of {calls}; median (quartiles)", rows)
    finish("dispatch", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
