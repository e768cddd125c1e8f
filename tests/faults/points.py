"""Named points where a job touches its files, by Python's audit events: the product is the same for a test."""

import sys
from collections.abc import Callable
from pathlib import PurePath

TEMPORARY = ".orbax-checkpoint-tmp"
# With a checkpoint every 10 steps, of which 3 stay: 40 is the first one that lets another be deleted.
POINTS = {
    "before the snapshot": ("job.finished", "40"),
    "before the first write": ("os.mkdir", f"40{TEMPORARY}"),
    "in the write": ("open", f"40{TEMPORARY}/state{TEMPORARY}/_METADATA"),
    "before the rename": ("os.rename", f"40{TEMPORARY}"),
    "after the rename": ("os.rename", "kept/10"),
    "in the deletion of an old one": ("shutil.rmtree", "10.deleting"),
    "in a line of the log": ("job.writing", "44"),
}


def act_at(point: str, act: Callable[[], object]) -> None:
    """Act just before what the point names is done, in the thread that does it."""
    event, path = POINTS[point]

    def hook(name: str, about: tuple[object, ...]) -> None:
        if name == event and PurePath(str(about[0])).match(path):
            act()

    sys.addaudithook(hook)
