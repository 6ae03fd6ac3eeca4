"""A data set on disk, read back by index, whole, or as torch reads it."""

import multiprocessing
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_transformer
from models import tokens as tokens_of
from stored import HOOKS, LENGTH, RESID, Z, heads, lance, numbers, pa, resid, tokens, write
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from actctx import DataError, NotCapturedError, OptionError, SelectionError, capture
from actctx._model.fingerprint import describe_model
from actctx.dataset import ActivationDataset
from actctx.extract import extract

ROWS = 100


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", ROWS, commits=3)


@pytest.fixture
def data(path):
    return ActivationDataset(path)


@pytest.fixture(scope="module")
def aliased(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "b.lance", 20, names=("resid", "z"))


def same(batch, rows):
    rows = torch.as_tensor(rows)
    assert torch.equal(batch[RESID], resid(rows))
    assert torch.equal(batch[Z], heads(rows))
    assert torch.equal(batch["token"], tokens(rows))
    assert torch.equal(batch["sequence"], rows // LENGTH)
    assert torch.equal(batch["position"], (rows % LENGTH).int())
    assert torch.equal(batch["label"], rows // LENGTH % 3)
    assert batch["text"] == [f"row {row}" for row in rows.tolist()]


def pickled(data):
    return pickle.loads(pickle.dumps(data))  # noqa: S301  it is our own


def test_it_has_as_many_rows_as_were_written(data):
    assert len(data) == ROWS


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(None), range(ROWS)),
        (slice(10, 40), range(10, 40)),
        (slice(None, None, -7), range(ROWS - 1, -1, -7)),
        (slice(90, 500), range(90, ROWS)),
        ([5, 3, 98], [5, 3, 98]),
        ([5, 5, -1, 5], [5, 5, ROWS - 1, 5]),
        (range(4, 9), range(4, 9)),
        (torch.tensor([60, 2]), [60, 2]),
        (np.array([60, 2], dtype=np.uint8), [60, 2]),
        (torch.arange(ROWS) % 9 == 4, range(4, ROWS, 9)),
        ([row > 95 for row in range(ROWS)], range(96, ROWS)),
        ([], []),
        (slice(5, 5), []),
        (torch.tensor([], dtype=torch.long), []),
    ],
)
def test_several_rows_are_read_in_the_order_of_the_index(data, index, rows):
    same(data[index], torch.tensor(list(rows), dtype=torch.long))


@pytest.mark.parametrize("index", [7, np.int64(7), torch.tensor(7), 7 - ROWS])
def test_an_int_reads_one_row_without_an_axis_for_it(data, index):
    row = data[index]
    assert torch.equal(row[RESID], resid(torch.tensor([7]))[0])
    assert row[Z].shape == (2, 3)
    assert row["token"] == 7
    assert row["text"] == "row 7"


def test_tensors_are_owned_and_of_the_stored_dtype(data):
    first, second = data[:10], data[:10]
    assert first[RESID].dtype == torch.bfloat16
    assert first[Z].dtype == torch.float16
    first[RESID].zero_()
    same(second, range(10))
    assert first[Z].is_contiguous()


def test_iterating_ends_with_the_last_row(data):
    assert sum(1 for _ in data) == ROWS


def test_one_site_is_read_whole(data):
    assert torch.equal(data.read(RESID), resid(torch.arange(ROWS)))
    assert data.read("text")[3] == "row 3"


def test_all_tokens_are_read_at_once(data):
    assert torch.equal(data.tokens, tokens(torch.arange(ROWS)))


def test_sites_say_their_axes_and_places(data):
    site = data.sites[Z]
    assert list(data.sites) == [RESID, Z]
    assert site.axes == ("head", "d_head")
    assert site.shape == (2, 3)
    assert site.dtype == "float16"
    assert site.hook == "blocks.0.attn.o.hook_in"


def test_only_the_chosen_sites_are_read(path):
    assert RESID not in ActivationDataset(path, sites=Z)[0]
    assert ActivationDataset(path, sites=[Z, RESID]).sites.keys() == {Z, RESID}


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("position > 0 AND token != 17", lambda row: row % LENGTH > 0 and row % 97 != 17),
        ("text = 'row 12'", lambda row: row == 12),
        ("token < 0", lambda _: False),
    ],
)
def test_a_filter_leaves_the_rows_that_it_holds_of(path, where, kept):
    rows = [row for row in range(ROWS) if kept(row)]
    data = ActivationDataset(path, where=where)
    assert len(data) == len(rows)
    same(data[:], torch.tensor(rows, dtype=torch.long))


def test_a_filter_names_sites_as_they_are_named(path):
    data = ActivationDataset(path, where=f"`{Z}`[1] >= 50")
    assert numbers(data[:]).tolist() == list(range(50, ROWS))


