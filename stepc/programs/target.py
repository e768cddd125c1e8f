"""Finds the program that a command is to look at, and compiles it; it must not know what is asked of it."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh

import stepc as sc
from stepc.errors import did_you_mean

# Where the arguments of a jitted function are looked for, in its own module.
EXAMPLE = "example_args"
_HERE = "cpu"


@dataclass(frozen=True)
class Target:
    """A compiled program, with what the command line calls it. `traces` is known of a step of stepc."""

    title: str
    compiled: sc.Compiled | jax.stages.Compiled
    mesh: Mesh | None
    traces: int | None

    def known(self, device: str | None) -> sc.report.Known:
        """All there is to know of it."""
        match self.compiled:
            case sc.Compiled():
                return self.compiled.known(device)
            case _:
                return sc.report.known(self.compiled, self.mesh, title=self.title, device=device)

    def check(self, budget: sc.Budget) -> None:
        """Hold it to a budget."""
        match self.compiled:
            case sc.Compiled():
                self.compiled.check(budget, traces=self.traces)
            case _:
                sc.inspect.check(budget, self.compiled, self.mesh)


def compiled(
    written: str, *, args: str = EXAMPLE, on: str | None = None, axes: Mapping[str, int] | None = None
) -> Target:
    """Find and compile what `FILE.py:NAME` or `module:NAME` names.

    Meaning: NAME is a jitted function, whose arguments are what `args` names beside it; or a tuple of a step, or of a
      jitted function, and its arguments; or a function that returns such a tuple, given `mesh=` if it takes one.
      Arguments may be shapes, `jax.ShapeDtypeStruct`.

    Args:
      args: the name of the arguments of a jitted function.
      on: a topology, as in `sc.topology`; by default the devices of this machine, a CPU's simulated.
      axes: the size of each axis of the mesh; None for no mesh here, and for one axis `data` on a topology.
    Errors: ConfigError that says what is not there. What the user's own code raises passes through.
    """
    mesh = _mesh(on, axes)
    module, place, name = _found(written)
    value = _named(module, name, place)
    if isinstance(value, jax.stages.Wrapped):
        given = _resolved(_named(module, args, place), mesh, args)
        program, arguments = value, given if isinstance(given, tuple) else (given,)
    else:
        program, *arguments = _tuple(_resolved(value, mesh, written), written)
    match program:
        case sc.Step():
            step = program.lower(*arguments).compile()
            return Target(repr(program.pipeline), step, program.mesh, program.traces)
        case _:
            made = program.lower(*arguments).compile()
            return Target(name, made, _fitting(made, mesh), None)


def read_axes(written: str) -> dict[str, int]:
    """Read `data=256,model=4`."""
    axes: dict[str, int] = {}
    for part in written.split(","):
        name, _, size = part.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdigit() or int(size) < 1 or name.strip() in axes:
            facts = (("expected", "axis=size, each axis once, as in data=256,model=4"), ("got", written))
            raise sc.ConfigError("--mesh does not say which axes there are.", facts=facts)
        axes[name.strip()] = int(size)
    return axes


def _mesh(on: str | None, axes: Mapping[str, int] | None) -> Mesh | None:
    if on is not None and on != _HERE:
        jax.config.update("jax_platforms", "cpu")  # no device is needed, and none must be waited for
        return sc.topology(on, **(axes or {}))
    if axes is None:
        return None
    wanted = prod(axes.values())
    try:
        jax.config.update("jax_num_cpu_devices", wanted)  # has no effect on accelerators
    except RuntimeError:
        pass  # some backend runs already; what it has is seen below
    devices = jax.devices()
    if len(devices) < wanted:
        raise sc.ConfigError(
            f"The mesh has {wanted} devices, and there are {len(devices)}.",
            suggestion="With --on, such as --on tpu:v5e:16x16, no device is needed.",
        )
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices[:wanted])


def _fitting(made: jax.stages.Compiled, mesh: Mesh | None) -> Mesh | None:
    """The mesh, if the program is for as many devices as it has."""
    if mesh is None:
        return None
    devices = {device for one in jax.tree.leaves(made.input_shardings) for device in one.device_set}
    if len(devices) != mesh.size:
        raise sc.ConfigError(
            f"The program is for {len(devices)} device{'s' if len(devices) > 1 else ''}, and the mesh has {mesh.size}.",
            suggestion="Let the arguments be a function that takes `mesh`, and say there how they lie on it.",
        )
    return mesh


def _found(written: str) -> tuple[ModuleType, str, str]:
    """The module, what the user called it, and the name in it."""
    place, _, name = written.rpartition(":")
    if not place or not name:
        facts = (("expected", "FILE.py:NAME or module:NAME"), ("got", written))
        raise sc.ConfigError("This does not name a program.", facts=facts)
    path = Path(place)
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        if _is_missing(place):
            raise sc.ConfigError(f"There is no module `{place}` here.")
        return importlib.import_module(place), place, name
    if not path.is_file():
        raise sc.ConfigError(f"There is no file {path}.")
    sys.path.insert(0, str(path.parent.resolve()))
    numbered = (path.stem if number == 0 else f"{path.stem}_{number}" for number in count())
    called = next(name for name in numbered if name not in sys.modules)
    spec = importlib.util.spec_from_file_location(called, path)
    if spec is None or spec.loader is None:
        raise sc.ConfigError(f"{path} is not a file of Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        if error.filename is None or Path(error.filename).resolve() != path.resolve():
            raise  # in a file that this one imports
        raise sc.ConfigError(f"{path}:{error.lineno} is not Python: {error.msg}.") from error
    return module, place, name


def _is_missing(module: str) -> bool:
    parts = module.split(".")
    return any(importlib.util.find_spec(".".join(parts[: end + 1])) is None for end in range(len(parts)))


def _named(module: ModuleType, name: str, place: str) -> Any:  # Any: what a user's module holds
    held = vars(module)
    if name not in held:
        public = [one for one in held if not one.startswith("_")]
        raise sc.ConfigError(f"`{place}` has no `{name}`.", suggestion=did_you_mean(name, public))
    return held[name]


def _resolved(value: Any, mesh: Mesh | None, written: str) -> Any:  # Any: see `_named`
    """What a function returns, given the mesh if it takes one; anything else as it is."""
    if not inspect.isfunction(value):
        return value
    parameters = inspect.signature(value).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.name != "mesh"]
    if needed:
        raise sc.ConfigError(f"`{written}` takes {', '.join(needed)}; only `mesh` is known here.")
    if any(one.name == "mesh" for one in parameters):
        return value(mesh=mesh)
    if mesh is not None:
        raise sc.ConfigError(f"`{written}` takes no `mesh`, so --on and --mesh say nothing to it.")
    return value()


def _tuple(value: Any, written: str) -> tuple[Any, ...]:  # Any: see `_named`
    if isinstance(value, tuple) and value and isinstance(value[0], sc.Step | jax.stages.Wrapped):
        return value
    facts = (
        ("expected", "(step, state, batch), or (jitted function, *arguments), or a function that returns that"),
        ("got", type(value).__name__),
    )
    raise sc.ConfigError(f"`{written}` is not a program to look at.", facts=facts)
