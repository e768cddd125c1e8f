"""The structure of the house, held by reading the source: who imports whom, how long a file is, what is documented.

The table is the documentation: what a room may import of stepc, besides itself.
"""

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest
from catalogue import SAMPLES

import stepc as sc
from stepc.language.pipeline import word_of

PACKAGE = Path(__file__).parent.parent / "stepc"
LANGUAGE = ("errors", "core.nodes", "language")
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "private": ("errors",),
    "units": ("errors",),
    "core": ("core",),
    # The surface: a word knows core nodes, never a law, a pass, the reference or another word.
    "language.kinds": (),
    "language.source": (),
    "language.fields": ("errors",),
    "language.padding": ("errors", "language.kinds", "language.state"),
    "language.sharding": ("core.layout", "errors", "language.fields"),
    "language.state": ("language.kinds",),
    "language.meaning": ("core.nodes", "core.terms", "language.kinds", "language.state"),
    "language.pipeline": ("core.nodes", "errors", "language.kinds", "language.meaning", "language.source"),
    "language.words": (
        "core.layout", "core.nodes", "core.terms", "errors", "language.fields", "language.kinds", "language.meaning",
        "language.pipeline", "language.sharding", "language.source", "language.state", "units",
    ),
    # The reference never sees the core.
    "language.reference": ("errors", "language.kinds", "language.meaning", "language.pipeline", "language.state"),
    # The passes never see a word.
    "compiler.rewrite": ("core.laws", "core.nodes"),
    "compiler.instructions": ("core.nodes",),
    "compiler.schedule": ("compiler.instructions", "core.nodes"),
    "compiler.layout": ("core.layout", "core.nodes", "errors"),
    "compiler.parts": ("compiler.instructions", "compiler.layout"),
    "compiler.check": ("core.nodes", "errors", "language.kinds", "language.state"),
    "compiler.placing": ("compiler.layout", "core.layout", "language.kinds", "language.state"),
    "compiler.shardings": ("compiler.layout", "compiler.plan", "core.layout", "language.state"),
    "compiler.batches": (
        "compiler.check", "compiler.decision", "compiler.layout", "compiler.many", "compiler.placing",
        "language.kinds", "language.state",
    ),
    "compiler.plan": ("compiler.instructions", "compiler.rewrite", "compiler.search", "core.nodes"),
    "compiler.dependence": ("private",),
    "compiler.liveness": (),
    "compiler.search": ("inspect", "units"),
    "compiler.loss": (
        "compiler.dependence", "compiler.instructions", "core.nodes", "core.terms", "errors", "language.kinds",
        "language.state",
    ),
    "compiler.tally": ("core.terms",),
    "compiler.flow": (
        "compiler", "compiler.instructions", "compiler.loss", "compiler.tally", "core.nodes", "core.terms",
        "language.kinds",
    ),
    "compiler.ending": ("compiler.flow", "compiler.instructions", "core.terms", "language.kinds"),
    "compiler.watch": ("language.state",),
    "compiler.making": (
        "compiler.check", "compiler.ending", "compiler.instructions", "compiler.watch", "core.terms",
        "language.kinds", "language.state",
    ),
    "compiler.layers": (),
    "compiler.devices": (
        "compiler", "compiler.flow", "compiler.instructions", "compiler.layers", "core.layout", "core.terms",
    ),
    "compiler.lower": (
        "compiler", "compiler.devices", "compiler.ending", "compiler.flow", "compiler.instructions", "compiler.loss",
        "compiler.making", "compiler.parts", "compiler.schedule", "language.kinds", "language.meaning",
        "language.state",
    ),
    # Questions about any compiled program: below the stages that ask them, and blind to pipelines.
    "inspect": ("inspect", "errors", "units"),
    "compiler.decision": ("compiler", "core", "language"),
    "compiler.measures": ("compiler.breakdown", "compiler.plan", "inspect"),
    "compiler.breakdown": ("compiler.plan", "inspect"),
    # For eyes: it shows what is known of a program, and of its plan if it has one.
    "report": ("compiler.plan", "core.nodes", "errors", "inspect", "report", "units"),
    "compiler.stages": ("compiler.breakdown", "compiler.measures", "compiler.plan", "inspect", "report"),
    "compiler.forms": ("language.kinds", "language.state"),
    "compiler.gate": ("compiler.forms", "compiler.stages", "inspect", "language.kinds"),
    "compiler.asking": (
        "compiler.check", "compiler.forms", "compiler.liveness", "compiler.search", "compiler.stages", "core.nodes",
        "errors", "inspect", "language.kinds", "language.pipeline", "language.state",
    ),
    "compiler.step": ("compiler", "core", "errors", "inspect", "language"),
    # Several processes that train as one: what they share knows no step.
    "processes": ("errors", "private", "processes"),
    "compiler.many": (
        "compiler.check", "core.nodes", "errors", "language.kinds", "language.state",
        "processes.board", "processes.poll",
    ),
    "runner": (
        "errors", "inspect", "language.kinds", "language.padding", "language.state", "processes", "runner", "units",
    ),
    "testing": ("compiler.step", "core", "errors", "inspect", "language", "testing"),
    "programs": ("", "errors", "processes", "programs", "runner"),
    "cli": ("", "errors", "processes", "programs", "runner"),
    "__main__": ("cli",),
}  # fmt: skip
ONLY_THE_LOWERING_NAMES = {"scan", "shard_map", "psum"}
LONGEST_FILE, LONGEST_FUNCTION = 300, 40

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def stepc_imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "stepc"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stepc":
            inner = (node.module or "").partition(".")[2]
            found += [inner] if inner else [alias.name for alias in node.names]
    return found


