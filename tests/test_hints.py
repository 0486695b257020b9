"""Options that messages name exist in the commands that can print them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from ddim.cli._hints import translated
from ddim.cli.main import COMMANDS, cli
from ddim.errors import DdimError, DdimWarning, either, warn

SRC = Path(__file__).resolve().parents[1] / "src" / "ddim"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
NAMED = re.compile(r"\bddim (\w+)\b")
CLI = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in SRC.glob("cli/*.py")}

# What is at fault, and its place among the arguments: an option that was given, so there is one.
SUBJECTS = {"DdimError": 0, "numbers": 1, "whole_numbers": 1, "usable": 1}
# Modules of the library whose hints name options: they are printed by these commands alone. Others name arguments.
ONLY_IN = {
    "evaluation/counts.py": ("evaluate", "reproduce"),
    "evaluation/extractors.py": ("evaluate", "reproduce", "distance", "statistics"),
    "evaluation/inception.py": ("evaluate", "reproduce", "distance", "statistics"),
    "model/importers/diffusers.py": ("sample", "plan"),
    "train/presets.py": ("train",),
}


@cache
def options(name: str) -> frozenset[str]:
    """All options of a command, as they are written."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    found = {word for one in command.params for word in (*one.opts, *one.secondary_opts)}
    return frozenset(found | {"--help"})


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a tree, an f-string's values as `?`; docstrings and the declarations of options left out."""
    skipped = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.option", "click.argument"):
            skipped |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SUBJECTS:
            place = SUBJECTS[ast.unparse(node.func)]
            skipped |= {id(inner) for subject in node.args[place : place + 1] for inner in ast.walk(subject)}
        if isinstance(node, ast.JoinedStr) and id(node) not in skipped:
            inner = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            skipped |= {id(part) for part in ast.walk(node)}
            yield "?".join(str(part.value) for part in sorted(inner, key=lambda one: (one.lineno, one.col_offset)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def named(text: str, commands: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each option of a text with each command that must have it: that named before it, or else those that print it."""
    for found in OPTION.finditer(text):
        before = [match[1] for match in NAMED.finditer(text[: found.start()]) if match[1] in COMMANDS]
        for command in before[-1:] or commands:
            yield found[0], command


def functions(module: str) -> dict[str, ast.AST]:
    """The top-level functions, classes and assigned values of a module of commands."""
    made: dict[str, ast.AST] = {}
    for node in CLI[module].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made[node.name] = node
        elif isinstance(node, ast.Assign):
            made |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return made


@cache
def imports(module: str) -> dict[str, tuple[str, str]]:
    """What a module of commands has from the others: name here -> module, name there."""
    made = {}
    for node in ast.walk(CLI[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddim.cli."):
            there = (node.module or "").removeprefix("ddim.cli.")
            made |= {alias.asname or alias.name: (there, alias.name) for alias in node.names}
    return made


def reached(command: str) -> set[tuple[str, str]]:
    """Every function of the modules of commands that a command may run."""
    todo, seen = [(command, "command")], set[tuple[str, str]]()
    while todo:
        module, name = todo.pop()
        own = functions(module)
        if (module, name) in seen or name not in own:
            continue
        seen.add((module, name))
        for node in ast.walk(own[name]):
            if isinstance(node, ast.Name):
                todo.append(imports(module).get(node.id, (module, node.id)))
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_options_that_it_has(command: str) -> None:
    wrong = []
    for module, name in sorted(reached(command)):
        for text in texts(functions(module)[name]):
            for option, where in named(text, (command,)):
                if option not in options(where):
                    wrong.append(f"{module}.{name}: {option} is not of {where}: {text!r}")
    assert not wrong, "\n".join(wrong)


def test_every_function_of_the_commands_is_reached_by_one() -> None:
    """Otherwise the test above would see less than it seems to."""
    found = set().union(*(reached(command) for command in COMMANDS))
    shared = {(module, name) for module in CLI for name in functions(module) if name.islower() and name[0] != "_"}
    unseen = {one for one in shared - found if any(OPTION.search(text) for text in texts(functions(one[0])[one[1]]))}
    assert not {one for one in unseen if one[0] not in ("main", "hints")}


def test_the_library_names_options_of_the_commands_that_print_them() -> None:
    wrong, used = [], set[str]()
    for path in sorted(SRC.rglob("*.py")):
        module = path.relative_to(SRC).as_posix()
        if module.startswith("cli/"):
            continue
        for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            if OPTION.fullmatch(text):  # a name that is put into a message, not a hint
                continue
            for option, where in named(text, ONLY_IN.get(module, ("",))):
                used.add(module)
                if not where:
                    wrong.append(
                        f"{module}: {option} is of no command it names; say the argument, name=value: {text!r}"
                    )
                elif option not in options(where):
                    wrong.append(f"{module}: {option} is not of {where}: {text!r}")
    assert not wrong, "\n".join(wrong)
    assert ONLY_IN.keys() <= used


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_use_options_that_there_are(command: str) -> None:
    found = cli.get_command(click.Context(cli), command)
    for line in (found.help or "").splitlines():
        if line.strip().startswith("ddim "):
            for part in line.split("&&"):
                assert all(option in options(where) for option, where in named(part, (command,))), line


def test_an_argument_is_said_as_the_commands_option_or_left_out() -> None:
    train, encode = (cli.get_command(click.Context(cli), name) for name in ("train", "encode"))
    hint = either("remove them", "leave them out with skip_unreadable=True", "use fit='stretch'")
    assert translated(hint, train) == "remove them, or leave them out with --skip-unreadable, or use --fit stretch"
    assert translated(hint, encode) == "remove them, or use --fit stretch"
    assert translated(hint, None) == str(hint)
    assert translated(either("say nothing=1"), train) == ""
    assert translated("flip=False", train) == "--no-flip"
    assert translated("--set train.steps=6", train) == "--set train.steps=6"
    assert translated("a plain text with x=1", train) == "a plain text with x=1"


def test_hints_survive_in_errors_and_warnings() -> None:
    hint = either("a", "b=1")
    assert DdimError("x", "y", hint).hint is hint
    assert str(DdimError("x", "y", hint)) == "x: y; a, or b=1"
    with pytest.warns(DdimWarning) as said:
        warn("x", hint)
    assert said[0].message.hint is hint
