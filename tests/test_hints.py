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
COMMAND = re.compile(r"\bddim (\w+)\b")
CLI = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in SRC.glob("cli/*.py")}

# Functions and the position of the argument that is the subject of an error: an option that was passed.
SUBJECTS = {"DdimError": 0, "numbers": 1, "whole_numbers": 1, "usable": 1}
# Modules of the library whose hints name options, and the commands that print them. Other modules name arguments.
ONLY_IN = {
    "evaluation/counts.py": ("evaluate", "reproduce"),
    "evaluation/extractors.py": ("evaluate", "reproduce", "distance", "statistics"),
    "evaluation/inception.py": ("evaluate", "reproduce", "distance", "statistics"),
    "model/importers/diffusers.py": ("sample", "plan"),
    "train/presets.py": ("train",),
}


@cache
def options(name: str) -> frozenset[str]:
    """All options of a command, as written on the command line."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    parts = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    parameters = [parameter for part in parts for parameter in part.params]
    names = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    return frozenset(names | {"--help"})


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a tree, with an f-string's values as `?`, without docstrings and declarations of options."""
    skipped = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.option", "click.argument"):
            skipped |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("suggest", "suggest_sampling"):
            words = [part for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            skipped |= {id(part) for part in ast.walk(node)}
            words.sort(key=lambda part: (part.lineno, part.col_offset))
            first = ["sample"] if ast.unparse(node.func) == "suggest_sampling" else []
            yield " ".join(["ddim", *first, *(str(word.value) for word in words)])
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SUBJECTS:
            position = SUBJECTS[ast.unparse(node.func)]
            skipped |= {id(inner) for subject in node.args[position : position + 1] for inner in ast.walk(subject)}
        if isinstance(node, ast.JoinedStr) and id(node) not in skipped:
            inner = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            skipped |= {id(part) for part in ast.walk(node)}
            yield "?".join(str(part.value) for part in sorted(inner, key=lambda part: (part.lineno, part.col_offset)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def options_in(text: str, commands: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Each option in a text with each command that must have it: the last one named before it, or else `commands`."""
    for option in OPTION.finditer(text):
        before = [match[1] for match in COMMAND.finditer(text[: option.start()]) if match[1] in COMMANDS]
        for command in before[-1:] or commands:
            yield option[0], command


def functions(module: str) -> dict[str, ast.AST]:
    """The top-level functions, classes and assigned values of a module of commands."""
    definitions: dict[str, ast.AST] = {}
    for node in CLI[module].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return definitions


@cache
def imports(module: str) -> dict[str, tuple[str, str]]:
    """Names that a module of commands imports from the others: local name -> module, name in that module."""
    names = {}
    for node in ast.walk(CLI[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddim.cli."):
            source = (node.module or "").removeprefix("ddim.cli.")
            names |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return names


def reached(command: str) -> set[tuple[str, str]]:
    """Every function of the modules of commands that a command can call."""
    todo, seen = [(command, "command")], set[tuple[str, str]]()
    while todo:
        module, name = todo.pop()
        definitions = functions(module)
        if (module, name) in seen or name not in definitions:
            continue
        seen.add((module, name))
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name):
                todo.append(imports(module).get(node.id, (module, node.id)))
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_messages_of_a_command_name_its_options(command: str) -> None:
    wrong = []
    for module, name in sorted(reached(command)):
        for text in texts(functions(module)[name]):
            for option, where in options_in(text, (command,)):
                if option not in options(where):
                    wrong.append(f"{module}.{name}: {option} is not an option of {where}: {text!r}")
    assert not wrong, "\n".join(wrong)


def test_every_function_with_options_in_its_messages_is_reached_by_a_command() -> None:
    """Otherwise the test above would not check its messages."""
    called = set().union(*(reached(command) for command in COMMANDS))
    shared = {(module, name) for module in CLI for name in functions(module) if name.islower() and name[0] != "_"}
    unseen = {
        function
        for function in shared - called
        if any(OPTION.search(text) for text in texts(functions(function[0])[function[1]]))
    }
    assert not {function for function in unseen if function[0] not in ("main", "hints")}


def test_messages_of_the_library_name_options_of_the_commands_that_print_them() -> None:
    wrong, used = [], set[str]()
    for path in sorted(SRC.rglob("*.py")):
        module = path.relative_to(SRC).as_posix()
        if module.startswith("cli/"):
            continue
        for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            if OPTION.fullmatch(text):  # an option name that is inserted into a message
                continue
            for option, where in options_in(text, ONLY_IN.get(module, ("",))):
                used.add(module)
                if not where:
                    wrong.append(f"{module}: {option} belongs to no command; name the argument, name=value: {text!r}")
                elif option not in options(where):
                    wrong.append(f"{module}: {option} is not an option of {where}: {text!r}")
    assert not wrong, "\n".join(wrong)
    assert ONLY_IN.keys() <= used


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_use_options_that_exist(command: str) -> None:
    click_command = cli.get_command(click.Context(cli), command)
    for line in (click_command.help or "").splitlines():
        if line.strip().startswith("ddim "):
            for part in line.split("&&"):
                assert all(option in options(where) for option, where in options_in(part, (command,))), line


def test_arguments_in_hints_become_options_or_are_left_out() -> None:
    train, encode = (cli.get_command(click.Context(cli), name) for name in ("train", "encode"))
    hint = either("remove them", "leave them out with skip_unreadable=True", "use fit='stretch'")
    assert translated(hint, train) == "remove them, or leave them out with --skip-unreadable, or use --fit stretch"
    assert translated(hint, encode) == "remove them, or use --fit stretch"
    assert translated(hint, None) == str(hint)
    assert translated(either("use nothing=1"), train) == ""
    assert translated("flip=False", train) == "--no-flip"
    assert translated("--set train.steps=6", train) == "--set train.steps=6"
    assert translated("a plain text with x=1", train) == "a plain text with x=1"


def test_errors_and_warnings_keep_their_hints() -> None:
    hint = either("a", "b=1")
    assert DdimError("x", "y", hint).hint is hint
    assert str(DdimError("x", "y", hint)) == "x: y; a, or b=1"
    with pytest.warns(DdimWarning) as record:
        warn("x", hint)
    assert record[0].message.hint is hint
