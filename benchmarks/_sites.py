"""What one hooked site costs: microseconds a site and forward."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
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

Run = Callable[[Any, Tensor, int], None]


def _nothing(model: Any, tokens: Tensor, forwards: int) -> None:
    with torch.no_grad():
        for _ in range(forwards):
            model(tokens)


def _capture(model: Any, tokens: Tensor, forwards: int) -> None:
    with capture(model, NAMES):
        for _ in range(forwards):
            model(tokens)


def _hook(model: Any, tokens: Tensor, forwards: int) -> None:
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


def _name(layer: int) -> str:
    return NAMES.replace("*", str(layer))


def _trace(model: Any, tokens: Tensor, forwards: int) -> None:
    import nnsight

    for _ in range(forwards):
        with torch.no_grad(), model.trace(tokens):
            kept = nnsight.save([layer.output for layer in model.transformer.h])
        kept.clear()


CASES: dict[str, tuple[str, Run]] = {
    "bare hook that clones, plain model": (PLAIN, _hook),
    "**`capture`, plain model**": (PLAIN, _capture),
    "bare hook that clones, bridge": (BRIDGE, _hook),
    "**`capture`, bridge**": (BRIDGE, _capture),
}
if NNSIGHT not in WITHOUT:
    CASES["nnsight: `trace`, `save`"] = (NNSIGHT, _trace)


def measure_sites(setup: Setup, *, rounds: int) -> dict[str, dict[int, float]]:
    """Time forwards of a tiny model with all `resid_post` captured, less the same without.

    Cases and forwards without are interleaved, in another order each round.

    Returns:
        For each case and number of forwards in a block, the median of the microseconds that a site
        and forward took. Opening and closing the block is part of it.

    """
    setup = replace(setup, layers=LAYERS, d_model=64, heads=4, batch=1, tokens=8)
    kinds = dict.fromkeys(kind for kind, _ in CASES.values())
    models, tokens = {kind: build(setup, kind) for kind in kinds}, make_tokens(setup)
    cases: dict[str, tuple[str, Run]] = {**{kind: (kind, _nothing) for kind in kinds}, **CASES}
    if NNSIGHT in models:  # what it wraps is not run bare: it would pay for the wrapping
        cases[NNSIGHT] = (PLAIN, _nothing)
    chance = random.Random(0)  # noqa: S311  nothing secret
    taken: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in CASES}
    for _ in range(rounds):
        for forwards in (FORWARDS, 1):
            seconds = {}
            for name in chance.sample(list(cases), len(cases)):
                kind, run = cases[name]
                run(models[kind], tokens, 1)
                seconds[name] = _time(run, models[kind], tokens, forwards)
            for name, (kind, _) in CASES.items():
                more = (seconds[name] - seconds[kind]) / forwards / LAYERS * MICROSECONDS
                taken[name][forwards].append(more)
    return {
        name: {forwards: statistics.median(each) for forwards, each in found.items()}
        for name, found in taken.items()
    }


def _time(run: Run, model: Any, tokens: Tensor, forwards: int) -> float:
    start = time.perf_counter()
    run(model, tokens, forwards)
    return time.perf_counter() - start


def site_rows(found: dict[str, dict[int, float]]) -> str:
    """Write what sites cost as a Markdown table."""
    lines = [
        f"| way | µs a site, {FORWARDS} forwards a block | µs a site, one forward a block |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {way} | {us[FORWARDS]:.1f} | {us[1]:.1f} |" for way, us in found.items()]
    return "\n".join(lines)
