"""The shape of the project: imports in one direction, few files at the top, short functions on the training path."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from conftest import ROOT

PACKAGES = ("process", "layers", "prepare", "generate", "export", "tools", "benchmarks")
FILES = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))])
NAMES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path for path in FILES}
TRAINING_PATH = ("train", "config", "data", "collate", "model_patch", "loss", "checkpoint", "distributed", "metrics", "common")
MAX_LINES, MAX_LINES_OF_THE_LOOP, MAX_ARGUMENTS = 60, 110, 8


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[Path]:
    """Files of the project that a file imports, in functions too; imports for type checking aside."""
    typing = {id(node) for test in ast.walk(tree(path)) if is_type_checking(test) for node in ast.walk(test)}
    for node in ast.walk(tree(path)):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [] if all(name in NAMES for name in names) else [node.module]
        else:
            continue
        yield from (NAMES[name] for name in names if name in NAMES)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def num_lines(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def circle_from(path: Path, above: tuple[Path, ...], done: set[Path]) -> tuple[Path, ...]:
    """A chain of imports that comes back to one of its files, if there is one below `path`."""
    if path in above:
        return (*above[above.index(path) :], path)
    if path in done:
        return ()
    for below in imported(path):
        if found := circle_from(below, (*above, path), done):
            return found
    done.add(path)
    return ()


def test_imports_form_no_circle():
    done: set[Path] = set()
    for path in FILES:
        found = circle_from(path, (), done)
        assert not found, " -> ".join(str(p.relative_to(ROOT)) for p in found)


def test_imports_go_down():
    """common.py and the readers of data import nothing from above; only commands import train.py."""
    assert not list(imported(ROOT / "common.py"))
    users = {str(path.relative_to(ROOT)) for path in FILES if ROOT / "train.py" in set(imported(path))}
    assert all(name.split("/")[0] in ("tools", "benchmarks") for name in users), users
    for name in ("manifest", "forms", "audio", "codes_cache"):
        below = {path.relative_to(ROOT).parts[0] for path in imported(ROOT / "prepare" / f"{name}.py")}
        assert below <= {"prepare", "common.py", "config.py", "distributed.py", "loss.py"}, (name, below)


def test_the_top_level_is_small():
    top = [path for path in FILES if path.parent == ROOT]
    assert len(top) <= 11 and {f"{name}.py" for name in TRAINING_PATH} <= {path.name for path in top}
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in top) <= 4120


def test_functions_of_the_training_path_are_short():
    for name in TRAINING_PATH:
        for function in functions(NAMES[name]):
            limit = MAX_LINES_OF_THE_LOOP if (name, function.name) == ("train", "loop") else MAX_LINES
            assert num_lines(function) <= limit, f"{name}.{function.name}: {num_lines(function)} lines"


def test_signatures_are_short():
    """Plain functions; constructors of a component list its settings, and patched methods keep upstream's arguments."""
    for path in FILES:
        for function in functions(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            assert function.name == "__init__" or count <= MAX_ARGUMENTS, f"{path.name}: {function.name}: {count} arguments"
