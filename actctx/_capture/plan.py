"""Plan what a forward would leave in a capture, without running it.

# NOTE [A plan is a capture]
The capture itself is opened on a stand-in of the model whose weights and activations have shapes
and no values (see `_model/shape_run.py`), and the shapes are read off what it leaves. So all that
a capture does with a slice, a mask or a dtype is done here by the same code.

What a model asks of values that are not there is answered with no, and in a second run with yes.
There is a plan where both leave the same, or where the model itself refuses one of the answers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from actctx._capture.cache_size import Held, counting_cache
from actctx._capture.forward import apart
from actctx._capture.given_masks import MASKS
from actctx._capture.opening import Opening
from actctx._capture.watched import Options, WatchedSite
from actctx._errors import ActctxError, PlanError
from actctx._model.parallel import is_cut
from actctx._model.shape_run import ShapeRun, depends_on_values
from actctx._results.activations import Activations
from actctx._results.column import Column
from actctx._results.plan import Plan, PlannedSite


@dataclass(frozen=True, eq=False)
class Asked:
    """What a plan is asked for: a capture, and a forward.

    Attributes:
        model: The model, which is left as it is.
        sites: What is captured.
        options: What holds for all sites.
        hand_over: Makes of the buffer what the capture hands back.
        args: What the forward is given by position.
        kwargs: What it is given by name.

    """

    model: nn.Module
    sites: Sequence[WatchedSite]
    options: Options
    hand_over: Callable[[Activations], Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class _Outcome:
    """What one answer to questions about values has led to.

    Attributes:
        were_asked: Whether there was a question.
        sites: What the sites would leave.
        plan: The plan; None where there was an error.
        error: The error.

    """

    were_asked: bool = False
    sites: dict[str, PlannedSite] = field(default_factory=dict)
    plan: Plan | None = None
    error: Exception | None = None


def plan_forward(asked: Asked) -> Plan:
    """Plan what a forward would leave.

    Raises:
        PlanError: It cannot be told without running the model.
        ActctxError: As for a capture of such a forward.

    """
    model = asked.model
    if is_cut(model):
        raise _refusal(model, "its weights are split over processes, which would all have to plan")
    reduced = next((site for site in asked.sites if site.reduce is not None), None)
    if reduced is not None:
        raise PlanError(
            f"{reduced.shown} cannot be planned: reduce= keeps a statistic, not a tensor; plan the "
            "capture without reduce="
        )
    first = _outcome(asked, answer=False)
    found = _agreed(model, first, _outcome(asked, answer=True)) if first.were_asked else first
    if found.plan is not None:
        return found.plan
    assert found.error is not None  # noqa: S101  there is one where there is no plan
    if isinstance(found.error, ActctxError):
        raise found.error
    raise _refusal(model, _why(found.error)) from found.error


def _agreed(model: nn.Module, first: _Outcome, other: _Outcome) -> _Outcome:
    """Return what both answers lead to; see the note above."""
    if first.plan is None or other.plan is None:
        failed, ended = (first, other) if first.plan is None else (other, first)
        is_refused = isinstance(failed.error, ActctxError) or depends_on_values(failed.error)
        return failed if is_refused or ended.plan is None else ended
    if first.sites != other.sites:
        raise _refusal(model, "what it leaves depends on values of its activations")
    if first.plan.cache_nbytes != other.plan.cache_nbytes:
        first.plan.cache_nbytes = None
    return first


def _outcome(asked: Asked, *, answer: bool) -> _Outcome:
    """Capture from a stand-in, and read off what it leaves."""
    run, outcome = ShapeRun(asked.model), _Outcome()
    sites = {site.key: _on_stand_in(run, site) for site in asked.sites}
    opening = Opening(
        run.model, [*sites.values()], asked.options, scope="context", hand_over=asked.hand_over
    )
    args, kwargs, is_guessed = _given(run, asked)
    with run.running(answer=answer) as answers, apart():
        try:
            with _counting(run, asked.options) as held, opening:
                run.model(*args, **kwargs)
            opening.finish()
        except Exception as error:  # noqa: BLE001  it is judged beside that of the other answer
            outcome.error = error
            return outcome
        finally:
            outcome.were_asked = answers.were_given
        is_guessed |= opening.is_guessed
        acts = opening.buffer
        outcome.sites = {
            column.label.key: _planned(column, sites[column.label.key], is_guessed=is_guessed)
            for column in acts.columns
        }
    outcome.plan = Plan(
        outcome.sites,
        names={key: site.place.names for key, site in sites.items()},
        missing=acts.missing,
        cache_nbytes=_count_cache(asked, answer=answer) if held is None else held.nbytes,
    )
    return outcome


def _counting(run: ShapeRun, options: Options) -> AbstractContextManager[Held | None]:
    """Count what caching everything would hold, unless the forward stops before its end."""
    return nullcontext() if options.stop else counting_cache(run.model)


def _on_stand_in(run: ShapeRun, site: WatchedSite) -> WatchedSite:
    """Watch the stand-in of a site's module.

    Raises:
        PlanError: How often it runs, and on what, depends on values.

    """
    module = run.copies[site.place.module]
    if module in run.routed:
        raise PlanError(
            f"{site.shown} cannot be planned: it runs once for each expert, on the tokens that are "
            "routed to it, whose number depends on values; leave it out of the plan"
        )
    return replace(site, place=replace(site.place, module=module))


def _given(run: ShapeRun, asked: Asked) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Copy what the forward is given; a mask without values is taken to have no padding."""
    args, kwargs = run.copied((asked.args, asked.kwargs))
    is_guessed = False
    for name, value in asked.kwargs.items():
        if name.endswith(MASKS) and isinstance(value, Tensor) and value.is_meta:
            kwargs[name] = torch.ones(value.shape, dtype=value.dtype, device=run.device)
            is_guessed = True
    return args, kwargs, is_guessed


def _planned(column: Column[Any], site: WatchedSite, *, is_guessed: bool) -> PlannedSite:
    """Read off a column what a site has left."""
    axes, outline = column.label.settle(), column.outline()
    has_rows = site.rows is not None and not site.rows.is_one_a_sequence
    return PlannedSite(
        axes=axes,
        shape=tuple(outline.shape),
        dtype=outline.dtype,
        device=torch.device(column.row(drawn=False).device),
        nbytes=column.nbytes,
        firings=len(column.firings),
        is_upper_bound=is_guessed and has_rows and site.options.mask == "attention",
    )


def _count_cache(asked: Asked, *, answer: bool) -> int | None:
    """Count what caching everything would hold, of a forward that the capture stops early."""
    with suppress(Exception):  # the rest may not run without values
        run = ShapeRun(asked.model)
        args, kwargs, _ = _given(run, asked)
        with run.running(answer=answer), apart(), counting_cache(run.model) as held:
            run.model(*args, **kwargs)
        return held.nbytes
    return None


def _refusal(model: nn.Module, why: str) -> PlanError:
    return PlanError(
        f"a forward of {type(model).__name__} cannot be planned: {why}; capture a small forward, "
        "and read acts.nbytes"
    )


def _why(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "").rstrip(".")
    if depends_on_values(error):
        return f"it depends on values of its activations, which a plan does not compute ({said})"
    return f"it raised {type(error).__name__}: {said}"
