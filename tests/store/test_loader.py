"""Batches for training: each row once, shuffled, the same for a seed, resumed anywhere."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from stored import RESID, Z, heads, numbers, resid, write
from torch.utils.data import DataLoader, IterableDataset

from actctx import OptionError
from actctx._store.rows import StoredRows
from actctx._store.shuffle import Order
from actctx.dataset import ActivationDataset

ROWS = 1000

# A tiny data set has several pools only if they are smaller than what mixes well.
pytestmark = pytest.mark.filterwarnings("ignore:pool=")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ActivationDataset(write(tmp_path_factory.mktemp("data") / "a.lance", ROWS, commits=3))


def epoch(loader):
    return np.concatenate([numbers(batch) for batch in loader])


def order_of(rows, **options):
    alone = {"shuffle": True, "drop_last": False, "rank": 0, "world_size": 1, "seed": 0, "epoch": 0}
    return Order(rows, **{**alone, **options})


@pytest.mark.parametrize("pool", [1, 200, 10_000])
@pytest.mark.parametrize("batch_size", [7, 64, 4096])
def test_an_epoch_gives_each_row_once(data, batch_size, pool):
    given = epoch(data.loader(batch_size, pool=pool))
    assert sorted(given) == list(range(ROWS))


def test_a_batch_holds_what_its_rows_hold(data):
    for batch in data.loader(64, pool=256):
        rows = torch.from_numpy(numbers(batch))
        assert torch.equal(batch[RESID], resid(rows))
        assert torch.equal(batch["sequence"], rows // 16)


def test_batches_are_whole_but_the_last(data):
    sizes = [len(batch["token"]) for batch in data.loader(64)]
    assert sizes == [64] * 15 + [40]
    assert len(data.loader(64)) == 16


def test_drop_last_leaves_out_what_fills_no_batch(data):
    loader = data.loader(64, drop_last=True)
    assert [len(batch["token"]) for batch in loader] == [64] * 15
    assert len(loader) == 15


def test_without_shuffling_rows_come_in_their_order(data):
    assert epoch(data.loader(64, shuffle=False, pool=128)).tolist() == list(range(ROWS))


def test_a_file_that_fits_into_a_pool_is_shuffled_row_by_row(data):
    given = epoch(data.loader(64))
    neighbours = np.abs(np.diff(given)) == 1
    assert neighbours.mean() < 0.02


def test_a_batch_of_a_small_pool_comes_from_everywhere_in_the_file():
    order = order_of(10**6, batch_size=1024, pool=64)
    pool = next(order.pools(0))
    for batch in pool.batches[:4]:
        tenths = np.bincount(pool.rows[batch] * 10 // 10**6, minlength=10)
        assert tenths.min() > 50


def test_the_same_seed_gives_the_same_order_with_any_number_of_threads(data):
    orders = [epoch(data.loader(64, seed=3, pool=256, workers=n)).tolist() for n in (0, 1, 4)]
    assert orders[0] == orders[1] == orders[2]


def test_another_seed_gives_another_order(data):
    assert epoch(data.loader(64, seed=3)).tolist() != epoch(data.loader(64, seed=4)).tolist()


def test_another_epoch_gives_another_order(data):
    loader = data.loader(64, pool=128)
    first, second = epoch(loader), epoch(loader)
    assert sorted(second) == list(range(ROWS))
    assert first.tolist() != second.tolist()
    assert loader.epoch == 2


def test_the_same_rows_do_not_travel_together_in_each_epoch():
    def blocks(number):
        rows = next(order_of(10**5, batch_size=64, pool=10, epoch=number).pools(0)).rows
        return set(rows[np.diff(rows, prepend=-2) > 1] % 32)

    assert blocks(0) != blocks(1)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_rows_without_overlap_or_loss(data, world_size, shuffle, workers):
    options = {"shuffle": shuffle, "workers": workers, "pool": 64, "world_size": world_size}
    shares = [epoch(data.loader(16, rank=rank, **options)) for rank in range(world_size)]
    assert sorted(np.concatenate(shares)) == list(range(ROWS))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_with_drop_last_all_ranks_have_as_many_batches(data):
    loaders = [
        data.loader(111, drop_last=True, rank=rank, world_size=3, pool=222) for rank in range(3)
    ]
    counts = [[len(batch["token"]) for batch in loader] for loader in loaders]
    assert counts == [[111] * 3] * 3


def test_the_ranks_of_torchs_distributed_group_share_the_rows(data):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shares = []
    for rank in range(3):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:
            shares.append(epoch(data.loader(16, pool=64)))
        finally:
            torch.distributed.destroy_process_group()
    assert sorted(np.concatenate(shares)) == list(range(ROWS))
    assert [*map(len, shares)] == [333, 333, 334]


@pytest.mark.parametrize("given", [0, 1, 5, 15, 16])
def test_an_epoch_is_gone_on_with_at_any_batch(data, given):
    options = {"seed": 5, "pool": 256}
    unbroken = data.loader(64, **options)
    expected = [numbers(batch).tolist() for _ in range(2) for batch in unbroken]

    broken = data.loader(64, **options)
    got = [numbers(batch).tolist() for _, batch in zip(range(given), broken, strict=False)]
    state = json.loads(json.dumps(broken.state_dict()))

    resumed = data.loader(64, workers=0, **options)
    resumed.load_state_dict(state)
    while resumed.epoch < 2:
        got += [numbers(batch).tolist() for batch in resumed]
    assert got == expected


def test_a_state_of_the_last_batch_leaves_nothing_of_the_epoch(data):
    loader = data.loader(64)
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 16)
    resumed = data.loader(64)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert resumed.epoch == 1
    assert epoch(resumed).tolist() == epoch(loader).tolist()


@pytest.mark.parametrize("saved_at", [0, 2])
@pytest.mark.parametrize("given", [0, 2, 3])
def test_all_ranks_go_on_with_the_state_of_one(data, given, saved_at):
    def loader(rank):
        return data.loader(111, pool=222, rank=rank, world_size=3)

    assert [len(loader(rank)) for rank in range(3)] == [3, 3, 4]
    states, rows = [], []
    for rank in range(3):
        broken = loader(rank)
        for _, batch in zip(range(given), broken, strict=False):
            rows.append(numbers(batch))
        states.append(broken.state_dict())
    for rank in range(3):
        resumed = loader(rank)
        resumed.load_state_dict(states[saved_at])
        rows += [numbers(batch) for batch in resumed]
        assert resumed.epoch == 1
    assert sorted(np.concatenate(rows)) == list(range(ROWS))


def test_a_loader_can_be_pickled(data):
    loader = data.loader(64, pool=256)
    next(iter(loader))
    copy = pickle.loads(pickle.dumps(loader))  # noqa: S301  it is our own
    copy.load_state_dict(loader.state_dict())
    assert len(epoch(copy)) == ROWS - 64


def test_an_epoch_that_was_left_early_is_followed_by_the_next(data):
    loader = data.loader(64)
    next(iter(loader))
    again = data.loader(64)
    list(again)
    assert epoch(loader).tolist() == epoch(again).tolist()


def test_a_filter_leaves_its_rows_only(data):
    kept = ActivationDataset(data.path, where="position > 0 AND label = 1")
    given = epoch(kept.loader(16, pool=64))
    assert sorted(given) == [row for row in range(ROWS) if row % 16 > 0 and row // 16 % 3 == 1]


def test_batches_move_to_the_device(data):
    batch = next(iter(data.loader(16, device="meta")))
    assert batch[RESID].device.type == "meta"
    assert len(batch["text"]) == 16


def test_without_rows_there_are_no_batches(data):
    loader = ActivationDataset(data.path, where="position < 0").loader(16)
    assert len(loader) == 0
    assert not list(loader)


def test_threads_end_with_the_iteration(data):
    before = threading.active_count()
    for _ in data.loader(16, workers=3, pool=64):
        break
    list(data.loader(16, workers=3, pool=64))
    assert threading.active_count() == before


@pytest.mark.thorough
def test_a_script_may_end_in_the_middle_of_an_epoch(data):
    code = (
        "from actctx.dataset import ActivationDataset\n"
        f"batches = iter(ActivationDataset({data.path!r}).loader(16))\n"
        "next(batches)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stderr


def test_an_error_of_reading_reaches_the_one_who_iterates(tmp_path):
    data = ActivationDataset(write(tmp_path / "a.lance", 2000))
    loader = data.loader(16, pool=64)
    for file in (tmp_path / "a.lance" / "data").iterdir():
        file.write_bytes(b"")
    with pytest.raises((OSError, ValueError)):
        list(loader)


@pytest.fixture
def reads(monkeypatch):
    """The numbers of rows of the reads, as they end."""
    seen, read = [], StoredRows.read_into

    def reading(self, batch, rows, **place):
        read(self, batch, rows, **place)
        seen.append(len(rows))

    monkeypatch.setattr(StoredRows, "read_into", reading)
    return seen


def test_pools_are_read_before_they_are_asked_for(data, reads):
    batches = iter(data.loader(64, pool=64))
    next(batches)
    end = time.monotonic() + 10
    while sum(reads) < 4 * 64 and time.monotonic() < end:
        time.sleep(0.01)  # as one who trains on the batch
    assert sum(reads) >= 4 * 64
    time.sleep(0.1)
    assert sum(reads) <= 8 * 64


def test_without_threads_nothing_is_read_before_it_is_asked_for(data, reads):
    batches = iter(data.loader(64, pool=64, workers=0))
    for given in range(1, 4):
        next(batches)
        time.sleep(0.05)
        assert sum(reads) == 64 * given


def test_strings_are_counted_where_memory_is(tmp_path):
    data = ActivationDataset(write(tmp_path / "a.lance", 500, width=10_000))
    assert 500 * 10_000 < data.loader(1).memory < 500 * 10_000 * 1.1
    held = sum(map(sys.getsizeof, data.read("text"))) + data.nbytes
    assert 0.9 < data._rows.row_memory * 500 / held < 1.1
    some = ActivationDataset(data.path, where="text > 'row 3'")
    assert 0.9 < some._rows.row_memory / data._rows.row_memory < 1.1


def test_a_loader_of_a_large_file_holds_little():
    order = order_of(10**10, batch_size=4096, pool=8)
    tracemalloc.start()
    assert 7 * 4096 <= len(next(order.pools(1000)).rows) <= 8 * 4096
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


MESSAGES = [
    ({"batch_size": 0}, "batch_size=0 is too small; give 1 or more"),
    ({"batch_size": 4, "workers": -1}, "workers=-1 is too small; give 0 or more"),
    ({"batch_size": 4, "seed": None}, "seed=None is not an int; give 0 or more"),
    ({"batch_size": 4, "seed": 0.5}, "seed=0.5 is not an int; give 0 or more"),
    ({"batch_size": True}, "batch_size=True is not an int; give 1 or more"),
    ({"batch_size": 4, "pool": 1e6}, "pool=1000000.0 is not an int; give 1 or more"),
    (
        {"batch_size": 4, "rank": 0.5, "world_size": 2},
        "rank=0.5 is not one of 2 ranks; they count from 0",
    ),
    (
        {"batch_size": 4, "rank": 2, "world_size": 2},
        "rank=2 is not one of 2 ranks; they count from 0",
    ),
    (
        {"batch_size": 4, "rank": 2},
        "rank=2 and world_size=None belong together; give both or neither",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), MESSAGES)
def test_options_that_make_no_sense_are_refused(data, options, message):
    with pytest.raises(OptionError) as caught:
        data.loader(**options)
    assert str(caught.value) == message


def test_the_state_of_a_loader_of_another_order_is_refused(data):
    state = data.loader(64, seed=1).state_dict()
    with pytest.raises(OptionError) as caught:
        data.loader(64, seed=2).load_state_dict(state)
    assert str(caught.value) == (
        "the state is of a loader with seed=1, but this one has seed=2, which gives another order; "
        "create the loader with the same arguments"
    )


def test_the_pools_of_two_loaders_are_told_apart_in_rows(data):
    state = {**data.loader(4).state_dict(), "pool": 3}
    with pytest.raises(OptionError, match="a loader with pool=12, but this one has pool=131072, "):
        data.loader(4).load_state_dict(state)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (None, "None"),
        ({}, "{}"),
        ({"epoch": 1, "batch": 2}, "{'batch': 2, 'epoch': 1}"),
        ([("epoch", 1)], "[('epoch', 1)]"),
    ],
)
def test_what_is_no_state_is_refused(data, state, shown):
    with pytest.raises(OptionError) as caught:
        data.loader(64).load_state_dict(state)
    assert str(caught.value) == (
        f"{shown} is not a state of a loader; give what state_dict() returned"
    )


@pytest.mark.parametrize("name", ["epoch", "batch"])
def test_a_state_counts_from_0(data, name):
    loader = data.loader(64)
    state = loader.state_dict()
    with pytest.raises(OptionError) as caught:
        loader.load_state_dict({**state, name: -3})
    assert str(caught.value) == (
        f"the state is of {name}=-3, but they count from 0; give what state_dict() returned"
    )
    assert loader.state_dict() == state


@pytest.mark.parametrize(("rank", "most"), [(None, 16), (0, 8)])
def test_a_state_of_a_batch_behind_the_last_is_refused(data, rank, most):
    loader = data.loader(64, rank=rank, world_size=None if rank is None else 2)
    state = loader.state_dict()
    with pytest.raises(OptionError) as caught:
        loader.load_state_dict({**state, "batch": 10**6})
    assert str(caught.value) == (
        f"the state is of batch=1000000, but an epoch has no more than {most}; give what "
        "state_dict() returned"
    )
    assert loader.state_dict() == state


def test_a_device_that_is_none_is_refused(data):
    with pytest.raises(OptionError, match=r"^device='gpu' cannot hold activations: Expected one"):
        data.loader(4, device="gpu")


@pytest.mark.usefixtures("unchecked")
def test_numbers_may_be_of_numpy(data):
    loader = data.loader(np.int64(64), seed=np.int32(3), rank=np.int64(1), world_size=np.int64(2))
    assert json.loads(json.dumps(loader.state_dict()))["seed"] == 3


def test_a_loader_is_an_iterable_dataset_of_torch(data):
    loader = data.loader(64)
    assert isinstance(loader, IterableDataset)
    given = DataLoader(loader, batch_size=None)
    assert len(given) == 16
    expected = epoch(data.loader(64))
    assert epoch(given).tolist() == expected.tolist()
    assert loader.epoch == 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs forks")
@pytest.mark.filterwarnings("ignore:lance is not fork-safe")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_workers_of_a_dataloader_are_refused(data):
    loader = DataLoader(
        data.loader(64), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    with pytest.raises(OptionError) as caught:
        next(iter(loader))
    assert (
        "a loader cannot be shared by 2 workers of a DataLoader, each of which would yield all "
        "batches; it reads ahead in threads, so give DataLoader(loader, batch_size=None, "
        "num_workers=0), or iterate over it"
    ) in str(caught.value)


@pytest.mark.thorough
def test_two_iterations_of_a_loader_share_no_state(data):
    loader = data.loader(64, seed=2)
    both = [
        (numbers(one).tolist(), numbers(other).tolist())
        for one, other in zip(loader, loader, strict=True)
    ]
    assert len(both) == 16
    assert all(one == other for one, other in both)
    assert loader.epoch == 1


def test_a_state_is_that_of_the_last_iteration(data):
    loader = data.loader(64, seed=2)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    state = loader.state_dict()
    rest = [numbers(batch).tolist() for batch in first]
    assert loader.state_dict() == state
    assert (state["epoch"], state["batch"]) == (1, 1)
    assert len(rest) == 15
    resumed = data.loader(64, seed=2)
    resumed.load_state_dict(state)
    assert epoch(resumed).tolist() == epoch(second).tolist()


def test_a_state_that_is_loaded_is_left_alone_by_an_iteration_before(data):
    loader = data.loader(64)
    before = iter(loader)
    next(before)
    state = {**loader.state_dict(), "epoch": 5, "batch": 7}
    loader.load_state_dict(state)
    next(before)
    assert loader.state_dict() == state
    assert len(list(loader)) == 16 - 7


OLD = {
    "rows": ROWS,
    "batch_size": 64,
    "pool": 1290,
    "shuffle": True,
    "drop_last": False,
    "world_size": 1,
    "seed": 0,
    "epoch": 3,
    "batch": 5,
}


@pytest.mark.parametrize(("scheme", "which"), [({}, "an earlier"), ({"scheme": 3}, "another")])
def test_a_state_of_another_way_to_shuffle_is_refused(data, scheme, which):
    loader = data.loader(64)
    with pytest.raises(OptionError) as caught:
        loader.load_state_dict({**OLD, **scheme})
    assert str(caught.value) == (
        f"the state is of {which} version of actctx, which shuffled differently, so its "
        "epoch cannot be resumed; start the next one: "
        "loader.load_state_dict({**loader.state_dict(), 'epoch': 4})"
    )
    loader.load_state_dict({**loader.state_dict(), "epoch": 4})
    assert loader.epoch == 4


def test_rows_take_the_place_of_those_that_were_given(tmp_path):
    data = ActivationDataset(write(tmp_path / "a.lance", 20_000))
    loader = data.loader(100, pool=2000, workers=2)
    assert loader.memory < data._rows.row_memory * 20_000 / 4
    for batch in loader:
        rows = torch.from_numpy(numbers(batch))
        assert torch.equal(batch[RESID], resid(rows))
        assert torch.equal(batch[Z], heads(rows))
        assert torch.equal(batch["sequence"], rows // 16)
