"""How the code is built: floors, sizes, forbidden things, and what the repository must not hold."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
LONGEST_FILE = 320
LONGEST_FUNCTION = 60  # with signature and docstring
LONGEST_BODY = 45  # without

# Import from your own floor or below.
FLOORS = (
    {
        "schedule",
        "start",
        "grid",
        "seeds",
        "device_noise",
        "noise_kernels",
        "errors",
        "files",
        "temporary",
        "checksum",
        "tensors",
        "pixels",
        "plan_file",
        "reading",
        "limits",
        "devices",
        "arguments",
    },  # 0 ground
    {"table", "row", "plan", "mixture", "gaussian", "inference", "categorical", "comparison"},  # 1 theory
    {
        "denoiser",
        "tokens",
        "guidance",
        "hooks",
        "objective",
        "times",
        "samplers",
        "bound",
        "token_bound",
        "ode",
        "exact",
        "emulate",
    },  # 2 method
    {
        "loop",
        "parallel",
        "blocks",
        "cuda_graphs",
        "fitting",
        "tuning",
        "implicit",
        "inversion",
        "network",
        "latents",
        "training",
        "feed",
        "likelihood",
        "native",
        "planning",
        "foreign_denoiser",
        "wrapping",
    },  # 3 journeys
    {
        "config",
        "categorical_config",
        "schedule_config",
        "presets",
        "checkpoint",
        "kinds",
        "engine",
        "model",
        "token_model",
        "run_config",
        "runs",
        "budget",
        "metrics",
        "generate",
        "plausible",
        "manifest",
        "finished",
        "states",
        "roundtrip",
        "bits",
        "calibration",
        "check",
        "evaluation",
        "compute",
        "interop",
        "export",
        "hub",
        "published",
    },  # 4 goods
    {"report", "cli", "__init__", "__main__"},  # 5 doors
)
# Towers stand beside the house: they know the ground floor at most, and are known from the journeys upwards.
TOWERS = {"nn", "data", "sheet"}
TOWER_DOOR = 3

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SRC.glob("ddim/**/*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def front_names() -> dict[str, str]:
    """The names `import ddim` offers, to the modules they come from: the table `_HOME` of the package."""
    for node in TREES["ddim"].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME":
            return {name: f"ddim.{home or name}" for name, home in ast.literal_eval(node.value).items()}
    raise AssertionError("src/ddim/__init__.py has no table _HOME")


def imported(module: str) -> Iterator[str]:
    """The modules of this package that a module imports, wherever in the file the import stands."""
    front = front_names()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "ddim":  # then what it takes from the package decides; its version is nobody's
                    for used in ast.walk(TREES[module]):
                        if isinstance(used, ast.Attribute) and dotted(used.value) == (alias.asname or "ddim"):
                            yield from [front[used.attr]] if used.attr in front else []
                elif alias.name.startswith("ddim."):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] == "ddim":
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    if source == "ddim" and alias.name in front:
                        yield front[alias.name]
                    elif inner in FILES or source != "ddim":
                        yield inner if inner in FILES else source


def room(module: str) -> str:
    """The file or folder of `src/ddim` a module is at home in."""
    return module.split(".")[1] if "." in module else "__init__"


def may_import(here: str, there: str) -> bool:
    """Whether a room may import from another one."""
    if here == there:
        return True
    if here in TOWERS:
        return FLOOR.get(there) == 0
    if there in TOWERS:
        return FLOOR.get(here, 0) >= TOWER_DOOR
    return FLOOR.get(there, 0) <= FLOOR.get(here, 0)  # the test above speaks of rooms without a floor


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


@pytest.mark.parametrize("module", FILES)
def test_every_module_has_a_floor(module: str) -> None:
    name = room(module)
    assert name in FLOOR or name in TOWERS, (
        f"src/ddim/{name} has no floor: give it one in FLOORS (or TOWERS) of tests/test_structure.py, "
        "the lowest that has everything it imports"
    )


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    wrong = [there for there in imported(module) if not may_import(room(module), room(there))]
    assert not wrong, f"{module} must not import {', '.join(wrong)}: it is on a higher floor, or a tower"


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("model", "plan", True),
        ("plan", "model", False),
        ("plan", "gaussian", True),
        ("training", "nn", True),
        ("objective", "nn", False),
        ("nn", "errors", True),
        ("nn", "plan", False),
        ("nn", "data", False),
        ("runs", "cli", False),
    ],
)
def test_the_rule_of_the_floors(here: str, there: str, allowed: bool) -> None:
    assert may_import(here, there) is allowed


def test_imports_inside_functions_and_for_types_are_seen() -> None:
    assert "ddim.model" in set(imported("ddim.cli.options"))
    assert {"ddim.runs", "ddim.presets"} <= set(imported("ddim.cli.train"))


def test_imports_form_no_circle() -> None:
    graph = {module: {there for there in imported(module) if there != module} for module in FILES if module != "ddim"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_modules_are_imported_by_name_except_at_the_two_lazy_doors() -> None:
    """A computed import would escape the walk above."""
    lazy = {m for m, tree in TREES.items() for node in ast.walk(tree) if dotted(node).endswith("import_module")}
    assert lazy == {"ddim", "ddim.cli.main"}


@pytest.mark.parametrize("module", FILES)
def test_rooms_are_small(module: str) -> None:
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines, at most {LONGEST_FILE}: split the file"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            told = ast.get_docstring(node) is not None and len(node.body) > 1
            end = node.end_lineno or node.lineno
            body = end - node.body[1 if told else 0].lineno + 1
            assert body <= LONGEST_BODY, f"the body of {node.name} has {body} lines, at most {LONGEST_BODY}"
            # A command's signature and docstring are the list of its options and its help.
            if not (room(module) == "cli" and node.name == "command"):
                whole = end - node.lineno + 1
                assert whole <= LONGEST_FUNCTION, f"{node.name} has {whole} lines, at most {LONGEST_FUNCTION}"


GLOBAL_DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "rand_like",
    "randn_like",
    "normal",
    "bernoulli",
    "multinomial",
}
IN_PLACE_DRAWS = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_"}
BANNED_MODULES = {"pickle", "marshal", "shelve", "random"}


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Each thing in a file that must not be there: it runs a stranger's code, or moves a global generator."""
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"line {line}: import {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            if owner in ("np.random", "numpy.random") and node.attr not in ("Generator", "Philox"):
                yield f"line {line}: {owner}.{node.attr}"
        elif isinstance(node, ast.Call):
            name, given = dotted(node.func), {word.arg: word.value for word in node.keywords}
            safe = given.get("weights_only")
            if name in ("eval", "exec", "compile", "__import__"):
                yield f"line {line}: {name}"
            elif name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                yield f"line {line}: torch.load without weights_only=True"
            elif name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all") and id(node) not in forked:
                yield f"line {line}: {name} outside fork_rng"
            elif name.startswith("torch.") and name.split(".")[1] in GLOBAL_DRAWS and "generator" not in given:
                yield f"line {line}: {name} without a generator"
            elif isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE_DRAWS and "generator" not in given:
                yield f"line {line}: {node.func.attr} without a generator"


