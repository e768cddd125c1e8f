"""The command line as a user meets it: what each command prints, exit codes, mistakes."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path

import jax
import pytest
from rich.console import Console

from stepc.cli import EPILOGS, FILES, FOLDERS, _parser, load_target, main
from stepc.report import terminal

MINE = """
import jax, jax.numpy as jnp, optax
import stepc as sc

S = jax.ShapeDtypeStruct

def loss(params, rows):
    return jnp.mean((jnp.tanh(rows["x"] @ params["in"]) @ params["out"]) ** 2)

def build(mesh, inside=False):
    middle = sc.accumulate(4) @ sc.clip(1.0) if inside else sc.clip(1.0) @ sc.accumulate(4)
    step = sc.compile(sc.update(optax.adamw(3e-4)) @ middle @ sc.shard(sc.dp("data")) @ sc.grad(loss), mesh=mesh)
    state = step.init({"in": S((32, 64), jnp.float32), "out": S((64, 16), jnp.float32)})
    return step, state, {"x": S((256, 32), jnp.float32)}

def inside(mesh):
    return build(mesh, inside=True)

@jax.jit
def train_step(params, x):
    return params - jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)

example_args = (S((64, 64), jnp.float32), S((128, 64), jnp.float32))
pair = (train_step, *example_args)
alone = (train_step, example_args[0])

def two(mesh):
    return build(mesh)[:2]

def four(mesh):
    return (*build(mesh), 5)
number = 3

def needs(a, b):
    return a
