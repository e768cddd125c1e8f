"""Questions about a compiled program. It knows executables and HLO text, and nothing about pipelines.

`DEVICES` is the table of devices, by name, that `roofline` estimates for.
"""

from stepc.inspect.budget import Budget, Measurement, check
from stepc.inspect.collectives import Collective, Collectives, Overlap, collectives
from stepc.inspect.cost import Cost, cost
from stepc.inspect.diff import Change, Diff, diff
from stepc.inspect.donation import Aliases, DonatedLeaf, aliases, donated_leaves
from stepc.inspect.memory import Memory, MemoryPart, memory
from stepc.inspect.roofline import DEVICES, Device, Roofline, roofline
from stepc.inspect.timeline import CollectiveSegment, ComputeSegment, LoopSegment, timeline
from stepc.inspect.topology import topology

__all__ = [
    "Aliases",
    "Budget",
    "Change",
    "Collective",
    "CollectiveSegment",
    "Collectives",
    "ComputeSegment",
    "Cost",
    "DEVICES",
    "Device",
    "Diff",
    "DonatedLeaf",
    "LoopSegment",
    "Measurement",
    "Memory",
    "MemoryPart",
    "Overlap",
    "Roofline",
    "aliases",
    "check",
    "collectives",
    "cost",
    "diff",
    "donated_leaves",
    "memory",
    "roofline",
    "timeline",
    "topology",
]
