"""The layout that docs/developing.md describes: who may import whom, no re-exports, no circles, utils knows no lab."""

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # besides itself
    "utils": set(),
    "exercises": {"utils"},
    "study": {"utils"},
    "extensions": {"utils", "exercises", "study"},
    "bench": {"utils", "study", "extensions"},
    "grading": {"utils", "exercises", "study"},
    "scripts": {"utils", "exercises", "study", "extensions", "bench", "grading"},
}
PACKAGES = MAY_IMPORT.keys() - {"scripts"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).glob("*.py"))
}


def imports(source: str) -> list[tuple[str, str]]:
    """(module, name) of every import of ours, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] in PACKAGES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def needed(module: str, name: str) -> str:
    """The module that `from module import name` runs."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def defined(source: str) -> set[str]:
    """Names that a module makes itself, at its top level or in an `if` or `try` there."""
    names = set()
    bodies = [ast.parse(source).body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            elif isinstance(node, (ast.If, ast.Try)):
                bodies += [node.body, node.orelse]
    return names


def cells(path: Path) -> str:
    """The code of a notebook whose cells are plain Python."""
    sources = ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    return "\n".join(source for source in sources if not source.startswith(("%", "!")))


SOURCES = {module: path.read_text("utf-8") for module, path in MODULES.items()}
NOTEBOOKS = {path.name: cells(path) for path in [*ROOT.glob("*.ipynb"), *ROOT.glob("extensions/*.ipynb")]}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    package = module.split(".")[0]
    others = {name.split(".")[0] for name, _ in imports(SOURCES[module])} - {package}
    assert others <= MAY_IMPORT[package]


@pytest.mark.parametrize("module", [*MODULES, *NOTEBOOKS])
def test_a_name_is_imported_from_the_file_that_defines_it(module):
    source = SOURCES.get(module) or NOTEBOOKS[module]
    wrong = [
        f"{other}.{name}"
        for other, name in imports(source)
        if name and needed(other, name) == other and name not in defined(SOURCES[other])
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    graph = {module: {needed(*each) for each in imports(source)} - {module} for module, source in SOURCES.items()}
    packages = {module: {other for other in others if other in graph} for module, others in graph.items()}
    TopologicalSorter(packages).prepare()  # CycleError names the circle


def test_the_four_notebooks_import_few_names_of_ours():
    """As students see them: without the hidden tests."""
    hidden = re.compile("### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", re.DOTALL)
    names = {name for path in ROOT.glob("*.ipynb") for name in imports(hidden.sub("", cells(path)))}
    assert len(names) <= 50, sorted(names)


def test_the_core_is_small_and_knows_no_lab():
    core = [path for module, path in MODULES.items() if module.startswith("utils")]
    assert len(core) <= 16  # 15 modules and the reading guide
    for path in core:
        words = set(re.findall(r"\w+", path.read_text("utf-8")))
        assert not words & {"extensions", "Recipe", "study", "exercises", "grading"}, path.name
