"""The command line: a new project, several processes, compiled steps and checkpoints to look at. It knows no model."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn, TypeAlias

import jax
from jax.sharding import Mesh

import stepc as sc
from stepc._distributed.launch import launch
from stepc._projects import LIBRARIES, missing_packages, write_project
from stepc._runner.checkpoint import checkpoint_store
from stepc._runner.loggers.console import print_to_nobody
from stepc.errors import did_you_mean

FAILED, INVALID, INTERRUPTED = 1, 2, 130
Options: TypeAlias = dict[str, Any]  # Any: each value is what the type of its option returns

_BUILD = """\
in your own file train.py:

  def build(mesh):
      step = stepc.compile(pipeline, mesh=mesh)
      return step, step.init(params), batch  # jax.ShapeDtypeStruct leaves do as well: nothing runs
"""

# What `stepc COMMAND --help` ends with: examples to copy, and the exit codes.
EPILOGS = MappingProxyType(
    {
        "new": """\
Three files and a test: model.py (the model and its loss), step.py (the pipeline), train.py (data, loggers, evaluation,
checkpoints), and test_step.py, which holds the step to a budget and to its reference.

examples:
  stepc new moons                                     # Flax NNX
  stepc new moons --model equinox

exit codes: 0 on success, 2 for invalid arguments or a directory that is not empty.""",
        "launch": """\
Each process finds the others through sc.init_distributed(). Its output is prefixed with its number.

examples:
  stepc launch -n 2 -- python train.py                # your own program
  stepc launch -n 4 -- python -m examples.gpt         # the demo, in a clone of the repository

exit codes: 0 if every process succeeds, else the code of the first that failed; 2 for invalid arguments.""",
        "explain": f"""\
{_BUILD}
examples:
  stepc explain train.py:build --mesh data=8
  stepc explain train.py:build --on tpu:v5e:16x16 --mesh data=64,model=4
  stepc explain --jit my_module:train_step --args example_args

exit codes: 0 on success, 1 if no k fits accumulate(memory=...), 2 for invalid arguments or an error in your file.""",
        "report": f"""\
{_BUILD}
examples:
  stepc report train.py:build --mesh data=8 -o step.html
  stepc report train.py:build --on gpu:h100:32x8 --device gpu:h100 -o pod.html

exit codes: 0 on success, 1 if no k fits accumulate(memory=...), 2 for invalid arguments or an error in your file.""",
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

exit codes: 0 if every limit holds, 1 if one is exceeded, 2 for invalid arguments or an error in your file.""",
        "diff": f"""\
{_BUILD}
examples:
  stepc diff old.py:build new.py:build --mesh data=8
  stepc diff before.hlo after.hlo             # files with the text of `compiled.hlo()`

exit codes: 0 if nothing changed, 1 if something did, 2 for invalid arguments or an error in your file.""",
        "tune": f"""\
{_BUILD}
The step needs one accumulate(…), whatever its k. Each k that divides the rows is compiled and, on the devices that
there are, measured in turns; shapes are filled with zeros. Nothing is chosen: write the number that you want.

examples:
  stepc tune train.py:build
  stepc tune train.py:build --mesh data=8 --memory 12GiB --rounds 9 -o k.png
  stepc tune train.py:build --on tpu:v5e:16x16        # memory and collectives alone

exit codes: 0 on success, 1 if no k fits --memory, 2 for invalid arguments or an error in your file.""",
        "checkpoints": """\
Nothing is changed, and a run may go on in the directory. The list reads the metadata of each checkpoint and looks
whether its leaves are there; `show` and `compare` read every leaf and check its CRC-32.

examples:
  stepc checkpoints runs/first                        # step, time, size, metrics, intact or damaged, the best
  stepc checkpoints runs/first show 200               # every leaf: path, dtype, shape, bytes
  stepc checkpoints runs/first compare 100 200        # the leaves that differ, and by how much
  stepc checkpoints runs/first compare 200 runs/second/200

exit codes: 0 on success; 1 if a checkpoint is damaged, or two differ; 2 for invalid arguments.""",
        "completion": """\
The script completes commands, options, choices and files. It starts no Python while you type. Write it where the shell
looks for it:

  bash  ~/.local/share/bash-completion/completions/stepc
  zsh   a file _stepc in a folder of $fpath
  fish  ~/.config/fish/completions/stepc.fish

examples:
  stepc completion bash
  stepc completion zsh

exit codes: 0 on success, 2 for invalid arguments or without shtab.""",
    }
)
# What one does in a new project.
NEXT = """\
  python train.py                            # trains, evaluates, saves; the same command resumes
  pytest                                     # the budget of the step, and its reference
  stepc explain step.py:build --mesh data=8  # what it computes and sends"""
