"""Two writers of one data set: the second is refused, whatever became of the lock."""

import errno
import os
import threading

import pytest
from extracted import RESID, Z, refusal
from models import bridge, tokens

from actctx import DataError
from actctx._extract import writer
from actctx._store.destination import Destination
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")

BATCHES = 8


@pytest.fixture(autouse=True)
def commits(monkeypatch):
    """Commit every few rows."""
    monkeypatch.setattr(writer, "_COMMIT_BYTES", 5000)


def batches(count=BATCHES):
    return [tokens(5, 7, seed) for seed in range(count)]


def check_whole(out):
    extract(bridge(), batches(), [RESID, Z], out)
    data = ActivationDataset(out)
    wanted = [token for batch in batches() for token in batch.flatten().tolist()]
    assert data.tokens.tolist() == wanted
    assert data.verify().unchecked == ()


def broken_into(out, meanwhile):
    """Extract, and after two batches let somebody else do something, once they are on disk."""
    rows = []

    def interrupted():
        yield from batches()[:2]
        while not rows or rows[-1] < 70:
            is_there = any(out.glob("_versions/*.manifest"))
            rows.append(lance.dataset(str(out)).count_rows() if is_there else 0)
        meanwhile()
        yield from batches()[2:]

    with pytest.raises(DataError) as caught:
        extract(bridge(), interrupted(), [RESID, Z], out)
    return str(caught.value)


def test_a_second_writer_that_took_the_lock_away_doubles_no_rows(out):
    def second():
        (out / "writing.lock").unlink()
        extract(bridge(), batches()[:4], [RESID, Z], out)

    message = broken_into(out, second)
    assert message.startswith(f"'{out}' was written to by another process: its newest version is ")
    assert message.endswith(
        ", of 70 rows, so nothing more is added; let one writer end, then the same call resumes "
        "after the rows on disk"
    )
    assert len(ActivationDataset(out)) == 140
    check_whole(out)


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_that_is_said_and_no_row_is_doubled(out, monkeypatch, error):
    def acquire(*_, **__):
        raise error if isinstance(error, Exception) else OSError(error, os.strerror(error))

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    said = f"'{out}' is on a file system without locks, so a second writer is noticed only"
    with pytest.warns(UserWarning, match=said):
        message = broken_into(out, lambda: extract(bridge(), batches()[:4], [RESID, Z], out))
    assert "was written to by another process" in message
    with pytest.warns(UserWarning, match=said):
        check_whole(out)


def test_a_commit_of_somebody_else_ends_the_writer_before_its_own(out):
    message = broken_into(out, lambda: lance.dataset(str(out)).update_config({"mine": "1"}))
    assert "was written to by another process" in message
    check_whole(out)


def test_two_writers_that_commit_at_once_add_rows_once(out, monkeypatch):
    extract(bridge(), batches()[:2], [RESID, Z], out)
    monkeypatch.setattr("actctx._store.destination._locked", lambda _: None)
    started, ended = threading.Barrier(2), []

    def write():
        destination = Destination(out)
        contents = destination.contents
        table = lance.dataset(str(out)).to_table().slice(0, 35)
        started.wait()
        try:
            contents.append(iter(table.cast(contents.schema).to_batches()))
        except DataError as error:
            ended.append(str(error))
        finally:
            destination.release()

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ActivationDataset(out)) == 105
    assert len(ended) <= 1  # at the very same moment, the later one replaces the other


def test_columns_are_not_added_beside_another_writer(out):
    extract(bridge(), batches(), [RESID], out)

    def second():
        (out / "writing.lock").unlink()
        extract(bridge(), [*batches(), *batches(1)], [RESID], out)

    def interrupted():
        yield from batches()[:2]
        second()
        yield from batches()[2:]

    with pytest.raises(DataError) as caught:
        extract(bridge(), interrupted(), [Z], out, add=True)
    assert "was written to by another process" in str(caught.value)
    assert [*ActivationDataset(out).sites] == [RESID]


def test_a_lock_that_is_held_is_refused(out):
    destination = Destination(out)
    try:
        message = refusal(DataError, bridge(), batches(), RESID, out)
    finally:
        destination.release()
    assert "is being written to by another extraction" in message
