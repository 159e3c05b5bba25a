import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from ulmfit_tools.checkpoints import (
    RECORD,
    CheckpointError,
    clean_up,
    delete_folder,
    last_good_checkpoint,
    list_checkpoints,
    resume_problems,
    rotate_checkpoints,
    staging_folder,
    step_of,
    verify,
    whole_folder,
    write_json,
)
from ulmfit_tools.errors import InputError

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def fill(folder: Path, value: float = 1.0) -> None:
    """The files that a Trainer checkpoint needs, small."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((64,), value)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.full((64,), value)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": value}))


def write(run: Path, step: int) -> Path:
    target = run / f"checkpoint-{step}"
    with whole_folder(target) as staging:
        fill(staging, float(step))
        (staging / RECORD).write_text("{}")
    return target


def write_and_fail(run: Path, step: int, error: BaseException) -> None:
    with whole_folder(run / f"checkpoint-{step}", expected_bytes=7_500_000) as staging:
        fill(staging, 9.0)
        raise error


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWriting:
    def test_appears_with_all_files_and_a_manifest(self, tmp_path):
        with whole_folder(tmp_path / "checkpoint-3") as staging:
            assert staging == staging_folder(tmp_path / "checkpoint-3")
            assert names(tmp_path) == [".incomplete-checkpoint-3"]
            (staging / "deep").mkdir()
            (staging / "deep" / "a.bin").write_bytes(b"abc")
        assert names(tmp_path) == ["checkpoint-3"]
        manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
        # SHA-256 of "abc": FIPS 180-2, appendix B.1
        sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert manifest["files"] == {"deep/a.bin": {"size": 3, "sha256": sha256}}
        assert verify(tmp_path / "checkpoint-3") == []

    def test_the_staging_folder_is_no_checkpoint_for_trainer(self, tmp_path):
        with whole_folder(tmp_path / "checkpoint-3"):
            assert get_last_checkpoint(str(tmp_path)) is None
            assert list_checkpoints(tmp_path) == []

    def test_an_error_leaves_nothing_behind_and_the_old_one_in_place(self, tmp_path):
        write(tmp_path, 3)
        with pytest.raises(KeyboardInterrupt):
            write_and_fail(tmp_path, 3, KeyboardInterrupt())
        assert names(tmp_path) == ["checkpoint-3"]
        assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text()) == {"global_step": 3.0}

    def test_replaces_an_older_folder_of_the_same_name(self, tmp_path):
        write(tmp_path, 3)
        with whole_folder(tmp_path / "checkpoint-3") as staging:
            (staging / "new").touch()
        assert names(tmp_path / "checkpoint-3") == ["manifest.json", "new"]
        assert names(tmp_path) == ["checkpoint-3"]

    def test_files_are_synced_before_the_rename_and_the_folder_after(self, tmp_path, monkeypatch):
        events = []
        real_fsync, real_rename = os.fsync, os.rename

        def fsync(handle):
            events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
            real_fsync(handle)

        def rename(source, target):
            events.append("RENAME")
            real_rename(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
        write(tmp_path, 3)
        before, after = events[: events.index("RENAME")], events[events.index("RENAME") + 1 :]
        assert set(FILES) < set(before)
        assert before.index("manifest.json") > max(before.index(name) for name in FILES)
        assert "checkpoint-3" in before
        assert tmp_path.name in after

    def test_json_is_replaced_whole(self, tmp_path):
        write_json(tmp_path / "a.json", {"x": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"x": object()})
        assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def killed_at(moment: int, job) -> bool:
    """Run `job` in a child that dies, as from SIGKILL, before its n-th change to the disk; False if it ends."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os._exit(1)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            job()
            os._exit(0)
        except BaseException:
            os._exit(2)
    status = os.waitpid(child, 0)[1]
    assert os.WEXITSTATUS(status) != 2
    return os.WEXITSTATUS(status) == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
class TestKilledAtEveryMoment:
    """One process is killed before each of its changes to the disk in turn; the next finds whole checkpoints only."""

    def test_writing_the_next_one(self, tmp_path):
        found = self.after_each_kill(tmp_path, lambda run: write(run, 2), before=[1])
        assert found == {(1,), (1, 2)}

    def test_replacing_the_only_one(self, tmp_path):
        found = self.after_each_kill(tmp_path, lambda run: write(run, 1), before=[1])
        assert found == {(1,)}

    def test_rotating(self, tmp_path):
        def rotate(run):
            rotate_checkpoints(run, 1, newest=run / "checkpoint-3")

        found = self.after_each_kill(tmp_path, rotate, before=[1, 2, 3])
        assert found == {(1, 2, 3), (2, 3), (3,)}

    def after_each_kill(self, tmp_path, job, before):
        found, moment = set(), 1
        while True:
            run = tmp_path / str(moment)
            for step in before:
                write(run, step)
            killed = killed_at(moment, lambda run=run: job(run))
            for checkpoint in list_checkpoints(run):  # also before anything is cleaned up
                assert verify(checkpoint) == []
            clean_up(run)
            assert all(name.startswith("checkpoint-") for name in names(run))
            good, skipped = last_good_checkpoint(run)
            assert good is not None
            assert skipped == []
            found.add(tuple(step_of(path) for path in list_checkpoints(run)))
            if not killed:
                return found
            moment += 1


