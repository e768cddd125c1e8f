"""A copy of the state to go back to, and the batches since: what a policy that goes on must keep."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from stepc.runner.feed import Item


@jax.jit
def copy(state: Any) -> Any:  # Any: a state, whatever it is made of
    """New buffers for every leaf, lying as they lay. `device_put` would alias them, and a donation delete both."""
    return jax.tree.map(jnp.copy, state)


@dataclass
class Anchor:
    """The state after a settled step.

    Args:
      state: a copy; it is copied again when it is used.
      number: that step.
      after: where the data stood after it.
      kept: what was given to the step since, in order.
      steps_per_call: how many numbers each of them takes.
    """

    state: Any  # Any: a state
    number: int
    after: Any  # Any: the position of the data
    steps_per_call: int
    kept: list[Item] = field(default_factory=list)

    def replay(self, leave_out: int | None) -> list[Item]:
        """All that was given since, with a hole where the call with the step `leave_out` was."""
        place = -1 if leave_out is None else self.place_of(leave_out)
        return [
            Item(None, item.after, is_hole=True) if number == place else item for number, item in enumerate(self.kept)
        ]

    def place_of(self, step: int) -> int:
        """Which of the kept calls made a step."""
        return (step - self.number - 1) // self.steps_per_call

    def price(self) -> str:
        """What it costs to keep, in words."""
        bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array))
        return f"{bytes_:,} bytes for a copy of the state"
