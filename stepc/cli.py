"""The command line: reads the words, finds the program, and turns its errors into messages and exit codes."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import stepc as sc
from stepc.programs.job import Job

# What `stepc train` imports beyond what stepc needs: the extra "demo".
DEMO = ("rich", "matplotlib")
FAILED, MISTAKEN, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the words after `stepc`; those of the process by default.
    Meaning: 0 if all went well, 1 if the extra is not installed, 2 for a mistake in the command, 130 for Ctrl-C.
    Errors: what is neither of these passes through with its traceback: it is a fault of ours.
    """
    options = vars(_parser().parse_args(argv))
    try:
        return _train(options)
    except sc.Interrupted as stop:
        return _ended(str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return _ended("Interrupted outside of the training loop.", INTERRUPTED)
    except sc.StepError:
        raise  # the step itself failed: its cause and traceback are what one needs
    except sc.StepcError as error:
        return _ended(f"{type(error).__name__}: {error}", MISTAKEN)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepc", description="A compiler for JAX training steps.")
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser(
        "train",
        help="train a small GPT with a compiled step",
        description="Train a small GPT on the source of Python's standard library, and show the compiled step.",
        allow_abbrev=False,
    )
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
    return parser


def _train(options: dict[str, Any]) -> int:  # Any: each is what the reader of its field returns
    missing = [name for name in DEMO if importlib.util.find_spec(name) is None]
    if missing:
        needed, them = " and ".join(missing), "it" if len(missing) == 1 else "them"
        return _ended(f"`stepc train` needs {needed}. Install {them} with: pip install 'stepc[demo]'", FAILED)
    # By name, and not at the top: `stepc train --help` and the message above must work without the extra. Asking
    # first, instead of catching ImportError, keeps an import that fails for another reason a traceback.
    importlib.import_module("stepc.programs.train").train(Job(**options))
    return 0


def _ended(message: str, code: int) -> int:
    print(f"stepc: {message}", file=sys.stderr)
    return code
