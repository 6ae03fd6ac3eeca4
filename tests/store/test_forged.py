"""Data sets whose metadata says something else than their columns hold."""

import contextlib
import io
import json
import math
import re

import pytest
import torch
from stored import LENGTH, RESID, Z, heads, lance, pa, resid, write

from actctx import DataError, OptionError
from actctx._cli.commands import info
from actctx._store.destination import Destination
from actctx._store.site_columns import StoredSite, as_array, as_tensor, column_name
from actctx._store.validation import Files
from actctx._text import printable
from actctx.dataset import ActivationDataset

ROWS = 100
COLUMN = column_name(Z)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", ROWS, commits=2)


def forge(path, **changed):
    """Write other metadata; `site` are changes to that of `Z`, and None leaves out."""
    dataset = lance.dataset(path)
    found = json.loads(dataset.schema.metadata[b"actctx"])
    for place, changes in ((found["sites"][1], changed.pop("site", {})), (found, changed)):
        place.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del place[name]
    return rewrite(path, json.dumps(found))


def rewrite(path, metadata):
    lance.dataset(path).update_schema_metadata({"actctx": metadata})
    return path


def refusal(path):
    """What whoever reads, whoever resumes and the command line say, which is one thing."""
    said = set()
    for move in (ActivationDataset, Destination, lambda path: info(str(path))):
        with pytest.raises(DataError) as caught:
            move(path)
        said.add(str(caught.value))
    (only,) = said
    return only


def damaged(path, found):
    return (
        f"the data set at '{path}' cannot be read: its metadata 'actctx' is damaged ({found}); put "
        "a copy of it in its place, or extract it again to another path"
    )


def other_column(path, found):
    return (
        f"the data set at '{path}' cannot be read: {found}; put a copy of it in its place, or "
        "extract it again to another path"
    )


@pytest.mark.parametrize(
    ("site", "found"),
    [
        ({"shape": [2, 400]}, f"its column {COLUMN!r} is {{}}[6], not {{}}[800]"),
        ({"shape": [2, 2]}, f"its column {COLUMN!r} is {{}}[6], not {{}}[4]"),
        ({"dtype": "float32"}, f"its column {COLUMN!r} is {{}}[6], not {{float}}[6]"),
        ({"dtype": "bfloat16"}, f"its column {COLUMN!r} is {{}}[6], not {{bfloat16}}[6]"),
        ({"name": RESID}, f"two of its columns are named {RESID!r}"),
        ({"name": "token"}, "two of its columns are named 'token'"),
        ({"name": "text"}, "two of its columns are named 'text'"),
        ({"column": "label"}, "its column 'label' is int64, not {}[6]"),
    ],
)
def test_a_column_that_is_not_as_the_metadata_says_is_named(tmp_path, site, found):
    path = forge(write(tmp_path / "a.lance", ROWS), site=site)
    kinds = {"": "halffloat", "float": "float", "bfloat16": "bfloat16"}
    for name, kind in kinds.items():
        found = found.replace(f"{{{name}}}", f"fixed_size_list<item: {kind}>")
    assert refusal(path) == other_column(path, found)


def test_no_width_is_taken_for_another_of_bfloat16(tmp_path):
    path = write(tmp_path / "a.lance", ROWS, names=(Z, RESID))  # the first is of bfloat16
    dataset = lance.dataset(path)
    found = json.loads(dataset.schema.metadata[b"actctx"])
    found["sites"][0]["shape"] = [400]
    rewrite(path, json.dumps(found))
    kind = "fixed_size_list<item: bfloat16>"
    assert refusal(path) == other_column(
        path, f"its column {COLUMN!r} is {kind}[4], not {kind}[400]"
    )


