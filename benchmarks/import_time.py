"""How much longer does `import stepc` take than `import jax, optax`?

New processes, interleaved. Each reports its own import time, so interpreter start is not counted. All modules have
bytecode, as installed packages do, and the files are in the page cache: the first import after a boot takes longer.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType

from measuring import (
    CPU_SECONDS,
    SECONDS,
    Sample,
    Taken,
    arguments,
    begin,
    difference,
    finish,
    interleaved,
    show,
    spreads,
    verdict,
)

IMPORTS: Mapping[str, str] = MappingProxyType({"jax, optax": "jax, optax", "stepc": "stepc"})
TARGET_SECONDS = 0.2


def importing(names: str, bytecode: str) -> Sample:
    """A sample that imports in a new process, with bytecode in a directory of its own."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables["PYTHONPYCACHEPREFIX"] = bytecode
    program = f"""
import time
started = time.perf_counter(), time.process_time()
import {names}
print(time.perf_counter() - started[0], time.process_time() - started[1])
"""

    def sample() -> Taken:
        command = (sys.executable, "-c", program)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        seconds, cpu_seconds = map(float, done.stdout.split())
        return Taken(seconds, cpu_seconds)

    return sample


def main() -> None:
    options = arguments(__doc__, rounds=25).parse_args()
    rounds = 3 if options.quick else options.rounds
    setting = begin("import stepc against import jax, optax")
    with tempfile.TemporaryDirectory() as bytecode:  # filled by the round that is thrown away
        samples = {name: importing(names, bytecode) for name, names in IMPORTS.items()}
        taken = interleaved(samples, rounds=rounds)
    rows, results = [("import", *IMPORTS, "difference", "target")], {}
    for clock, place in (("seconds", SECONDS), ("cpu_seconds", CPU_SECONDS)):
        each, extra = spreads(taken, place), difference(taken, "stepc", "jax, optax", place)
        target = verdict(extra.median, TARGET_SECONDS) if place == SECONDS else "-"
        rows.append((clock.replace("cpu_", "CPU "), *(each[name].shown() for name in IMPORTS), extra.shown(), target))
        results[clock] = {**each, "difference": extra}
    show(f"{rounds} fresh processes each; median (quartiles)", rows)
    finish("import_time", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
