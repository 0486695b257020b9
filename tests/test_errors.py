"""Exceptions of the package can be pickled and passed between processes."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import inspect
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ddim
from ddim.errors import DdimError

SRC = Path(ddim.__file__).parent


def exceptions() -> list[type[BaseException]]:
    """Every exception class that a module of the package defines; only modules that define one are imported."""
    builtin = {name for name, obj in vars(builtins).items() if inspect.isclass(obj) and issubclass(obj, BaseException)}
    defined: dict[str, str] = {}
    classes = [
        (".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__"), node)
        for path in SRC.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    while new := [
        (module, node.name)
        for module, node in classes
        if node.name not in defined
        and any(ast.unparse(base).split(".")[-1] in builtin | defined.keys() for base in node.bases)
    ]:
        defined |= {name: module for module, name in new}
    return [getattr(importlib.import_module(module), name) for name, module in sorted(defined.items())]


def instance(kind: type[BaseException]) -> BaseException:
    """An instance of a class, with a text for every required argument."""
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {p.name: f"of {p.name}" for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    error = kind(*(f"text of {name}" for name in needed or ["the message"]), **named)
    error.extra = 3  # type: ignore[attr-defined]
    return error


def test_every_exception_can_be_pickled_and_copied() -> None:
    kinds = exceptions()
    assert {"DdimError", "DdimWarning", "MisfitError", "Unavailable"} <= {kind.__name__ for kind in kinds}
    for error in map(instance, kinds):
        copiers: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy]
        copiers += [lambda obj, n=n: pickle.loads(pickle.dumps(obj, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
        for copier in copiers:
            other = copier(error)
            assert type(other) is type(error)
            assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))


class KeywordError(DdimError):
    """A subclass with other arguments."""

    def __init__(self, path: str, *, line: int):
        self.line = line
        super().__init__(path, f"is wrong in line {line}", "correct it")


def fail(name: str) -> None:
    """The function run by a worker."""
    if name == "keyword":
        raise KeywordError("a.txt", line=3)
    if name == "misfit":
        from ddim.data.image import MisfitError

        raise MisfitError("a.png", "is 3x3", "give another")
    raise DdimError("a.txt", "is wrong", "correct it")


def attributes(error: DdimError) -> tuple[Any, ...]:
    return type(error).__name__, str(error), vars(error)


@pytest.mark.parametrize("pool", ["Pool", "ProcessPoolExecutor"])
def test_an_error_of_a_worker_process_is_raised_in_the_parent(pool: str) -> None:
    """An exception that cannot be unpickled would make the parent wait forever."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) if pool == "Pool" else ProcessPoolExecutor(1, context) as workers:
        for name in ("plain", "keyword", "misfit"):
            with pytest.raises(DdimError) as expected:
                fail(name)
            result: Any = (  # with a time limit, because the failure would be an endless wait
                partial(workers.map_async(fail, [name]).get, 60)  # type: ignore[union-attr]
                if pool == "Pool"
                else partial(workers.submit(fail, name).result, 60)  # type: ignore[union-attr]
            )
            with pytest.raises(DdimError) as received:
                result()
            assert attributes(received.value) == attributes(expected.value)


def test_ddim_error_is_a_value_error() -> None:
    assert issubclass(DdimError, ValueError)


def catches(node: ast.AST | None) -> set[str]:
    """The names of the exceptions of a handler or of `suppress`."""
    if node is None:
        return {"ValueError"}
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def swallowed(tree: ast.AST) -> Iterator[int]:
    """Lines that raise a DdimError where ValueErrors are caught but DdimError is not named."""
    for node in ast.walk(tree):
        caught: set[str] = set()
        body: list[ast.stmt] = []
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                caught |= catches(handler.type)
            body = node.body
        elif isinstance(node, ast.With) and "suppress(" in ast.unparse(node.items[0].context_expr):
            caught, body = catches(node.items[0].context_expr), node.body
        if caught & {"ValueError", "Exception"} and "DdimError" not in caught:
            for inner in (inner for statement in body for inner in ast.walk(statement)):
                if isinstance(inner, ast.Raise) and "DdimError(" in ast.unparse(inner):
                    yield inner.lineno


def test_no_ddim_error_is_raised_where_value_errors_are_caught() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SRC.rglob("*.py")}
    assert not [(path.relative_to(SRC), line) for path, tree in trees.items() for line in swallowed(tree)]


def test_the_check_for_swallowed_errors_finds_them() -> None:
    code = "try:\n    if x:\n        raise DdimError(1, 2, 3)\nexcept {}:\n    pass\n"
    assert list(swallowed(ast.parse(code.format("(OSError, ValueError)")))) == [3]
    assert list(swallowed(ast.parse(code.format("OSError")))) == []
    assert list(swallowed(ast.parse("with suppress(ValueError):\n    raise DdimError(1, 2, 3)"))) == [2]
