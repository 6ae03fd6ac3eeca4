"""Columns of a data set that somebody else added, or changed."""

import numpy as np
import pytest
import torch
from stored import LENGTH, lance, numbers, pa, write

from actctx import DataError
from actctx.dataset import ActivationDataset

ROWS = 100


@pytest.fixture(scope="module")
def widened(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("data") / "a.lance", ROWS, commits=3)
    at = np.arange(ROWS) % LENGTH
    columns = {
        "u16": pa.array(at, pa.uint16()),
        "u32": pa.array(at + 2**32 - LENGTH, pa.uint32()),
        "u64": pa.array([int(each) + 2**64 - LENGTH for each in at], pa.uint64()),
        "holes": pa.array([None if each == 3 else int(each) for each in at], pa.int32()),
        "flags": pa.array([None if each == 3 else bool(each > 3) for each in at]),
        "whole": pa.array(at, pa.int16()),
        "floats": pa.array([None if each == 3 else float(each) for each in at]),
    }
    lance.dataset(path).add_columns(pa.table(columns).to_reader())
    return path


def test_columns_that_others_added_are_read(widened):
    data = ActivationDataset(widened)
    rows = data[[35, 2, 3, 2]]
    assert rows["u16"].tolist() == [3, 2, 3, 2]
    assert rows["u32"].tolist() == [2**32 - 13, 2**32 - 14, 2**32 - 13, 2**32 - 14]
    assert rows["u16"].dtype == rows["u32"].dtype == torch.int64
    assert rows["u64"] == [2**64 - 13, 2**64 - 14, 2**64 - 13, 2**64 - 14]
    assert rows["whole"].dtype == torch.int16
    assert numbers(rows).tolist() == [35, 2, 3, 2]


def test_nulls_that_others_added_are_none_in_a_list(widened):
    data = ActivationDataset(widened)
    assert data[3]["holes"] is None
    assert data[[2, 3, 4]]["holes"] == [2, None, 4]
    assert data[2:5]["flags"] == [False, None, True]
    assert data[[4]]["holes"] == [4]  # a list also where there is none among the rows
    assert data.read("floats")[2:5].isnan().tolist() == [False, True, False]
    assert len(ActivationDataset(widened, where="holes IS NULL")) == 7


@pytest.mark.filterwarnings("ignore:pool=")  # several pools of so few rows are small
def test_columns_that_others_added_come_in_batches(widened):
    batches = list(ActivationDataset(widened).loader(32, pool=64))
    assert sum(batch["holes"].count(None) for batch in batches) == 7
    assert max(u for batch in batches for u in batch["u16"].tolist()) == LENGTH - 1
    for batch in batches:
        assert [u - 2**64 + LENGTH for u in batch["u64"]] == batch["u16"].tolist()


def test_nulls_where_extract_wrote_numbers_are_said(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    lance.dataset(path).update({"label": "null"}, where="position = 3")
    data = ActivationDataset(path)
    with pytest.raises(DataError) as caught:
        data[:]
    assert str(caught.value) == (
        f"the column 'label' of '{path}' has nulls, which int64 does not have; fill them, for "
        "example with -1, or drop the column"
    )
    assert len(data.read("text")) == ROWS
