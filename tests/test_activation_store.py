"""Activations on disk: what is written is read, whole or not at all, once."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ulmfit_tools import activation_store
from ulmfit_tools.activation_store import (
    Entry,
    build,
    cache_size,
    check_room,
    in_use,
    locked,
    remove_cache,
    remove_entry,
)
from ulmfit_tools.errors import InputError
from ulmfit_tools.freeze_boundary import CannotPrecompute
from ulmfit_tools.row_source import content_key

LENGTHS = np.array([3, 1, 4, 1, 5], dtype=np.int32)
WIDTH = 2
NAME, OTHER = "0a" * 16, "0b" * 16  # of folders


def vectors_of(row, lengths=LENGTHS):
    """Row r's vectors: r + i / 8 in both places, exact in every type."""
    return torch.tensor([[row + i / 8] * WIDTH for i in range(lengths[row])])


def compute(rows):
    return [([vectors_of(row) for row in rows], [])]


def entry(folder, dtype="float32"):
    made = Entry(folder / NAME, LENGTHS, WIDTH, dtype)
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(activation_store, "ROWS_IN_A_PART", 2)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_what_is_written_is_read(tmp_path, dtype, size):
    made = entry(tmp_path, dtype)
    assert not made.is_complete
    assert build([made], np.array([4, 2, 0, 1, 3]), compute) == 3  # five rows, two a part
    assert made.is_complete
    assert made.nbytes == (tmp_path / NAME / "activations.bin").stat().st_size == 14 * WIDTH * size
    expected = torch.cat([vectors_of(row) for row in (2, 0, 4)]).to(getattr(torch, dtype))
    again = Entry(tmp_path / NAME, LENGTHS, WIDTH, dtype)
    assert torch.equal(again.fetch([2, 0, 4]), expected)
    assert again.fetch([2]).dtype == getattr(torch, dtype)


def test_rounding_is_that_of_torch(tmp_path):
    values = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    for dtype in ("float16", "bfloat16"):
        made = Entry(tmp_path / dtype, np.ones(5, dtype=np.int32), WIDTH, dtype, has_positions=True)
        made.prepare()
        build([made], np.arange(5), lambda rows: [([values[row : row + 1] for row in rows], [7 - r for r in rows])])
        assert torch.equal(made.fetch(np.array([3, 0])), values[[3, 0]].to(getattr(torch, dtype)))
        assert made.positions.tolist() == [7, 6, 5, 4, 3]


def test_one_pass_makes_several_entries(tmp_path):
    ones = Entry(tmp_path / "ones", np.ones(5, dtype=np.int32), 1, has_positions=True)
    ones.prepare()
    both = [entry(tmp_path), ones]

    def of_both(rows):
        return [*compute(rows), ([torch.tensor([[float(row)]]) for row in rows], [0] * len(rows))]

    build(both, np.arange(5), of_both)
    assert both[0].fetch([1]).tolist() == [[1, 1]]
    assert ones.fetch([4, 1]).tolist() == [[4], [1]]


def test_an_interrupted_build_goes_on_with_what_is_missing(tmp_path):
    made, seen = entry(tmp_path), []

    def dies(rows):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(rows.tolist())
        return compute(rows)

    with pytest.raises(KeyboardInterrupt):
        build([made], np.arange(5), dies)
    assert not made.is_complete
    again, rest = entry(tmp_path), []

    def notes(rows):
        rest.append(rows.tolist())
        return compute(rows)

    build([again], np.arange(5), notes)
    assert (seen, rest) == ([[0, 1]], [[2, 3], [4]])
    assert torch.equal(again.fetch(range(5)), torch.cat([vectors_of(row) for row in range(5)]))


def test_several_processes_share_the_parts(tmp_path):
    """Two builds side by side in threads, with a real barrier between them."""
    barrier, done = threading.Barrier(2), {0: [], 1: []}

    def work(rank):
        def notes(rows):
            done[rank].append(rows.tolist())
            return compute(rows)

        build([made], np.arange(5), notes, rank=rank, world_size=2, barrier=barrier.wait)

    made = entry(tmp_path)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == {0: [[0, 1], [4]], 1: [[2, 3]]}
    assert made.is_complete
    assert torch.equal(made.fetch(range(5)), torch.cat([vectors_of(row) for row in range(5)]))


def test_another_layout_in_the_folder_is_made_anew(tmp_path):
    build([entry(tmp_path)], np.arange(5), compute)
    other = Entry(tmp_path / NAME, LENGTHS, WIDTH, "float16")
    assert not other.is_complete
    other.prepare()
    assert other.missing_parts() == [0, 1, 2]


