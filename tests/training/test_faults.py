"""Full disks, changed files, pickles in the folder: a clear error each, and nothing that was saved is lost."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import leftovers, steps
from test_resume import assert_same_run, tensors

from sparsekit.errors import CheckpointError, SparsekitError
from sparsekit.files import MANIFEST, verify
from sparsekit.model.targets import Run, load_model, resolve
from sparsekit.model.weights import WEIGHTS
from sparsekit.registry import registry
from sparsekit.spec.load import validate
from sparsekit.training.callbacks import Callback
from sparsekit.training.run import train
from sparsekit.training.trainer import Trainer

# The disk


class SmallFiles(Callback):
    """From one step on until before another, no file may grow past a size: what a full disk or a quota does."""

    class Params(Callback.Params):
        n_bytes: int
        begin: int
        end: int

    def on_gradients(self, trainer: Trainer) -> None:
        step = trainer.progress.step + 1
        if step == self.params.begin:
            wait_for_save(trainer)
            limit_files(self.params.n_bytes)
        if step == self.params.end:
            wait_for_save(trainer)
            limit_files(None)


def wait_for_save(trainer: Trainer) -> None:
    """Until the one under way has ended, well or badly."""
    if trainer.saver._under_way is not None:
        trainer.saver._under_way[1].exception()


def limit_files(n_bytes: int | None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if n_bytes is None else n_bytes, hard))


@pytest.fixture
def small_files() -> Any:
    registry("callback").register("small_files")(SmallFiles)
    yield
    limit_files(None)
    registry("callback").unregister("small_files")


def with_small_files(raw: dict[str, Any], n_bytes: int, begin: int, end: int = 1000) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["train"]["callbacks"] = [{"type": "small_files", "n_bytes": n_bytes, "begin": begin, "end": end}]
    return raw


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("n_bytes", [3000, 9000])  # too little for random numbers; enough for them, not for weights
def test_a_save_that_finds_no_room_costs_that_save_alone(
    saving: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], n_bytes: int
) -> None:
    whole = train(validate(saving), out=tmp_path / "whole")
    part = train(validate(with_small_files(saving, n_bytes, 6, 7)), out=tmp_path / "part")
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"warning: {part.folder}: the checkpoint of step 6 could not be written (")
    assert "File too large" in told
    assert told.endswith(f"the newest checkpoint is still {part.checkpoints[0]}\n")
    assert steps(part) == [3, 9, 12] and leftovers(part) == []
    assert_same_run(whole, part)


@pytest.mark.usefixtures("small_files")
def test_a_last_save_that_finds_no_room_is_an_error(saving: dict[str, Any], tmp_path: Path) -> None:
    saving["train"]["log_every"] = 100  # rows need room too
    whole = train(validate(saving), out=tmp_path / "whole")
    for n_bytes in (3000, 9000):
        with pytest.raises(
            CheckpointError, match=r"the checkpoint of step 12 could not be written \(.*File too large"
        ) as told:
            train(validate(with_small_files(saving, n_bytes, 12)), out=tmp_path / "part")
        limit_files(None)
        part = Run(tmp_path / "part")
        assert steps(part) == [3, 6, 9] and leftovers(part) == []
        assert str(told.value).endswith(f"; the newest checkpoint is still {part.checkpoints[-1]}")
    assert_same_run(whole, train(validate(saving), out=tmp_path / "part"))


@pytest.mark.usefixtures("small_files")
def test_no_room_for_a_row(saving: dict[str, Any], tmp_path: Path) -> None:
    whole = train(validate(saving), out=tmp_path / "whole")
    with pytest.raises(SparsekitError) as told:
        train(validate(with_small_files(saving, 1000, 8)), out=tmp_path / "part")
    limit_files(None)
    assert str(told.value) == (
        f"{tmp_path / 'part'}: cannot be written (File too large); make room and run the same command again, "
        "or give another --out; what was saved is whole"
    )
    assert steps(Run(tmp_path / "part")) == [3, 6]
    assert_same_run(whole, train(validate(saving), out=tmp_path / "part"))


@pytest.mark.usefixtures("small_files")
def test_no_room_for_tensorboard_costs_that_alone(
    saving: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whose own thread would print a trace."""
    whole = train(validate(saving), out=tmp_path / "whole")
    raw = with_small_files(saving, 20000, 4, 6)
    raw["train"]["callbacks"].append({"type": "tensorboard", "histograms": ["weights"], "histograms_every": 1})
    part = train(validate(raw), out=tmp_path / "part")
    assert capfd.readouterr().err == (
        f"warning: {part.folder}/tb: cannot be written (File too large); going on without it\n"
    )
    assert_same_run(whole, part)


