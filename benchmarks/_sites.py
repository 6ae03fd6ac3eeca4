"""What one hooked site costs: microseconds a site and forward."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import BRIDGE, NNSIGHT, PLAIN, Setup, build, make_tokens
from benchmarks._plain import WITHOUT

LAYERS = 24
NAMES = "blocks.*.hook_resid_post"
FORWARDS = 50
MICROSECONDS = 1e6

Run = Callable[[Any, Tensor, int], Iterable[Tensor]]
"""Runs so many forwards, and gives what it kept of the last or of all of them."""


def _nothing(model: Any, tokens: Tensor, forwards: int) -> Iterable[Tensor]:
    with torch.no_grad():
        for _ in range(forwards):
            model(tokens)
    return []


def _capture(model: Any, tokens: Tensor, forwards: int) -> Iterable[Tensor]:
    with capture(model, NAMES) as acts:
        for _ in range(forwards):
            model(tokens)
    return acts.values()  # not read here, since joining forwards is no part of a site


def _hook(model: Any, tokens: Tensor, forwards: int) -> Iterable[Tensor]:
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, activation: Tensor) -> None:
        kept.append(activation.clone())

    plain = hasattr(model, "transformer")
    places = (
        model.transformer.h if plain else [model.hook_dict[_name(layer)] for layer in range(LAYERS)]
    )
    with ExitStack() as hooks:
        for place in places:
            hooks.callback(place.register_forward_hook(keep).remove)
        _nothing(model, tokens, forwards)
    return kept


def _name(layer: int) -> str:
    return NAMES.replace("*", str(layer))


def _trace(model: Any, tokens: Tensor, forwards: int) -> Iterable[Tensor]:
    import nnsight

    kept: list[list[Tensor]] = []
    for _ in range(forwards):
        with torch.no_grad(), model.trace(tokens):
            outputs = nnsight.save([layer.output for layer in model.transformer.h])
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


def measure_sites(setup: Setup, *, rounds: int) -> dict[str, dict[str, float]]:
    """Time forwards of a tiny model with all `resid_post` captured, less the same without.

    Cases and forwards without are interleaved, in another order each round. What is counted is the
    time of the processor.

    Returns:
        For each case and number of forwards in a block, the microseconds that a site and forward
        took: the difference of the lower quartiles. Opening and closing the block is part of it.

    Raises:
        RuntimeError: The cases of a model keep other activations than each other.

    """
    setup = replace(setup, layers=LAYERS, d_model=64, heads=4, batch=1, tokens=8)
    kinds = dict.fromkeys(kind for kind, _ in CASES.values())
    models, tokens = {kind: build(setup, kind) for kind in kinds}, make_tokens(setup)
    _check_alike(models, tokens)
    chance = random.Random(0)  # noqa: S311  nothing secret
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    bare: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for forwards in (FORWARDS, 1):
            for name in chance.sample(list(CASES), len(CASES)):
                kind, run = CASES[name]
                run(models[kind], tokens, 1)
                taken[name, forwards].append(_time(run, models[kind], tokens, forwards))
                seconds = _time(_nothing, models[_bare(kind)], tokens, forwards)
                bare[_bare(kind), forwards].append(seconds)
    return {
        name: {
            str(forwards): (
                _quick(taken[name, forwards]) - _quick(bare[_bare(CASES[name][0]), forwards])
            )
            / (forwards * LAYERS)
            * MICROSECONDS
            for forwards in (FORWARDS, 1)
        }
        for name in CASES
    }


def _bare(kind: str) -> str:
    """Name what is run bare: what nnsight wraps would pay for the wrapping."""
    return PLAIN if kind == NNSIGHT else kind


def _quick(seconds: list[float]) -> float:
    """Return the lower quartile, which other work on the machine changes least."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _check_alike(models: dict[str, Any], tokens: Tensor) -> None:
    for model in (PLAIN, BRIDGE):
        cases = [(kind, run) for kind, run in CASES.values() if _bare(kind) == model]
        kept = [list(run(models[kind], tokens, 1)) for kind, run in cases]
        alike = all(map(torch.equal, each, kept[0]) for each in kept)
        if not all(len(each) == LAYERS and alike for each in kept):
            raise RuntimeError(f"the ways to capture from a {model} model keep different things")


def _time(run: Run, model: Any, tokens: Tensor, forwards: int) -> float:
    start = time.process_time()
    run(model, tokens, forwards)
    return time.process_time() - start


def site_rows(found: dict[str, dict[str, float]]) -> str:
    """Write what sites cost as a Markdown table."""
    lines = [
        f"| way | µs a site, {FORWARDS} forwards a block | µs a site, one forward a block |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {way} | {us[str(FORWARDS)]:.1f} | {us['1']:.1f} |" for way, us in found.items()]
    return "\n".join(lines)