TARGET_HELP = """the program to look at, FILE.py:NAME or module:NAME. NAME is a tuple (step, state, batch) or
(jitted function, *arguments), or a function that returns one and may take mesh=. Arguments may be shapes."""
# The name under which the arguments of a jitted function are expected in its module.
EXAMPLE_ARGS = "example_args"
HLO_SUFFIXES = (".txt", ".hlo")
# What a shell completes an argument with, in the words of shtab: names of its functions, by shell.
FILES = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "fish": "(__fish_complete_path (commandline -ct))",
    "tcsh": "f",
}
FOLDERS = {
    "bash": "_shtab_compgen_dirs",
    "zsh": "_files -/",
    "fish": "(__fish_complete_directories)",
    "tcsh": "d",
}
# Each simulated device takes threads, memory and time to start: a hundred thousand take minutes, without a word.
MOST_SIMULATED_DEVICES = 1024
# What a traceback leaves out of a failure of the user's own file: our way to it, the way through jax, and the frames
# that the annotation checkers of our tests put between.
OTHERS = ("stepc", "jax", "jaxlib", "importlib", "beartype", "jaxtyping")


@dataclass(frozen=True)
class Target:
    """A compiled program and its title. `traces` is known for a step of stepc only."""

    title: str
    compiled: sc.Compiled | jax.stages.Compiled
    mesh: Mesh | None
    traces: int | None

    def facts(self, device: str | None) -> sc.report.ProgramFacts:
        """Everything that can be read from it, with estimates for `device`."""
        match self.compiled:
            case sc.Compiled():
                return self.compiled.facts(device)
            case _:
                return sc.report.facts(self.compiled, self.mesh, title=self.title, device=device)

    def check(self, budget: sc.Budget) -> None:
        """Raise BudgetError if a limit is exceeded."""
        match self.compiled:
            case sc.Compiled():
                self.compiled.check(budget, traces=self.traces)
            case _:
                sc.inspect.check(budget, self.compiled, self.mesh)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Meaning: 0 on success; 1 if a budget is broken, two programs differ, a process failed or the reader of the output
      has gone; 2 for invalid arguments, or if the user's own file raises; 130 for Ctrl-C. `launch` returns the code of
      the first process that failed.

    Args:
      argv: the arguments after `stepc`; by default those of this process.
    Errors: what no line of the user's raises passes through: it is a fault of ours.
    """
    known, unknown = _parser().parse_known_args(argv)
    options = vars(known)
    parser: argparse.ArgumentParser = options.pop("parser")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    run: Callable[[Options], int] = options.pop("run")
    try:
        return run(options)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "Interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        print_to_nobody()
        return FAILED
    except (sc.StepError, sc.Preempted):
        raise
    except (sc.BudgetError, sc.PeerError) as error:
        return _fail(f"{type(error).__name__}: {error}", FAILED)
    except sc.StepcError as error:
        return _fail(f"{type(error).__name__}: {error}", INVALID)
    except Exception as error:  # whatever the user's own file raises; anything else is raised again
        found = traceback.TracebackException.from_exception(error)
        lines = _own_lines(found)
        if not lines:
            raise
        where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}"
        return _fail(f"{type(error).__name__} at {where}\n\n{''.join(found.format()).rstrip()}", INVALID)


def _fail(message: str, code: int) -> int:
    print(f"stepc: {message}", file=sys.stderr)
    return code


def _own_lines(found: traceback.TracebackException) -> traceback.StackSummary:
    """The frames of the user's, to which the traceback is cut, and those of its causes."""
    for cause in (found.__cause__, found.__context__):
        if cause is not None:
            _own_lines(cause)
    folders = tuple(
        f"{Path(spec.origin).parent}/" for name in OTHERS if (spec := importlib.util.find_spec(name)) and spec.origin
    )
    kept = [one for one in found.stack if not one.filename.startswith(("<frozen", "<@beartype", *folders))]
    found.stack = traceback.StackSummary.from_list(kept)
    return found.stack


