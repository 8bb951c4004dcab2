"""What a notebook must be so that its cells can be run in another order than from top to bottom, without running it.

Notebook -> list of problems, as in notebook_rules.py; for tests/test_order.py.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from exercise_rules import names_set, names_used
from nbformat import NotebookNode
from notebook_rules import code_cells

KNOWN = {*dir(builtins), "__name__", "get_ipython", "display"}
# What changes the model it is given, so that a second call on the same one is an error or wraps it twice.
WRAPPERS = {"attach", "attach_recipe", "get_peft_model", "AdapterLibrary", "load_adapter"}
# Methods that leave their object another one each time they are called.
CHANGING = {"append", "extend", "insert", "pop", "popitem", "reverse", "remove", "mul_", "add_", "step", "__next__"}
HOOKS = {"register_forward_hook", "register_forward_pre_hook"}  # as well, but where the cell takes them off again


def names_from_above(notebook: NotebookNode) -> list[str]:
    """A cell reads only what it or a cell above makes, and Python's names: "run all above" is always right advice."""
    made, problems = set(KNOWN), []
    for cell in code_cells(notebook):
        made |= names_set(cell.source, imports=True)
        problems += [f"{cell.id}: no cell above makes {name!r}" for name in sorted(names_used(cell.source) - made)]
    return problems


def can_run_twice(notebook: NotebookNode) -> list[str]:
    """No cell makes a name from that name's old value, or changes an object that an earlier cell has made."""
    return [f"{c.id}: {problem}" for c in code_cells(notebook) for problem in dict.fromkeys(_changes(c.source))]


def _changes(source: str) -> Iterator[str]:
    """What the second run of a cell would find changed by the first; its functions' bodies are not looked into."""
    later, here = names_set(source, imports=True), set()  # the names the cell makes at all; those it has made by now
    changing = CHANGING if ".remove()" in source else CHANGING | HOOKS
    for node in _in_order(ast.parse(source).body):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            here.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            here.add(node.name)
        elif isinstance(node, ast.alias):
            here.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name) and node.id in later - here:
            yield f"{node.id!r} is made from its own old value"
        elif (name := _changed(node, changing)) and name not in here:
            yield f"{name!r} of an earlier cell is changed"


def _changed(node: ast.AST, changing: set[str]) -> str | None:
    """The name of the object that `node` changes in place; None where it changes none, or one without a name."""
    if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Del):
        return _root(node)
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return _root(node.func) if node.func.attr in changing else None
    called = node.func.id if isinstance(node.func, ast.Name) else ""
    return _root(node.args[0]) if called in WRAPPERS | {"next"} and node.args else None


def _root(node: ast.AST) -> str | None:
    """`model` of `model.transformer.h[0]`: the name an expression begins with; None where it begins with a call."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _in_order(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """The nodes roughly as Python runs them: a value before its target, a loop's iterable before its body."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield node
        elif isinstance(node, ast.ExceptHandler):
            yield ast.Name(node.name or "", ast.Store())
            yield from _in_order(node.body)
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            yield from (n for g in node.generators for n in ast.walk(g.target))  # its own names, which it stores
            yield from _in_order(list(ast.iter_child_nodes(node)))
        else:
            first = [getattr(node, field) for field in ("value", "iter", "context_expr") if hasattr(node, field)]
            if isinstance(node, ast.AugAssign):  # x += 1 reads x
                yield from (ast.Name(n.id, ast.Load()) for n in [node.target] if isinstance(n, ast.Name))
            first = [n for n in first if isinstance(n, ast.AST)]
            yield from _in_order(first + [n for n in ast.iter_child_nodes(node) if n not in first])
            yield node
