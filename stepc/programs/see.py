"""The programs behind `stepc explain`, `report`, `check` and `diff`."""

import importlib
import importlib.util
import sys
from pathlib import Path

import stepc as sc
from stepc.programs.target import Target

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