@pytest.mark.parametrize(
    "shape", [[0, 3], [-2, -3], [2**40], [2**32, 2**32, 2**32, 6], [2**70, 1], [2**31]]
)
def test_sizes_that_no_row_has_are_said(tmp_path, shape):
    path = forge(
        write(tmp_path / "a.lance", ROWS), site={"shape": shape, "axes": ["_"] * len(shape)}
    )
    assert refusal(path) == damaged(path, f"{Z!r} has the shape {tuple(shape)}, which no row has")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"site": {"shape": "6"}}, "'sites[1].shape' is '6', not a list"),
        ({"site": {"shape": [2.0, 3]}}, "'sites[1].shape[0]' is 2.0, not a whole number"),
        (
            {"site": {"shape": [True, 6]}},
            "'sites[1].shape[0]' is True, not a whole number",
        ),
        ({"site": {"shape": [6]}}, f"{Z!r} has the axes 'head d_head', but the shape (6,)"),
        ({"site": {"axes": [1, 2]}}, "'sites[1].axes[0]' is 1, not a text"),
        ({"site": {"name": "\ud800"}}, r"'sites[1].name' is '\ud800', which is not text"),
        ({"site": {"name": ""}}, "the site '' has no name, or no column"),
        ({"site": {"column": None}}, "'sites[1].column' is missing"),
        ({"sites": {}}, "'sites' is {}, not a list"),
        ({"sites": [3]}, "'sites[0]' is 3, not an object"),
        ({"model": []}, "'model' is [], not an object"),
        ({"model": {"name": ""}}, "'model.class' is None, which is not text"),
        ({"rows": "layer"}, "'rows' is 'layer', neither 'token' nor 'sequence'"),
        (
            {"input": {"batch_size": "8"}},
            "'input.batch_size' is '8', which is not a number of sequences",
        ),
        ({"input": {"drop": json.loads("[" * 40 + "]" * 40)}}, "'input.drop' is nested too deeply"),
        ({"carried": "label"}, "'carried' is 'label', not a list"),
        ({"finished": 1}, "'finished' is 1, not true or false"),
        ({"versions": {"actctx": 1}}, "'versions.actctx' is 1, not a text"),
        ({"versions": None}, "'versions' is missing"),
        ({"format": True}, "'format' is True"),
        ({"format": 0}, "'format' is 0"),
        ({"format": None}, "'format' is None"),
    ],
)
def test_metadata_of_another_type_is_named(tmp_path, changed, found):
    path = forge(write(tmp_path / "a.lance", ROWS), **changed)
    assert refusal(path) == damaged(path, found)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ("[]", "it is not an object, but []"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"format": 1, "format": 1}', "it has a duplicate name"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_metadata_that_is_no_object_is_said(tmp_path, metadata, found):
    path = rewrite(write(tmp_path / "a.lance", ROWS), metadata)
    assert refusal(path) == damaged(path, found)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"format": 3}, "layout"),
        ({"zipped": True}, "field 'zipped'"),
        ({"site": {"scale": 2.0}}, "field 'sites[1].scale'"),
        ({"site": {"dtype": "load"}}, f"dtype 'load' of {Z!r}"),
    ],
)
def test_what_a_later_version_wrote_is_called_that(tmp_path, changed, what):
    versions = {"actctx": "9.\x1b[2J"}
    path = forge(write(tmp_path / "a.lance", ROWS), versions=versions, **changed)
    assert refusal(path) == (
        rf"'{path}' was written by actctx 9.\x1b[2J, whose {what} this version cannot read; "
        "upgrade actctx to read it"
    )


@pytest.mark.parametrize(
    ("alter", "found"),
    [
        (
            {"path": COLUMN, "data_type": "halves"},
            f"its column {COLUMN!r} is {{}}, not {{}}",
        ),
        (
            {"path": "token", "data_type": pa.int64()},
            "its column 'token' is int64, not int32",
        ),
        (
            {"path": "sequence", "data_type": pa.int32()},
            "its column 'sequence' is int32, not int64",
        ),
        ({"path": "token", "name": "tokens"}, "it has no column 'token'"),
    ],
)
def test_a_column_that_somebody_altered_is_named(tmp_path, alter, found):
    path = write(tmp_path / "a.lance", ROWS)
    if alter.get("data_type") == "halves":
        alter = {**alter, "data_type": pa.list_(pa.float32(), 6)}
        found = found.format(
            "fixed_size_list<item: float>[6]", "fixed_size_list<item: halffloat>[6]"
        )
    lance.dataset(path).alter_columns(alter)
    assert refusal(path) == other_column(path, found)


def without(path, column):
    """Append rows without a column."""
    table = lance.dataset(path).to_table().drop_columns([column])
    lance.write_dataset(table, path, mode="append")


