"""The cost of one hooked site, in microseconds per site and forward."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actctx import capture
from benchmarks.ways.models import (
    BRIDGE,
    NNSIGHT,
    PLAIN,
    WITHOUT,
    Setup,
    build,
    make_tokens,
    resid_name,
)

LAYERS = 24
FORWARDS = 50
MICROSECONDS = 1e6
MORE = 10
"""The factor of further rounds for a transformer's forward, whose time varies."""


@dataclass(frozen=True)
class Subject:
    """The hooked model.

    Attributes:
        model: The model.
        given: Its input.
        names: The names of its sites.
        places: The modules and hook points of its sites.

    """

    model: Any
    given: Tensor
    names: str
    places: list[Any]


def _transformer(setup: Setup, kind: str) -> Subject:
    model = build(setup, kind)
    names = [resid_name(layer) for layer in range(LAYERS)]
    places = [model.hook_dict[name] for name in names] if kind == BRIDGE else model.transformer.h
    return Subject(model, make_tokens(setup), "blocks.*.hook_resid_post", list(places))


def _blocks(setup: Setup, kind: str) -> Subject:
    """Make blocks that do nothing, so that only the hooks are timed.

    In a transformer's forward, hooks take a twentieth of the time, less than its variation.
    """
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.HookedRootModule import HookedRootModule

    class Blocks(HookedRootModule if kind == BRIDGE else nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                HookPoint() if kind == BRIDGE else nn.Identity() for _ in range(LAYERS)
            )

        def forward(self, activation: Tensor) -> Tensor:
            for block in self.blocks:
                activation = block(activation)
            return activation

    model: Any = Blocks()
    if kind == BRIDGE:
        model.setup()
    elif kind == NNSIGHT:
        from nnsight import NNsight

        model = NNsight(model)
    chance = torch.Generator().manual_seed(setup.seed)
    given = torch.rand(setup.batch, setup.tokens, setup.d_model, generator=chance)
    return Subject(model, given, "blocks.*", list(model.blocks))


Run = Callable[[Subject, int], Iterable[Tensor]]
"""Runs this many forwards, and returns the kept values of the last or of all of them."""


def _nothing(subject: Subject, forwards: int) -> Iterable[Tensor]:
    with torch.no_grad():
        for _ in range(forwards):
            subject.model(subject.given)
    return []


def _capture(subject: Subject, forwards: int) -> Iterable[Tensor]:
    with capture(subject.model, subject.names) as acts:
        for _ in range(forwards):
            subject.model(subject.given)
    return acts.values()  # not read here, since joining forwards is not part of a site


def _hook(subject: Subject, forwards: int) -> Iterable[Tensor]:
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, activation: Tensor) -> None:
        kept.append(activation.clone())

    with ExitStack() as hooks:
        for place in subject.places:
            hooks.callback(place.register_forward_hook(keep).remove)
        _nothing(subject, forwards)
    return kept


def _trace(subject: Subject, forwards: int) -> Iterable[Tensor]:
    import nnsight

    kept: list[list[Tensor]] = []
    for _ in range(forwards):
        with torch.no_grad(), subject.model.trace(subject.given):
            outputs = nnsight.save([place.output for place in subject.places])
        kept.append(outputs)
    return kept[-1]


CASES: dict[str, tuple[str, Run]] = {
    "bare hook that clones, plain model": (PLAIN, _hook),
    "**`capture`, plain model**": (PLAIN, _capture),
    "bare hook that clones, bridge": (BRIDGE, _hook),
    "**`capture`, bridge**": (BRIDGE, _capture),
}
if NNSIGHT not in WITHOUT:
    CASES["nnsight: `trace`, `save`"] = (NNSIGHT, _trace)

SUBJECTS = {FORWARDS: _blocks, 1: _transformer}
"""The hooked models, by the number of forwards in a block."""


def measure_sites(setup: Setup, *, rounds: int) -> dict[str, dict[str, float]]:
    """Time forwards with all sites captured, minus the same forwards without.

    Cases and forwards without captures are interleaved, in another order each round. Processor time
    is counted.

    Returns:
        For each case and number of forwards in a block, the microseconds that a site and forward
        took: the difference of the lower quartiles. Opening and closing the block is part of it.

    Raises:
        RuntimeError: The cases of a model keep different activations.

    """
    setup = replace(setup, layers=LAYERS, d_model=64, heads=4, batch=1, tokens=8)
    kinds = dict.fromkeys(kind for kind, _ in CASES.values())
    chance = random.Random(0)  # noqa: S311  nothing secret
    found: dict[str, dict[str, float]] = {name: {} for name in CASES}
    for forwards, make in SUBJECTS.items():
        subjects = {kind: make(setup, kind) for kind in kinds}
        _check_alike(subjects)
        taken: dict[str, list[float]] = defaultdict(list)
        without: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds if forwards > 1 else rounds * MORE):
            for name in chance.sample(list(CASES), len(CASES)):
                kind, run = CASES[name]
                run(subjects[kind], 1)
                taken[name].append(_time(run, subjects[kind], forwards))
                bare = subjects[_bare(kind)]
                without[_bare(kind)].append(_time(_nothing, bare, forwards))
        for name, (kind, _) in CASES.items():
            seconds = _quick(taken[name]) - _quick(without[_bare(kind)])
            found[name][str(forwards)] = seconds / (forwards * LAYERS) * MICROSECONDS
    return found


def _bare(kind: str) -> str:
    """Return the bare subject: a model wrapped by nnsight would include the cost of wrapping."""
    return PLAIN if kind == NNSIGHT else kind


def _quick(seconds: list[float]) -> float:
    """Return the lower quartile, which is least affected by other load on the machine."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _check_alike(subjects: dict[str, Subject]) -> None:
    for model in (PLAIN, BRIDGE):
        cases = [(kind, run) for kind, run in CASES.values() if _bare(kind) == model]
        kept = [list(run(subjects[kind], 1)) for kind, run in cases]
        if not all(len(each) == LAYERS and all(map(torch.equal, each, kept[0])) for each in kept):
            raise RuntimeError(f"the ways to capture from a {model} model keep different things")


def _time(run: Run, subject: Subject, forwards: int) -> float:
    start = time.process_time()
    run(subject, forwards)
    return time.process_time() - start


def site_rows(found: dict[str, dict[str, float]]) -> str:
    """Write the cost of sites as a Markdown table."""
    lines = [
        f"| way | µs per site, {FORWARDS} forwards per block | µs per site, one per block |",
        "| --- | ---: | ---: |",
    ]
    for way, us in found.items():
        many, one = (f"{us[n]:.1f}" if us[n] > 0 else "lost in noise" for n in (str(FORWARDS), "1"))
        lines.append(f"| {way} | {many} | {one} |")
    return "\n".join(lines)