def covers(prefix: str, module: str) -> bool:
    return module == prefix or (prefix != "" and module.startswith(f"{prefix}."))


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path) != "__init__"], ids=module_of)
def test_room_imports_only_what_the_table_allows(path: Path) -> None:
    module = module_of(path)
    rooms = [room for room in ALLOWED if covers(room, module)]
    if not rooms and not stepc_imports(ast.parse(path.read_text())):
        return  # the docstring of a package
    allowed = ALLOWED[max(rooms, key=len)]
    for imported in stepc_imports(ast.parse(path.read_text())):
        assert any(covers(prefix, imported) for prefix in allowed), f"{module} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "language" / "words").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_word_imports_no_other_word(path: Path) -> None:
    assert not [one for one in stepc_imports(ast.parse(path.read_text())) if covers("language.words", one)]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_import_hides_inside_a_function(path: Path) -> None:
    for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
        assert not [one for one in ast.walk(function) if isinstance(one, ast.Import | ast.ImportFrom)], function.name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_file_and_functions_keep_their_budgets(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_FILE
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
        assert (body[-1].end_lineno or 0) - body[0].lineno < LONGEST_FUNCTION, function.name


def test_only_the_lowering_names_scan_shard_map_and_psum() -> None:
    naming = set()
    for path in (*PACKAGE.glob("language/**/*.py"), *PACKAGE.glob("core/*.py"), *PACKAGE.glob("compiler/*.py")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        naming |= {module_of(path)} if names & ONLY_THE_LOWERING_NAMES else set()
    assert naming == {"compiler.lower", "compiler.devices", "compiler.layers"}


def test_private_names_of_jax_are_in_one_file() -> None:
    for path in FILES:
        if module_of(path) != "private":
            assert "jax._src" not in path.read_text(), module_of(path)
            assert "jaxlib._" not in path.read_text(), module_of(path)


def test_core_nodes_and_laws_import_only_the_standard_library() -> None:
    for name in ("layout", "nodes", "laws"):
        tree = ast.parse((PACKAGE / "core" / f"{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert all(not (module or "").startswith(("jax", "optax", "numpy")) for module in modules)
    assert len(sc.nodes.Node.__args__) < 10  # pyright: ignore[reportAttributeAccessIssue]


def test_vocabulary_is_sorted_and_documented() -> None:
    lines = [line for line in (PACKAGE / "__init__.py").read_text().splitlines() if line.startswith("from")]
    assert all(line.split(" import ")[1].split(" as ")[0] == line.split(" as ")[1] for line in lines)
    public = {name: value for name, value in vars(sc).items() if not name.startswith("_")}
    for name, value in public.items():
        if not isinstance(value, ModuleType):
            assert inspect.getdoc(value), f"{name} has no docstring"


IN_WORDS = "stepc.language.words"
WORDS = [name for name, value in vars(sc).items() if getattr(value, "__module__", "").startswith(IN_WORDS)]
PARTS = ("Meaning:", "Why:", "Args:", "Shapes:", "Units:", "Type:", "Errors:", "Example:", "Source:")


@pytest.mark.parametrize("name", [*WORDS, "dp", "tp"])
def test_word_is_documented_after_the_template(name: str) -> None:
    text = inspect.getdoc(getattr(sc, name)) or ""
    parts = tuple(part for part in PARTS if part != "Args:" or inspect.signature(getattr(sc, name)).parameters)
    parts = parts if name in WORDS else tuple(part for part in parts if part not in ("Shapes:", "Units:", "Type:"))
    places = [text.find(f"\n{part}") for part in parts]
    assert -1 not in places, [part for part, place in zip(parts, places, strict=True) if place == -1]
    assert places == sorted(places)


def test_every_word_has_a_sample() -> None:
    classes = {word_of(type(sample)) for sample in SAMPLES.values()}
    assert classes == set(WORDS)
    assert classes == {path.stem for path in (PACKAGE / "language" / "words").glob("[!_]*.py")}
