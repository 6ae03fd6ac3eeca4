"""More sites for the rows of a data set that is there."""

import pytest
import torch
from models import bridge
from test_extract import RESID, Read, Z, refusal
from test_resume import batches

from actctx import DataError
from actctx.extract import extract

lance = pytest.importorskip("lance")

DROP = {"position": [0]}
MLP = "blocks.0.hook_mlp_out"


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "acts.lance"
    extract(bridge(), batches(6), RESID, path, drop=DROP)
    return path


def check(out, tmp_path, dtype=None):
    read = Read(out)
    extract(bridge(), batches(6), [Z, MLP], tmp_path / "alone.lance", drop=DROP, dtype=dtype)
    alone = Read(tmp_path / "alone.lance")
    assert [site.name for site in read.layout.sites] == [RESID, Z, MLP]
    assert torch.equal(read[Z], alone[Z])
    assert torch.equal(read[MLP], alone[MLP])
    assert not (tmp_path / "acts.lance.adding").exists()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_sites_are_added_to_the_rows_that_are_there(out, tmp_path, dtype):
    before = {file.name for file in (out / "data").iterdir()}
    was = Read(out)[RESID]
    done = extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True, dtype=dtype)
    assert (done.rows, done.new_rows) == (180, 0)
    assert before < {file.name for file in (out / "data").iterdir()}
    assert torch.equal(Read(out)[RESID], was)
    check(out, tmp_path, dtype)


def test_adding_that_broke_goes_on(out, tmp_path):
    def breaks():
        yield from batches(3)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        extract(bridge(), breaks(), [Z, MLP], out, drop=DROP, add=True)
    assert [site.name for site in Read(out).layout.sites] == [RESID]
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


@pytest.mark.parametrize(
    "where",
    [
        "lance.LanceDataset.add_columns",
        "lance.LanceDataset.update_schema_metadata",
        "actctx._adding.shutil.rmtree",
    ],
)
def test_adding_that_ended_between_its_steps_goes_on(out, tmp_path, monkeypatch, where):
    extract(bridge(), batches(6), [Z, MLP], tmp_path / "acts.lance.adding", drop=DROP)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, dies)
        with pytest.raises(KeyboardInterrupt):
            extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    assert len(Read(out)) == 180
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


def test_all_of_them_are_gone_on_with_together(out):
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    done = extract(bridge(), batches(8), [RESID, Z, MLP], out, drop=DROP)
    assert done.new_rows == 60


def test_sites_are_not_added_twice(out):
    assert refusal(DataError, bridge(), batches(6), RESID, out, drop=DROP, add=True) == (
        f"'{out}' has '{RESID}' already; leave it out, or give another an alias, as in "
        "{'resid': ...}"
    )


def test_sites_are_added_to_what_there_is(tmp_path):
    path = tmp_path / "none.lance"
    assert refusal(DataError, bridge(), batches(6), Z, path, drop=DROP, add=True) == (
        f"'{path}' has no rows to add sites to; extract to it without add=True first"
    )


def test_another_input_is_not_added(out):
    other = batches(6)
    other[1][0, 2] = 0
    message = refusal(DataError, bridge(), other, Z, out, drop=DROP, add=True)
    assert message.startswith("the rows on disk came from another input: row 31 is token ")


def test_a_shorter_input_is_not_added(out):
    assert refusal(DataError, bridge(), batches(5), Z, out, drop=DROP, add=True) == (
        f"the input leaves 150 rows, but '{out}' has 180; give the input that they came from"
    )


def test_rows_that_are_chosen_otherwise_are_not_added(out):
    assert refusal(DataError, bridge(), batches(6), Z, out, add=True) == (
        f"cannot add to '{out}': its drop is {{'position': [0]}}, not {{}}; give the same, or "
        "another path"
    )
