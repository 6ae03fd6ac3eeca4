"""Texts that are carried: stored once a sequence, and read with each of its rows."""

import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from extracted import refusal
from torch import nn

from actctx import DataError, OptionError, Site
from actctx._store.layout import KEY, layout_of
from actctx._store.texts import offsets_of_matching
from actctx._store.where import rows_where
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")

BLOCK = Site("block", axes="batch pos d")
LENGTHS = [5, 1, 9, 3, 12, 7, 4, 8]
DOCUMENTS = ["", "a 'quoted' one", "ünï", "yes", "no", "yes", "longer " * 50, "no"]
CARRY = ["document", "label", "source"]


class Model(nn.Module):
    """A model of one look-up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Embedding(50, 4)

    def forward(self, input_ids):
        return self.block(input_ids)


def rows(documents=DOCUMENTS, lengths=LENGTHS):
    return [
        {
            "input_ids": [1 + each % 49 for each in range(length)],
            "document": document,
            "label": number % 3,
            "source": f"source {number % 2}",
        }
        for number, (document, length) in enumerate(zip(documents, lengths, strict=True))
    ]


@pytest.fixture(scope="module")
def model():
    return Model().eval()


@pytest.fixture
def written(model, out):
    extract(model, rows(), BLOCK, out, carry=CARRY, batch_size=3)
    return out


def check(batch, documents=DOCUMENTS):
    """Make sure that each row has the texts of its sequence."""
    sequences = batch["sequence"].tolist()
    assert batch["document"] == [documents[number] for number in sequences]
    if "source" in batch:
        assert batch["source"] == [f"source {number % 2}" for number in sequences]
    assert batch["label"].tolist() == [number % 3 for number in sequences]


def test_rows_have_the_texts_of_their_sequence(written):
    data = ActivationDataset(written)
    assert list(data[0]) == ["token", "sequence", "position", *CARRY, "block"]
    assert len(data) == sum(LENGTHS)
    check(data[:])
    check(data[::-3])
    check(data[[7, 7, 40, 0, 3]])
    check(data[data.read("sequence") == 4])
    assert data[11]["document"] == DOCUMENTS[int(data[11]["sequence"])]
    assert data.read("source") == data[:]["source"]
    check(pickle.loads(pickle.dumps(data))[:])  # noqa: S301  of our own


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_training_have_them(written, workers):
    for batch in ActivationDataset(written).loader(8, seed=0, workers=workers):
        check(batch)


def test_they_are_in_the_first_row_of_their_sequence_alone(written):
    table = lance.dataset(written).to_table()
    is_first = np.diff(table["sequence"].to_numpy(), prepend=-1) != 0
    assert [each is not None for each in table["document"].to_pylist()] == is_first.tolist()
    assert table["_back"].to_pylist() == table["position"].to_pylist()


def test_they_take_their_space_once(model, out):
    draw = np.random.default_rng(0)
    documents = [draw.integers(97, 123, 2**16).astype(np.uint8).tobytes().decode() for _ in "1234"]
    extract(model, rows(documents, [500] * 4), BLOCK, out, carry="document")
    size = sum(file.stat().st_size for file in (out / "data").iterdir())
    assert size < 2 * 4 * 2**16


def test_rows_of_one_sequence_share_their_text_in_memory(model, out):
    documents = [f"{number} " * 2**18 for number in range(3)]
    extract(model, rows(documents, [300] * 3), BLOCK, out, carry=["document", "label"])
    data = ActivationDataset(out)
    assert len({id(text) for text in data[:]["document"]}) == 3
    assert data.loader(8)._order.pool > 100  # and not 32, as were each row to have its own
    few = ActivationDataset(out, where="length(document) > 9 AND position < 3")
    assert len(few) == 9
    few = ActivationDataset(out, where="starts_with(document, '1') AND position < 3")
    assert few.read("document") == [documents[1]] * 3


def test_long_texts_of_long_sequences_are_stored(model, out):
    text = "x" * 2**20
    extract(model, [{"input_ids": [1] * 2050, "document": text}], BLOCK, out, carry="document")
    assert ActivationDataset(out)[2049]["document"] == text


@pytest.mark.parametrize("options", [{"slice": {"pos": -1}}, {"pool": "mean"}])
def test_rows_that_are_sequences_have_them(model, out, options):
    extract(model, rows(), BLOCK, out, carry=CARRY, **options)
    assert len(ActivationDataset(out)) == len(DOCUMENTS)
    check(ActivationDataset(out)[:])


@pytest.mark.parametrize("most", [1, 7, 13, 30])
def test_a_data_set_that_ended_within_a_sequence_is_resumed(model, out, most):
    extract(model, rows(), BLOCK, out, carry=CARRY, batch_size=3, max_tokens=most)
    check(ActivationDataset(out)[:])
    extract(model, rows(), BLOCK, out, carry=CARRY, batch_size=3)
    assert len(ActivationDataset(out)) == sum(LENGTHS)
    check(ActivationDataset(out)[:])
    check(ActivationDataset(out, where="document = 'yes' OR position > 2")[:])


def test_other_texts_are_another_input(model, written):
    other = rows(["other", *DOCUMENTS[1:]])
    message = refusal(DataError, model, other, BLOCK, written, carry=CARRY, batch_size=3)
    assert "or other carried values" in message


def test_sites_are_added_beside_them(model, written):
    added = {"again": BLOCK}
    extract(model, rows(), added, written, carry=CARRY, batch_size=3, add=True)
    batch = ActivationDataset(written)[:]
    check(batch)
    assert torch.equal(batch["again"], batch["block"])


def test_the_column_that_finds_them_is_taken(model, out):
    data = [{"input_ids": [1, 2], "_back": "a"}]
    message = refusal(OptionError, model, data, BLOCK, out, carry="_back")
    assert message.startswith("'_back' is the name of another column")


# Conditions.

CONDITIONS = {
    "document = 'yes'": lambda row: row["document"] == "yes",
    "document = ''": lambda row: row["document"] == "",
    "document = 'a ''quoted'' one'": lambda row: row["document"] == "a 'quoted' one",
    "`document` LIKE '%o%' AND position > 1": lambda row: (
        "o" in row["document"] and row["position"] > 1
    ),
    "document = 'yes' OR position = 0": lambda row: (
        row["document"] == "yes" or row["position"] == 0
    ),
    "NOT (document = source OR token = 3)": lambda row: row["token"] != 3,
    "length(document) > 5 AND label = 0": lambda row: (
        len(row["document"]) > 5 and row["label"] == 0
    ),
    "upper(document) IN ('YES', 'ÜNÏ')": lambda row: row["document"] in {"yes", "ünï"},
    "source = 'source 1' AND document = 'no'": lambda row: (
        row["source"] == "source 1" and row["document"] == "no"
    ),
    "document = 'no' AND block[2] > 0": lambda row: row["document"] == "no" and row["block"][1] > 0,
    "document < source": lambda row: row["document"] < row["source"],
    "document || source = 'nosource 1' AND position > 0": lambda row: (
        row["document"] + row["source"] == "nosource 1" and row["position"] > 0
    ),
    "regexp_match(document, '^n') IS NOT NULL": lambda row: row["document"].startswith("n"),
    "label = 1": lambda row: row["label"] == 1,
    "document IS NULL": lambda _row: False,
    "document = 'nowhere'": lambda _row: False,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_are_asked_of_each_row(written, condition):
    whole = ActivationDataset(written)
    wanted = [at for at in range(len(whole)) if CONDITIONS[condition](whole[at])]
    found = ActivationDataset(written, where=condition)
    assert len(found) == len(wanted)
    batch, expected = found[:], whole[wanted]
    check(batch)
    assert torch.equal(batch["sequence"], expected["sequence"])
    assert torch.equal(batch["position"], expected["position"])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_texts_go_on_from_one_batch_to_the_next(written, batch_size):
    whole = ActivationDataset(written)[:]
    condition = "document = 'yes' AND position < 4"
    found = offsets_of_matching(
        lance.dataset(written).take,
        partial(rows_where, condition=condition, refused=OptionError),
        rows=len(whole["document"]),
        columns=["position"],
        texts=["document"],
        batch_size=batch_size,
        path="acts.lance",
    )
    wanted = [
        at
        for at, (text, position) in enumerate(
            zip(whole["document"], whole["position"], strict=True)
        )
        if text == "yes" and whole["position"][at] < 4
    ]
    assert np.concatenate([*found]).tolist() == wanted


def test_what_is_no_condition_on_texts_is_refused(written):
    with pytest.raises(OptionError) as refused:
        ActivationDataset(written, where="document = 'yes' AND lable = 1")
    assert str(refused.value) == (
        "where=\"document = 'yes' AND lable = 1\" is not a condition on rows: there is no column "
        "lable; the columns are token, sequence, position, document, label, source, `block`; "
        "strings need single quotes, as in label = 'yes'"
    )


# Rows that others deleted.


def test_rows_behind_deleted_ones_keep_their_texts(written):
    lance.dataset(written).delete("position = 1 OR label = 1")
    data = ActivationDataset(written)
    wanted = [at for at, row in enumerate(LENGTHS) if at % 3 != 1]
    assert len(data) == sum(LENGTHS[at] - (LENGTHS[at] > 1) for at in wanted)
    check(data[:])
    check(data[[5, 2, 9]])
    check(ActivationDataset(written, where="document = 'no' OR position > 3")[:])


@pytest.mark.parametrize("deleted", ["sequence = 2 AND position = 0", "position = 0"])
def test_rows_whose_texts_were_deleted_are_refused(written, deleted):
    lance.dataset(written).delete(deleted)
    data = ActivationDataset(written)
    message = (
        f"texts of '{written}' are lost: the first row of their sequence, which stored them, was "
        "deleted or changed; read only the sites with data.read(), or write the data set again"
    )
    for read in (
        lambda: data[:],
        lambda: ActivationDataset(written, where="document = 'yes'"),
    ):
        with pytest.raises(DataError) as refused:
            read()
        assert str(refused.value) == message
    assert len(data.read("block")) == len(data)


CHANGED = [{"_back": "99"}, {"_back": "-1"}, {"_back": "_back + 1"}, {"document": "NULL"}]


@pytest.mark.parametrize("changed", CHANGED, ids=str)
def test_rows_that_point_elsewhere_are_refused(written, changed):
    lance.dataset(written).update(changed, where="position < 2")
    data = ActivationDataset(written)
    with pytest.raises(DataError, match=r"^texts of .* are lost"):
        data[:]
    with pytest.raises(DataError, match=r"^texts of .* are lost"):
        data.read("document")


# Data sets of before, which have texts in each row.


def older(path):
    """Write a data set as versions did that had texts in each row."""
    batch = ActivationDataset(path)[:]
    dataset = lance.dataset(path)
    table = dataset.to_table().drop_columns(["_back"])
    said = json.loads(dataset.schema.metadata[KEY])
    del said["texts"]
    for name in ("document", "source"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(batch[name]))
    table = table.replace_schema_metadata({KEY: json.dumps({**said, "format": 1})})
    lance.write_dataset(table, path, mode="overwrite")


def test_older_data_sets_are_read_and_resumed_as_they_are(model, out):
    extract(model, rows(), BLOCK, out, carry=CARRY, batch_size=3, max_tokens=13)
    older(out)
    check(ActivationDataset(out)[:])
    extract(model, rows(), BLOCK, out, carry=CARRY, batch_size=3)
    check(ActivationDataset(out)[:])
    check(ActivationDataset(out, where="document = 'yes' AND position > 1")[:])
    table = lance.dataset(out).to_table()
    assert table["document"].null_count == 0
    assert "_back" not in table.column_names
    assert layout_of(lance.dataset(out), str(out)).texts == ()
    assert json.loads(table.schema.metadata[KEY])["format"] == 1


def test_older_versions_are_told_that_they_are_older(written, model, tmp_path):
    assert json.loads(lance.dataset(written).schema.metadata[KEY])["format"] == 2
    extract(model, rows(), BLOCK, tmp_path / "labels.lance", carry="label")
    said = json.loads(lance.dataset(tmp_path / "labels.lance").schema.metadata[KEY])
    assert said["format"] == 1
    assert "texts" not in said