"""
MESH = "--mesh=data=8"
KEPT = 'gradient_reductions = 1\ncollectives_in_loops = 0\ncollective_bytes = "12MiB"\ndonated = true\ntraces = 1\n'


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it, with eight devices that jax already runs."""
    assert len(jax.devices()) == 8
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "budget.toml").write_text(KEPT)
    (tmp_path / "wrong.py").write_text("x = 1\nopen(")
    (tmp_path / "words.txt").write_text("no program\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_explain_prints_the_plan_and_what_became_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "mine.py:build", MESH, "--device=gpu:h100"]) == 0
    shown = capsys.readouterr().out
    for landmark in ("plan of update(", "defer-reduce", "as compiled: collectives", "accumulator", "gpu:h100: "):
        assert landmark in shown


def test_explain_of_a_jitted_function_needs_no_stepc(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--jit", "mine:train_step"]) == 0
    assert "no collectives" in capsys.readouterr().out
    assert main(["explain", "mine.py:pair"]) == 0


def test_check_of_a_kept_budget_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mine.py:build", MESH, "--budget=budget.toml"]) == 0
    assert "All 5 limits hold" in capsys.readouterr().out


def test_check_of_an_empty_budget_is_refused(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "empty.toml").write_text("")
    assert main(["check", "mine.py:build", MESH, "--budget=empty.toml"]) == 2
    assert "The budget empty.toml sets no limit, so nothing would be checked." in capsys.readouterr().err


def test_check_of_a_broken_budget_exits_with_one_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mine.py:inside", MESH, "--budget=budget.toml"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("stepc: BudgetError: 2 of 5 limits are exceeded.")
    assert "responsible" in shown


def test_report_writes_a_page_and_says_where(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "mine.py:build", MESH, "--out=step.html"]) == 0
    assert capsys.readouterr().out.startswith("step.html  ")
    assert (mine / "step.html").read_text().startswith("<!doctype html>")


def test_diff_exits_with_one_if_something_changed(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "mine.py:build", "mine.py:build", MESH]) == 0
    assert capsys.readouterr().out == "nothing changed\n"
    assert main(["diff", "mine.py:build", "mine.py:inside", MESH]) == 1
    assert "  + 4 x all-reduce" in capsys.readouterr().out
    (mine / "a.txt").write_text("HloModule m\nENTRY e {\n  ROOT a = f32[4] parameter(0)\n}\n")
    assert main(["diff", "a.txt", "a.txt"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "mine.py:biuld"], "`mine.py` has no `biuld`."),
        (["explain", "nofile.py:build"], "There is no file nofile.py."),
        (["explain", "nomodule:build"], "There is no module `nomodule` here."),
        (["explain", "mine.py"], "Invalid name of a program."),
        (["explain", "mine.py:number"], "`mine.py:number` is not a program."),
        (["explain", "mine.py:needs"], "`mine.py:needs` takes a, b; only `mesh` can be given here."),
        (["explain", "mine.py:build", "--mesh=data"], "Invalid --mesh."),
        (["explain", "mine.py:build", "--mesh=data=16"], "The mesh needs 16 devices, but there are 8."),
        (["explain", "mine.py:build", MESH, "--device=tpu:v0"], "Unknown device 'tpu:v0'."),
        (["explain", "--jit=mine:train_step", MESH], "The program uses 1 device, but the mesh has 8."),
        (["explain", "--jit=mine:train_step", "--args=exmple"], "`mine` has no `exmple`"),
        (["explain", "mine.py:build", "--mesh=data=4,data=2"], "Invalid --mesh."),
        (["explain", "wrong.py:x"], "wrong.py:2 is not valid Python: '(' was never closed."),
        (["report", "mine.py:build", MESH, "--out=."], "Cannot write .: Is a directory."),
        (["diff", "words.txt", "words.txt"], "words.txt is not HLO text: it has no ENTRY computation."),
        (["check", "mine.py:build", MESH, "--budget=no.toml"], "The budget no.toml cannot be read"),
        (["report", "mine.py:build", MESH, "--out=no/x.html"], "There is no directory no for x.html."),
        (["diff", "a.txt", "b.txt"], "There is no file a.txt."),
        (
            ["explain", "mine.py:build", "--mesh=data=100000"],
            "--mesh asks for 100,000 devices; at most 1,024 are simulated.",
        ),
        (["explain", "mine.py:two", MESH], "`mine.py:two` has 2 parts instead of 3."),
        (["explain", "mine.py:four", MESH], "got       (step, State, dict, int)"),
        (["explain", "mine.py:alone"], "missing a required argument: 'x'"),
        (["explain", "--jit=mine:train_step", "--args=number"], "takes  train_step(params, x)"),
    ],
)
def test_mistake_is_a_message_and_exits_with_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("stepc: ConfigError: ")
    assert message in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "x = 1\nraise RuntimeError('no vocabulary')\n",
            ["RuntimeError at raises.py:2", "RuntimeError: no vocabulary"],
        ),
        ("import not_there\n", ["ModuleNotFoundError at raises.py:1", "No module named 'not_there'"]),
        ("def x():\n    return [][0]\n", ["IndexError at raises.py:2", ", line 2, in x"]),
        (
            "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('b') from error\n",
            ["ValueError at raises.py:4", "KeyError: 'a'", "direct cause"],
        ),
        (
            "import jax\n\n\ndef f(x):\n    return x['nope']\n\n\nx = (jax.jit(f), {'w': 1.0})\n",
            ["KeyError at raises.py:5", "KeyError: 'nope'"],
        ),
        ("from unclosed import x\n", ["SyntaxError at raises.py:1", "unclosed.py", "'(' was never closed"]),
    ],
    ids=["module", "import", "function", "cause", "jitted", "syntax_of_another_file"],
)
def test_failure_of_the_users_own_file_is_its_line_and_a_short_traceback(
    text: str, shown: list[str], mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "unclosed.py").write_text("open(")
    (mine / "raises.py").write_text(text)
    assert main(["explain", "raises.py:x"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"stepc: {shown[0]}\n")
    assert all(one in printed for one in shown)
    assert "cli.py" not in printed and "site-packages" not in printed


def test_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepc.report.text", itemgetter("nothing"))
    with pytest.raises(TypeError, match="not subscriptable"):
        main(["explain", "mine.py:pair"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["explain", "mine.py:build", "--mehs=data=8"],
            "unrecognized arguments: --mehs=data=8. Did you mean '--mesh'?",
        ),
        (["report", "mine.py:build", "--uot", "x.html"], "Did you mean '--out'?"),
        (["explian", "mine.py:build"], "Did you mean 'explain'?"),
        (["explain", "mine.py:build", "--zzzzzz"], "unrecognized arguments: --zzzzzz\n"),
    ],
)
def test_misspelt_command_or_option_is_named(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


def test_memory_that_nothing_fits_is_a_message_and_exits_with_one(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MINE.replace("sc.clip(1.0) @ sc.accumulate(4)\n", 'sc.accumulate(memory="1 kB")\n')
    (mine / "asking.py").write_text(text)
    assert main(["explain", "asking.py:build", MESH]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith('stepc: BudgetError: `accumulate(memory="1 kB")`: no k')
    (mine / "asking.py").write_text(text.replace("1 kB", "1 GB"))
    assert main(["explain", "asking.py:build", MESH]) == 0
    assert 'accumulate(memory="1 GB") became accumulate(1)' in capsys.readouterr().out


@pytest.mark.parametrize("verb", EPILOGS)
def test_help_has_examples_that_the_parser_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert EPILOGS[verb] in shown
    examples = [line.partition("#")[0].split()[1:] for line in shown.splitlines() if line.startswith("  stepc ")]
    assert len(examples) >= 2
    for words in examples:
        assert _parser().parse_args(words)


@pytest.mark.parametrize("verb", ["explain", "report", "check", "diff"])
def test_help_teaches_names_exit_codes_and_topologies(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "exit codes: 0 " in shown
    assert "tpu:v5p:8x8x16" in shown


def shown_on(width: int) -> Callable[[str], str]:
    def show(name: str) -> str:
        console = Console(width=width, record=True, force_terminal=True)
        axes = None if name == "pair" else {"data": 8}
        terminal.show(load_target(f"mine.py:{name}", axes=axes).facts(None), console)
        return console.export_text()

    return show


@pytest.mark.parametrize("width", [60, 160])
def test_terminal_shows_laws_collectives_and_memory_bars(width: int) -> None:
    text = shown_on(width)("build")
    for landmark in ("defer-reduce", "collectives", "optimizer state", "█", "donation"):
        assert landmark in text
    assert max(map(len, text.splitlines())) <= width
    assert "no collectives" in shown_on(width)("pair")


def test_completion_without_shtab_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)  # Python's own way to say: not installed
    assert main(["completion", "bash"]) == 2
    assert "Install it with: pip install 'stepc[completion]'" in capsys.readouterr().err


COMPLETED = {
    "stepc ch": ["check", "checkpoints"],
    "stepc new --model e": ["equinox"],
    "stepc checkpoints runs sh": ["show"],
    "stepc explain --mes": ["--mesh"],
    "stepc explain mi": ["mine.py"],
    "stepc check --budget bud": ["budget.toml"],
    "stepc completion z": ["zsh"],
}


def test_bash_completes_commands_options_choices_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="the extra is not installed: pip install '.[completion]'")
    assert main(["completion", "bash"]) == 0
    lines = [capsys.readouterr().out, "function=$(complete -p stepc | sed 's/.*-F \\([^ ]*\\).*/\\1/')"]
    for written in COMPLETED:
        words = written.split()
        lines += [
            f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); $function",
            "echo ${COMPREPLY[@]}",
        ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == list(COMPLETED.values()), done.stderr


def test_arguments_are_completed_as_shtab_completes_them() -> None:
    shtab = pytest.importorskip("shtab", reason="the extra is not installed: pip install '.[completion]'")
    assert {name: shtab.FILE[name] for name in FILES} == FILES
    assert {name: shtab.DIRECTORY[name] for name in FOLDERS} == FOLDERS


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"stepc {version('stepc')}\n"


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "usage: stepc" in capsys.readouterr().err