class TestFullDisk:
    """What the three writers of a checkpoint raise when the disk is full, as seen on a full file system."""

    ERRORS = [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_one_line_and_the_last_checkpoint_intact(self, tmp_path, error):
        write(tmp_path, 1)
        with pytest.raises(CheckpointError) as caught:
            write_and_fail(tmp_path, 2, error)
        message = str(caught.value)
        assert isinstance(caught.value, InputError)
        assert "\n" not in message
        assert str(tmp_path / "checkpoint-2") in message
        assert "at least 7.5 MB" in message
        free = shutil.disk_usage(tmp_path).free / 1e6
        assert float(message.split(" MB are free")[0].rsplit(" ", 1)[1]) == pytest.approx(free, rel=0.05)
        assert names(tmp_path) == ["checkpoint-1"]
        assert last_good_checkpoint(tmp_path) == (tmp_path / "checkpoint-1", [])

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    @pytest.mark.parametrize("writer", ["torch", "safetensors", "plain"])
    def test_real_write_errors_are_recognised(self, tmp_path, writer):
        """A limit on the size of a file makes the writers fail in the same places as a full disk does."""
        resource = pytest.importorskip("resource", reason="limits the size of a file, which Windows cannot")
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                with whole_folder(tmp_path / "checkpoint-2") as staging:
                    if writer == "torch":
                        torch.save({"a": torch.zeros(100_000)}, staging / "a.pt")
                    elif writer == "safetensors":
                        save_file({"a": torch.zeros(100_000)}, staging / "a.safetensors")
                    else:
                        (staging / "a").write_bytes(bytes(400_000))
                os._exit(1)
            except CheckpointError:
                os._exit(0)
            except BaseException:
                os._exit(2)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
        assert names(tmp_path) == []

    def test_other_errors_stay_what_they_are(self, tmp_path):
        for error in (PermissionError(errno.EACCES, "Permission denied"), RuntimeError("shapes do not match")):
            with pytest.raises(type(error), match=str(error.args[-1])):
                write_and_fail(tmp_path, 2, error)


class TestVerifying:
    @pytest.mark.parametrize("how", ["missing", "half", "empty", "bit"])
    @pytest.mark.parametrize("name", [*FILES, "manifest.json"])
    def test_any_damage_is_seen_and_the_one_before_taken(self, tmp_path, name, how):
        good, bad = write(tmp_path, 1), write(tmp_path, 2)
        damage(bad / name, how)
        found, [(path, reason)] = last_good_checkpoint(tmp_path)
        assert found == good
        assert path == bad
        if name != "manifest.json":
            assert reason.startswith(name)

    def test_says_what_is_wrong(self, tmp_path):
        folder = write(tmp_path, 1)
        size = (folder / "model.safetensors").stat().st_size
        damage(folder / "model.safetensors", "half")
        damage(folder / "optimizer.pt", "bit")
        damage(folder / "scheduler.pt", "missing")
        assert verify(folder) == [
            f"model.safetensors has {size // 2:,} of {size:,} bytes",
            "optimizer.pt has other content than was written",
            "scheduler.pt is missing",
        ]

    def test_files_put_beside_it_later_do_no_harm(self, tmp_path):
        folder = write(tmp_path, 1)
        (folder / "notes.txt").write_text("mine")
        assert verify(folder) == []

    def test_no_checkpoint_at_all(self, tmp_path):
        assert last_good_checkpoint(tmp_path) == (None, [])
        assert last_good_checkpoint(tmp_path / "nowhere") == (None, [])
        assert resume_problems(tmp_path / "checkpoint-5") == ["there is no such folder"]

    def test_newest_means_the_highest_step_not_the_name(self, tmp_path):
        for step in (9, 100, 20):
            write(tmp_path, step)
        assert [step_of(path) for path in list_checkpoints(tmp_path)] == [9, 20, 100]
        assert last_good_checkpoint(tmp_path)[0].name == "checkpoint-100"

    def test_weights_only_cannot_be_resumed_from(self, tmp_path):
        with whole_folder(tmp_path / "checkpoint-1") as staging:
            fill(staging)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                (staging / name).unlink()
        assert verify(tmp_path / "checkpoint-1") == []
        assert resume_problems(tmp_path / "checkpoint-1") == [
            "optimizer.pt is missing",
            "scheduler.pt is missing",
            "rng_state.pth is missing",
        ]

    def test_step_of_another_folder(self):
        with pytest.raises(InputError, match="Received: runs/best"):
            step_of("runs/best")


class TestWithoutManifest:
    """Checkpoints of a plain Trainer: everything needed is there and opens."""

    def test_accepted_when_whole(self, tmp_path):
        fill(tmp_path / "checkpoint-1")
        assert last_good_checkpoint(tmp_path) == (tmp_path / "checkpoint-1", [])

    @pytest.mark.parametrize("how", ["missing", "half", "empty"])
    @pytest.mark.parametrize("name", FILES)
    def test_the_ten_cases_and_five_empty_ones(self, tmp_path, name, how):
        fill(tmp_path / "checkpoint-1")
        fill(tmp_path / "checkpoint-2")
        damage(tmp_path / "checkpoint-2" / name, how)
        found, skipped = last_good_checkpoint(tmp_path)
        assert found == tmp_path / "checkpoint-1"
        assert name in skipped[0][1]

    def test_a_changed_bit_is_seen_in_pytorch_files_only(self, tmp_path):
        fill(tmp_path / "checkpoint-1")
        path = tmp_path / "checkpoint-1" / "optimizer.pt"
        content = bytearray(path.read_bytes())
        content[content.index(torch.ones(64).numpy().tobytes())] ^= 1
        path.write_bytes(content)
        assert resume_problems(tmp_path / "checkpoint-1") == ["optimizer.pt is damaged"]

    def test_sharded_weights_need_their_shards(self, tmp_path):
        folder = tmp_path / "checkpoint-1"
        fill(folder)
        os.rename(folder / "model.safetensors", folder / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert resume_problems(folder) == ["model.safetensors.index.json is damaged"]
        shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
        assert resume_problems(folder) == []


class TestCleaningUp:
    def test_half_written_folders_go(self, tmp_path):
        write(tmp_path, 1)
        fill(staging_folder(tmp_path / "checkpoint-2"))
        fill(tmp_path / ".deleted-checkpoint-0")
        clean_up(tmp_path)
        assert names(tmp_path) == ["checkpoint-1"]

    def test_a_whole_one_that_was_not_yet_renamed_is(self, tmp_path):
        write(tmp_path, 2)
        staging = staging_folder(tmp_path / "checkpoint-2")
        staging.parent.mkdir()
        os.rename(tmp_path / "checkpoint-2", staging)
        clean_up(tmp_path)
        assert names(tmp_path) == ["checkpoint-2"]
        assert verify(tmp_path / "checkpoint-2") == []

    def test_other_folders_stay(self, tmp_path):
        for name in ("best", ".incomplete-notes", "checkpoint-x"):
            (tmp_path / name).mkdir()
        clean_up(tmp_path)
        clean_up(tmp_path / "nowhere")
        assert names(tmp_path) == [".incomplete-notes", "best", "checkpoint-x"]


class TestRotating:
    def run(self, tmp_path, steps, limit, newest, best=None):
        for step in steps:
            write(tmp_path, step)
        best = None if best is None else tmp_path / f"checkpoint-{best}"
        deleted = rotate_checkpoints(tmp_path, limit, newest=tmp_path / f"checkpoint-{newest}", best=best)
        return [step_of(path) for path in list_checkpoints(tmp_path)], [step_of(path) for path in deleted]

    def test_the_earliest_go(self, tmp_path):
        assert self.run(tmp_path, [8, 9, 10, 11], 2, newest=11) == ([10, 11], [8, 9])

    def test_the_best_stays(self, tmp_path):
        assert self.run(tmp_path, [8, 9, 10, 11], 2, newest=11, best=8) == ([8, 11], [9, 10])

    def test_the_best_stays_beside_the_newest_also_beyond_the_limit(self, tmp_path):
        assert self.run(tmp_path, [8, 9, 10], 1, newest=10, best=8) == ([8, 10], [9])

    def test_a_best_one_elsewhere_counts_for_nothing(self, tmp_path):
        assert self.run(tmp_path, [8, 9, 10], 1, newest=10, best=99) == ([10], [8, 9])

    @pytest.mark.parametrize("limit", [None, 0])
    def test_no_limit(self, tmp_path, limit):
        assert self.run(tmp_path, [8, 9], limit, newest=9) == ([8, 9], [])

    def test_never_the_only_good_one(self, tmp_path):
        """100 and 120 are damaged, so the run went on from 80 and wrote 90; Trainer's order would keep 120 alone."""
        for step in (80, 100, 120):
            write(tmp_path, step)
        damage(tmp_path / "checkpoint-100" / "optimizer.pt", "half")
        damage(tmp_path / "checkpoint-120" / "optimizer.pt", "half")
        assert self.run(tmp_path, [90], 1, newest=90) == ([90], [100, 120, 80])
        assert last_good_checkpoint(tmp_path) == (tmp_path / "checkpoint-90", [])

    def test_deleting_is_a_rename_first(self, tmp_path, monkeypatch):
        folder = write(tmp_path, 1)
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        delete_folder(folder)
        assert names(tmp_path) == [".deleted-checkpoint-1"]