@pytest.mark.parametrize("module", FILES)
def test_nothing_forbidden(module: str) -> None:
    assert not list(forbidden(TREES[module]))


@pytest.mark.parametrize(
    "line",
    [
        "torch.manual_seed(0)",
        "np.random.seed(0)",
        "numpy.random.default_rng(0)",
        "import pickle",
        "from random import choice",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "torch.randn(3)",
        "x.normal_()",
    ],
)
def test_the_forbidden_is_noticed(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "with torch.random.fork_rng():\n    torch.manual_seed(0)",
        "made.manual_seed(0)",
        "np.random.Generator(np.random.Philox(key=key))",
        "torch.load(path, weights_only=True)",
        "network.eval()",
        "torch.randn(3, generator=made)",
        "re.compile(text)",
    ],
)
def test_the_allowed_is_let_through(line: str) -> None:
    assert not list(forbidden(ast.parse(line)))


HELP = """
import sys
import ddim, ddim.cli.main
try:
    ddim.cli.main.main(["--help"])
except SystemExit as end:
    assert not end.code, end.code
print(sorted({"torch", "numpy", "PIL", "pydantic"} & sys.modules.keys()), file=sys.stderr)
"""


def test_import_and_help_do_not_wait_for_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]", f"`import ddim` and `ddim --help` load {done.stderr}"
    assert "Commands" in done.stdout


def repository_texts() -> Iterator[tuple[str, str]]:
    """Name and text of every text file that is tracked by git, or is new and not ignored."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in names:
        path = ROOT / name
        if name and path.is_file():
            data = path.read_bytes()
            if b"\0" not in data:
                yield name, data.decode("utf-8", errors="replace")


# Written so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|work|opt|Users)/\w|/tmp/ba[s]h|(?<!\w)[C]:\\\\?Users")
REGISTRY = re.compile(
    r"\bpy[p]i\.org|python[h]osted\.|download\.py[t]orch\.|\bana[c]onda\.(?:org|com)|[i]ndex-url", re.I
)


def test_no_path_of_a_machine_and_no_registry_host() -> None:
    found = []
    for name, text in repository_texts():
        for number, line in enumerate(text.splitlines(), 1):
            for pattern in (MACHINE_PATH, REGISTRY):
                if match := pattern.search(line):
                    found.append(f"{name}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_look_for() -> None:
    for text in (
        "/ho" + "me/me/x",
        "at /ro" + "ot/x",
        '"/wo' + "rk/x",
        "=/op" + "t/x",
        "/tmp/" + "bash_jobs",
    ):
        assert MACHINE_PATH.search(text), text
    for text in ("a path such as photos/" + "work/1.png", "net" + "work/body", "https://example.org/home/page"):
        assert not MACHINE_PATH.search(text), text
    assert REGISTRY.search("https://py" + "pi.org/simple")


def test_what_is_listed_twice_so_that_help_is_quick_is_the_same() -> None:
    """The options and the configuration cannot ask numpy's modules for their tables."""
    from ddim import grid, schedule
    from ddim.cli.options import GRIDS
    from ddim.config import ScheduleConfig

    assert list(GRIDS) == list(grid.NAMED)
    assert {*get_args(ScheduleConfig.model_fields["name"].annotation)} == {*schedule.NAMED, "betas"}


def test_the_plan_in_the_docs_is_what_is_printed() -> None:
    """docs/design.md shows a few lines of code and then, in the next block, what they print."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\s+```\n(.*?)```", text, re.S).groups()  # type: ignore[union-attr]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == shown
