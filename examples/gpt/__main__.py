"""The command line of the demo: `python -m examples.gpt --help`."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

import jax

import stepc as sc
from examples.gpt.job import Job

# What the demo imports beyond what stepc needs: the extra "demo".
REQUIRED = ("rich", "matplotlib", "orbax")
FAILED, INVALID, INTERRUPTED = 1, 2, 130

EPILOG = """\
examples:
  python -m examples.gpt                                  # about two minutes on two cores
  python -m examples.gpt --steps 100 --k 8 --batch 32     # eight microbatches a step, on two simulated devices
  stepc launch -n 4 -- python -m examples.gpt             # four processes, each with its own part of every batch

exit codes: 0 on success, 1 if a package is missing, 2 for invalid options, 130 for Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the options say, and return the exit code.

    An error of the step itself passes through: its cause and its traceback are what one needs. So does every error of a
    job of several processes, because the exception that ends one process is what ends the others.
    """
    options = vars(_parser().parse_args(argv))
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"The demo needs {' and '.join(missing)}. Install with: pip install -e '.[demo]'", FAILED)
    try:
        job = Job(**options)
        # By name, so that `--help` and the message above work without the extra.
        importlib.import_module("examples.gpt.train").train(job)
        return 0
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "Interrupted outside the training loop.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail
        return FAILED
    except (sc.StepError, sc.Preempted):
        raise
    except sc.StepcError as error:
        if jax.process_count() > 1:
            raise
        return _fail(f"{type(error).__name__}: {error}", INVALID)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gpt",
        description="Train a small GPT on the source of Python's standard library, and show the compiled step.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in fields(Job):
        name, help_text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        if option.default is False:
            parser.add_argument(name, action="store_true", help=help_text)
            continue
        parser.add_argument(
            name,
            type=option.metadata["type"],
            default=option.default,
            metavar=option.metadata["unit"],
            help=f"{help_text} (default: {option.metadata['shown']})",
        )
    return parser


def _fail(message: str, code: int) -> int:
    print(f"examples.gpt: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
