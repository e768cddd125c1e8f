"""The command line: reads the words, finds the program, and turns its errors into messages and exit codes."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import stepc as sc
from stepc.processes.launch import launch
from stepc.programs import see
from stepc.programs.job import Job
from stepc.programs.lessons import LESSONS
from stepc.programs.target import EXAMPLE, Target, compiled, read_axes
from stepc.runner.console import print_to_nobody

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
    see.explain(_target(options), device=options["device"])
    return 0


def _report(options: Options) -> int:
    see.report(_target(options), device=options["device"], out=options["out"])
    return 0


def _check(options: Options) -> int:
    see.check(_target(options), budget=options["budget"])
    return 0


def _diff(options: Options) -> int:
    axes = None if options["mesh"] is None else read_axes(options["mesh"])
    before, after = (
        see.text_of(options[name]) or compiled(options[name], on=options["on"], axes=axes).compiled
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