# The parser, from top to bottom as `stepc --help` lists it.


class _Parser(argparse.ArgumentParser):
    """A parser that names what a misspelt command or option is close to."""

    def error(self, message: str) -> NoReturn:
        hint = None
        if found := re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", message):
            hint = did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        elif found := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            hint = did_you_mean(found[1], re.findall(r"--[\w-]+", self.format_help()))
        super().error(f"{message}. {hint}" if hint else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stepc",
        description="Look at compiled JAX training steps: plans, collectives, memory, budgets.",
        epilog="`stepc COMMAND --help` has examples.",
    )
    parser.add_argument("--version", action="version", version=f"stepc {importlib.metadata.version('stepc')}")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = _command(commands, "new", _new, "write a project that trains, with a test that holds its budget")
    made = command.add_argument("directory", type=Path, metavar="DIR", help="a directory that is new, or empty")
    _completed_by(made, FOLDERS)
    command.add_argument("--model", choices=tuple(LIBRARIES), default="nnx", help="its library (default: nnx)")
    command = _command(commands, "launch", _launch, "run a program in several processes on this machine")
    command.add_argument("-n", type=int, required=True, metavar="PROCESSES", help="number of processes")
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command of each process")
    command = _command(commands, "explain", _explain, "print the plan of a step and what the compiler made of it")
    _add_target(command)
    _add_device(command)
    command = _command(commands, "report", _report, "write the same as one HTML page, with pictures and the HLO")
    _add_target(command)
    _add_device(command)
    made = command.add_argument(
        "--out", "-o", type=Path, default=Path("step.html"), metavar="FILE", help="the page (default: step.html)"
    )
    _completed_by(made, FILES)
    command = _command(commands, "check", _check, "hold a compiled step to a budget")
    _add_target(command)
    made = command.add_argument(
        "--budget", type=Path, required=True, metavar="FILE.toml", help="the limits: fields of stepc.Budget"
    )
    _completed_by(made, FILES)
    command = _command(commands, "diff", _diff, "show what changed between two compiled programs")
    for name in ("before", "after"):
        made = command.add_argument(
            name, metavar=name.upper(), help="a program as in `stepc explain`, or a file of HLO text (.txt, .hlo)"
        )
        _completed_by(made, FILES)
    _add_mesh(command)
    command = _command(commands, "tune", _tune, "measure a step for every number of microbatches")
    _completed_by(command.add_argument("target", metavar="TARGET", help=TARGET_HELP), FILES)
    _add_mesh(command)
    command.add_argument("--memory", metavar="SIZE", help="how much a step may hold on one device, as in 12GiB")
    command.add_argument(
        "-k", dest="ks", metavar="K,K,…", help="which k to measure (default: all that divide the rows)"
    )
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each is measured (default: 5)")
    made = command.add_argument(
        "--out", "-o", type=Path, metavar="FILE.png", help="write a picture of times and memory too"
    )
    _completed_by(made, FILES)
    command = _command(commands, "checkpoints", _checkpoints, "list the checkpoints of a run, show one, compare two")
    made = command.add_argument("directory", type=Path, metavar="DIR", help="the directory of sc.Checkpoints")
    _completed_by(made, FOLDERS)
    command.add_argument("verb", nargs="?", choices=("list", "show", "compare"), default="list", help="default: list")
    command.add_argument("steps", nargs="*", metavar="STEP", help="one to show, two to compare: a step, or DIR/STEP")
    command = _command(commands, "completion", _completion, "print what completes the commands in a shell")
    command.add_argument("shell", choices=tuple(FILES), help="the shell that reads it")
    return parser


