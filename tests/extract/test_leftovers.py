"""What a killed writer leaves is deleted by the next one, and nothing else is."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
from extracted import TESTS
from safetensors.torch import load_file
from stored import Z, write

from actctx import DataError, capture
from actctx._files import room_beside, written_beside
from actctx.dataset import ActivationDataset
from actctx.extract import extract

pytestmark = pytest.mark.thorough

RESID = "blocks.1.hook_resid_post"

if sys.platform == "win32":
    pytest.skip("a process is forked for each kill", allow_module_level=True)

# Children of one process, each killed at another of the calls by which it changes the disk; behind
# each comes the same call, unbroken.
CHILD = f"""
import os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import Mlp
from safetensors.torch import load_file
from actctx import capture
from actctx.dataset import ActivationDataset

folder, kind = Path(sys.argv[1]), sys.argv[2]
out = folder / "out"
if kind != "save":
    import datasets, lance
    from datasets import load_from_disk
CHANGES = {{"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}}
seen, last = 0, None

def changes(event, args):
    if event in CHANGES:
        return True
    return event == "open" and isinstance(args[2], int) and bool(args[2] & os.O_CREAT)

def watch(event, args):
    global seen
    if last is not None and changes(event, args):
        seen += 1
        if seen > last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)

model = Mlp()
with capture(model, "block") as acts:
    model(torch.ones(1, 2).long())
acts.save(folder / "first")  # what it imports is not imported by every child
(folder / "first").unlink()

def whole(out):
    if kind in ("save", "to_safetensors"):
        return bool(load_file(out))
    return len(load_from_disk(out) if kind == "to_saelens" else ActivationDataset(out)) > 0

WRITERS = {{
    "save": lambda: acts.save(folder / "out"),
    "to_safetensors": lambda: ActivationDataset(folder / "a.lance").to_safetensors(folder / "out"),
    "to_saelens": lambda: ActivationDataset(folder / "a.lance", sites={Z!r}).to_saelens(
        folder / "out", context=10
    ),
    "from_saelens": lambda: ActivationDataset.from_saelens(folder / "cached", folder / "out"),
}}

def forked(do):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os._exit(not do())
    except BaseException as error:
        sys.stderr.write(str(error))
    os._exit(2)

def run(killed_at):
    global last
    last = killed_at
    WRITERS[kind]()
    last = None
    return True

def here():
    return {{each.name for each in folder.iterdir()}}

before, kills, left = here(), 0, set()
while (code := forked(lambda: run(kills))) == -signal.SIGKILL:
    left |= here() - before - {{"out"}}
    is_there = out.exists()
    assert not is_there or forked(lambda: whole(out)) == 0, "half of it"
    again = forked(lambda: run(None))
    assert again == (2 if is_there and kind != "save" else 0), again
    assert here() == {{*before, "out"}}, here()
    assert forked(lambda: whole(out)) == 0, "not whole"
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    kills += 1
assert code == 0, code
print(kills, len(left))
"""


@pytest.fixture
def acts(mlp, ids):
    with capture(mlp, "block") as acts:
        mlp(ids)
    return acts


def check_kills(folder, kind, *, least):
    """Kill a writer at each of its steps; what it leaves is whole, or gone with the next call."""
    run = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), kind]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, left = map(int, done.stdout.split())
    assert kills >= left >= least  # or nothing was tested


@pytest.mark.thorough
def test_a_killed_save_leaves_nothing_behind_the_next_one(tmp_path):
    check_kills(tmp_path, "save", least=5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["to_safetensors", "to_saelens", "from_saelens"])
def test_a_killed_conversion_leaves_nothing_behind_the_next_one(tmp_path, kind):
    pytest.importorskip("datasets")
    write(tmp_path / "a.lance", 40)
    data = ActivationDataset(tmp_path / "a.lance", sites=Z)
    data.to_saelens(tmp_path / "cached", context=10)
    check_kills(tmp_path, kind, least=5)


def test_an_extraction_clears_what_lies_beside_it(gpt2, ids, tmp_path):
    room = leave_a_room(tmp_path / "out")
    extract(gpt2, ids, RESID, tmp_path / "acts.lance", progress=False)
    assert not room.exists()


def test_an_extraction_clears_what_an_addition_left_that_was_done(gpt2, ids, tmp_path):
    out, done = tmp_path / "acts.lance", tmp_path / "acts.lance.adding.done"
    begun = tmp_path / "acts.lance.adding"
    extract(gpt2, ids, RESID, out, progress=False)
    extract(gpt2, ids, RESID, done, progress=False)
    begun.mkdir()
    (begun / "writing.lock").touch()
    extract(gpt2, ids, RESID, out, progress=False)
    assert [each.name for each in tmp_path.iterdir()] == ["acts.lance"]


def test_an_extraction_leaves_alone_what_is_no_addition(gpt2, ids, tmp_path):
    for name in ("acts.lance.adding", "acts.lance.adding.done"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    for _ in range(2):
        extract(gpt2, ids, RESID, tmp_path / "acts.lance", progress=False)
    assert len([*tmp_path.glob("*/file")]) == 2


def test_an_extraction_that_has_nothing_to_write_deletes_what_a_killed_one_left(
    gpt2, ids, tmp_path
):
    out = tmp_path / "acts.lance"
    with pytest.raises(ConnectionError):
        extract(gpt2, broken(ids), RESID, out, progress=False)
    orphan = out / "data" / "orphan.lance"
    shutil.copyfile(next((out / "data").iterdir()), orphan)
    assert extract(gpt2, [ids], RESID, out, progress=False).new_rows == 0
    assert not orphan.exists()
    assert ActivationDataset(out).layout.finished


def broken(ids):
    yield ids
    raise ConnectionError


def leave_a_room(path):
    """Leave what a killed writer would leave."""
    with room_beside(path) as held:
        left = path.with_name("out.0123456789ab.partial")
        shutil.copytree(held.parent, left)
    return left


def test_what_a_killed_writer_left_of_another_file_is_cleared_as_well(acts, tmp_path):
    room = leave_a_room(tmp_path / "out")
    acts.save(tmp_path / "another")
    assert not room.exists()


def test_what_a_running_writer_holds_is_left_alone(acts, tmp_path):
    with written_beside(tmp_path / "mine") as partial:
        partial.write_text("half")
        acts.save(tmp_path / "acts")
        assert partial.read_text() == "half"
        partial.write_text("whole")
    assert (tmp_path / "mine").read_text() == "whole"
    assert {each.name for each in tmp_path.iterdir()} == {"mine", "acts"}


def test_what_is_a_users_own_is_left_alone(acts, tmp_path):
    (tmp_path / "acts.partial").write_text("mine")
    (tmp_path / "acts.0123456789ab.partial").write_text("mine")
    (tmp_path / "dir.0123456789ab.partial").mkdir()
    (tmp_path / "dir.0123456789ab.partial" / "file").write_text("mine")
    odd = leave_a_room(tmp_path / "acts")
    (odd / "file").write_text("mine")
    (tmp_path / "link.0123456789ab.partial").symlink_to(odd)
    before = {each: each.is_file() and each.read_text() for each in tmp_path.rglob("*")}
    acts.save(tmp_path / "acts")
    (tmp_path / "acts").unlink()
    assert {each: each.is_file() and each.read_text() for each in tmp_path.rglob("*")} == before


def test_a_file_has_the_mode_that_the_system_gives_or_the_one_that_it_had(acts, tmp_path):
    (tmp_path / "plain").touch()
    acts.save(tmp_path / "acts")
    assert (tmp_path / "acts").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "acts").chmod(0o640)
    acts.save(tmp_path / "acts")
    assert stat.S_IMODE((tmp_path / "acts").stat().st_mode) == 0o640


def test_a_file_that_a_link_leads_to_is_replaced_and_the_link_stays(acts, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "acts").symlink_to(tmp_path / "far" / "acts")
    acts.save(tmp_path / "acts")
    assert (tmp_path / "acts").is_symlink()
    assert [*load_file(tmp_path / "far" / "acts")] == ["block"]


def test_a_pipe_is_not_replaced_by_a_file(acts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError) as caught:
        acts.save(tmp_path / "pipe")
    assert str(caught.value) == (
        f"cannot write to '{tmp_path / 'pipe'}': it is a device or a pipe; give the path of a file"
    )


def test_a_name_as_long_as_the_system_takes_can_be_written_to(acts, tmp_path):
    acts.save(tmp_path / ("é" * 127))
    assert [len(each.name) for each in tmp_path.iterdir()] == [127]
