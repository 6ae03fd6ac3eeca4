"""How a data set is laid out on disk: its columns, its metadata, and tensors as their values."""

import json

import pytest
import torch

from actctx import DataError, OptionError
from actctx._store.layout import Layout
from actctx._store.libraries import import_lance
from actctx._store.site_columns import StoredSite, as_array, as_tensor, check_rows, column_name
from actctx._text import dtype_name

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)


def stored(dtype=torch.float16, shape=(4, 8), name="blocks.0.attn.hook_z"):
    word = str(dtype).removeprefix("torch.")
    axes = ("head", "d_head", "more")[: len(shape)]
    return StoredSite(name, column_name(name), name, axes, shape, word)


def layout(*sites):
    model = {"name": "tiny", "class": "Tiny", "fingerprint": "0"}
    return Layout(model, sites, "token", {"context": 8}, {"actctx": "1"}, ("label",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_comes_back_from_disk_to_the_bit(dtype, tmp_path):
    site = stored(dtype)
    z = (9 * torch.randn(6, 4, 8).abs()).to(dtype)
    table = pa.table({site.column: as_array(z)})
    lance.write_dataset(table, tmp_path / "acts.lance")
    read = lance.dataset(tmp_path / "acts.lance").to_table().column(site.column)
    assert torch.equal(as_tensor(read, site), z)
    assert as_tensor(read, site).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_on_a_column_is_read_in_its_place(dtype):
    site = stored(dtype)
    z = (9 * torch.randn(6, 4, 8).abs()).to(dtype)
    assert torch.equal(as_tensor(as_array(z).slice(2, 3), site), z[2:5])


def test_a_column_in_several_chunks_is_one_tensor():
    z = torch.randn(6, 4, 8)
    chunks = pa.chunked_array([as_array(z[:2]), as_array(z[2:])])
    assert torch.equal(as_tensor(chunks, stored(torch.float32)), z)


def test_a_column_without_rows_is_a_tensor_without_rows():
    assert as_tensor(as_array(torch.empty(0, 4, 8)), stored(torch.float32)).shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_way_copies(dtype):
    z = (9 * torch.randn(6, 4, 8).abs()).to(dtype)
    column = as_array(z)
    assert as_tensor(column, stored(dtype)).data_ptr() == z.data_ptr()


def test_what_a_column_shows_outlives_its_tensor():
    column = as_array(torch.arange(192.0).view(6, 4, 8).clone())
    read = as_tensor(column, stored(torch.float32))
    del column
    assert torch.equal(read, torch.arange(192.0).view(6, 4, 8))


def test_columns_have_names_without_dots_that_are_no_two_alike():
    names = ["blocks.0.hook_z", "blocks/0/hook_z", "blocks%2F0.hook_z", "blocks.0/hook_z"]
    columns = [column_name(name) for name in names]
    assert columns[0] == "blocks/0/hook_z"
    assert len(set(columns)) == len(names)
    assert not any("." in column for column in columns)


def test_a_layout_comes_back_from_its_schema(tmp_path):
    wanted = layout(stored(), stored(torch.bfloat16, (32,), "blocks.0.hook_resid_post"))
    schema = wanted.schema(pa.schema([pa.field("label", pa.int64())]))
    lance.write_dataset([], tmp_path / "acts.lance", schema=schema)
    found = lance.dataset(tmp_path / "acts.lance").schema
    assert Layout.of(found, "acts.lance") == wanted
    assert found.names == [
        "token",
        "sequence",
        "position",
        "_input",
        "label",
        "blocks/0/attn/hook_z",
        "blocks/0/hook_resid_post",
    ]


def test_a_site_whose_column_is_missing_is_not_there():
    z, resid = stored(), stored(torch.bfloat16, (32,), "blocks.0.hook_resid_post")
    schema = layout(z, resid).schema(pa.schema([pa.field("label", pa.int64())]))
    schema = schema.remove(schema.get_field_index(z.column)).append(pa.field("mine", pa.int8()))
    found = Layout.of(schema, "acts.lance")
    assert found == layout(resid)
    assert found.unlisted(schema) == ["mine"]


def test_another_lance_dataset_is_refused():
    with pytest.raises(DataError) as refused:
        Layout.of(pa.schema([("x", pa.int32())]), "other.lance")
    assert str(refused.value) == (
        "'other.lance' is a Lance dataset, but not one of actctx: its schema has no metadata "
        "'actctx'; give the path that extract() wrote to"
    )


def test_a_later_layout_is_refused():
    later = json.dumps({**json.loads(layout().as_metadata()), "format": 3})
    schema = pa.schema([], metadata={"actctx": later})
    with pytest.raises(DataError) as refused:
        Layout.of(schema, "acts.lance")
    assert str(refused.value) == (
        "'acts.lance' was written by actctx 1, whose layout this version cannot read; upgrade "
        "actctx to read it"
    )


def test_other_dtypes_are_refused():
    with pytest.raises(OptionError) as refused:
        check_rows("hook_out", torch.zeros(3, 2, dtype=torch.float64))
    assert str(refused.value) == (
        "'hook_out' yields float64, which a data set cannot store; give dtype= torch.float32, "
        "torch.float16 or torch.bfloat16"
    )


@pytest.mark.parametrize("dtype", [torch.uint64, torch.complex64])
def test_what_no_dtype_makes_floating_point_is_refused_without_that_advice(dtype):
    with pytest.raises(OptionError) as refused:
        check_rows("hook_tokens", torch.empty(3, 2, dtype=dtype))
    assert str(refused.value) == (
        f"'hook_tokens' yields {dtype_name(dtype)}, but a data set stores floating-point numbers, "
        "bools, signed integers of up to 64 bits, and unsigned ones of 8 bits; leave the site "
        "out, or keep it in memory with capture()"
    )


def test_lance_is_asked_for_by_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lance", None)
    with pytest.raises(OptionError) as refused:
        import_lance()
    assert str(refused.value) == (
        "data sets need lance, which is not installed; install it with: pip install 'actctx[data]'"
    )
