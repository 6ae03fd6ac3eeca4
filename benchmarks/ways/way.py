"""A way to get an activation, and a table of ways that are compared."""

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
        name: What it is chosen by.
        title: What the table calls it.
        run: Runs it on a model and tokens, those of all batches where several are gathered. It
            returns the activation, or several, and holds nothing else; a bare forward, which
            captures nothing, returns None.
        limit: The name of the way that it is compared with.
        model: The kind of model that it runs on.
        near: The name of a way with another implementation of attention, whose activation its
            own is near to. Ways that have the limit and the attention in common yield the same.
        label: What plots call it; it is drawn if it has one.
        alone: Whether it leaves a process slower than it was, so that it is timed in its own.
        prepare: Makes what it needs beside the model and the tokens, before anything is measured.
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
"""Makes a way that captures nothing, for others to be compared with."""


USUAL = Setup()


@dataclass(frozen=True)
class Table:
    """Ways that are compared with each other.

    Attributes:
        name: What all of them are chosen by.
        title: What they do.
        ways: The ways, in the order of the table.
        setup: The model that they do it with, and how.
        varied: What of the setup the table is about, so that a quick run keeps it.
        rounds: The fresh processes to time in; none if memory alone is measured.
        repeats: The passes over all ways in each.
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