def test_a_filter_may_name_sites_that_are_not_read(path):
    data = ActivationDataset(path, sites=RESID, where=f"`{Z}`[1] >= 50 AND text != 'the `x` of it'")
    assert list(data.sites) == [RESID]
    assert numbers(data[:]).tolist() == list(range(50, ROWS))


def test_a_filter_names_aliases_and_hooks(aliased):
    for name in ("z", "`z`", f"`{HOOKS[1]}`"):
        data = ActivationDataset(aliased, where=f"{name}[1] >= 15")
        assert numbers(data[:]).tolist() == list(range(15, 20))


def test_a_site_with_an_alias_is_read_by_the_name_of_its_hook(aliased):
    rows = torch.arange(20)
    data = ActivationDataset(aliased, sites=[HOOKS[0], "z", HOOKS[1]])
    assert list(data.sites) == [HOOKS[0], "z", HOOKS[1]]
    assert data.sites[HOOKS[0]].name == "resid"
    assert torch.equal(data[:][HOOKS[0]], resid(rows))
    assert torch.equal(data[:]["z"], data[:][HOOKS[1]])
    assert torch.equal(ActivationDataset(aliased).read(HOOKS[1]), heads(rows))


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("blocks.*.hook_*", [RESID]),
        ("blocks.**", [RESID, Z]),
        ("hook_[yz]", [Z]),
        (["*z", RESID], [Z, RESID]),
    ],
)
def test_sites_are_read_by_globs(path, glob, names):
    assert list(ActivationDataset(path, sites=glob).sites) == names


def test_a_glob_matches_the_names_of_hooks(aliased):
    data = ActivationDataset(aliased, sites="blocks.*.hook_*")
    assert list(data.sites) == [HOOKS[0]]
    assert torch.equal(data.read(HOOKS[0]), resid(torch.arange(20)))


def test_a_glob_reads_several_aliases_of_a_hook_under_these(tmp_path):
    path = write(tmp_path / "a.lance", 4, names=("first", "last"), hooks=(RESID, RESID))
    assert list(ActivationDataset(path, sites="blocks.**").sites) == ["first", "last"]
    assert list(ActivationDataset(path, sites="*st").sites) == ["first", "last"]


def test_a_hook_that_has_several_aliases_is_refused(tmp_path):
    path = write(tmp_path / "a.lance", 4, names=("first", "last"), hooks=(RESID, RESID))
    with pytest.raises(NotCapturedError) as caught:
        ActivationDataset(path, sites=RESID)
    assert str(caught.value) == (
        f"the data set has {RESID!r} several times, so read one of 'first', 'last'"
    )


def test_what_has_an_alias_is_listed_with_its_hook(aliased):
    with pytest.raises(NotCapturedError) as caught:
        ActivationDataset(aliased, sites=RESID)
    assert str(caught.value) == (
        f"the data set has no {RESID!r}; closest: {HOOKS[0]!r}; it has 'resid' (of "
        f"{HOOKS[0]!r}), 'z' (of {HOOKS[1]!r})"
    )


def test_extracted_aliases_are_read_by_all_names_of_their_hook(tmp_path):
    model, ids = tiny_transformer(), tokens_of(batch=2)
    extract(model, ids, {"resid": RESID}, tmp_path / "a.lance")
    data = ActivationDataset(tmp_path / "a.lance")
    for name in (RESID, data.sites["resid"].hook):
        assert torch.equal(data.read(name), data.read("resid"))


def test_filtered_rows_are_counted_anew(path):
    data = ActivationDataset(path, where="position = 2")
    assert numbers(data[[1, -1]]).tolist() == [18, 98]


def test_rows_that_are_appended_later_are_not_seen(tmp_path):
    path = write(tmp_path / "a.lance", 20)
    data = ActivationDataset(path)
    lance.write_dataset(lance.dataset(path).to_table(), path, mode="append")
    assert len(pickled(data)[:]["token"]) == 20
    assert len(ActivationDataset(path)) == 40


def test_it_can_be_pickled(path):
    data = pickled(ActivationDataset(path, where="position > 0"))
    assert numbers(data[:3]).tolist() == [1, 2, 3]


def loader_of(data, method):
    context = multiprocessing.get_context(method)
    return DataLoader(data, batch_size=30, num_workers=2, multiprocessing_context=context)


