"""A manifest of which a byte was flipped is not read: an older version is, and nothing is lost."""

import re
import shutil
import warnings

import pytest
from commands import actctx
from extracted import RESID, Read, Z, batches
from models import bridge

from actctx import DataError
from actctx._extract import writer
from actctx._store.repair import repair
from actctx._store.site_columns import column_name
from actctx._store.versions import manifests
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")

CHANGED = "its manifest has other bytes than were written"
REMEDY = "put a copy of it in its place, or extract it again to another path"


def write(out, names=(Z,), **options):
    return extract(bridge(), batches(6), [*names], out, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Several commits, of a site and one that was added."""
    out = tmp_path_factory.mktemp("written") / "acts.lance"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_COMMIT_BYTES", 5000)
        write(out)
        write(out, [RESID], add=True)
    return out


@pytest.fixture
def out(written, tmp_path):
    return shutil.copytree(written, tmp_path / "acts.lance")


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x40
    file.write_bytes(content)


def newest(out):
    return next(iter(manifests(out).values()))


@pytest.mark.parametrize("part", range(12))
def test_a_flipped_byte_anywhere_in_the_newest_manifest_is_found(out, part):
    file = newest(out)
    wanted = Read(out).table
    flip(file, part * file.stat().st_size // 12)
    with pytest.warns(UserWarning, match=f"is incomplete, as after power loss: {CHANGED}"):
        data = ActivationDataset(out)
    assert data.verify().unchecked == ()
    with pytest.warns(UserWarning, match=CHANGED):
        write(out, [RESID], add=True)
    assert Read(out).table.equals(wanted)
    assert ActivationDataset(out).verify().unchecked == ()


def test_a_flipped_manifest_is_dropped_by_a_repair(out):
    file = newest(out)
    flip(file, file.stat().st_size // 2)
    result = actctx("repair", out)
    assert CHANGED in result.stderr
    assert result.exit_code == 0
    assert not file.exists()
    assert ActivationDataset(out).verify().unchecked == ()


def test_a_version_whose_number_is_used_again_is_read(out):
    file = newest(out)
    file.write_bytes(b"")
    repair(out, dry_run=False)
    lance.dataset(str(out)).delete("position = 1")  # as somebody else may, without a digest
    assert newest(out) == file
    rows = lance.dataset(str(out)).count_rows()
    assert len(ActivationDataset(out)) == rows


def test_sites_that_were_lost_with_newer_versions_are_added_again(out):
    wanted = Read(out).table
    for number, file in manifests(out).items():
        if column_name(RESID) in lance.dataset(str(out), version=number).schema.names:
            file.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as caught:
            write(out, [Z, RESID])
        assert str(caught.value) == (
            f"cannot resume '{out}': its list of sites is ['{Z}'], not ['{Z}', '{RESID}']; "
            "give the same, and add the others afterwards with add=True, or another path"
        )
        write(out)
        write(out, [RESID], add=True)
    assert Read(out).table.equals(wanted)


@pytest.mark.parametrize("data", [True, False])
def test_a_data_set_without_a_manifest_is_told_of(out, data):
    for file in manifests(out).values():
        file.unlink()
    if not data:
        shutil.rmtree(out / "data")
    said = f"the data set at '{out}' cannot be read: it has no manifest; {REMEDY}"
    with pytest.raises(DataError, match=f"^{re.escape(said)}$"):
        ActivationDataset(out)
    assert actctx("repair", out).stderr == f"error: {said}\n"