def _command(
    commands: Any,  # Any: argparse has no public type for its subparsers
    name: str,
    run: Callable[[Options], int],
    summary: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=EPILOGS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run, parser=command)
    return command


def _completed_by(argument: argparse.Action, functions: Mapping[str, str]) -> None:
    """Mark an argument for shtab, which reads this attribute."""
    vars(argument)["complete"] = functions


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    _completed_by(target.add_argument("target", nargs="?", metavar="TARGET", help=TARGET_HELP), FILES)
    target.add_argument("--jit", metavar="MODULE:FUNCTION", help="any jitted function; it need not use stepc")
    parser.add_argument(
        "--args",
        default=EXAMPLE_ARGS,
        metavar="NAME",
        help=f"the name of its arguments in the same module (default: {EXAMPLE_ARGS})",
    )
    _add_mesh(parser)


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on",
        metavar="TOPOLOGY",
        help="compile for a topology you do not have: tpu:v5p:8x8x16, gpu:h100:32x8 (default: this machine)",
    )
    parser.add_argument("--mesh", metavar="AXES", help="mesh axes, data=256,model=4; on a CPU, devices are simulated")


def _add_device(parser: argparse.ArgumentParser) -> None:
    devices = ", ".join(sc.inspect.DEVICES)
    parser.add_argument("--device", metavar="DEVICE", help=f"estimate times from the peaks of this device: {devices}")


# The commands.


def _new(options: Options) -> int:
    directory = options["directory"].expanduser()
    written = write_project(directory, options["model"])
    print(f"{', '.join(path.name for path in written)} in {directory}. Next:\n")
    print(f"  cd {directory}")
    if missing := missing_packages(options["model"]):
        print("  pip install " + " ".join(f"'{name}'" for name in missing))
    print(NEXT)
    return 0


def _launch(options: Options) -> int:
    command = options["command"]
    return launch(options["n"], command[1:] if command[:1] == ["--"] else command)


def _explain(options: Options) -> int:
    facts = _target(options).facts(options["device"])
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        importlib.import_module("stepc.report.terminal").show(facts)  # by name: rich is an extra
    else:
        print(sc.report.text(facts))
    return 0


def _report(options: Options) -> int:
    out: Path = options["out"]
    target = _target(options)
    if not out.parent.is_dir():
        raise sc.ConfigError(f"There is no directory {out.parent} for {out.name}.")
    facts = target.facts(options["device"])
    try:
        path = sc.report.write(facts, out)
    except OSError as error:
        raise sc.ConfigError(f"Cannot write {out}: {error.strerror}.") from error
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")
    return 0


def _check(options: Options) -> int:
    budget = sc.Budget.from_toml(options["budget"])
    num_limits = len(budget.limits)
    if not num_limits:
        raise sc.ConfigError(f"The budget {options['budget']} sets no limit, so nothing would be checked.")
    target = _target(options)
    target.check(budget)
    kept = "The limit holds" if num_limits == 1 else f"All {num_limits} limits hold"
    print(f"{target.title}\n{kept}: {budget!r}")
    return 0


