"""Questions about a compiled program; it knows nothing of pipelines, only executables and HLO text."""

from stepc.inspect.budget import Budget as Budget
from stepc.inspect.budget import check as check
from stepc.inspect.collectives import Collective as Collective
from stepc.inspect.collectives import Collectives as Collectives
from stepc.inspect.collectives import collectives as collectives
from stepc.inspect.difference import Diff as Diff
from stepc.inspect.difference import diff as diff
from stepc.inspect.donation import Aliases as Aliases
from stepc.inspect.donation import aliases as aliases
from stepc.inspect.memory import Cost as Cost
from stepc.inspect.memory import Memory as Memory
from stepc.inspect.memory import MemoryPart as MemoryPart
from stepc.inspect.memory import cost as cost
from stepc.inspect.memory import memory as memory
from stepc.inspect.roofline import DEVICES as DEVICES
from stepc.inspect.roofline import Device as Device
from stepc.inspect.roofline import Roofline as Roofline
from stepc.inspect.roofline import roofline as roofline
from stepc.inspect.topology import topology as topology