def test_wrong_shapes_are_not_written(tmp_path):
    made = entry(tmp_path)
    with pytest.raises(ValueError, match="Row 1 has 1 x 2 values"):
        build([made], np.arange(5), lambda rows: [([torch.zeros(3, WIDTH) for _ in rows], [])])
    assert made.missing_parts() == [0, 1, 2]


def test_what_the_type_cannot_hold_is_not_kept(tmp_path):
    """The largest float16 is 65504."""
    made = entry(tmp_path, "float16")
    with pytest.raises(CannotPrecompute, match="for row 1 is not finite in float16"):
        made.write(0, np.array([3, 1]), [torch.full((1, WIDTH), 65504.0), torch.full((1, WIDTH), 1e5)], [])
    assert made.missing_parts() == [0, 1, 2]


def test_what_an_interrupted_build_holds_on_the_disk_is_not_needed_again(tmp_path):
    made = Entry(tmp_path / NAME, np.ones(4, dtype=np.int32), 2**18)  # a MiB a row, two rows a part
    assert made.nbytes_to_come == made.nbytes == 4 * 2**20
    made.prepare()
    assert made.nbytes_to_come == pytest.approx(4 * 2**20, abs=2**16)  # a file system may count blocks of its own
    made.write(1, np.array([2, 3]), [torch.ones(1, 2**18)] * 2, [])
    assert made.nbytes_to_come == pytest.approx(2 * 2**20, abs=2**16)
    made.write(0, np.array([0, 1]), [torch.ones(1, 2**18)] * 2, [])
    assert made.nbytes_to_come == 0


WORKER = """
    import sys, time
    import numpy as np, torch
    from pathlib import Path
    from ulmfit_tools.activation_store import Entry, build, locked
    folder, pause = Path(sys.argv[1]), float(sys.argv[2])
    rows = 1024
    made = Entry(folder / "entry", np.ones(rows, dtype=np.int32), 3, has_positions=True)

    def compute(rows):
        time.sleep(pause)
        print("part", rows[0], flush=True)
        return [([torch.full((1, 3), float(row)) for row in rows], rows)]

    with locked(made.folder, lambda line: print(line, flush=True)):
        if not made.is_complete:
            made.prepare()
            build([made], np.arange(rows), compute)
    print("last", made.fetch([rows - 1]).tolist(), flush=True)
"""


def start(folder, pause):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_killed_in_the_middle_and_two_at_once_it_is_built_once(tmp_path):
    killed = start(tmp_path, 0.2)
    assert killed.stdout.readline() == "part 0\n"
    assert killed.stdout.readline() == "part 256\n"  # so part 0 is on the disk
    killed.kill()
    killed.wait()
    both = [start(tmp_path, 1.5) for _ in range(2)]
    said = sorted((process.communicate()[0].splitlines() for process in both), key=len)
    waited, built = said
    assert len(waited) == 2
    assert "Another run is at work on the same activations" in waited[0]
    assert built[-1] == waited[-1] == "last [[1023.0, 1023.0, 1023.0]]"
    assert [int(line.split()[1]) for line in built[:-1]][-2:] == [512, 768]
    assert "part 0" not in built  # it was there


def test_a_free_lock_is_taken_at_once(tmp_path):
    said = []
    for _ in range(2):
        with locked(tmp_path / "cache" / "entry", said.append):
            pass
    assert said == []


def test_no_room_is_one_line(tmp_path):
    check_room(tmp_path, 1000)
    with pytest.raises(
        InputError, match="The activations need 1,000,000,000,000 MiB, and the disk of .* free"
    ) as error:
        check_room(tmp_path, 10**12 * 2**20)
    assert "\n" not in str(error.value)