def _diff(options: Options) -> int:
    axes = None if options["mesh"] is None else read_axes(options["mesh"])
    before, after = (
        _hlo_text(options[name]) or load_target(options[name], on=options["on"], axes=axes).compiled
        for name in ("before", "after")
    )
    difference = sc.inspect.diff(before, after)
    print(difference)
    return FAILED if difference else 0


def _tune(options: Options) -> int:
    axes = None if options["mesh"] is None else read_axes(options["mesh"])
    program, arguments, _, _ = _loaded(options["target"], EXAMPLE_ARGS, options["on"], axes)
    if not isinstance(program, sc.Step):
        raise sc.ConfigError(f"`{options['target']}` is a jitted function; `stepc tune` measures a step of stepc.")
    written = (options["ks"] or "").replace(" ", "")
    if written and not all(one.isdigit() for one in written.split(",")):
        raise sc.ConfigError("Invalid -k.", facts=(("expected", "numbers, as in 1,2,4"), ("got", options["ks"])))
    ks = [int(one) for one in written.split(",")] if written else None
    tuning = sc.tune(program, *arguments, memory=options["memory"], ks=ks, rounds=options["rounds"])
    print(tuning)
    if options["out"] is not None:
        print(tuning.picture(options["out"]))
    return 0 if any(one.fits for one in tuning.rows) else FAILED


def _checkpoints(options: Options) -> int:
    checkpoint_store()  # it says how to install Orbax
    # By name, and not at the top: only this command needs Orbax.
    view = importlib.import_module("stepc._runner.checkpoint_view")
    verb, given, directory = options["verb"], options["steps"], options["directory"].expanduser().absolute()
    takes = {"list": 0, "show": 1, "compare": 2}[verb]
    if len(given) != takes:
        facts = (("takes", f"{takes} step{'s' * (takes != 1)}"), ("got", " ".join(given) or "none"))
        raise sc.ConfigError(f"Invalid arguments to `stepc checkpoints DIR {verb}`.", facts=facts)
    chosen = [view.stored_checkpoint(*_checkpoint_named(directory, one)) for one in given]
    match verb:
        case "show":
            text, is_good = view.contents_of(*chosen)
        case "compare":
            text, is_good = view.comparison_of(*chosen)
        case _:
            chosen = view.stored_checkpoints(directory)
            text, is_good = view.list_of(chosen), all(one.fault is None for one in chosen)
    print(text)
    return 0 if is_good else FAILED


def _completion(options: Options) -> int:
    if importlib.util.find_spec("shtab") is None:
        remedy = "Install it with: pip install 'stepc[completion]'"
        raise sc.ConfigError("Completion needs shtab.", suggestion=remedy)
    # By name, and not at the top: only this command needs it.
    print(importlib.import_module("shtab").complete(_parser(), options["shell"]))
    return 0


def _checkpoint_named(directory: Path, written: str) -> tuple[Path, int]:
    """The directory and the step of `200`, or of `runs/second/200`."""
    path = Path(written).expanduser().absolute()
    if not path.name.isdecimal():
        raise sc.ConfigError("Invalid step.", facts=(("expected", "a step, or DIR/STEP"), ("got", written)))
    return (directory if written.isdecimal() else path.parent), int(path.name)


def _hlo_text(written: str) -> str | None:
    """The HLO text of a file; None if `written` names a program."""
    path = Path(written)
    if path.suffix not in HLO_SUFFIXES:
        return None
    if not path.is_file():
        raise sc.ConfigError(f"There is no file {path}.")
    text = path.read_text()
    if "\nENTRY " not in text:
        raise sc.ConfigError(f"{path} is not HLO text: it has no ENTRY computation.")
    return text


# From `FILE.py:NAME` to a compiled program.


def _target(options: Options) -> Target:
    axes = None if options["mesh"] is None else read_axes(options["mesh"])
    return load_target(options["target"] or options["jit"], args=options["args"], on=options["on"], axes=axes)


