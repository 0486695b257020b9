"""One writer of files and folders: what is half-written has a name of its own, and only its owner's death frees it."""

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
from ddim.train.logger import MetricsLogger
from faults import FULL, Killed, faulty
from models import contents, ddim, load_tiny, save_tiny, tiny_model, write_pictures
from test_runs import assert_same_run, go, newest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TensorBoard, which takes most of the time of a short run."""
    monkeypatch.setattr(MetricsLogger, "_events", lambda *_: None)


def leave(path: Path, role: str = "part", folder: bool = False) -> Path:
    """What a process that is gone left of a file or folder."""
    left = temporary_name(path, role)
    if folder:
        left.mkdir()
        (left / "inner").write_bytes(b"half")
    else:
        left.write_bytes(b"half")
    return left


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_process_left_is_removed_when_it_is_gone(folder: bool, tmp_path: Path) -> None:
    left = leave(tmp_path / "a", folder=folder)
    assert unexpected_entries(tmp_path) == []
    remove_parts(tmp_path, "b")
    assert left.exists()
    remove_parts(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_living_process_is_writing_is_left_alone(folder: bool, tmp_path: Path) -> None:
    part, handle = create(tmp_path / "a", folder)
    remove_parts(tmp_path)
    assert part.exists()
    os.close(handle)
    remove_parts(tmp_path)
    assert not part.exists()


def test_another_process_is_seen_to_be_alive(tmp_path: Path) -> None:
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
def test_what_has_another_name_is_not_ours(name: str, folder: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if folder else (tmp_path / name).write_text("mine")
    assert unexpected_entries(tmp_path) == [name]
    remove_parts(tmp_path)
    assert (tmp_path / name).exists()


def test_no_two_writers_share_a_name(tmp_path: Path) -> None:
    assert len({temporary_name(tmp_path / "a", "part") for _ in range(100)}) == 100


@pytest.mark.parametrize("command", ["convert", "convert to diffusers", "calibrate", "train"])
def test_files_of_the_user_beside_the_place_stay(command: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    write_pictures(tmp_path / "images", 1)
    for name in (".o.old", ".o.part", ".o.1.old"):
        (tmp_path / "D" / name).mkdir(parents=True)
        (tmp_path / "D" / name / "mine.txt").write_text(name)
    before = {path: path.read_bytes() for path in (tmp_path / "D").rglob("mine.txt")}
    words: tuple[object, ...] = ("convert", tmp_path / "model")
    if command == "convert to diffusers":
        words += ("--to", "diffusers")
    elif command == "calibrate":
        words = ("calibrate", tmp_path / "model", tmp_path / "images", "--times", 24, "--device", "cpu")
    if command == "train":
        go(tmp_path / "D/o", stop=1)
    else:
        for _ in range(2):
            assert ddim(*words, "--out", tmp_path / "D/o") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (tmp_path / "D").iterdir()} == {"o", ".o.old", ".o.part", ".o.1.old"}


@pytest.mark.parametrize("inside", ["mine.txt", "unet/mine.txt", "scheduler/deep/mine.txt", ".mine.part"])
def test_a_pipeline_with_a_file_of_the_user_is_not_replaced(inside: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    words = ("convert", tmp_path / "model", "--to", "diffusers", "--out", tmp_path / "o")
    assert ddim(*words) == 0
    (tmp_path / "o" / inside).parent.mkdir(exist_ok=True)
    (tmp_path / "o" / inside).write_text("mine")
    assert ddim(*words) == 2
    assert (tmp_path / "o" / inside).read_text() == "mine"


@pytest.mark.parametrize("left", [".model.part", ".model.old", ".model.4711-0123abcd.part", ".model.4711-0123abcd.old"])
def test_a_run_goes_on_where_a_kill_left_half_a_model(left: str, tmp_path: Path) -> None:
    go(tmp_path, stop=2)
    (tmp_path / left).mkdir()
    (tmp_path / left / "model.safetensors").write_bytes(b"half")
    assert go(tmp_path)[-1].step == 12
    assert not (tmp_path / left).exists()


def test_a_folder_is_replaced_as_a_whole_or_not(tmp_path: Path) -> None:
    """Killed anywhere, the old or the new one is found and read."""
    first, second = (tiny_model(seed=seed).fingerprint for seed in (0, 1))
    save_tiny(tmp_path / "whole")
    with faulty() as system:
        tiny_model(seed=1).save(tmp_path / "whole")
    seen = set()
    for at in range(1, system.count + 1):
        place = tmp_path / str(at) / "model"
        save_tiny(place)
        with faulty(at), pytest.raises(Killed):
            tiny_model(seed=1).save(place)
        seen.add(load_tiny(place).fingerprint)
        tiny_model(seed=1).save(place)
        assert load_tiny(place).fingerprint == second
        assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert seen == {first, second}


def test_an_error_names_the_folder_and_not_the_half_written_one(tmp_path: Path) -> None:
    with faulty(3, FULL), pytest.raises(DdimError) as caught, new_folder(tmp_path / "o") as part:
        write_atomic(part / "a", b"content")
    assert caught.value.subject == str(tmp_path / "o")
    assert [*tmp_path.iterdir()] == []


def _fail(path: Path) -> None:
    path.write_text("ours")
    raise DdimError("x", "y", "z")


@pytest.mark.parametrize("there", [False, True])
def test_a_claim_that_came_to_nothing_is_undone(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(DdimError), claimed(folder, "a"):
        _fail(folder / "a")
    assert folder.exists() is there
    assert [*tmp_path.rglob("*")] == ([tmp_path / "deep", folder] if there else [])


def test_a_claim_is_kept_where_it_is_of_use(tmp_path: Path) -> None:
    def fail(keep: bool, name: str) -> None:
        with claimed(tmp_path / name, "a") as owned:
            if keep:
                owned.keep()
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
    "words",
    [
        ("--start", 99999999999999999999999999),
        ("--device", "meta"),
        ("--seed", -1),
        ("--start", 2**64),
        ("-n", 0),
    ],
)
def test_a_refused_command_leaves_the_folder_unclaimed(
    words: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    plain = ("sample", tmp_path / "model", "--out", tmp_path / "out", "--steps", 2, "-n", 1)
    assert ddim(*plain, *words) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()
    assert ddim(*plain, "--seed", 3, "--device", "cpu") == 0


def test_samples_that_are_no_numbers_leave_the_folder_unclaimed(tmp_path: Path) -> None:
    from ddim.evaluation.sample_folder import generate

    model = tiny_model()
    for parameter in model.network.parameters():
        parameter.fill_(float("nan"))
    with pytest.raises(DdimError, match=r"^samples: "):
        list(generate(model, model.plan(2), tmp_path / "out", 2))
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_at_once_leaves_the_folder_unclaimed(tmp_path: Path) -> None:
    with pytest.raises(DdimError, match=r"^step 2: "):
        go(tmp_path / "run", lr=1e30, clip_grad=1e30, warmup=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_a_copy_of_a_state_under_a_higher_number_is_ignored(keep: int, tmp_path: Path) -> None:
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


def test_states_none_of_which_is_whole_are_refused_and_the_hint_helps(tmp_path: Path) -> None:
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
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        opens = name == "open" or name.endswith(".open")
        words = [*node.args, *(word.value for word in node.keywords)]
        mode = any(isinstance(word, ast.Constant) and {*str(word.value)} & {*"wax+"} for word in words)
        if (
            name in functions
            or name.startswith("shutil.")
            or name.rpartition(".")[2] in methods
            or (opens and mode and not name.startswith("Image"))
        ):
            found.add(name)
    return found


def test_nothing_else_changes_the_file_system() -> None:
    """But for the compiler's cache and the download of Inception's weights, which are no files of ours."""
    allowed = {"atomic.py", "temporary.py", "library.py", "inception.py"}
    for path in sorted((ROOT / "src/ddim").rglob("*.py")):
        if path.name not in allowed:
            assert not changes(ast.parse(path.read_text(encoding="utf-8"))), path
    assert changes(ast.parse((ROOT / "src/ddim/_io/atomic.py").read_text(encoding="utf-8")))
    assert atomic.os is os
