"""What `--help` teaches of each command: examples that can be copied, and exit codes. Text only."""

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from math import prod
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh

import stepc as sc
from stepc._distributed.launch import launch
from stepc._runner.loggers.console import print_to_nobody
from stepc.errors import did_you_mean
from stepc.programs.job import Job

_BUILD = """\
in a file train.py of yours:

  def build(mesh):
      step = stepc.compile(pipeline, mesh=mesh)
      return step, step.init(params), batch  # of jax.ShapeDtypeStruct leaves as well: nothing is run
"""

LESSONS = MappingProxyType(
    {
        "train": """\
examples:
  stepc train                                 # about two minutes on two cores
  stepc train --steps 100 --k 8 --batch 32    # eight microbatches in one step, on two simulated devices

exit codes: 0 if all went well, 1 if what it needs is not installed, 2 for a mistake in the command, 130 for Ctrl-C.""",
        "launch": """\
examples:
  stepc launch -n 4 -- stepc train                        # four processes, each with its own part of every batch
  stepc launch -n 2 -- python train.py                    # your own program, which calls sc.init_distributed()

exit codes: 0 if all went well, else that of the first process that failed; 2 for a mistake in the command.""",
        "explain": f"""\
{_BUILD}
examples:
  stepc explain train.py:build --mesh data=8
  stepc explain train.py:build --on tpu:v5e:16x16 --mesh data=64,model=4
  stepc explain --jit my_module:train_step --args example_args

exit codes: 0 if all went well, 1 if nothing fits the memory it asks for, 2 for a mistake in the command.""",
        "report": f"""\
{_BUILD}
examples:
  stepc report train.py:build --mesh data=8 -o step.html
  stepc report train.py:build --on gpu:h100:32x8 --device gpu:h100 -o pod.html

exit codes: 0 if all went well, 1 if nothing fits the memory it asks for, 2 for a mistake in the command.""",
        "check": f"""\
{_BUILD}
in a file budget.toml:

  gradient_reductions = 1
  collectives_in_loops = 0
  temp_bytes = "2GiB"
  donated = true

examples:
  stepc check train.py:build --mesh data=8 --budget budget.toml
  stepc check train.py:build --on tpu:v5e:16x16 --budget budget.toml

exit codes: 0 if every promise holds, 1 if one is broken, 2 for a mistake in the command.""",
        "diff": f"""\
{_BUILD}
examples:
  stepc diff old.py:build new.py:build --mesh data=8
  stepc diff before.hlo after.hlo             # what `compiled.hlo()` returned, kept in files

exit codes: 0 if nothing changed, 1 if something did, 2 for a mistake in the command.""",
    }
)


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

    def known(self, device: str | None) -> sc.report.ProgramFacts:
        """All there is to know of it."""
        match self.compiled:
            case sc.Compiled():
                return self.compiled.facts(device)
            case _:
                return sc.report.facts(self.compiled, self.mesh, title=self.title, device=device)

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


_TEXTS = (".txt", ".hlo")


def explain(target: Target, *, device: str | None) -> None:
    """Print all there is to know: in colours on a terminal, if rich is installed; as plain text otherwise."""
    known = target.known(device)
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        # By name, and not at the top: rich is an extra.
        importlib.import_module("stepc.report.terminal").show(known)
    else:
        print(sc.report.text(known))


def report(target: Target, *, device: str | None, out: Path) -> None:
    """Write the page, and print where."""
    if out.parent and not out.parent.is_dir():
        raise sc.ConfigError(f"There is no folder {out.parent} to write {out.name} to.")
    known = target.known(device)
    try:
        path = sc.report.write(known, out)
    except OSError as error:
        raise sc.ConfigError(f"{out} cannot be written: {error.strerror}.") from error
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def check(target: Target, *, budget: Path) -> None:
    """Hold it to the budget, and print what was promised if all of it holds."""
    promised = sc.Budget.from_toml(budget)
    target.check(promised)
    many = len(promised.promised)
    print(f"{target.title}\n{'the promise holds' if many == 1 else f'all {many} promises hold'}: {promised!r}")


def text_of(written: str) -> str | None:
    """The HLO text of a file, if it is the name of one; None if it names a program."""
    path = Path(written)
    if path.suffix not in _TEXTS:
        return None
    if not path.is_file():
        raise sc.ConfigError(f"There is no file {path}.")
    text = path.read_text()
    if "\nENTRY " not in text:
        raise sc.ConfigError(f"{path} is not HLO text: it has no ENTRY computation.")
    return text


# What `stepc train` imports beyond what stepc needs: the extra "demo".
DEMO = ("rich", "matplotlib", "orbax")
FAILED, MISTAKEN, INTERRUPTED = 1, 2, 130
Options: TypeAlias = dict[str, Any]  # Any: each is what the reader of its option returns