def test_removing_takes_entries_and_nothing_else(tmp_path):
    made = entry(tmp_path)
    with locked(made.folder, print):
        build([made], np.arange(5), compute)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert remove_cache(tmp_path) >= made.nbytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert remove_cache(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    "path",
    [
        "corpus/entry.json",  # a store's marker, under another name
        f"{OTHER}/photo.jpg",  # a name like the store's, and something else in it
        f"{OTHER}/images/entry.json",
        f"{OTHER}aa/entry.json",
        OTHER,
    ],
)
def test_removing_leaves_folders_of_others(tmp_path, path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("{}")
    assert cache_size(tmp_path) == (0, 0)
    assert remove_cache(tmp_path) == 0
    assert (tmp_path / path).read_text() == "{}"


def test_what_a_kill_left_half_made_or_half_removed_is_removed(tmp_path):
    made = entry(tmp_path)
    (made.folder / "entry.json").rename(made.folder / ".incomplete-entry.json")
    (tmp_path / OTHER).mkdir()
    left = sum(file.stat().st_size for file in made.folder.iterdir())
    assert cache_size(tmp_path) == (2, left)
    with locked(made.folder):
        assert remove_cache(tmp_path) == 0
    assert remove_cache(tmp_path) == left > made.nbytes
    assert list(tmp_path.iterdir()) == []


def test_removing_leaves_what_is_being_computed_and_says_so(tmp_path, caplog):
    made = entry(tmp_path)
    other = Entry(tmp_path / OTHER, LENGTHS, WIDTH)
    other.prepare()
    sizes = [file.stat().st_size for file in other.folder.iterdir()]
    with locked(made.folder, print):
        assert remove_cache(tmp_path) == sum(sizes) > other.nbytes
        assert "1 of 2 sets of activations are in use and were left" in caplog.text
        build([made], np.arange(5), compute)
    assert made.is_sound()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.lock"]


def test_removing_leaves_what_others_read(tmp_path):
    """Two readers at once do not wait for each other; the entry goes once both are done."""
    made = entry(tmp_path)
    build([made], np.arange(5), compute)
    with in_use([made]):
        with in_use([made, made]):
            assert remove_cache(tmp_path) == 0
        assert remove_cache(tmp_path) == 0
        assert made.is_sound()
    assert remove_cache(tmp_path) >= made.nbytes
    with pytest.raises(CannotPrecompute, match="were removed by another process"), in_use([made]):
        pass


def test_a_lock_that_was_removed_while_another_waited_is_made_again(tmp_path):
    """Else two could hold it: one the file that is gone, one a new file of the same name."""
    folder, waits, held = tmp_path / "entry", threading.Event(), []

    def second():
        with locked(folder, lambda line: waits.set()):
            held.append(remove_entry(folder))  # None: another file handle does not get it

    thread = threading.Thread(target=second)
    with locked(folder, print):
        thread.start()
        assert waits.wait(60)
        folder.with_suffix(".lock").unlink()  # as `remove_entry` does, which holds it
    thread.join(60)
    assert held == [None]


def test_a_complete_entry_is_sound_as_long_as_its_bytes_are_those_that_were_written(tmp_path):
    made = entry(tmp_path)
    assert made.written(np.arange(5)).tolist() == []
    assert not made.is_sound()
    build([made], np.arange(5), compute)
    assert (made.is_complete, made.is_sound()) == (True, True)
    file = tmp_path / NAME / "activations.bin"
    content = file.read_bytes()
    file.write_bytes(content[:50] + b"x" + content[51:])
    assert (made.is_complete, made.is_sound()) == (True, False)
    file.write_bytes(content[:-1])
    assert (made.is_complete, made.is_sound()) == (False, False)
    file.write_bytes(content)
    (tmp_path / NAME / "complete.json").write_text("[]")
    assert (made.is_complete, made.is_sound()) == (False, False)
    made.prepare()  # whoever builds it again has found it wrong
    assert made.missing_parts() == [0, 1, 2]


def test_the_rows_of_the_parts_that_are_written(tmp_path):
    made, order = entry(tmp_path), np.array([4, 2, 0, 1, 3])
    made.write(1, order[2:4], [vectors_of(row) for row in order[2:4]], [])
    assert made.written(order).tolist() == [0, 1]


def test_keys_tell_content_apart():
    tensor = torch.arange(4.0)
    assert content_key(tensor, "a") == content_key(tensor.clone(), "a")
    others = [
        content_key(tensor, "b"), content_key("a", tensor), content_key(tensor.half(), "a"),
        content_key(tensor.view(2, 2), "a"), content_key(tensor, "a", None), content_key(tensor.numpy(), "ab"),
    ]  # fmt: skip
    assert len({content_key(tensor, "a"), *others}) == 7
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})


def anonymous_bytes():
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory figures from Linux's /proc")
def test_memory_stays_flat_while_the_file_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_store, "ROWS_IN_A_PART", 16)
    rows, tokens, width = 1024, 64, 256  # 64 MiB
    made = Entry(tmp_path / "large", np.full(rows, tokens, dtype=np.int32), width)
    made.prepare()
    before = anonymous_bytes()
    peak = [0]

    def measured(part):
        peak[0] = max(peak[0], anonymous_bytes() - before)
        return [([torch.zeros(tokens, width) for _ in part], [])]

    build([made], np.arange(rows), measured)
    for start_row in range(0, rows, 16):
        made.fetch(np.arange(start_row, start_row + 16))
        peak[0] = max(peak[0], anonymous_bytes() - before)
    assert made.nbytes == 64 * 2**20
    assert peak[0] < 8 * 2**20
