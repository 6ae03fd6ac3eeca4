"""How well batches are mixed: at any width, at any place of an epoch, and what is said of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stored import write

from actctx._store.loader import Loader
from actctx._store.mixing import neighbours
from actctx._store.permutation import permuted
from actctx._store.rows import StoredRows
from actctx._store.shuffle import BLOCK, dealt, shuffled
from actctx._store.site_columns import StoredSite
from actctx._text import format_bytes
from actctx.dataset import ActivationDataset

LARGE = 500_000_000
LENGTH = 128  # tokens of a sequence


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ActivationDataset(write(tmp_path_factory.mktemp("data") / "a.lance", 1000))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    from benchmarks.ways.load import _write_lance

    path = tmp_path_factory.mktemp("large") / "a.lance"
    _write_lance(path, 2**18, 256)
    return path


def batches_from(order, first, count):
    found = []
    for pool in order.pools(first):
        found += [pool.rows[batch] for batch in pool.batches]
        if len(found) >= count:
            return found[:count]
    return found


def sequences(rows):
    return len(np.unique(rows // LENGTH))


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 1000, 65_537])
def test_a_permutation_puts_each_number_once(size):
    found = permuted(np.arange(size), size, np.random.default_rng(0))
    assert sorted(found) == list(range(size))


def test_a_part_of_a_permutation_is_that_of_the_whole():
    whole = permuted(np.arange(10_007), 10_007, np.random.default_rng(0))
    part = permuted(np.arange(500, 900), 10_007, np.random.default_rng(0))
    assert part.tolist() == whole[500:900].tolist()


def test_a_permutation_is_as_even_as_chance():
    size, cells = 100_003, 50
    found = permuted(np.arange(size), size, np.random.default_rng(0))
    for first, second in ((np.arange(size), found), (found[:-1], found[1:])):
        counts, *_ = np.histogram2d(first, second, bins=cells)
        expected = len(first) / cells**2
        chi = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi - cells**2) < 5 * (2 * cells**2) ** 0.5


def test_all_orders_of_few_numbers_come_as_often():
    found = [tuple(permuted(np.arange(4), 4, np.random.default_rng(k))) for k in range(480)]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 20) ** 2 / 20).sum() < 23 + 5 * 46**0.5


@pytest.mark.parametrize("batches", [3, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("last", [1, 30, 64])
@pytest.mark.parametrize("first", [0, 7])
def test_a_batch_takes_as_few_rows_of_a_block_as_can_be(first, last, batches):
    places = np.arange(first, first + (batches - 1) * 64 + last)
    batch = dealt(places, 64, np.random.default_rng(0))
    assert np.bincount(batch).tolist() == [64] * (batches - 1) + [last]
    full = batches - (last < 64)
    of_a_block = np.unique(np.stack([places // BLOCK, batch]), axis=1, return_counts=True)[1]
    assert of_a_block.max() <= -(-BLOCK // full)


def test_a_batch_takes_rows_from_anywhere_within_blocks():
    places = np.arange(32 * 4096)
    batch = dealt(places, 4096, np.random.default_rng(0))
    within = np.bincount(places[batch == 5] % BLOCK, minlength=BLOCK)
    assert np.abs(within - 128).max() < 5 * 128**0.5


@pytest.mark.parametrize("rows", [200_000, 300_000, LARGE])
@pytest.mark.parametrize("batch_size", [64, 1000, 4096])
def test_pools_hold_16_batches_and_2048_blocks(batch_size, rows):
    order = shuffled(rows, batch_size, seed=0)
    last = (order.pool_count - 1) * len(order) // order.pool_count
    for first in (0, last):
        pool = next(order.pools(first))
        assert 16 <= len(pool.batches) <= order.pool
        assert 2048 * BLOCK <= len(pool.rows) <= order.pool_rows
    assert next(order.pools(last + 1)).rows.size < len(pool.rows)


def test_rows_are_read_in_blocks():
    pool = next(shuffled(LARGE, 4096, seed=0).pools(0))
    runs = 1 + np.count_nonzero(np.diff(pool.rows) != 1)
    assert runs <= len(pool.rows) / BLOCK + 2


@pytest.mark.parametrize("rows", [200_000, LARGE])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_batches_are_mixed_evenly_from_the_first_to_the_last(rows, place):
    order = shuffled(rows, 4096, seed=0)
    full = rows // 4096
    found = batches_from(order, int(place * (full - 2)), 2)
    drawn = np.random.default_rng(0).choice(rows, 4096, replace=False)
    for batch in found:
        assert len(batch) == 4096
        assert sequences(batch) > 0.95 * sequences(drawn)
        assert neighbours(batch) < neighbours(drawn) + 0.01


def test_all_rows_as_a_pool_are_one_pool(data):
    order = data.loader(300, pool=len(data))._order
    assert [len(batch) for batch in next(order.pools(0)).batches] == [300, 300, 300, 100]


def test_each_row_comes_once_from_several_pools():
    order = shuffled(300_123, 1000, seed=3)
    assert order.pool_count == 3
    found = np.concatenate(batches_from(order, 0, len(order)))
    assert np.array_equal(np.sort(found), np.arange(300_123))


def test_what_is_left_of_an_epoch_is_what_would_have_come():
    order = shuffled(300_123, 1000, seed=3)
    whole = batches_from(order, 0, len(order))
    for given in (1, 100, 101, 250, 300):
        left = batches_from(order, given, len(order))
        assert len(left) == len(whole) - given
        assert all(map(np.array_equal, left, whole[given:]))
        some = next(order.pools(given))
        assert len(some.rows) == sum(map(len, some.batches))  # nothing that was given is read


def test_neighbours_are_rows_with_the_next_or_the_last_beside_them():
    assert neighbours(np.array([5, 9, 6, 20, 8])) == 0.8
    assert neighbours(np.array([5])) == 0


def test_mixing_is_measured_beside_a_permutation(data):
    mixing = data.loader(100).mixing
    assert mixing.pool == 1000
    assert 30 < mixing.sequences < 63  # of 63
    assert abs(mixing.sequences - mixing.permuted_sequences) < 4
    assert abs(mixing.neighbours - mixing.permuted_neighbours) < 0.1
    assert mixing.memory == data.loader(100).memory


def test_mixing_tells_of_rows_that_are_not_shuffled(data):
    mixing = data.loader(96, shuffle=False).mixing
    assert mixing.neighbours == 1
    assert mixing.sequences == 6


def test_mixing_tells_the_worse_end_of_an_epoch(data, monkeypatch):
    monkeypatch.setattr("actctx._store.mixing._SEEN", 10)
    for where in ("sequence < 3 OR position = 0", "sequence > 59 OR position = 0"):
        some = ActivationDataset(data.path, where=where)
        mixing = some.loader(10, shuffle=False).mixing
        assert (mixing.sequences, mixing.neighbours) == (1, 1)


def test_a_loader_without_rows_has_a_mixing(data):
    loader = ActivationDataset(data.path, where="position < 0").loader(16)
    assert (loader.mixing.sequences, loader.mixing.pool) == (0, 0)


def test_mixing_is_said_in_words(data):
    mixing = data.loader(96, shuffle=False).mixing
    assert str(mixing).splitlines() == [
        f"a batch of 96 rows comes from 6.0 sequences; in a permutation, "
        f"{mixing.permuted_sequences:.1f}",
        f"100.0% of its rows have a neighbour in it; in a permutation, "
        f"{mixing.permuted_neighbours:.1%}",
        f"0 rows are shuffled at a time, in {mixing.memory / 2**10:.1f} KiB",
    ]


def test_a_pool_that_is_too_small_is_warned_of(data):
    with pytest.warns(UserWarning, match="pool=") as caught:
        data.loader(64, pool=64)
    assert [str(each.message) for each in caught] == [
        "pool=64 shuffles 64 rows at a time, out of 2 blocks of neighbouring rows: 100% of the "
        "rows of a batch have a neighbour in it; give pool=1000 or more, or leave it out"
    ]
    data.loader(64, pool=1000)
    data.loader(64, pool=64, shuffle=False)


def test_a_loader_that_takes_most_of_the_memory_is_warned_of(data, monkeypatch):
    memory = data.loader(64).memory
    monkeypatch.setattr("actctx._store.mixing._machine_memory", lambda: 2**17)
    with pytest.warns(UserWarning, match="the loader will hold") as caught:
        data.loader(64)
    assert str(caught[0].message) == (
        f"the loader will hold up to {memory / 2**10:.1f} KiB, and this machine has 128.0 KiB of "
        "memory; read fewer sites with sites=, or shuffle fewer rows at a time with pool=500"
    )


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_loader_holds_the_memory_that_it_says(large):
    code = (
        "from actctx.dataset import ActivationDataset\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        f"data = ActivationDataset({str(large)!r})\n"
        "next(iter(data.loader(64)))\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = peak()\n"
        "loader = data.loader(1024, pool=2**16)\n"
        "for batch in loader: pass\n"
        "print((peak() - before) * 1024, loader.memory, data.nbytes)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, said, everything = map(int, run.stdout.split())
    assert took < said + 2**26
    assert said < everything / 2


def test_the_figures_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "read-data-sets.md").read_text()
    page = " ".join(page.split())
    order = shuffled(LARGE, 4096, seed=0)
    found = batches_from(order, 0, 64)
    drawn = np.random.default_rng(0)
    drawn = [drawn.choice(LARGE, 4096, replace=False) for _ in range(16)]
    few, all_ = (round(float(np.mean(list(map(sequences, each)))), -1) for each in (found, drawn))
    share = np.mean([neighbours(batch) for batch in found])
    assert f"{few:,.0f} sequences, those of a permutation from {all_:,.0f}" in page
    assert f"{100 * share:.1f} % of its rows" in page
    site = StoredSite("", "", "", ("d_model",), (4096,), "float16")
    numbers = {"token": torch.int32, "sequence": torch.int64, "position": torch.int32}
    rows = StoredRows("", sites=dict.fromkeys("abcd", site), others=numbers)
    memory = Loader(rows, order, workers=1, device=None).memory
    assert f"Four sites of 4096 in float16 take {format_bytes(memory)}" in page


def test_a_rank_without_batches_has_nothing_to_be_warned_of(data):
    loader = data.loader(1000, pool=50, rank=0, world_size=2, drop_last=True)
    assert (len(loader), list(loader)) == (0, [])
