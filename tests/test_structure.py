"""Structure of the code: layers, forbidden calls, and what the repository must not contain."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import ddim
from ddim import names

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
# A package imports from its own layer or from those to the left. docs/design.md says what is in each package.
LAYERS = (
    "errors names | _io process nn | plan data | samplers objective | sampling exact | model | "
    "train evaluation interop check | serve cli"
)
LAYER = {name: number for number, layer in enumerate(LAYERS.split(" | ")) for name in layer.split()}
ONLY = {"nn": {"nn", "errors", "names", "_io"}}  # networks know nothing of schedules
FILES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SRC.glob("ddim/**/*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a module imports, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ddim."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ddim":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES or node.module != "ddim":
                    yield inner if inner in FILES else str(node.module)
                elif alias.name in ddim._SYMBOLS | ddim._MODULES:
                    yield f"ddim.{(ddim._SYMBOLS | ddim._MODULES)[alias.name]}"


def wrong_imports(trees: Mapping[str, ast.AST]) -> list[str]:
    """Imports from a layer to the right."""
    wrong = []
    for module, tree in trees.items():
        if module in ("ddim", "ddim.__main__"):
            continue
        here = module.split(".")[1]
        for there in imported(module, tree):
            other = there.split(".")[1]
            if LAYER[other] > LAYER[here] or other not in ONLY.get(here, LAYER) or (other == "cli") > (here == "cli"):
                wrong.append(f"{module} imports {there}")
    return wrong


def test_every_package_is_in_a_layer() -> None:
    there = {module.split(".")[1] for module in FILES if "." in module} - {"__main__"}
    assert there <= LAYER.keys()
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert not [name for name in there if f"`{name}`" not in text and name not in ("errors", "names")]


def test_four_files_at_the_root() -> None:
    files = {path.name for path in (SRC / "ddim").glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "errors.py", "names.py"}


def test_packages_have_a_docstring() -> None:
    assert not [module for module, path in FILES.items() if path.name == "__init__.py" and not doc(module)]


def doc(module: str) -> str | None:
    return ast.get_docstring(TREES[module])  # type: ignore[arg-type]


def test_imports_follow_the_layers() -> None:
    assert not wrong_imports(TREES)


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("ddim.plan.row", "from ddim.process.schedule import Level", True),
        ("ddim.samplers.ddim", "from ddim.objective.elbo import terms", True),
        ("ddim.plan.row", "from ddim.samplers import ddim", False),
        ("ddim.plan.row", "def f():\n    import ddim.model.model", False),
        ("ddim.nn.unet", "from ddim.process.schedule import Level", False),
        ("ddim.model.model", "from ddim.train import run", False),
        ("ddim.model.model", "from ddim import evaluation", False),
        ("ddim.evaluation.fid_table", "from ddim.cli.main import cli", False),
    ],
)
def test_wrong_imports_are_detected(module: str, line: str, allowed: bool) -> None:
    assert bool(wrong_imports({module: ast.parse(line)})) is not allowed


def test_imports_form_no_cycle() -> None:
    graph = {m: {there for there in imported(m, TREES[m]) if there != m} for m in FILES if m != "ddim"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_modules_are_imported_by_name() -> None:
    """A computed import would escape `imported`; the package and the list of commands have one each."""
    lazy = {m for m, tree in TREES.items() for node in ast.walk(tree) if dotted(node).endswith("import_module")}
    assert lazy == {"ddim", "ddim.cli.main"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def resolve(name: str) -> Any:
    """The object `ddim.a.b`: an attribute of `ddim`, or of the longest module that can be imported."""
    value: Any = ddim
    done = "ddim"
    for part in name.split(".")[1:]:
        done = f"{done}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(done)
    return value


MENTION = re.compile(r"(?<![\w./-])ddim(?:\.[A-Za-z_]\w*)+(?![\w/]|\.\w)")
# Files, the example of CONTRIBUTING.md, and modules that their package hides behind a function of the same name.
NOT_NAMES = {
    "ddim.py",
    "ddim.json",
    "ddim.samplers.middle",
    "ddim.samplers.ddim.ddim",
    "ddim.samplers.runge_kutta.probability_flow",
}


def test_every_name_in_docs_and_messages_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *FILES.values()]
    mentions = {name for page in pages for name in MENTION.findall(page.read_text(encoding="utf-8"))} - NOT_NAMES
    missing = []
    for name in sorted(mentions - FILES.keys()):  # some of these need Triton to be imported
        try:
            resolve(name)
        except (AttributeError, ImportError):
            missing.append(name)
    assert not missing


def test_dir_lists_the_public_names() -> None:
    assert {"Model", "load", "samplers", "timesteps", "__version__"} <= set(dir(ddim))
    assert all(getattr(ddim, name) is not None for name in ddim.__all__)


def test_names_match_the_registries() -> None:
    from ddim import emulate, objective, samplers, schedule, timesteps
    from ddim.train.presets import PRESETS

    assert list(names.SPACINGS) == list(timesteps.NAMED)
    assert list(names.SAMPLER_NAMES) == list(samplers.SAMPLERS)
    assert {*names.SCHEDULE_NAMES} == {*schedule.NAMED, "betas"}
    assert list(names.PRESET_NAMES) == list(PRESETS)
    assert list(names.EMULATED) == list(emulate.NAMES)
    for weight in names.LOSS_WEIGHTS:
        objective.weights(schedule.linear(10), "eps", weight)  # type: ignore[arg-type]


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
    """Forbidden calls in a file: those that run untrusted code or change a global generator."""
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


def test_nothing_forbidden() -> None:
    assert not [f"{module}: {what}" for module, tree in TREES.items() for what in forbidden(tree)]


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
def test_forbidden_calls_are_detected(line: str) -> None:
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
def test_allowed_calls_are_not_reported(line: str) -> None:
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
    matches = []
    for name, text in repository_texts():
        for number, line in enumerate(text.splitlines(), 1):
            for pattern in (MACHINE_PATH, REGISTRY):
                if match := pattern.search(line):
                    matches.append(f"{name}:{number}: {match.group()}")
    assert not matches, "\n".join(matches)


def test_the_patterns_match_paths_and_hosts() -> None:
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


def test_the_plan_in_the_docs_is_printed_by_its_code() -> None:
    """docs/design.md shows a few lines of code, and their output in the next block."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\s+```\n(.*?)```", text, re.S).groups()  # type: ignore[union-attr]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == shown
