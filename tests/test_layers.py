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
from stepc._language.pipeline import transform_name

PACKAGE = Path(__file__).parent.parent / "stepc"
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "_jax": ("errors",),
    "_units": ("errors",),
    # The closed middle. It imports nothing but the standard library.
    "_core": ("_core",),
    # What a user writes: it knows core nodes, never a law or a pass.
    "_language": ("_core.nodes", "_core.sharding", "_language", "_units", "errors"),
    # The reference never sees the core.
    "_language.reference": ("_language", "errors"),
    # Questions about any compiled program: blind to pipelines.
    "inspect": ("inspect", "_units", "errors"),
    "report": ("_compiler.plan", "_core.nodes", "_units", "errors", "inspect", "report"),
    # Several processes that train as one: what they share knows no step.
    "_distributed": ("_distributed", "_jax", "errors"),
    # The passes: they see core nodes and the user's trees, never a transform.
    "_compiler": (
        "_compiler", "_core", "_distributed", "_jax", "_language.kinds", "_language.semantics", "_language.state",
        "_language.terms", "_units", "errors", "inspect",
    ),
    # Where the surface meets the passes.
    "_compiler.autotune": ("_compiler", "_core", "_language", "_units", "errors", "inspect"),
    "_compiler.normalize": ("_compiler", "_core", "_language", "errors"),
    "_compiler.stages": ("_compiler", "_core", "inspect", "report"),
    "_compiler.step": ("_compiler", "_core", "_language", "errors", "inspect"),
    "_runner": ("_distributed", "_language.kinds", "_language.padding", "_language.state", "_runner", "_units",
        "errors", "inspect"),
    "testing": ("_compiler", "_core", "_language", "errors", "inspect", "testing"),
    "cli": ("", "_distributed", "_runner", "_units", "errors", "inspect", "report"),
    "__main__": ("cli",),
}  # fmt: skip
ONLY_THE_LOWERING_NAMES = {"scan", "shard_map", "psum"}

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


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "_language" / "transforms").glob("[!_]*.py")), ids=lambda path: path.stem
)
def test_transform_imports_no_other_word(path: Path) -> None:
    assert not [one for one in stepc_imports(ast.parse(path.read_text())) if covers("_language.transforms", one)]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_import_hides_inside_a_function(path: Path) -> None:
    for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
        assert not [one for one in ast.walk(function) if isinstance(one, ast.Import | ast.ImportFrom)], function.name


def test_only_the_lowering_names_scan_shard_map_and_psum() -> None:
    naming = set()
    for path in (*PACKAGE.glob("_language/**/*.py"), *PACKAGE.glob("_core/*.py"), *PACKAGE.glob("_compiler/*.py")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        naming |= {module_of(path)} if names & ONLY_THE_LOWERING_NAMES else set()
    assert naming == {"_compiler.collectives", "_compiler.layers", "_compiler.lowering"}


def test_private_names_of_jax_are_in_one_file() -> None:
    for path in FILES:
        if module_of(path) != "_jax":
            assert "jax._src" not in path.read_text(), module_of(path)
            assert "jaxlib._" not in path.read_text(), module_of(path)


def test_core_nodes_and_laws_import_only_the_standard_library() -> None:
    for name in ("laws", "nodes", "sharding"):
        tree = ast.parse((PACKAGE / "_core" / f"{name}.py").read_text())
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


IN_TRANSFORMS = "stepc._language.transforms"
TRANSFORMS = [name for name, value in vars(sc).items() if getattr(value, "__module__", "").startswith(IN_TRANSFORMS)]
PARTS = ("Meaning:", "Why:", "Args:", "Shapes:", "Units:", "Type:", "Errors:", "Example:", "Source:")


@pytest.mark.parametrize("name", [*TRANSFORMS, "dp", "tp"])
def test_transform_is_documented_after_the_template(name: str) -> None:
    text = inspect.getdoc(getattr(sc, name)) or ""
    parts = tuple(part for part in PARTS if part != "Args:" or inspect.signature(getattr(sc, name)).parameters)
    parts = parts if name in TRANSFORMS else tuple(part for part in parts if part not in ("Shapes:", "Units:", "Type:"))
    places = [text.find(f"\n{part}") for part in parts]
    assert -1 not in places, [part for part, place in zip(parts, places, strict=True) if place == -1]
    assert places == sorted(places)


def test_every_word_has_a_sample() -> None:
    classes = {transform_name(type(sample)) for sample in SAMPLES.values()}
    assert classes == set(TRANSFORMS)
    assert classes == {path.stem for path in (PACKAGE / "_language" / "transforms").glob("[!_]*.py")}
