"""Atomic writes: incomplete files have temporary names and are removed only after their writer has ended."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddim._io import atomic
from ddim._io.atomic import claimed, lock, new_folder, unexpected_entries, write_atomic
from ddim._io.safetensors import read_tensors
from ddim._io.temporary import create, remove_parts, temporary_name
from ddim.errors import DdimError, DdimWarning
from faults import FULL, Killed, faulty
from models import contents, ddim, load_tiny, save_tiny, tiny_model, write_pictures
from test_runs import assert_same_run, go, newest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable TensorBoard, which takes most of the time of a short run."""
    monkeypatch.setattr("ddim.train.logger.logger_of", lambda *_: None)


def leave_temporary(path: Path, role: str = "part", folder: bool = False) -> Path:
    """The temporary file or folder left by a killed process."""
    leftover = temporary_name(path, role)
    if folder:
        leftover.mkdir()
        (leftover / "inner").write_bytes(b"half")
    else:
        leftover.write_bytes(b"half")
    return leftover


@pytest.mark.parametrize("folder", [False, True])
def test_temporary_files_of_killed_processes_are_removed(folder: bool, tmp_path: Path) -> None:
    leftover = leave_temporary(tmp_path / "a", folder=folder)
    assert unexpected_entries(tmp_path) == []
    remove_parts(tmp_path, "b")
    assert leftover.exists()
    remove_parts(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("folder", [False, True])
def test_temporary_files_of_running_writers_are_not_removed(folder: bool, tmp_path: Path) -> None:
    part, handle = create(tmp_path / "a", folder)
    remove_parts(tmp_path)
    assert part.exists()
    os.close(handle)
    remove_parts(tmp_path)
    assert not part.exists()


def test_temporary_files_of_another_running_process_are_not_removed(tmp_path: Path) -> None:
    code = "import sys, pathlib; from ddim._io.temporary import create\n"
    code += "print(create(pathlib.Path(sys.argv[1]))[0], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        part = Path(other.stdout.readline().strip())
        remove_parts(tmp_path)
        assert part.exists()
        other.kill()
    remove_parts(tmp_path)
    assert not part.exists()


@pytest.mark.parametrize(
    "name",
    [".a.part", ".a.old", "a.part", ".a.123.old", ".a.x-01234567.part", ".a.1-0123456.part", ".a.12-0123456G.old"],
)
@pytest.mark.parametrize("folder", [False, True])
def test_files_with_other_names_are_not_removed(name: str, folder: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if folder else (tmp_path / name).write_text("mine")
    assert unexpected_entries(tmp_path) == [name]
    remove_parts(tmp_path)
    assert (tmp_path / name).exists()


def test_temporary_names_are_unique(tmp_path: Path) -> None:
    assert len({temporary_name(tmp_path / "a", "part") for _ in range(100)}) == 100


@pytest.mark.parametrize("command", ["convert", "convert to diffusers", "calibrate", "train"])
def test_files_of_the_user_beside_the_output_are_not_removed(command: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    write_pictures(tmp_path / "images", 1)
    for name in (".o.old", ".o.part", ".o.1.old"):
        (tmp_path / "D" / name).mkdir(parents=True)
        (tmp_path / "D" / name / "mine.txt").write_text(name)
    before = {path: path.read_bytes() for path in (tmp_path / "D").rglob("mine.txt")}
    arguments: tuple[object, ...] = ("convert", tmp_path / "model")
    if command == "convert to diffusers":
        arguments += ("--to", "diffusers")
    elif command == "calibrate":
        arguments = ("calibrate", tmp_path / "model", tmp_path / "images", "--times", 24, "--device", "cpu")
    if command == "train":
        go(tmp_path / "D/o", stop=1)
    else:
        for _ in range(2):
            assert ddim(*arguments, "--out", tmp_path / "D/o") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (tmp_path / "D").iterdir()} == {"o", ".o.old", ".o.part", ".o.1.old"}


@pytest.mark.parametrize("inside", ["mine.txt", "unet/mine.txt", "scheduler/deep/mine.txt", ".mine.part"])
def test_a_pipeline_with_a_file_of_the_user_is_not_replaced(inside: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    arguments = ("convert", tmp_path / "model", "--to", "diffusers", "--out", tmp_path / "o")
    assert ddim(*arguments) == 0
    (tmp_path / "o" / inside).parent.mkdir(exist_ok=True)
    (tmp_path / "o" / inside).write_text("mine")
    assert ddim(*arguments) == 2
    assert (tmp_path / "o" / inside).read_text() == "mine"


@pytest.mark.parametrize(
    "leftover", [".model.part", ".model.old", ".model.4711-0123abcd.part", ".model.4711-0123abcd.old"]
)
def test_resume_after_a_kill_that_left_an_incomplete_model(leftover: str, tmp_path: Path) -> None:
    go(tmp_path, stop=2)
    (tmp_path / leftover).mkdir()
    (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    assert go(tmp_path)[-1].step == 12
    assert not (tmp_path / leftover).exists()


def test_a_folder_is_replaced_atomically(tmp_path: Path) -> None:
    """After a kill at any point, the old or the new folder is read."""
    first, second = (tiny_model(seed=seed).fingerprint for seed in (0, 1))
    save_tiny(tmp_path / "whole")
    with faulty() as system:
        tiny_model(seed=1).save(tmp_path / "whole")
    seen = set()
    for at in range(1, system.count + 1):
        folder = tmp_path / str(at) / "model"
        save_tiny(folder)
        with faulty(at), pytest.raises(Killed):
            tiny_model(seed=1).save(folder)
        seen.add(load_tiny(folder).fingerprint)
        tiny_model(seed=1).save(folder)
        assert load_tiny(folder).fingerprint == second
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert seen == {first, second}


def test_an_error_names_the_folder_and_not_the_temporary_one(tmp_path: Path) -> None:
    with faulty(3, FULL), pytest.raises(DdimError) as caught, new_folder(tmp_path / "o") as part:
        write_atomic(part / "a", b"content")
    assert caught.value.subject == str(tmp_path / "o")
    assert [*tmp_path.iterdir()] == []


def _fail(path: Path) -> None:
    path.write_text("ours")
    raise DdimError("x", "y", "z")


@pytest.mark.parametrize("exists", [False, True])
def test_a_claimed_folder_is_removed_after_an_early_error(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    if exists:
        folder.mkdir(parents=True)
    with pytest.raises(DdimError), claimed(folder, "a"):
        _fail(folder / "a")
    assert folder.exists() is exists
    assert [*tmp_path.rglob("*")] == ([tmp_path / "deep", folder] if exists else [])


def test_a_claimed_folder_with_content_is_kept_after_an_error(tmp_path: Path) -> None:
    def fail(keep: bool, name: str) -> None:
        with claimed(tmp_path / name, "a") as claim:
            if keep:
                claim.keep()
            _fail(tmp_path / name / "a")

    with pytest.raises(DdimError):
        fail(True, "kept")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/a").write_text("from before")
    with pytest.raises(DdimError):
        fail(False, "used")
    assert contents(tmp_path) == {"kept/a": b"ours", "used/a": b"ours"}
    with lock(tmp_path / "kept"), pytest.raises(DdimError, match="kept: "), claimed(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept/a").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--start", 99999999999999999999999999),
        ("--device", "meta"),
        ("--seed", -1),
        ("--start", 2**64),
        ("-n", 0),
    ],
)
def test_a_command_with_an_error_creates_no_folder(
    arguments: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    command = ("sample", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2, "-n", 1)
    assert ddim(*command, *arguments) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()
    assert ddim(*command, "--seed", 3, "--device", "cpu") == 0


def test_samples_that_are_not_finite_create_no_folder(tmp_path: Path) -> None:
    from ddim.evaluation.sample_folder import generate

    model = tiny_model()
    for parameter in model.network.parameters():
        parameter.fill_(float("nan"))
    with pytest.raises(DdimError, match=r"^samples: "):
        list(generate(model, model.plan(2), tmp_path / "out", 2))
    assert not (tmp_path / "out").exists()


def test_training_that_diverges_at_once_creates_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DdimError, match=r"^step 2: "):
        go(tmp_path / "run", lr=1e30, clip_grad=1e30, warmup=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_a_state_under_a_wrong_step_number_is_ignored(keep: int, tmp_path: Path) -> None:
    go(tmp_path / "whole", keep=keep)
    go(tmp_path / "run", stop=6, keep=keep)
    stale = tmp_path / "run/state/99999999.safetensors"
    stale.write_bytes(newest(tmp_path / "run").read_bytes())
    for first, stop in ((6, 9), (9, 0)):
        with pytest.warns(DdimWarning):
            assert go(tmp_path / "run", stop=stop, keep=keep)[0].step == first
    with pytest.warns(DdimWarning, match=r"\b12 steps\b.*\b13\b|99999999"):
        assert go(tmp_path / "run", keep=keep)[-1].step == 12
    assert int(read_tensors(tmp_path / "run/state/00000012.safetensors")[0]["step"]) == 12
    stale.unlink()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_only_damaged_states_are_an_error_with_a_working_hint(tmp_path: Path) -> None:
    import shutil

    go(tmp_path, stop=6)
    for path in (tmp_path / "state").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DdimError) as caught:
        go(tmp_path)
    assert str(tmp_path / "state") in caught.value.hint
    shutil.rmtree(tmp_path / "state")
    assert go(tmp_path)[0].event == "started"


def changes(tree: ast.AST) -> set[str]:
    """The calls in a file that change a file system."""
    methods = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "rename", "symlink_to", "hardlink_to"}
    functions = {"os.replace", "os.remove", "os.makedirs", "os.rename", "os.write", "os.unlink", "os.mkdir", "os.rmdir"}
    calls = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        opens = name == "open" or name.endswith(".open")
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        mode = any(isinstance(value, ast.Constant) and {*str(value.value)} & {*"wax+"} for value in values)
        if (
            name in functions
            or (name.startswith("shutil.") and name not in ("shutil.which", "shutil.get_terminal_size"))
            or name.rpartition(".")[2] in methods
            or (opens and mode and not name.startswith("Image"))
        ):
            calls.add(name)
    return calls


def test_only_the_io_package_changes_the_file_system() -> None:
    """Except for the compiler's cache and the download of the Inception weights."""
    allowed = {"atomic.py", "temporary.py", "library.py", "inception.py"}
    for path in sorted((ROOT / "src/ddim").rglob("*.py")):
        if path.name not in allowed:
            assert not changes(ast.parse(path.read_text(encoding="utf-8"))), path
    assert changes(ast.parse((ROOT / "src/ddim/_io/atomic.py").read_text(encoding="utf-8")))
    assert atomic.os is os
