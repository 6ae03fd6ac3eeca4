"""What lies where a data set is to be written: it is resumed, or left as it is."""

import errno
import os
from pathlib import Path

import pytest
from extracted import RESID, Read, Z, batches, refusal
from models import bridge
from resumed import unbroken

from actctx import DataError

lance = pytest.importorskip("lance")


def test_a_damaged_manifest_is_told_of(out):
    unbroken(out, 2)
    for manifest in (out / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"")
    message = refusal(DataError, bridge(), batches(3), [RESID, Z], out)
    assert message.startswith(f"the data set at '{out}' cannot be read: ")
    assert message.endswith("; put a copy of it in its place, or extract it again to another path")


def test_a_data_set_is_gone_on_with_only_where_that_is_asked_for(out):
    unbroken(out, 3)
    message = refusal(
        DataError, bridge(), batches(), [RESID, Z], out, drop={"position": [0]}, resume=False
    )
    assert message == f"'{out}' exists; give resume=True to resume it, or another path"


def test_a_file_in_its_place_is_refused(out):
    out.write_text("mine")
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"'{out}' is a file, not a data set of actctx; give another path, or remove it"
    )
    assert out.read_text() == "mine"


def test_a_directory_of_other_things_is_refused(out):
    out.mkdir()
    (out / "notes.txt").touch()
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"'{out}' is a directory with other content, not a data set of actctx; give another path, "
        "or remove it"
    )
    assert [each.name for each in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("lock", [False, True])
def test_a_data_set_within_a_directory_of_other_things_stays_whole(out, lock):
    inner = out / "data" / "mine.lance"
    inner.parent.mkdir(parents=True)
    if lock:
        (out / "writing.lock").touch()
    unbroken(inner, 2)
    before = {each.name for each in inner.rglob("*")}
    for _ in range(2):
        assert refusal(DataError, bridge(), batches(), RESID, out) == (
            f"'{out}' is a directory with other content, not a data set of actctx; give another "
            "path, or remove it"
        )
    assert {each.name for each in inner.rglob("*")} == before
    assert len(Read(inner)) == 60


@pytest.mark.parametrize("name", ["_versions", "_transactions", "_indices"])
def test_a_directory_without_the_lock_was_not_begun(out, name):
    (out / name).mkdir(parents=True)
    message = refusal(DataError, bridge(), batches(), RESID, out)
    assert message.startswith(f"'{out}' is a directory with other content")
    assert [each.name for each in out.iterdir()] == [name]


def test_what_could_not_be_made_is_made_later(out, monkeypatch):
    def fails(*_, **__):
        (out / "_versions").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("lance.write_dataset", fails)
        refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert len(unbroken(out, 2)) == 60


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._acts.lance"])
def test_what_file_managers_leave_does_not_matter(out, name):
    out.mkdir()
    (out / name).touch()
    assert len(unbroken(out, 2)) == 60


def test_other_files_in_a_data_set_do_not_matter(out):
    unbroken(out, 2)
    (out / "notes.txt").touch()
    assert len(unbroken(out, 3)) == 90
    assert (out / "notes.txt").exists()


def test_a_dataset_of_others_is_refused(out):
    import pyarrow as pa

    lance.write_dataset(pa.table({"x": [1]}), str(out))
    there = {each.name for each in out.iterdir()}
    message = refusal(DataError, bridge(), batches(), RESID, out)
    assert message.startswith(f"'{out}' is a Lance dataset, but not one of actctx")
    assert {each.name for each in out.iterdir()} == there


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    out = tmp_path / "missing" / "acts.lance"
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"cannot write to '{out}': {os.strerror(errno.ENOENT)}; make the directory '{out.parent}' "
        "first"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written_to_is_named(out, monkeypatch, number):
    def fails(self, **_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", fails)
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"cannot write to '{out}': {os.strerror(number)}; give another path"
    )