TARGET = """a program to look at: FILE.py:NAME or module:NAME. NAME is a tuple (step, state, batch), or a function that
returns one, given mesh= if it takes it; (jitted function, *arguments) does as well. Arguments may be shapes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the words after `stepc`; those of the process by default.
    Meaning: 0 if all went well; 1 if the extra is not installed, a budget is broken, two programs differ, or another
      process failed, or nobody reads on; 2 for a mistake in the command; 130 for Ctrl-C.
    Errors: what is neither of these passes through with its traceback: it is a fault of ours, or of the user's program.
    """
    options = vars(_parser().parse_args(argv))
    run: Callable[[Options], int] = options.pop("run")
    try:
        return run(options)
    except sc.Interrupted as stop:
        return _ended(str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return _ended("Interrupted outside of the training loop.", INTERRUPTED)
    except (sc.StepError, sc.Preempted):
        raise  # the step itself failed: its cause and traceback are what one needs; or SIGTERM, which has a code
    except BrokenPipeError:  # whoever read it, as `head` does, has enough; in training `Console` sees to that
        print_to_nobody()
        return FAILED
    except (sc.BudgetError, sc.PeerError) as error:
        return _ended(f"{type(error).__name__}: {error}", FAILED)
    except sc.StepcError as error:
        return _ended(f"{type(error).__name__}: {error}", MISTAKEN)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepc",
        description="A compiler for JAX training steps.",
        epilog="begin with `stepc train`; `stepc COMMAND --help` has examples.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_train(commands)
    _add_launch(commands)
    one = _command(commands, "explain", _explain, "print all there is to know of a compiled step")
    _add_target(one)
    _add_device(one)
    one = _command(commands, "report", _report, "write all of it, with pictures and the HLO, as one page")
    _add_target(one)
    _add_device(one)
    one.add_argument("--out", "-o", type=Path, default=Path("step.html"), metavar="FILE", help="(default: step.html)")
    one = _command(commands, "check", _check, "hold a compiled step to a budget")
    _add_target(one)
    one.add_argument(
        "--budget", type=Path, required=True, metavar="FILE.toml", help="the promises, by the fields of stepc.Budget"
    )
    one = _command(commands, "diff", _diff, "show what changed between two compiled programs")
    for name in ("before", "after"):
        one.add_argument(name, metavar=name.upper(), help="as in `stepc explain`, or a file of HLO text (.txt, .hlo)")
    _add_place(one)
    return parser


def _command(
    commands: Any,  # Any: argparse has no public type for its subparsers
    name: str,
    run: Callable[[Options], int],
    meaning: str,
) -> argparse.ArgumentParser:
    one = commands.add_parser(
        name,
        help=meaning,
        description=f"{meaning[0].upper()}{meaning[1:]}.",
        epilog=LESSONS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one.set_defaults(run=run)
    return one


def _add_target(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("target", nargs="?", metavar="TARGET", help=TARGET)
    which.add_argument(
        "--jit", metavar="MODULE:FUNCTION", help="any jitted function, that need not have heard of stepc"
    )
    parser.add_argument(
        "--args", default=EXAMPLE, metavar="NAME", help=f"its arguments, beside it in the module (default: {EXAMPLE})"
    )
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on", metavar="TOPOLOGY", help="compile for what is not there: tpu:v5p:8x8x16, gpu:h100:32x8 (default: here)"
    )
    parser.add_argument("--mesh", metavar="AXES", help="data=256,model=4; on a CPU, the devices are simulated")


def _add_device(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(sc.inspect.DEVICES)
    parser.add_argument("--device", metavar="DEVICE", help=f"whose peaks to estimate times with: {known}")


def _add_train(commands: Any) -> None:  # Any: see `_command`
    meaning = "train a small GPT on the source of Python's standard library, and show the compiled step"
    train = _command(commands, "train", _train, meaning)
    for one in fields(Job):
        option, meaning = f"--{one.name.replace('_', '-')}", one.metadata["meaning"]
        if one.default is False:
            train.add_argument(option, action="store_true", help=meaning)
            continue
        train.add_argument(
            option,
            type=one.metadata["reader"],
            default=one.default,
            metavar=one.metadata["unit"],
            help=f"{meaning} (default: {one.metadata['shown']})",
        )


def _add_launch(commands: Any) -> None:  # Any: see `_command`
    one = _command(commands, "launch", _launch, "try a program of many processes on this machine")
    one.add_argument("-n", type=int, required=True, metavar="PROCESSES", help="how many; they meet on 127.0.0.1")
    one.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as: -- stepc train")


def _launch(options: Options) -> int:
    command = options["command"]
    return launch(options["n"], command[1:] if command[:1] == ["--"] else command)


def _train(options: Options) -> int:
    missing = [name for name in DEMO if importlib.util.find_spec(name) is None]
    if missing:
        needed, them = " and ".join(missing), "it" if len(missing) == 1 else "them"
        return _ended(f"`stepc train` needs {needed}. Install {them} with: pip install 'stepc[demo]'", FAILED)
    # By name, and not at the top: `stepc train --help` and the message above must work without the extra. Asking
    # first, instead of catching ImportError, keeps an import that fails for another reason a traceback.
    importlib.import_module("stepc.programs.train").train(Job(**options))
    return 0


def _explain(options: Options) -> int:
    explain(_target(options), device=options["device"])
    return 0


def _report(options: Options) -> int:
    report(_target(options), device=options["device"], out=options["out"])
    return 0


def _check(options: Options) -> int:
    check(_target(options), budget=options["budget"])
    return 0


def _diff(options: Options) -> int:
    axes = None if options["mesh"] is None else read_axes(options["mesh"])
    before, after = (
        text_of(options[name]) or compiled(options[name], on=options["on"], axes=axes).compiled
        for name in ("before", "after")
    )
    found = sc.inspect.diff(before, after)
    print(found)
    return FAILED if found else 0


def _target(options: Options) -> Target:
    axes = None if options["mesh"] is None else read_axes(options["mesh"])
    return compiled(options["target"] or options["jit"], args=options["args"], on=options["on"], axes=axes)


def _ended(message: str, code: int) -> int:
    print(f"stepc: {message}", file=sys.stderr)
    return code
