"""A way to get an activation, and a table of compared ways."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.ways.models import BRIDGE, Setup

Captured = Tensor | Sequence[Tensor] | None


Run = Callable[[Any, Tensor], Captured]


@dataclass(frozen=True)
class Way:
    """One way to get the activation.

    Attributes:
        name: Its name on the command line.
        title: Its name in the table.
        run: Runs it on a model and tokens, those of all batches if several are gathered. It returns
            the activation, or several, and keeps nothing else; a bare forward, which captures
            nothing, returns None.
        limit: The name of the way that it is compared with.
        model: The kind of model that it runs on.
        near: The name of a way with another implementation of attention and a close result. Ways
            with the same limit and attention yield the same result.
        label: Its name in plots; it is drawn if it has one.
        alone: Whether it makes its process slower, so that it is timed in its own.
        prepare: Makes what it needs besides the model and the tokens, before anything is measured.
        captures: Whether it yields anything, which a bare forward does not.

    """

    name: str
    title: str
    run: Run
    limit: str
    model: str = BRIDGE
    near: str = ""
    label: str = ""
    alone: bool = False
    prepare: Callable[[Setup], object] | None = None
    captures: bool = True


bare_way = partial(Way, captures=False)
"""Makes a way that captures nothing, as a limit for others."""


USUAL = Setup()


@dataclass(frozen=True)
class Table:
    """Ways that are compared with each other.

    Attributes:
        name: Its name on the command line.
        title: What the ways do.
        ways: The ways, in the order of the table.
        setup: The model and how it runs.
        varied: The fields of the setup that the table is about, which a quick run keeps.
        rounds: The number of new processes to time in; none if only memory is measured.
        repeats: The number of passes over all ways in each.
        sweep: The tables that it is one point of, if it is; most have a name for that alone.
        x: Where it is among them.
        to_disk: Whether what is captured goes to disk, or comes from there, so that it is no part
            of what a way may take of memory.
        needs: The libraries that it is left out without.

    """

    name: str
    title: str
    ways: tuple[Way, ...]
    setup: Setup = USUAL
    varied: dict[str, int] = field(default_factory=dict)
    rounds: int = 1
    repeats: int = 1
    sweep: str = ""
    x: int = 0
    to_disk: bool = False
    needs: tuple[str, ...] = ()

    @property
    def is_usual(self) -> bool:
        """Whether it is no mere point of a sweep, so that it is measured without being named."""
        return self.name != f"{self.sweep}-{self.x}"
