"""An extraction that ended early is resumed at the row where it ended."""

import errno
import os
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from extracted import RESID, Read, Z, batches, refusal, same, sequences
from models import bridge, tokens
from resumed import BATCHES, unbroken

from actctx import DataError
from actctx._extract.writer import commit_seconds
from actctx._store.contents import Contents
from actctx.extract import extract

lance = pytest.importorskip("lance")


def test_what_is_on_disk_is_not_run_again(out):
    unbroken(out, 4)
    model, ran = bridge(), []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    done = extract(model, batches(6), [RESID, Z], out, drop={"position": [0]})
    hook.remove()
    assert (done.new_rows, len(ran)) == (60, 2)


@pytest.mark.parametrize("first", [1, 29, 30, 31, 100])
def test_a_larger_number_of_tokens_goes_on_within_a_batch(tmp_path, first):
    out = tmp_path / "acts.lance"
    unbroken(out, max_tokens=first)
    unbroken(out, max_tokens=200)
    assert same(Read(out), unbroken(tmp_path / "whole.lance", max_tokens=200))


def test_a_finished_data_set_is_left_as_it_is(out):
    unbroken(out, 3)
    before = lance.dataset(str(out)).count_rows()
    done = extract(bridge(), batches(3), [RESID, Z], out, drop={"position": [0]})
    assert (done.rows, done.new_rows) == (before, 0)
    assert Read(out).layout.finished


def test_a_finished_data_set_that_does_not_grow_gets_no_new_version(out):
    unbroken(out, 3)
    before = lance.dataset(str(out)).version
    unbroken(out, 3)
    refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert lance.dataset(str(out)).version == before
    assert Read(out).layout.finished


def test_a_finished_data_set_grows_with_its_input(tmp_path):
    out = tmp_path / "acts.lance"
    unbroken(out, 2)
    unbroken(out, 3, max_tokens=70)
    assert Read(out).layout.finished
    unbroken(out, 5)
    assert same(Read(out), unbroken(tmp_path / "whole.lance", 5))


def killed_before_the_note(out, monkeypatch):
    """Reach the number of tokens, but not the note of it."""

    def dies(*_, finished):
        if finished:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("actctx._store.contents.Contents.record_finished", dies)
        with pytest.raises(KeyboardInterrupt):
            unbroken(out, 3, max_tokens=70)
    assert (len(Read(out)), Read(out).layout.finished) == (70, False)


def test_what_has_all_its_tokens_is_finished_later(out, monkeypatch):
    killed_before_the_note(out, monkeypatch)
    unbroken(out, 3, max_tokens=70)
    assert Read(out).layout.finished


def test_what_has_all_its_tokens_refuses_another_input(out, monkeypatch):
    killed_before_the_note(out, monkeypatch)
    options = {"drop": {"position": [0]}, "max_tokens": 70}
    message = refusal(DataError, bridge(), batches(6)[3:], [RESID, Z], out, **options)
    assert message.startswith("the rows on disk came from another input: row 0 is token ")


def whole_and_in_parts(path, data, **options):
    """Extract with a batch size, and with another that is gone on with; return the rows of both."""
    whole, out = path / "whole.lance", path / "acts.lance"
    extract(bridge(), data, RESID, whole, batch_size=8, **options)
    extract(bridge(), data, RESID, out, batch_size=8, max_tokens=13, **options)
    assert Read(whole).layout.input["batch_size"] == 8
    return Read(whole), out


@pytest.mark.thorough
@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (tokens(30), {}),
        (tokens(30).numpy(), {}),
        (sequences(), {"pack": True, "context": 4}),
        (sequences(), {}),
        (sequences(), {"pool": "mean"}),
    ],
)
def test_another_batch_size_goes_on_in_the_same_order(tmp_path, monkeypatch, data, options, size):
    monkeypatch.setattr("actctx._extract.inputs._WINDOW", 2)
    wanted, out = whole_and_in_parts(tmp_path, data, **options)
    model, ran = bridge(), []
    hook = model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    # Batches of a sorted order are run in parts, but never joined.
    is_same = size > 8 and isinstance(data, list) and "pack" not in options
    with nullcontext() if is_same else pytest.warns(UserWarning, match="only up to rounding"):
        extract(model, data, RESID, out, batch_size=size, **options)
    hook.remove()
    read = Read(out)
    columns = ["token", "sequence", "position", "_input"]
    assert read.table.select(columns).equals(wanted.table.select(columns))
    torch.testing.assert_close(read[RESID], wanted[RESID], atol=1e-5, rtol=0)
    assert max(ran) <= size