def load_target(
    written: str, *, args: str = EXAMPLE_ARGS, on: str | None = None, axes: Mapping[str, int] | None = None
) -> Target:
    """Load and compile what `FILE.py:NAME` or `module:NAME` names.

    Meaning: NAME is a jitted function, whose arguments are under the name `args` in the same module; or a tuple of a
      step or a jitted function and its arguments; or a function that returns such a tuple, called with `mesh=` if it
      takes one. Arguments may be shapes, `jax.ShapeDtypeStruct`.

    Args:
      args: the name of the arguments of a jitted function.
      on: a topology, as in `sc.topology`; by default the devices of this machine, simulated on a CPU.
      axes: the size of each mesh axis. None means no mesh on this machine, and one axis `data` on a topology.
    Errors: ConfigError that says what does not exist. What the user's own code raises passes through.
    """
    program, arguments, mesh, name = _loaded(written, args, on, axes)
    match program:
        case sc.Step():
            step = program.lower(*arguments).compile()
            return Target(repr(program.pipeline), step, program.mesh, program.traces)
        case _:
            compiled = program.lower(*arguments).compile()
            return Target(name, compiled, _checked_mesh(compiled, mesh), None)


def _loaded(
    written: str, args: str, on: str | None, axes: Mapping[str, int] | None
) -> tuple[Any, tuple[Any, ...], Mesh | None, str]:  # Any: a step or a jitted function, and its arguments
    """The program that is named, its arguments, the mesh and the name. Errors: see `load_target`."""
    mesh = _mesh(on, axes)
    module, place, name = _module(written)
    value = _attribute(module, name, place)
    if isinstance(value, jax.stages.Wrapped):
        given = _called(_attribute(module, args, place), mesh, args)
        program, arguments = value, given if isinstance(given, tuple) else (given,)
    else:
        program, *rest = _checked_tuple(_called(value, mesh, written), written)
        arguments = tuple(rest)
    _check_arguments(program, arguments, written)
    return program, arguments, mesh, name


def read_axes(written: str) -> dict[str, int]:
    """Read `data=256,model=4`."""
    axes: dict[str, int] = {}
    for part in written.split(","):
        name, _, size = part.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdigit() or int(size) < 1 or name.strip() in axes:
            facts = (("expected", "axis=size, each axis once, as in data=256,model=4"), ("got", written))
            raise sc.ConfigError("Invalid --mesh.", facts=facts)
        axes[name.strip()] = int(size)
    return axes


def _mesh(on: str | None, axes: Mapping[str, int] | None) -> Mesh | None:
    if on is not None and on != "cpu":
        jax.config.update("jax_platforms", "cpu")  # a topology needs no device, and jax must not wait for one
        return sc.topology(on, **(axes or {}))
    if axes is None:
        return None
    num_devices = prod(axes.values())
    if num_devices > MOST_SIMULATED_DEVICES:
        raise sc.ConfigError(
            f"--mesh asks for {num_devices:,} devices; at most {MOST_SIMULATED_DEVICES:,} are simulated.",
            suggestion="--on compiles for more, without a device: --on tpu:v5e:16x16 --mesh data=256, for example.",
        )
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)  # has no effect on accelerators
    except RuntimeError:
        pass  # a backend is running already; its devices are counted below
    devices = jax.devices()
    if len(devices) < num_devices:
        raise sc.ConfigError(
            f"The mesh needs {num_devices} devices, but there are {len(devices)}.",
            suggestion="--on needs no device: --on tpu:v5e:16x16, for example.",
        )
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices[:num_devices])


