"""The order in which the rows of a data set are given: shuffled, divided among ranks, resumable.

# NOTE [The shuffle]
Rows that lie together are read many times faster than rows that lie apart, so they are read in
blocks of 32. An epoch permutes the blocks of the whole file, reads them pool by pool, and permutes
the rows of each pool. A pool holds thousands of blocks from everywhere in the file, so that a batch
meets few neighbours; a file that fits into one pool is permuted row by row. Where the blocks begin
is drawn anew for each epoch, so that the same rows do not travel together forever.

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
from actctx._text import counted

_BLOCK = 32
_MOST_BLOCKS = 2**22  # 32 MiB of block numbers; larger files are read in larger blocks


@dataclass(frozen=True)
class Pool:
    """Some batches, whose rows are read together.

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
        pool: The batches of a pool.
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

    def pools(self, batch: int) -> Iterator[Pool]:
        """Give what is left from a batch on: nothing, where the epoch has no more."""
        if batch >= len(self):
            return
        for number in range(batch // self.pool, -(-len(self) // self.pool)):
            pool = self._pool(number)
            yield Pool(pool.rows, pool.batches[max(batch - number * self.pool, 0) :])

    def _pool(self, number: int) -> Pool:
        first, end = self._share
        end = min(end, first + len(self) * self.batch_size)
        first += number * self.pool * self.batch_size
        places = np.arange(first, min(end, first + self.pool * self.batch_size))
        order = np.arange(len(places))
        if self.shuffle:
            order = self._random(2 + first).permutation(order)
        cuts = range(self.batch_size, len(order), self.batch_size)
        return Pool(np.sort(self._rows_at(places)), np.split(order, cuts))

    @property
    def _share(self) -> tuple[int, int]:
        """Where this rank begins and ends in what all ranks together are given."""
        first, end = (rank * self.rows // self.world_size for rank in (self.rank, self.rank + 1))
        return first, end

    def _rows_at(self, places: Int64[np.ndarray, "row"]) -> Int64[np.ndarray, "row"]:
        if not self.shuffle:
            return places
        number, within = np.divmod(places, self._block)
        whole = number < len(self._blocks)  # the rows that fill no block come last
        places = places.copy()
        places[whole] = self._blocks[number[whole]] * self._block + within[whole]
        return (places + self._shift) % self.rows

    @property
    def _block(self) -> int:
        return max(_BLOCK, -(-self.rows // _MOST_BLOCKS))

    @cached_property
    def _blocks(self) -> Int64[np.ndarray, "block"]:
        return self._random(0).permutation(self.rows // self._block)

    @cached_property
    def _shift(self) -> int:
        return int(self._random(1).integers(self.rows))

    def _random(self, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, what])


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
                f"rank={rank!r} is none of {counted(ranks, 'rank')}; they count from 0"
            )
        return number, ranks
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