@pytest.mark.thorough
def test_spawned_workers_of_a_dataloader_read_it(data):
    data[:10]
    batches = list(loader_of(data, "spawn"))
    assert torch.equal(torch.cat([batch[Z] for batch in batches]), heads(torch.arange(ROWS)))
    assert batches[0]["text"][:2] == ["row 0", "row 1"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs forks")
@pytest.mark.filterwarnings("ignore:lance is not fork-safe")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_that_were_forked_are_told_to_be_spawned(data):
    with pytest.raises(OptionError) as caught:
        list(loader_of(data, "fork"))
    assert (
        f"{data.path!r} cannot be read in a process that was forked, since Lance's threads do not "
        "survive a fork; start workers another way: DataLoader(..., "
        "multiprocessing_context='spawn')"
    ) in str(caught.value)


@pytest.mark.thorough
def test_a_dataloader_reads_batches_at_once(data):
    sampler = BatchSampler(RandomSampler(data), 32, drop_last=False)
    batches = list(DataLoader(data, sampler=sampler, batch_size=None))
    assert sorted(np.concatenate([numbers(batch) for batch in batches])) == list(range(ROWS))


def test_a_dataloader_that_shuffles_is_warned_of_once(path):
    data = ActivationDataset(path)
    with pytest.warns(UserWarning, match="a DataLoader that shuffles") as caught:
        batches = list(DataLoader(data, batch_size=32, shuffle=True))
    assert [str(each.message) for each in caught] == [
        "a DataLoader that shuffles reads every row separately, many times slower than "
        "data.loader(32), which reads blocks of rows; iterate over that, or give "
        "DataLoader(data.loader(32), batch_size=None)"
    ]
    assert sorted(np.concatenate([numbers(batch) for batch in batches])) == list(range(ROWS))


def test_a_dataloader_that_does_not_shuffle_is_not_warned_of(path):
    assert len(list(DataLoader(ActivationDataset(path), batch_size=32))) == -(-ROWS // 32)


def test_rows_that_are_read_together_are_owned_one_by_one(data):
    rows = data.__getitems__([3, 5])
    assert torch.equal(rows[1][RESID], resid(torch.tensor([5]))[0])
    for row in rows:
        for values in filter(torch.is_tensor, row.values()):
            assert values.untyped_storage().nbytes() == values.nbytes


def test_reading_a_site_takes_little_more_memory_than_it_has(tmp_path):
    resource = pytest.importorskip("resource", reason="peaks are read from a Unix system")
    unit = 1 if sys.platform == "darwin" else 2**10
    rows = 2**20
    path = write(tmp_path / "a.lance", rows)
    data = ActivationDataset(path)
    data[:10]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data.read(Z).shape == (rows, 2, 3)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more * unit < 2**20 * 96


def test_ranges_of_rows_are_not_written_out_to_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("actctx._store.rows._READ_BYTES", 2**14)
    rows = 2**17
    data = ActivationDataset(write(tmp_path / "a.lance", rows), sites=[])
    expected = tokens(torch.arange(rows))
    for read, found in (
        (lambda: data[:10]["token"], expected[:10]),
        (lambda: data[5000::-7]["token"], expected[:5001].flip(0)[::7]),
        (lambda: data.tokens, expected),
    ):
        read()
        tracemalloc.start()  # which sees NumPy's memory, and not torch's
        assert torch.equal(read(), found)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < rows * 4


def test_the_model_that_it_came_from_is_accepted(tmp_path, mlp):
    path = write(tmp_path / "a.lance", 4, model=describe_model(mlp))
    ActivationDataset(path, model=mlp).check(mlp)


def test_another_model_is_refused_with_both_shown(tmp_path, mlp):
    path = write(tmp_path / "a.lance", 4, model={"name": "x/y", "class": "T", "fingerprint": "0"})
    found = describe_model(mlp)["fingerprint"]
    with pytest.raises(DataError) as caught:
        ActivationDataset(path, model=mlp)
    assert str(caught.value) == (
        f"'{path}' holds activations of a T 'x/y' with the fingerprint 0, but this model is a Mlp "
        f"with the fingerprint {found}; give the model that they were extracted from, or extract "
        "them from this one (if a part of the model is initialised at random each time it is "
        "loaded, such as a head that was not saved, call torch.manual_seed() before loading it; a "
        "model in another dtype is also another model)"
    )


def test_what_extract_wrote_is_what_the_model_computes(tmp_path):
    model, ids = tiny_transformer(), tokens_of(batch=6)
    extract(model, ids, [RESID, Z], tmp_path / "a.lance", dtype=torch.bfloat16)
    with capture(model, [RESID, Z], dtype=torch.bfloat16, stop=True) as acts:
        model(ids)
    data = ActivationDataset(tmp_path / "a.lance", model=model)
    assert torch.equal(data.read(RESID), acts[RESID].flatten(0, 1))
    assert torch.equal(data[:][Z], acts[Z].flatten(0, 1))
    assert torch.equal(data.tokens, ids.flatten().int())
    assert data.sites[Z].axes == acts.axes(Z)[2:]


def test_rows_may_be_sequences(tmp_path):
    model, ids = tiny_transformer(), tokens_of(batch=6)
    extract(model, ids, RESID, tmp_path / "a.lance", slice={"pos": -1})
    data = ActivationDataset(tmp_path / "a.lance")
    assert repr(data).startswith("ActivationDataset: 6 sequences, 1 site")
    assert "batch d_model" in repr(data)
    batch = next(iter(data.loader(4)))
    assert torch.equal(batch["token"], ids[batch["sequence"], -1].int())


def test_its_repr_is_a_short_table(data):
    assert repr(data).splitlines()[0] == "ActivationDataset: 100 tokens, 2 sites, 4.3 KiB"
    assert "token head d_head  (100, 2, 3)  float16" in repr(data)


def test_in_a_notebook_it_is_a_table_of_html(data):
    assert "<td" in data._repr_html_()
    assert ">bytes</th></tr>" in data._repr_html_()


def test_an_unfinished_data_set_is_read_and_says_so(tmp_path):
    data = ActivationDataset(write(tmp_path / "a.lance", 4, finished=False))
    assert repr(data).splitlines()[0].endswith(", unfinished")
    assert not data.layout.finished


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda _: None, "it does not exist"),
        (Path.mkdir, "the directory does not contain one"),
        (Path.touch, "it is a file"),
    ],
)
def test_a_path_without_a_data_set_is_refused(tmp_path, make, found):
    path = tmp_path / "b.lance"
    make(path)
    with pytest.raises(DataError) as caught:
        ActivationDataset(path)
    assert str(caught.value) == (
        f"no data set can be read from '{path}': {found}; give the path that extract() wrote to"
    )


