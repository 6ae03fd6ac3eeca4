"""The order of the rows of a data set: shuffled, divided among ranks, resumable.

# NOTE [The shuffle]
Rows that lie together are read many times faster than rows that lie apart, so they are read in
blocks of 32. An epoch permutes the blocks of the whole file and divides them into pools of one
size: at least 16 batches and 2048 blocks, unless somebody bounds them. The rows of a pool are dealt
to its batches as cards are, so that those of a block go to as many batches as they can, and no
batch is mixed less than another, the last ones included. What fits into one pool is permuted row by
row. Where the blocks begin is drawn anew for each epoch, so that the same rows do not travel
together forever.

The order is a function of the seed, the epoch and the sizes, and of nothing that was read before:
an epoch is resumed by its number and that of a batch, whoever reads, with however many threads.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64

from actctx._errors import OptionError
from actctx._store.indexing import is_int, whole_number
from actctx._store.permutation import permuted
from actctx._text import counted

BLOCK = 32
LEAST_BATCHES = 16  # of a pool without a bound
LEAST_ROWS = 2048 * BLOCK


@dataclass(frozen=True)
class Pool:
    """Some batches, whose rows are shuffled among each other.

    Attributes:
        rows: The rows to read, as they lie in the file.
        batches: For each batch, which of these it takes, in its order.

    """

    rows: Int64[np.ndarray, "row"]
    batches: list[Int64[np.ndarray, "_"]]


@dataclass(frozen=True)
class Order:
    """The order of one epoch, for one rank of several.

    Attributes:
        rows: The rows of the data set.
        batch_size: The rows of a batch.
        pool: The most batches of a pool. An epoch is divided evenly into as few pools as that
            allows, so each has at least half of it, unless all batches are fewer.
        shuffle: Whether the order is random; otherwise it is that of the file.
        drop_last: Whether to leave out a last batch that is not full, and what only some ranks
            have, so that all have as many batches.
        rank: Which of the shares to give.
        world_size: Into how many shares the epoch is divided.
        seed: What the order depends on.
        epoch: What it depends on as well.

    """

    rows: int
    batch_size: int
    pool: int
    shuffle: bool
    drop_last: bool
    rank: int
    world_size: int
    seed: int
    epoch: int

    def __len__(self) -> int:
        """Count the batches of this rank."""
        if self.drop_last:
            return self.rows // self.world_size // self.batch_size
        first, end = self._share
        return math.ceil((end - first) / self.batch_size)

    @property
    def pool_count(self) -> int:
        """The number of pools."""
        return -(-len(self) // self.pool)

    @property
    def pool_rows(self) -> int:
        """The most rows of a pool."""
        first, end = self._share
        largest = -(-len(self) // max(self.pool_count, 1))
        return min(largest * self.batch_size, end - first)

    def pools(self, batch: int) -> Iterator[Pool]:
        """Give what is left from a batch on: nothing, where the epoch has no more."""
        count, pools = len(self), self.pool_count
        if batch >= count:
            return
        for number in range(((batch + 1) * pools - 1) // count, pools):
            first, end = number * count // pools, (number + 1) * count // pools
            yield self._pool(first, end, given=max(batch - first, 0))

    def _pool(self, first: int, end: int, *, given: int) -> Pool:
        """Make the pool of some batches, without those that were given."""
        start, stop = self._share
        places = np.arange(
            start + first * self.batch_size, min(start + end * self.batch_size, stop)
        )
        turns = self._turns(places, alone=end - first == len(self))
        left = turns >= given * self.batch_size
        rows, turns = self._rows_at(places[left]), turns[left]
        by_row = np.argsort(rows, kind="stable")  # which is faster where blocks are in order
        order = np.empty_like(by_row)
        order[turns[by_row] - given * self.batch_size] = np.arange(len(order))
        cuts = range(self.batch_size, len(order), self.batch_size)
        return Pool(rows[by_row], np.split(order, cuts))

    def _turns(self, places: Int64[np.ndarray, "row"], *, alone: bool) -> Int64[np.ndarray, "row"]:
        """Return the turn of each row of a pool, which may be the only one."""
        if not self.shuffle:
            return np.arange(len(places))
        random = self._random(2 + int(places[0]))
        if alone:
            return random.permutation(len(places))
        batch = dealt(places, self.batch_size, random)
        turns = np.empty_like(places)
        turns[self._grouped(batch, random)] = np.arange(len(places))
        return turns

    def _grouped(
        self, batch: Int64[np.ndarray, "row"], random: np.random.Generator
    ) -> Int64[np.ndarray, "row"]:
        """Order the rows of a pool by their batch, and those of a batch at random."""
        small = batch.astype(np.min_scalar_type(batch.max()))  # these are sorted faster
        order = np.argsort(small, kind="stable")
        full = order[: len(order) // self.batch_size * self.batch_size]
        by_batch = full.reshape(-1, self.batch_size)
        random.permuted(by_batch, axis=1, out=by_batch)
        random.shuffle(order[len(full) :])
        return order

    @property
    def _share(self) -> tuple[int, int]:
        """Where this rank begins and ends in what all ranks together are given."""
        first, end = (rank * self.rows // self.world_size for rank in (self.rank, self.rank + 1))
        return first, end

    def _rows_at(self, places: Int64[np.ndarray, "row"]) -> Int64[np.ndarray, "row"]:
        if not self.shuffle:
            return places
        number, within = np.divmod(places, BLOCK)
        blocks = self.rows // BLOCK
        whole = number < blocks  # the rows that fill no block come last
        those = np.arange(number[0], min(number[-1] + 1, blocks))
        starts = permuted(those, blocks, self._random(0)) * BLOCK
        places = places.copy()
        places[whole] = starts[number[whole] - number[0]] + within[whole]
        return (places + self._shift) % self.rows

    @cached_property
    def _shift(self) -> int:
        return int(self._random(1).integers(self.rows))

    def _random(self, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, what])


def dealt(
    places: Int64[np.ndarray, "row"], batch_size: int, random: np.random.Generator
) -> Int64[np.ndarray, "row"]:
    """Return the batch of each row of a pool, so that each takes as few of a block as can be.

    Batches are taken in turns, which a last one that is not full misses now and then. A block is
    given what comes next, in random order; where there are fewer batches than rows in it, in random
    order from turn to turn, which keeps its neighbours apart.

    Args:
        places: The places of the rows in the order of the blocks, ascending.
        batch_size: The rows of a batch.
        random: What is drawn from.

    """
    batches = -(-len(places) // batch_size)
    last = len(places) - (batches - 1) * batch_size
    names = random.permutation(batches - (last < batch_size))
    names = np.append(names, np.arange(len(names), batches))  # one that is not full comes last
    turns = np.tile(names, (batch_size, 1))
    number = np.arange(batch_size)
    taken = np.ones_like(turns, dtype=bool)
    taken[:, -1] = (number + 1) * last // batch_size > number * last // batch_size
    run = places // BLOCK * BLOCK + places % BLOCK // batches
    found = np.empty_like(places)
    found[np.argsort(run - run[0] + random.random(len(places)))] = turns[taken]
    return found


def shuffled(rows: int, batch_size: int, *, seed: int) -> Order:
    """Shuffle all rows once."""
    return Order(
        rows=rows,
        batch_size=batch_size,
        pool=batches_of(None, batch_size, rows=rows),
        shuffle=True,
        drop_last=False,
        rank=0,
        world_size=1,
        seed=seed,
        epoch=0,
    )


def batches_of(pool: int | None, batch_size: int, *, rows: int) -> int:
    """Return the most batches of a pool of so many rows; of all rows, where it has as many."""
    if pool is None:  # each has at least half of it
        return 2 * max(LEAST_BATCHES, -(-LEAST_ROWS // batch_size))
    return max(1, pool // batch_size if pool < rows else -(-rows // batch_size))


def rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Fill in which process of a distributed group this is.

    Raises:
        OptionError: Only one of the two is given, or there is no such rank.

    """
    if (rank is None) != (world_size is None):
        raise OptionError(
            f"rank={rank} and world_size={world_size} belong together; give both or neither"
        )
    if rank is not None and world_size is not None:
        ranks = whole_number("world_size", world_size, least=1)
        number = operator.index(rank) if is_int(rank) else -1
        if not 0 <= number < ranks:
            raise OptionError(
                f"rank={rank!r} is not one of {counted(ranks, 'rank')}; they count from 0"
            )
        return number, ranks
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