@pytest.mark.parametrize("file", ["manifest.json", "random.safetensors", "state.json", "weights"])
def test_disk_full_at_each_file(
    saving: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    """ENOSPC where a file is forced to the disk, which is when a file system may find out."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".step-00000006" in path and file in path:
            raise full
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run = train(validate(saving), out=tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "step 6 could not be written (No space left on device)" in told
    assert steps(run) == [3, 9, 12] and leftovers(run) == []


@pytest.mark.parametrize("where", ["run", "parent", "checkpoints"])
def test_a_file_where_a_folder_should_be(saving: dict[str, Any], tmp_path: Path, where: str) -> None:
    out = tmp_path / "runs" / "a"
    blocked = {"run": out, "parent": out.parent, "checkpoints": out / "checkpoints"}[where]
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    if where == "checkpoints":
        (out / "spec.json").write_text("{}")  # without it the folder is no run's
    with pytest.raises(SparsekitError) as told:
        train(validate(saving), out=out)
    line = str(told.value)
    if where == "checkpoints":
        assert line.startswith(f"{out}: the checkpoint of step 12 could not be written (")
        assert line.endswith("; no checkpoint was saved before")
    else:
        assert line.startswith(f"{out}: cannot be written (") and str(blocked) in line
        assert line.endswith("); give another --out")
    assert "\n" not in line
    assert blocked.read_text() == "in the way"


def test_a_folder_that_cannot_be_made(saving: dict[str, Any]) -> None:
    with pytest.raises(SparsekitError, match=r"^/proc/nowhere/run: cannot be written \(No such file or directory"):
        train(validate(saving), out="/proc/nowhere/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(saving: dict[str, Any], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SparsekitError, match=r"cannot be written \(Permission denied"):
        train(validate(saving), out=tmp_path / "run")


# Files that change


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A finished run with two checkpoints, to be copied and spoilt: (spec, folder)."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "train.txt").write_text(" ".join(str(i * i) for i in range(2000)))
    (folder / "validation.txt").write_text(" ".join(str(i * i) for i in range(3000, 3100)))
    raw = {
        "model": {
            "d_model": 8, "n_layers": 1, "vocab_size": 300, "max_seq_len": 16,
            "block": {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "mlp", "d_ff": 8}},
        },
        "data": {
            "source": {
                "type": "text",
                "path": str(folder / "train.txt"),
                "validation_path": str(folder / "validation.txt"),
            },
            "tokenizer": {"type": "bpe", "vocab_size": 300},
        },
        "train": {
            "max_steps": 4, "checkpoint_every": 2, "micro_batch_size": 4, "log_every": 1, "callbacks": [],
            "schedule": "constant",
        },
    }  # fmt: skip
    return raw, train(validate(raw), out=folder / "run").folder


MODEL, OPTIMIZER = (f"{WEIGHTS}/shard-00001-model-0000{i}-of-00002.safetensors" for i in (1, 2))
FILES = ["manifest.json", "random.safetensors", "spec.json", "state.json", "tokenizer.json", MODEL, OPTIMIZER]
DAMAGES = [(file, "a bit") for file in FILES] + [
    *((file, "the end") for file in (MANIFEST, MODEL, OPTIMIZER)),
    *((file, "all") for file in (MANIFEST, "spec.json", "tokenizer.json", MODEL)),
]


def copied(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(kept[1], tmp_path / "run")))


def test_these_are_all_files(kept: tuple[dict[str, Any], Path]) -> None:
    folder = Run(kept[1]).checkpoints[-1]
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == FILES


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_file_is_named_and_an_earlier_checkpoint_taken(
    kept: tuple[dict[str, Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: str,
) -> None:
    raw = copy.deepcopy(kept[0])
    raw["train"]["max_steps"] = 5
    run = copied(kept, tmp_path)
    older, newest = run.checkpoints
    path = newest / file
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[content.index(b"d_model") if file == "spec.json" else len(content) // 2] ^= 0x10
        path.write_bytes(content)
    elif damage == "the end":
        path.write_bytes(content[: len(content) * 2 // 3])
    else:
        path.unlink()
    blamed = newest if file == MANIFEST and damage == "a bit" else path
    for attempt in (
        lambda: load_model(resolve(run)),
        lambda: train(validate(raw), out=tmp_path / "b", resume=str(newest)),
    ):
        with pytest.raises(CheckpointError) as told:
            attempt()
        assert str(told.value).startswith(str(blamed)) and "\n" not in str(told.value)
    capsys.readouterr()
    resumed = train(validate(raw), out=run.folder)
    damaged, resumption = capsys.readouterr().err.splitlines()
    assert damaged.startswith(str(blamed)) and damaged.endswith("; passed over")
    assert resumption == f"{run.folder}: going on from step 2 ({older})"
    assert resumed.metrics[-1]["step"] == 5
    assert [path.name for path in resumed.checkpoints] == ["step-00000004", "step-00000005"]
    verify(resumed.checkpoints[0])  # written anew
    assert not list(newest.parent.glob("past-*"))  # overtaken


def test_any_bit_of_the_manifest(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Whatever single bit is flipped, the checkpoint is refused in a line, never accepted and never a traceback."""
    folder = copied(kept, tmp_path).checkpoints[-1]
    path = folder / MANIFEST
    content = path.read_bytes()
    choose = random.Random(0)
    for _ in range(600):
        at, bit = choose.randrange(len(content)), choose.randrange(8)
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        same = _parsed(changed) == json.loads(content)  # white space may change into other white space
        if not same:
            with pytest.raises(CheckpointError):
                verify(folder)


def _parsed(content: bytes | bytearray) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_nothing_whole_is_an_error(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    run = copied(kept, tmp_path)
    for folder in run.checkpoints:
        (folder / "state.json").write_text("{}")
    reason = r"step-00000004/state.json: has 2 bytes where \d+ were written"
    line = rf"^{run.folder}: none of its checkpoints is whole \({run.folder}/checkpoints/{reason}\); "
    for attempt in (lambda: train(validate(kept[0]), out=run.folder), lambda: load_model(run)):
        with pytest.raises(CheckpointError, match=f"{line}start over with --resume never$"):
            attempt()
    assert steps(run) == [2, 4]


def test_the_newest_whole_checkpoint_is_what_a_run_stands_for(
    kept: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(kept, tmp_path)
    older, newer = run.checkpoints
    assert resolve(run, weights=True).checkpoint == newer
    (newer / "state.json").write_text("{}")
    assert resolve(run, weights=True).checkpoint == older
    told = capsys.readouterr().err
    assert told.startswith(f"{newer}/state.json: has 2 bytes") and told.endswith(
        f" were written; passed over for {older}\n"
    )
    wanted, found = load_model(older).state_dict(), load_model(run).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_folder_of_other_things_is_left_alone(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    out = tmp_path / "texts"
    out.mkdir()
    (out / "train.log").write_text("begun\n")  # as a shell writes it
    for name in ("notes.txt", "tokenizer.json"):
        (out / name).write_text("mine")
    for resume in ("auto", "never"):
        with pytest.raises(CheckpointError) as told:
            train(validate(kept[0]), out=out, resume=resume)
        assert str(told.value) == f"{out}: holds notes.txt and no run; give another --out"
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "train.log": "begun\n", "notes.txt": "mine", "tokenizer.json": "mine",
    }  # fmt: skip
    (out / "notes.txt").unlink()
    assert steps(train(validate(kept[0]), out=out)) == [2, 4]

    checkpoint = copied(kept, tmp_path).checkpoints[-1]
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(CheckpointError, match="is a checkpoint, not a run's folder; give another --out"):
        train(validate(kept[0]), out=checkpoint)
    assert sorted(checkpoint.rglob("*")) == before


def test_a_damaged_checkpoint_does_not_drive_out_whole_ones(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Of the newest one that is kept: a damaged one of a later step is none."""
    raw = copy.deepcopy(kept[0])
    raw["train"] |= {"max_steps": 3, "checkpoint_every": 1, "keep": {"last": 1, "best": False}}
    run = copied(kept, tmp_path)
    (run.checkpoints[-1] / "state.json").unlink()
    train(validate(raw), out=run.folder)
    assert steps(run) == [3]
    verify(run.checkpoints[0])


@pytest.mark.parametrize("line", ['{"step": 2, "lo"ss": 1}', "[2]", '{"loss": 1.0}', "\x00"])
def test_a_damaged_row(kept: tuple[dict[str, Any], Path], tmp_path: Path, line: str) -> None:
    """But for the last one, which a kill cuts short."""
    run = copied(kept, tmp_path)
    path = run.folder / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], line, *rows[2:]]) + "\n")
    raw = copy.deepcopy(kept[0])
    raw["train"]["max_steps"] = 5
    with pytest.raises(CheckpointError) as told:
        train(validate(raw), out=run.folder)
    assert str(told.value) == f"{path}:2: is damaged; mend the line, or remove it"
    path.write_text("\n".join([*rows, line]))
    assert [row["step"] for row in train(validate(raw), out=run.folder).metrics] == [1, 2, 3, 4, 5]


def test_what_is_no_checkpoint_of_ours_is_left_alone(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    run = copied(kept, tmp_path)
    names = ["step-x", "past-step-old", "step-", "notes.txt"]
    for name in names:
        (run.folder / "checkpoints" / name).write_text("mine")
    raw = copy.deepcopy(kept[0])
    raw["train"] |= {"max_steps": 6, "keep": {"last": 1, "best": False}}
    assert steps(train(validate(raw), out=run.folder)) == [6]
    assert all((run.folder / "checkpoints" / name).read_text() == "mine" for name in names)


# Pickles


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


PICKLES = [".metadata", "optimizer.pt", "__0_0.distcp", "pytorch_model.bin", "state.pkl", "data.npy"]


def test_no_pickle_is_opened(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    raw = copy.deepcopy(kept[0])
    raw["train"]["max_steps"] = 6
    run, mark = copied(kept, tmp_path), tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it works
    mark.unlink()
    for folder in (run.folder, run.folder / "checkpoints", *run.checkpoints, *(c / WEIGHTS for c in run.checkpoints)):
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
        torch.save(Bomb(mark), folder / "model.pth")
    before = tensors(Run(kept[1]).checkpoints[-1])
    model = load_model(run)
    assert all(torch.equal(tensor, before[f"model.{name}"]) for name, tensor in model.state_dict().items())
    assert train(validate(raw), out=run.folder).metrics[-1]["step"] == 6
    assert train(validate(raw), out=tmp_path / "other", resume=str(run.checkpoints[0])).metrics[-1]["step"] == 6
    assert not mark.exists()


@pytest.mark.parametrize("file", ["random.safetensors", MODEL, OPTIMIZER])
def test_a_pickle_under_the_name_of_tensors_is_not_opened(
    kept: tuple[dict[str, Any], Path], tmp_path: Path, file: str
) -> None:
    """Not even where the manifest was made to fit."""
    run, mark = copied(kept, tmp_path), tmp_path / "unpickled"
    folder = run.checkpoints[-1]
    (folder / file).write_bytes(content := pickle.dumps(Bomb(mark)))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    verify(folder)
    raw = copy.deepcopy(kept[0])
    raw["train"]["max_steps"] = 6
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(validate(raw), out=run.folder)
    assert not mark.exists()


def test_tensors_that_were_added_are_refused(kept: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    run = copied(kept, tmp_path)
    folder = run.checkpoints[-1]
    shutil.copy(folder / MODEL, folder / WEIGHTS / "shard-00002-model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"shard-00002-\S+: was not written with the checkpoint; remove it"):
        load_model(folder)
