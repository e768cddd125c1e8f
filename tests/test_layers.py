"""Who may import whom, held by reading the source. The table is the documentation.

`errors` <- `_core` <- `_language`, and `_compiler` builds on the core. Passes never see a transform, and the reference
never sees the core.
"""

import ast
import sys
from pathlib import Path
from typing import get_args

import stepc as sc

PACKAGE = Path(sc.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LANGUAGE_OF_PASSES = (
    "_language.encoded",
    "_language.kinds",
    "_language.model_state",
    "_language.names",
    "_language.optimizers",
    "_language.semantics",
    "_language.state",
    "_language.terms",
)
# What a folder or a file may import of stepc, besides itself. The longest matching entry applies.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": ("_text",),
    "_text": (),
    "_jax": ("errors",),
    "_units": ("errors",),
    "_forks": (),
    # The closed core. It imports nothing but the standard library.
    "_core": (),
    "nodes": ("_core.nodes",),
    # What a user writes: it knows core nodes, but no law and no pass.
    "_language": ("_core.nodes", "_core.sharding", "_text", "_units", "errors"),
    # The reference never sees the core.
    "_language.reference": ("_language", "errors"),
    # No transform imports another.
    "_language.transforms": (
        "_core.nodes", "_core.sharding", "_language.encoded", "_language.fields", "_language.kinds",
        "_language.model_state", "_language.optimizers",
        "_language.pipeline", "_language.semantics", "_language.sharding", "_language.state", "_language.terms",
        "_text", "_units", "errors",
    ),
    # Questions about any compiled program. They know nothing about pipelines.
    "inspect": ("_text", "_units", "errors"),
    "report": ("_text", "errors", "inspect"),
    # Processes that train together. What they share knows no step.
    "_distributed": ("_forks", "_jax", "errors"),
    # The passes: they see core nodes and the user's trees, never a transform.
    "_compiler": ("_core", "_distributed", "_jax", *LANGUAGE_OF_PASSES, "_text", "_units", "errors", "inspect"),
    # The five files where the surface meets the passes.
    "_compiler.autotune": ("_compiler", "_core", "_language", "_text", "_units", "errors", "inspect"),
    "_compiler.tune": ("_compiler", "_language", "_text", "_units", "errors", "inspect"),
    "_compiler.normalize": ("_compiler", "_core", "_language", "errors"),
    "_compiler.stages": ("_compiler", "_core", "_units", "errors", "inspect", "report"),
    "_compiler.step": ("_compiler", "_jax", "_core", "_language", "_units", "errors", "inspect"),
    # The loop: a step is something to call.
    "_runner": (
        "_distributed", "_forks", "_jax", "_language.kinds", "_language.padding", "_language.state", "_text", "_units",
        "errors", "inspect",
    ),
    # An evaluation adds up the terms that a loss returns; what it is called by does not.
    "_runner.callbacks": ("_language.kinds", "_language.state", "_runner", "errors"),
    "_runner.evaluation": ("_language.kinds", "_language.state", "_language.terms", "_runner", "errors"),
    # A compilation is no stall.
    "_runner.watchdog": ("_jax", "_runner"),
    # A pipeline in place of a step is recognised, and the remedy named.
    "_runner.run": ("_language.kinds", "_language.pipeline", "_language.state", "_runner", "errors"),
    "testing": ("_compiler", "_core", "_language", "errors", "inspect"),
    # Files of a new project, as texts.
    "_projects": ("errors",),
    "cli": ("", "_distributed", "_projects", "_runner", "_units", "errors", "inspect", "report"),
    "__main__": ("cli",),
}  # fmt: skip
ONLY_THE_LOWERING_NAMES = {"scan", "shard_map", "psum"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def stepc_imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "stepc"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stepc":
            inner = (node.module or "").partition(".")[2]
            found += [inner] if inner else [alias.name for alias in node.names]
    return found


def covers(prefix: str, module: str) -> bool:
    return module == prefix or (prefix != "" and module.startswith(f"{prefix}."))


def test_files_import_only_what_the_table_allows() -> None:
    for path in FILES:
        module, imports = module_of(path), stepc_imports(path)
        if module == "__init__" or not imports:
            continue
        entries = [entry for entry in ALLOWED if covers(entry, module)]
        assert entries, f"{module} is not in the table"
        entry = max(entries, key=len)
        allowed = ALLOWED[entry] if entry == "_language.transforms" else (*ALLOWED[entry], entry)
        assert not [one for one in imports if not any(covers(prefix, one) for prefix in allowed)], module


def test_no_two_folders_import_each_other() -> None:
    edges: set[tuple[str, str]] = set()
    for path in FILES:
        folder = module_of(path).split(".")[0]
        if folder not in ("__init__", "cli"):
            edges |= {(folder, imported.split(".")[0]) for imported in stepc_imports(path)}
    cycles = {frozenset({one, two}) for one, two in edges if one != two and (two, one) in edges}
    assert not cycles


def test_no_import_hides_inside_a_function() -> None:
    for path in FILES:
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            imports = [one for one in ast.walk(function) if isinstance(one, ast.Import | ast.ImportFrom)]
            assert not imports, f"{module_of(path)}: {function.name}"


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


def test_inputs_of_a_scan_are_counted_in_one_file() -> None:
    # jax 0.11 keeps the numbers elsewhere. On another jax, no other test would notice.
    naming = {module_of(path) for path in FILES if '"num_consts"' in path.read_text()}
    assert naming == {"_jax"}


def test_core_imports_only_itself_and_the_standard_library() -> None:
    for path in (PACKAGE / "_core").glob("*.py"):
        tree = ast.parse(path.read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {module.split(".")[0] for module in modules} - {"stepc"} <= sys.stdlib_module_names, path.name


def test_core_is_small() -> None:
    """A pass handles every node, so each one needs a written reason."""
    assert len(get_args(sc.nodes.Node)) <= 12
