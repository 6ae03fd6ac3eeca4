"""Files and tables that somebody edited: caches of SAELens, rows, columns."""

import json

import pytest
import torch
from stored import lance, pa, tokens, write

from actctx import DataError, OptionError
from actctx._store.destination import Destination
from actctx._store.validation import check_columns
from actctx.dataset import ActivationDataset

ROWS = 100


def cached(tmp_path, runs, **changed):
    """Cache runs as SAELens does, and change what the directory says of itself."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"hook": datasets.Array2D(shape=(4, 2), dtype="float32")})
    datasets.Dataset.from_dict({"hook": runs}, features=features).save_to_disk(tmp_path / "cached")
    for name, change in changed.items():
        file = tmp_path / "cached" / f"{name}.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))
    return tmp_path / "cached"


RUN = [[0.0, 1.0]] * 4


@pytest.mark.parametrize(
    ("runs", "changed", "found"),
    [
        ([RUN, RUN[:3]], {}, "cannot be read whole: its column 'hook' has runs that are not of 4"),
        (
            [RUN, [[0.0]] * 4],
            {},
            "cannot be read whole: its column 'hook' has runs that are not of 2",
        ),
        ([RUN, None], {}, "cannot be read whole: its column 'hook' has runs that are not of 4"),
        (
            [RUN, [[0.0, None]] * 4],
            {},
            "cannot be read whole: its column 'hook' has nulls among its elements",
        ),
        (
            [RUN],
            {"dataset_info": lambda found: found["features"]["hook"].update(shape=[-4, 2])},
            "has activations of the shape (-4, 2) in its column 'hook', not runs of one context",
        ),
        (
            [RUN],
            {"dataset_info": lambda found: found["features"].update(hook=3)},
            "is not a directory of SAELens' cached activations: ",
        ),
        (
            [RUN],
            {"state": lambda found: found.clear()},
            "is not a directory of SAELens' cached activations: ",
        ),
    ],
)
def test_what_saelens_cached_is_checked(tmp_path, runs, changed, found):
    path = cached(tmp_path, runs, **changed)
    with pytest.raises(DataError) as caught:
        ActivationDataset.from_saelens(path, tmp_path / "a.lance")
    assert str(caught.value).startswith(f"'{path}' {found}")
    assert [each.name for each in tmp_path.iterdir()] == ["cached"]


def edited(path, change):
    """Change the bytes of each file of rows."""
    for file in (path / "data").iterdir():
        file.write_bytes(change(file.read_bytes()))
    return path


def test_a_damaged_file_ends_no_scan_of_it(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    kind = b"/lance.encodings.ColumnEncoding"
    edited(path, lambda found: found.replace(kind, kind[:-4] + b"\0" + kind[-3:]))
    with pytest.raises(DataError) as caught:
        ActivationDataset(path, where="position > 3")
    assert str(caught.value).startswith(f"rows of '{path}' cannot be read: ")
    destination = Destination(path)
    with pytest.raises(DataError, match="cannot be read: "):
        next(destination.contents.origins())
    destination.release()


def test_a_file_that_says_its_tables_are_longer_than_it_is_not_read(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    edited(path, lambda found: found[:-13] + b"\x7f" + found[-12:])  # 2**31 of what else there is
    data = ActivationDataset(path)
    (file,) = (path / "data").iterdir()
    with pytest.raises(DataError) as caught:
        data[0]
    assert str(caught.value) == (
        f"rows of '{path}' cannot be read: its file {file.name!r} is damaged; open it again, since "
        "another process may have replaced its files; if that fails, see 'actctx verify' and "
        "'actctx repair'"
    )


def test_a_file_of_deleted_rows_that_is_another_is_not_read(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    lance.dataset(path).delete("position = 5")
    assert len(ActivationDataset(path)[:]["token"]) == 94
    (file,) = (path / "_deletions").iterdir()
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table[:2])
    with pytest.raises(DataError, match=f"its file '{file.name}' is damaged"):
        ActivationDataset(path)[:]


def test_a_file_of_deleted_rows_that_says_a_buffer_is_longer_than_memory_is_not_read(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    lance.dataset(path).delete("position = 5")
    (file,) = (path / "_deletions").iterdir()
    found = file.read_bytes()
    nulls = found.index(b"\xff" * 9)  # the length of a bitmap that is not compressed, and its bits
    file.write_bytes(found[: nulls + 7] + b"\x7f" + found[nulls + 8 :])
    with pytest.raises(DataError, match=f"its file '{file.name}' is damaged"):
        ActivationDataset(path)[:]


def test_columns_of_one_name_are_said():
    twice = pa.schema([("token", pa.int32()), ("label", pa.int64()), ("label", pa.string())])
    with pytest.raises(ValueError, match=r"^it has several columns 'label'$"):
        check_columns(twice, {"token": pa.int32()})


def test_a_carried_column_that_became_another_is_said(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    data = ActivationDataset(path)
    lance.dataset(path).alter_columns({"path": "label", "data_type": pa.int32()})
    assert data[3]["label"].dtype == torch.int64  # of the version that was opened
    data._rows.version = None
    data._rows._opened = data._rows._files = None
    with pytest.raises(DataError, match="its column 'label' is int32, unlike before; "):
        data[3]


def test_a_condition_that_fails_at_a_text_with_a_nul_ends_nothing(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    lance.dataset(path).update({"text": "concat('a', chr(0))"}, where="position = 3")
    assert ActivationDataset(path, where="position = 3")[0]["text"] == "a\0"
    with pytest.raises(OptionError, match=r"is not a condition on rows: .*Cannot cast string"):
        ActivationDataset(path, where="position = 3 AND CAST(text AS INT) > 3")


def test_rows_without_a_token_are_not_read_and_not_resumed(tmp_path):
    path = write(tmp_path / "a.lance", ROWS)
    lance.dataset(path).alter_columns({"path": "token", "nullable": True})
    assert ActivationDataset(path).tokens.tolist() == tokens(torch.arange(ROWS)).tolist()
    lance.dataset(path).update({"token": "null"}, where="position = 3")
    with pytest.raises(DataError, match=r"^the column 'token' of '.*' has nulls, which int32"):
        ActivationDataset(path)[:]
    destination = Destination(path)
    with pytest.raises(DataError, match="cannot be read: rows have no value in its column 'token'"):
        next(destination.contents.origins())
    destination.release()