def test_rows_that_were_appended_without_a_site_are_said(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    without(path, COLUMN)
    for move in (ActivationDataset, Destination):
        with pytest.raises(DataError) as caught:
            move(path)
        assert str(caught.value) == (
            f"the data set at '{path}' cannot be read: its rows from 100 to 200 were appended "
            f"without the column {Z!r}; delete them, or leave that column out with sites="
        )
    assert len(ActivationDataset(path, sites=RESID)[:][RESID]) == 2 * ROWS


@pytest.mark.parametrize("within", [False, True])
def test_nulls_in_a_site_are_said(tmp_path, within):
    path = write(tmp_path / "a.lance", ROWS)
    table = lance.dataset(path).to_table()
    at = table.schema.get_field_index(COLUMN)
    nulls = pa.nulls(ROWS, table.schema.field(at).type)
    if within:
        nulls = pa.FixedSizeListArray.from_arrays(pa.nulls(6 * ROWS, pa.float16()), 6)
    lance.write_dataset(table.set_column(at, table.schema.field(at), nulls), path, mode="append")
    data = ActivationDataset(path)
    assert torch.equal(data[:ROWS][Z], heads(torch.arange(ROWS)))
    found = f"1 of 1 rows have no value in its column {COLUMN!r}"
    if within:
        found = f"its column {COLUMN!r} has nulls among its elements"
    with pytest.raises(DataError) as caught:
        data[ROWS]
    assert str(caught.value) == (
        f"rows of '{path}' cannot be read: {found}; open it again, since another process may have "
        "replaced its files; if that fails, see 'actctx verify' and 'actctx repair', or leave that "
        "site out with sites="
    )
    for move in (lambda: [*data.loader(64)], lambda: data.read(Z), lambda: data[[0, 150]]):
        with pytest.raises(DataError, match=re.escape(COLUMN)):
            move()
    assert len(data.read(RESID)) == 2 * ROWS


def test_a_data_set_that_another_took_the_place_of_is_said(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    data = ActivationDataset(path)
    other = write(tmp_path / "b.lance", ROWS, names=(Z, RESID))
    data._rows.path = str(other)  # as a process that opens it later finds it
    data._rows._opened = data._rows._files = None
    with pytest.raises(DataError, match=r"^rows of '.*' cannot be read: its column '.*' is "):
        data[:]


def test_a_column_that_was_dropped_is_not_missed(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    lance.dataset(path).drop_columns(["label", COLUMN])
    data = ActivationDataset(path)
    assert [*data[0]] == ["token", "sequence", "position", "text", RESID]
    assert data.layout.carried == ("text",)


def columns(rows=4):
    """Give columns that are shorter than they say, or not what they say."""
    z = as_array(heads(torch.arange(rows)))
    batch = pa.record_batch([z], names=["z"])
    message = batch.serialize().to_pybytes()
    length = (2 * 6 * rows).to_bytes(8, "little")
    assert message.count(length) == 2  # of what follows the head, and of the buffer
    short = (40).to_bytes(8, "little").join(message.rsplit(length, 1))
    yield pa.ipc.read_record_batch(short, batch.schema).column(0), "has less in memory"
    yield (
        pa.FixedSizeListArray.from_arrays(z.flatten(), 3),
        "is fixed_size_list<item: halffloat>[3]",
    )
    offsets = pa.array([0, 6, 12, 18, 24], pa.int32())
    yield pa.ListArray.from_arrays(offsets, z.flatten()), "is list<item: halffloat>"
    yield z.flatten(), "is halffloat"


@pytest.mark.parametrize("number", range(4))
def test_no_memory_is_shown_that_a_column_does_not_have(number):
    column, found = [*columns()][number]
    site = StoredSite(Z, COLUMN, Z, ("head", "d_head"), (2, 3), "float16")
    with pytest.raises(ValueError, match=re.escape(found)):
        as_tensor(column, site)


def test_a_window_on_a_column_with_nulls_elsewhere_is_read_in_its_place():
    values = pa.array(
        [[float(k)] * 6 if k != 1 else None for k in range(5)], pa.list_(pa.float16(), 6)
    )
    site = StoredSite(Z, COLUMN, Z, ("head", "d_head"), (2, 3), "float16")
    assert as_tensor(values.slice(2, 2), site).flatten(1)[:, 0].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"^1 of 2 rows have no value in its column"):
        as_tensor(values.slice(1, 2), site)


def test_a_file_that_says_it_has_more_than_it_has_is_not_read(whole):
    dataset = lance.dataset(whole)
    files = Files(dataset, str(whole))
    assert files.take(torch.arange(3).numpy(), ["token"]).num_rows == 3
    assert files._is_new.tolist() == [False, True]
    files._fragments[1] = files._fragments[0]
    files._fragments[0].physical_rows += 1
    with pytest.raises(ValueError, match=r"^its file '.*' is damaged$"):
        files.check()


def test_names_from_a_file_are_shown_without_control_characters(tmp_path):
    evil = "\x1b]0;owned\x07\x1b[2J\r\n\u202egnp"
    model = {"name": evil, "class": evil, "fingerprint": evil}
    path = forge(
        write(tmp_path / "a.lance", ROWS),
        model=model,
        site={"name": evil, "hook": evil, "axes": [evil, "d"]},
        versions={"actctx": evil, evil: evil},
        input={evil: {evil: [evil]}},
    )
    data, shown = ActivationDataset(path), io.StringIO()
    with contextlib.redirect_stdout(shown):
        info(str(path))
    with pytest.raises(DataError) as caught:
        data.check(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError) as unknown:
        ActivationDataset(path, where="nothing = 1")
    said = (str(caught.value), str(unknown.value))
    for text in (shown.getvalue(), repr(data), data._repr_html_(), *said):
        assert "owned" in text
        assert text.replace("\n", "").isprintable()
    assert torch.equal(data[:3][evil], heads(torch.arange(3)))


def test_a_text_is_printable():
    assert printable("blocks.0 é 层") == "blocks.0 é 层"
    assert printable("\x1b[31m\n\u202e\ud800") == r"\x1b[31m\n\u202e\ud800"


def test_more_rows_than_memory_holds_are_said(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    data = ActivationDataset(path)
    with pytest.raises(DataError) as caught:
        data._rows.empty(2**46)
    size = 2**46 * data._rows.row_bytes / 2**40
    assert str(caught.value) == (
        f"{2**46} rows of '{path}' take {size:.1f} TiB, which do not fit in memory; read fewer at "
        "once, or fewer columns with sites="
    )


def test_a_carried_column_that_is_not_what_it_says_is_said(whole):
    data = ActivationDataset(whole)
    offsets = pa.array([0, 3, 2, 4], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abcd")])
    with pytest.raises(DataError, match="its column 'text' is not string: "):
        data._rows._objects(pa.table({"text": text}), "text")
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    with pytest.raises(DataError, match="its column 'text' is not string: "):
        data._rows._objects(pa.table({"text": text}), "text")


def test_what_is_whole_is_read_as_it_was(whole):
    data = ActivationDataset(whole)
    rows = torch.arange(ROWS)
    assert torch.equal(data[:][RESID], resid(rows))
    assert torch.equal(data[:][Z], heads(rows))
    assert data[17]["position"] == 17 % LENGTH
    assert data.nbytes == ROWS * (math.prod((2, 3)) * 2 + 4 * 2 + 4 + 8 + 4 + 8)


def test_nulls_are_not_added_to_another_data_set(tmp_path):
    whole = Destination(write(tmp_path / "a.lance", ROWS))
    path = write(tmp_path / "b.lance", ROWS // 2, names=("more", "most"))
    table = lance.dataset(path).to_table()
    at = table.schema.get_field_index("more")
    nulls = pa.nulls(ROWS // 2, table.schema.field(at).type)
    lance.write_dataset(table.set_column(at, table.schema.field(at), nulls), path, mode="append")
    other = Destination(path)
    try:
        with pytest.raises(DataError) as caught:
            whole.contents.take_columns(other.contents)
    finally:
        whole.release()
        other.release()
    assert str(caught.value).startswith(f"cannot add the sites to '{whole.path}': ")
    assert "rows have no value in its column 'more'" in str(caught.value)
    assert [*ActivationDataset(whole.path).sites] == [RESID, Z]
