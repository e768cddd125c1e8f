"""What a run did."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Run:
    """What a run did.

    Args:
      state: the state after the last finished step; alive.
      steps: the number of the last finished step, those of earlier runs on the same checkpoints among them.
      ended: "steps", "data", "interrupted" or "preempted".
      metrics: those of the last finished step, as floats.
      failures: how many of each kind there were, also those that a policy went on from.
      skipped: how many steps, and how many reads of the data, were left out.
      rollbacks: how often the run went back.
      logger_failures: how often each logger raised, by the name of its class.
      log_seconds: how long each logger took, by the name of its class.
    """

    state: Any  # Any: a state, whatever it is made of; None in the `.run` of an error that left none
    steps: int = 0
    ended: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    rollbacks: int = 0
    logger_failures: dict[str, int] = field(default_factory=dict)
    log_seconds: dict[str, float] = field(default_factory=dict)
