"""Extractions that are killed, interrupted or fail: what came is kept, and they are resumed."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from extracted import RESID, TESTS, Read, Z, batches, refusal, same
from models import bridge
from resumed import BATCHES, child, unbroken

from actctx import DataError
from actctx.dataset import ActivationDataset
from actctx.extract import extract


@pytest.fixture
def commits(monkeypatch):
    """Commit every few rows."""
    monkeypatch.setattr("actctx._extract.writer._COMMIT_BYTES", 5000)


def killed_at(out, seconds, commits):
    """Kill an extraction so many seconds after as many commits, and tell whether it had ended."""
    process = child(out)
    assert process.stdout.readline() == "begun\n"
    for _ in range(commits):
        process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return "ended" in process.communicate()[0]


def check_kills(tmp_path, seed, kills):
    out, draw = tmp_path / "acts.lance", random.Random(seed)  # noqa: S311
    wanted = unbroken(tmp_path / "whole.lance")
    counts = []
    for number in range(kills):
        if killed_at(out, draw.uniform(0, 0.1), commits=number):
            break
        if (out / "_versions").is_dir() and [*(out / "_versions").glob("*.manifest")]:
            read = Read(out)
            counts.append(len(read))
            rows = wanted.table.slice(0, len(read))
            assert read.table.equals(rows.cast(read.table.schema))
    assert counts == sorted(counts)
    assert any(0 < count < len(wanted) for count in counts)
    unbroken(out)
    assert same(Read(out), wanted)
    assert not any(name.suffix != ".lance" for name in (out / "data").iterdir())
    assert ActivationDataset(out).verify().unchecked == ()
    return counts


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
def test_what_was_killed_is_whole_and_goes_on_where_it_ended(tmp_path, seed):
    check_kills(tmp_path, seed, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 184))
def test_what_was_killed_again_and_again_is_whole(tmp_path, seed):
    check_kills(tmp_path, seed, kills=6)


def test_what_a_killed_writer_left_over_is_deleted(out):
    unbroken(out, 2)
    (out / "data" / "0000.lance").write_bytes(b"half")
    unbroken(out, 4)
    assert not (out / "data" / "0000.lance").exists()


def test_a_data_set_that_was_killed_while_it_was_made_is_made_anew(out):
    (out / "_transactions").mkdir(parents=True)
    (out / "writing.lock").touch()
    assert len(unbroken(out, 2)) == 60


@pytest.mark.usefixtures("commits")
def test_an_exception_in_the_iterator_reaches_the_caller_and_keeps_what_came(tmp_path):
    class Broken(Exception):
        pass

    def breaks():
        yield from batches(7)
        raise Broken

    out = tmp_path / "acts.lance"
    with pytest.raises(Broken):
        extract(bridge(), breaks(), [RESID, Z], out, drop={"position": [0]})
    read = Read(out)
    assert len(read) == 7 * 30
    assert not read.layout.finished
    unbroken(out)
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))


@pytest.mark.usefixtures("commits")
def test_an_exception_in_the_model_reaches_the_caller_and_keeps_what_came(tmp_path):
    out, model, ran = tmp_path / "acts.lance", bridge(), []

    def break_at_last(*_):
        ran.append(1)
        if len(ran) == 8:
            raise ZeroDivisionError

    hook = model.register_forward_pre_hook(break_at_last)
    with pytest.raises(ZeroDivisionError):
        extract(model, batches(), [RESID, Z], out, drop={"position": [0]})
    hook.remove()
    assert len(Read(out)) == 7 * 30
    extract(model, batches(), [RESID, Z], out, drop={"position": [0]})
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))


def test_an_interrupt_keeps_what_came(out):
    def interrupted():
        yield from batches(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(bridge(), interrupted(), [RESID, Z], out, drop={"position": [0]})
    assert len(Read(out)) == 90


INTERRUPTED = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx._extract import writer
from actctx.extract import extract

append, model = writer.Contents.append, bridge()

def slow(self, batches):
    print("committing", flush=True)
    sys.stdin.readline()
    append(self, batches)

def run():
    batches = [tokens(5, 7, seed) for seed in range(6)]
    return extract(model, batches, {[RESID, Z]!r}, sys.argv[1], drop={{"position": [0]}})

writer.Contents.append = slow
try:
    run()
except KeyboardInterrupt:
    print("interrupted", flush=True)
writer.Contents.append = append
run()
time.sleep(1)  # for what would still be written
"""


@pytest.mark.thorough
def test_after_an_interrupt_of_a_commit_the_same_process_goes_on(tmp_path):
    out = tmp_path / "acts.lance"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "committing\n"
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # the commit ends only then
    assert process.communicate("\n")[0] == "interrupted\n"
    assert process.returncode == 0
    assert same(Read(out), unbroken(tmp_path / "whole.lance", 6))


@pytest.mark.parametrize("step", ["update_schema_metadata", "cleanup_old_versions"])
def test_a_disk_that_is_full_between_commits_is_told_of(out, monkeypatch, step):
    unbroken(out, 2)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"lance.LanceDataset.{step}", fails)
        message = refusal(DataError, bridge(), batches(3), [RESID, Z], out, drop={"position": [0]})
    assert message == (
        f"cannot write to '{out}': {os.strerror(errno.ENOSPC)}; 60 rows are on disk, and running "
        "it again resumes after them"
    )
    assert len(unbroken(out, 3)) == 90


@pytest.mark.thorough
def test_two_writers_at_once_are_refused(tmp_path):
    out = tmp_path / "acts.lance"
    process = child(out)
    assert process.stdout.readline() == "begun\n"
    message = refusal(DataError, bridge(), batches(), [RESID, Z], out, drop={"position": [0]})
    assert message == (
        f"'{out}' is being written to by another extraction; wait until it has ended, or give "
        "another path"
    )
    assert process.communicate()[0].endswith("ended\n")
    assert process.returncode == 0
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))


FULL = f"""
import resource, sys
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx._extract import writer
from actctx.extract import extract
writer._COMMIT_BYTES = 20_000
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))

def batches():
    for seed in range(20):
        yield tokens(5, 7, seed)
    writer._COMMIT_BYTES = 10_000_000
    for seed in range(20, {BATCHES}):
        yield tokens(5, 7, seed)

extract(bridge(), batches(), {[RESID, Z]!r}, sys.argv[1], drop={{"position": [0]}})
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    out = tmp_path / "acts.lance"
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stderr
    rows = len(Read(out))
    assert rows
    assert f"DataError: cannot write to '{out}': " in run.stderr
    assert f"{rows} rows are on disk, and running it again resumes after them" in run.stderr
    unbroken(out)
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))