def test_sites_are_added_with_another_batch_size(tmp_path):
    wanted, out = whole_and_in_parts(tmp_path, sequences())
    extract(bridge(), sequences(), Z, out, batch_size=3, add=True)
    with pytest.warns(UserWarning, match="only up to rounding"):
        extract(bridge(), sequences(), [RESID, Z], out, batch_size=5)
    assert Read(out)["sequence"] == wanted["sequence"]


@pytest.mark.parametrize("names", [RESID, [Z]])
def test_what_has_no_rows_fixes_nothing(out, tmp_path, monkeypatch, names):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("actctx._store.contents.Contents.append", fails)
        refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert len(Read(out)) == 0
    options = {"drop": {"token": [0]}, "dtype": torch.bfloat16}
    extract(bridge(), batches(2), names, out, **options)
    extract(bridge(), batches(2), names, tmp_path / "whole.lance", **options)
    assert same(Read(out), Read(tmp_path / "whole.lance"))


# While it is written.


def test_who_opened_a_data_set_can_read_it_while_it_grows(out):
    unbroken(out, 2)
    opened = lance.dataset(str(out))
    unbroken(out, 3)
    unbroken(out, 4)
    assert lance.dataset(str(out), version=opened.version).to_table().num_rows == 60


@pytest.mark.thorough
def test_versions_that_were_replaced_long_ago_are_deleted_but_tagged_ones(out, monkeypatch):
    unbroken(out, 2)
    first = lance.dataset(str(out)).version
    lance.dataset(str(out)).tags.create("begun", 1)
    time.sleep(1.1)  # what is about as old as what is kept is kept, too
    unbroken(out, 3)
    second = lance.dataset(str(out)).version
    time.sleep(1.1)
    monkeypatch.setattr("actctx._store.contents._KEPT", timedelta(seconds=1))
    unbroken(out, 4)
    kept = [version["version"] for version in lance.dataset(str(out)).versions()]
    assert first not in kept
    assert second in kept
    assert lance.dataset(str(out), version="begun").count_rows() == 0


def test_rows_are_committed_while_the_input_stalls(out, monkeypatch):
    monkeypatch.setattr("actctx._extract.writer._COMMIT_SECONDS", 0.2)
    found = []

    def stalls():
        yield from batches(3)
        end = time.monotonic() + 30
        while time.monotonic() < end and found[-1:] != [90]:
            time.sleep(0.05)
            if [*out.glob("_versions/*.manifest")]:
                found.append(lance.dataset(str(out)).count_rows())
        yield from batches(4)[3:]

    extract(bridge(), stalls(), [RESID, Z], out, drop={"position": [0]})
    assert found[-1] == 90
    assert len(Read(out)) == 120


@pytest.mark.parametrize(("elapsed", "wanted"), [(0.0, 60.0), (6e3, 60.0), (6e5, 6e3)])
def test_commits_are_fewer_the_longer_it_takes(elapsed, wanted):
    assert commit_seconds(elapsed) == wanted


def test_a_slow_writer_holds_the_iterator_back(out, monkeypatch):
    append, read, seen = Contents.append, [], []

    def slow(self, rows):
        while not seen or len(read) > seen[-1]:
            seen.append(len(read))
            time.sleep(0.3)
        append(self, rows)

    def counted():
        for batch in batches():
            read.append(batch)
            yield batch

    monkeypatch.setattr(Contents, "append", slow)
    extract(bridge(), counted(), [RESID, Z], out)
    assert max(seen) <= 12  # 4 and 4 that wait, and those that are being read, run and written
    assert len(Read(out)) == BATCHES * 35
