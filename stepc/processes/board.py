"""A notice board that all processes of a job see: what one writes, the others read. It knows no arrays."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import jax

from stepc.errors import Facts, PeerError
from stepc.private import Client, membership

PATIENCE_SECONDS = 300.0  # how long the others may take to come to the same place: they load data, they compile
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # where an object lies in memory: no two processes agree on that
SHOWN = 8  # how many differences a message lists


@dataclass(frozen=True, eq=False)  # there is one in a process
class Board:
    """The store of texts of a job.

    Args:
      me: the number of this process.
      num: how many there are.
    """

    client: Client
    me: int
    num: int
    _asked: Counter[str] = field(default_factory=Counter)

    def put(self, key: str, text: str, *, again: bool = False) -> bool:
        """Write; whether it was written. What is there stays, unless it is to be written `again`."""
        try:
            self.client.key_value_set(key, text, again)
        except jax.errors.JaxRuntimeError:  # it exists, or the store is gone
            return False
        return True

    def read(self, key: str, *, seconds: float = PATIENCE_SECONDS) -> str | None:
        """Wait for what another process writes; None if it does not, or the store is gone."""
        try:
            return self.client.blocking_key_value_get(key, int(seconds * 1000))
        except jax.errors.JaxRuntimeError:
            return None

    def peek(self, key: str) -> str | None:
        """What is written, if it is."""
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None

    def number(self, topic: str) -> int:
        """How often this was asked for: all processes come to the same places in the same order."""
        self._asked[topic] += 1
        return self._asked[topic]

    def differences(self, topic: str, mine: Mapping[str, str], *, among: Sequence[int] | None = None) -> Facts:
        """Rows of (name, text) for what is not the same on all processes; the same rows on each.

        Args:
          topic: what is compared; all come here for the same topics in the same order.
          among: the processes that come here; by default all.
        Errors: PeerError if one does not come.
        The first of them reads what each wrote and writes what differs: so each text is read once.
        """
        everyone = list(range(self.num) if among is None else among)
        place = f"stepc/{topic}/{'-'.join(map(str, everyone))}/{self.number(f'{topic} {everyone}')}"
        self.put(f"{place}/{self.me}", json.dumps({name: ADDRESS.sub("", text) for name, text in mine.items()}))
        if self.me == everyone[0]:
            told = {process: self.read(f"{place}/{process}") for process in everyone}
            self.put(f"{place}/verdict", json.dumps(_verdict(told)))
        verdict = self.read(f"{place}/verdict", seconds=PATIENCE_SECONDS * 2)
        missing, rows = ([everyone[0]], []) if verdict is None else json.loads(verdict)
        if missing:
            what = f"Process {missing[0]} did not come to compare its {topic} with the others."
            raise PeerError(what, process=missing[0], phase="compare")
        return tuple((name, text) for name, text in rows)


def _verdict(told: Mapping[int, str | None]) -> tuple[list[int], list[tuple[str, str]]]:
    """Who did not come, and what differs."""
    missing = [process for process, text in told.items() if text is None]
    if missing:
        return missing, []
    each = {process: json.loads(text or "") for process, text in told.items()}
    first, *others = each
    rows = []
    for name in dict.fromkeys(name for one in each.values() for name in one):
        here = each[first].get(name, "nothing")
        odd = next((process for process in others if each[process].get(name, "nothing") != here), None)
        if odd is not None:
            rows.append((name, f"process {first}: {here}; process {odd}: {each[odd].get(name, 'nothing')}"))
    left = [("and", f"{len(rows) - SHOWN} more")] if len(rows) > SHOWN else []
    return [], rows[:SHOWN] + left


@cache
def _board(client: Client, me: int, num: int) -> Board:
    return Board(client, me, num)


def board() -> Board | None:
    """The board of this job; None if it has one process."""
    joined = membership()
    return None if joined is None or joined[2] == 1 else _board(*joined)