def test_a_lance_dataset_of_another_kind_is_refused(tmp_path):
    lance.write_dataset(pa.table({"x": [1]}), tmp_path / "c.lance")
    with pytest.raises(DataError, match="is a Lance dataset, but not one of actctx"):
        ActivationDataset(tmp_path / "c.lance")


ERRORS = [
    (
        lambda data: ActivationDataset(data.path, sites="blocks.1.hook_resid_pst"),
        NotCapturedError,
        f"the data set has no 'blocks.1.hook_resid_pst'; closest: '{RESID}', '{Z}'; it "
        f"has '{RESID}', '{Z}'",
    ),
    (
        lambda data: ActivationDataset(data.path, sites="blocks.*.hook_q"),
        NotCapturedError,
        f"the data set has no 'blocks.*.hook_q'; closest: '{Z}', '{RESID}'; it has "
        f"'{RESID}', '{Z}'",
    ),
    (
        lambda data: ActivationDataset(data.path, sites=5),
        OptionError,
        f"sites= has 5, which is not a name; give names of sites, or globs, of '{RESID}', '{Z}'",
    ),
    (
        lambda data: data.read("lable"),
        NotCapturedError,
        f"the data set has no 'lable'; closest: 'label'; it has '{RESID}', '{Z}', 'token', "
        "'sequence', 'position', 'label', 'text'",
    ),
    (
        lambda data: data[100],
        SelectionError,
        "there is no row 100: the data set has 100 rows",
    ),
    (
        lambda data: data[[0, -101]],
        SelectionError,
        "there is no row -101: the data set has 100 rows",
    ),
    *(
        (
            read,
            SelectionError,
            "there is no row 18446744073709551615: the data set has 100 rows",
        )
        for read in (
            lambda data: data[2**64 - 1],
            lambda data: data[[2**64 - 1]],
            lambda data: data[np.array([2**64 - 1], dtype=np.uint64)],
            lambda data: data[torch.tensor([2**64 - 1], dtype=torch.uint64)],
        )
    ),
    (
        lambda data: data[np.array([100], dtype=np.uint8)],
        SelectionError,
        "there is no row 100: the data set has 100 rows",
    ),
    (
        lambda data: data[1.5:],
        OptionError,
        "cannot select rows by slice(1.5, None, None); give whole numbers, and no step of 0",
    ),
    (
        lambda data: data[::0],
        OptionError,
        "cannot select rows by slice(None, None, 0); give whole numbers, and no step of 0",
    ),
    (
        lambda data: data[torch.ones(99, dtype=torch.bool)],
        SelectionError,
        "the mask is for 99 rows, but the data set has 100; give one entry for each",
    ),
    (
        lambda data: data[[0.5]],
        OptionError,
        "cannot select rows by [0.5]; give a position, a slice, or a list, tensor or boolean mask "
        "of one axis",
    ),
    (
        lambda data: data["token"],
        OptionError,
        "cannot select rows by 'token'; data.read('token') reads a column of all rows",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("read", "error", "message"), ERRORS)
def test_what_cannot_be_read_is_said(data, read, error, message):
    with pytest.raises(error) as caught:
        read(data)
    assert str(caught.value) == message