def _module(written: str) -> tuple[ModuleType, str, str]:
    """The module, the user's name for it, and the name in it."""
    place, _, name = written.rpartition(":")
    if not place or not name:
        facts = (("expected", "FILE.py:NAME or module:NAME"), ("got", written))
        raise sc.ConfigError("Invalid name of a program.", facts=facts)
    path = Path(place)
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        parts = place.split(".")
        if any(importlib.util.find_spec(".".join(parts[: end + 1])) is None for end in range(len(parts))):
            raise sc.ConfigError(f"There is no module `{place}` here.")
        return importlib.import_module(place), place, name
    if not path.is_file():
        raise sc.ConfigError(f"There is no file {path}.")
    sys.path.insert(0, str(path.parent.resolve()))
    numbered = (path.stem if number == 0 else f"{path.stem}_{number}" for number in count())
    module_name = next(name for name in numbered if name not in sys.modules)  # two files of `diff` may share a name
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise sc.ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        if error.filename is None or Path(error.filename).resolve() != path.resolve():
            raise  # in a file that this one imports
        raise sc.ConfigError(f"{path}:{error.lineno} is not valid Python: {error.msg}.") from error
    return module, place, name


def _attribute(module: ModuleType, name: str, place: str) -> Any:  # Any: whatever a user's module holds
    held = vars(module)
    if name not in held:
        public = [one for one in held if not one.startswith("_")]
        raise sc.ConfigError(f"`{place}` has no `{name}`.", suggestion=did_you_mean(name, public))
    return held[name]


def _called(value: Any, mesh: Mesh | None, written: str) -> Any:  # Any: see `_attribute`
    """What a function returns, called with the mesh if it takes one; any other value as it is."""
    if not inspect.isfunction(value):
        return value
    parameters = inspect.signature(value).parameters.values()
    required = [one.name for one in parameters if one.default is one.empty and one.name != "mesh"]
    if required:
        raise sc.ConfigError(f"`{written}` takes {', '.join(required)}; only `mesh` can be given here.")
    if any(one.name == "mesh" for one in parameters):
        return value(mesh=mesh)
    if mesh is not None:
        raise sc.ConfigError(f"`{written}` takes no `mesh`, so --on and --mesh have no effect.")
    return value()


def _checked_tuple(value: Any, written: str) -> tuple[Any, ...]:  # Any: see `_attribute`
    if isinstance(value, tuple) and value and isinstance(value[0], sc.Step | jax.stages.Wrapped):
        return value
    facts = (
        ("expected", "(step, state, batch), or (jitted function, *arguments), or a function that returns one of them"),
        ("got", type(value).__name__),
    )
    raise sc.ConfigError(f"`{written}` is not a program.", facts=facts)


def _check_arguments(program: Any, arguments: Sequence[Any], written: str) -> None:  # Any: see `_attribute`
    """Refuse a tuple of the wrong length, before the program is traced."""
    match program:
        case sc.Step() if len(arguments) != 2:
            facts = (
                ("expected", "(step, state, batch)"),
                ("got", f"({', '.join(['step', *(type(one).__name__ for one in arguments)])})"),
            )
            raise sc.ConfigError(f"`{written}` has {len(arguments) + 1} parts instead of 3.", facts=facts)
        case jax.stages.Wrapped():
            try:
                inspect.signature(program).bind(*arguments)
            except TypeError as error:
                takes = f"{getattr(program, '__name__', 'the function')}{inspect.signature(program)}"
                facts = (("takes", takes), ("got", f"{len(arguments)} arguments: {error}"))
                raise sc.ConfigError(f"The arguments of `{written}` do not fit.", facts=facts) from error
        case _:
            pass


def _checked_mesh(compiled: jax.stages.Compiled, mesh: Mesh | None) -> Mesh | None:
    """The mesh, if the program uses as many devices as it has."""
    if mesh is None:
        return None
    devices = {device for one in jax.tree.leaves(compiled.input_shardings) for device in one.device_set}
    if len(devices) != mesh.size:
        plural = "s" if len(devices) > 1 else ""
        raise sc.ConfigError(
            f"The program uses {len(devices)} device{plural}, but the mesh has {mesh.size}.",
            suggestion="Make the arguments a function of `mesh` that gives each a sharding on it.",
        )
    return mesh
