"""The command: `python -m benchmarks`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring.devices import meter_of
from benchmarks.measuring.machine import machine
from benchmarks.measuring.measure import ProbeError, measure_memory, measure_time, probe, say
from benchmarks.measuring.probe import Order
from benchmarks.measuring.sites import FORWARDS, site_rows
from benchmarks.reporting.findings import Findings, FindingsError
from benchmarks.reporting.plots import draw
from benchmarks.reporting.report import (
    Result,
    disk_rows,
    find_disagreement,
    find_regressions,
    gather_rows,
    rows,
)
from benchmarks.reporting.targets import site_targets, targets
from benchmarks.ways.models import WITHOUT, Setup
from benchmarks.ways.setups import QUICK, setup_of, why_not
from benchmarks.ways.sweeps import SWEEPS
from benchmarks.ways.tables import TABLES, WAYS
from benchmarks.ways.way import Table, Way

QUICK_CASES = (
    "filter-stop",
    "capture-stop",
    "plain-bridge",
    "plain-hidden",
    "plain-capture-stop",
    "gather-64-capture",
)
OTHERS = {
    "sites": "microseconds per hooked site and forward",
    "checks": "microseconds of type checks",
}
USUAL = tuple(name for name, table in TABLES.items() if table.is_usual)
CASES = ", ".join([*USUAL, *SWEEPS, *OTHERS])
CHOSEN_IN = {way.name: name for name in reversed(TABLES) for way in TABLES[name].ways}
"""The table for a way that is requested alone: the first that has it."""


def main(
    *,
    case: Annotated[
        list[str] | None, typer.Option(help=f"A table or a way; repeatable. Tables: {CASES}.")
    ] = None,
    list_cases: Annotated[
        bool, typer.Option("--list", help="List all tables and their ways, and exit.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only check that everything works and fits, with tiny sizes."),
    ] = False,
    model: Annotated[
        str,
        typer.Option(help="The name or path of a Hugging Face model. By default random weights."),
    ] = Setup.model,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences.")] = None,
    tokens: Annotated[int | None, typer.Option(min=8, help="Tokens per sequence.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="The number of new processes to time in.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="The number of passes in each process.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="The number of torch's threads.")
    ] = Setup.threads,
    device: Annotated[str, typer.Option(help="Device of the model, such as cuda.")] = Setup.device,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="A folder for plots of everything in --json, or of this run. Without --case, "
            "sweeps are measured too."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="A file for the results. Its other tables, and other ways of the same tables, are "
            "kept.",
        ),
    ] = None,
) -> None:
    """Measure the cost of capturing activations of a model like GPT-2 small.

    Each way's extra peak memory is measured in its own process, and its time relative to a bare
    forward that is stopped where capture(stop=True) ends it. See benchmarks/README.md.
    """
    if list_cases:
        print(*_listing(), sep="\n")
        return
    if quick and model:
        raise typer.BadParameter("a quick run has its own tiny model; leave out --quick or --model")
    if quick and plot and any(plot.glob("*.png")):
        raise typer.BadParameter(
            f"{plot} has plots, which those of a quick run would replace; give another folder",
            param_hint="--plot",
        )
    try:
        meter_of(device)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    asked = case or [*(QUICK_CASES if quick else USUAL), *OTHERS, *(SWEEPS if plot else ())]
    runs = _given(rounds=1) if quick else _given(rounds=rounds, repeats=repeats)
    given: dict[str, Any] = {"threads": threads, "device": device, "model": model}
    given |= {} if quick else _given(batch=batch, tokens=tokens)
    chosen = [(*each, setup_of(each[0], quick=quick, **given)) for each in _chosen(asked)]
    chosen = [each for each in chosen if _can_be_measured(each[0], each[2])]
    try:
        findings = Findings(json_file, quick=quick, device=device)
        for table, _, setup in chosen:
            findings.check(table, setup)
    except FindingsError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from None
    faults: list[str] = []
    for table, ways, setup in chosen:
        faults += _measure(table, ways, setup, findings, quick=quick, **runs)
    faults += _measure_others(asked, findings, quick=quick)
    if plot:
        drawn = ", ".join(draw(findings.tables, plot))
        print(f"drawn in {plot}: {drawn or 'nothing, since plots need plain or a sweep'}\n")
    print(", ".join(f"{what} {found}" for what, found in machine(device).items()))
    if faults:
        sys.exit("\n".join(faults))


def _can_be_measured(table: Table, setup: Setup) -> bool:
    """Say why a table is skipped, if it is."""
    missing = [library for library in table.needs if find_spec(library) is None]
    how = "docs/benchmarks.md says how"
    why = f"not installed: {', '.join(missing)}; {how}" if missing else why_not(table, setup)
    if why:
        print(f"{table.name} is skipped: {why}\n")
    without = sorted({way.model for way in table.ways} & WITHOUT)
    if without:
        print(f"{table.name} is without ways of {' and '.join(without)}: not installed\n")
    return not why


def _measure(
    table: Table,
    ways: Sequence[Way],
    setup: Setup,
    findings: Findings,
    *,
    quick: bool,
    rounds: int | None = None,
    repeats: int | None = None,
) -> list[str]:
    """Measure a table, memory first, and return its failures."""
    processes = 2 if setup.device == "cpu" else 1  # importing takes longer than running
    results = measure_memory(setup, [way.name for way in ways], processes=processes)
    faults = [f"{each.way}: {each.failed}" for each in results if each.failed]
    limits = {way.limit for way in ways}
    lost = limits & {each.way for each in results if each.failed or each.does_not_fit}
    if lost:
        return [*faults, f"{table.name}: nothing to compare with: {', '.join(lost)} did not run"]
    disagreement = find_disagreement(results)
    if disagreement:
        return [*faults, f"{table.name}: nothing can be compared: {disagreement}"]
    stay = _keep(table, setup, results, findings)
    if table.rounds:
        runs = rounds or table.rounds
        passes = min(2, table.repeats) if quick else repeats or table.repeats
        try:
            measure_time(setup, results, rounds=runs, repeats=passes)
        except ProbeError as error:
            faults.append(f"{table.name}: {error}")
        stay = _keep(table, setup, results, findings)
    if stay:
        print(f"--json keeps the earlier results, which are more complete: {', '.join(stay)}\n")
    if not quick and table.is_usual:
        verdicts = targets(results, batches=setup.batches)
        print(*(f"- {verdict}\n" for verdict in verdicts), sep="")
    return [*faults, *(find_regressions(results) if quick else [])]


def _keep(table: Table, setup: Setup, results: list[Result], findings: Findings) -> list[str]:
    """Write and print the results so far, and return the ways with better results in the file."""
    stay = findings.put_results(table, setup, results)
    sizes = f"{setup.batch} x {setup.tokens} tokens, {setup.layers} layers"
    passes = max(len(result.seconds) for result in results)
    how = f"{setup.device}, {setup.threads} threads, {passes} passes"
    print(f"{table.title}: {setup.model or 'random weights'}, {sizes}, {how}\n")
    if table.to_disk:
        print(disk_rows(results), end="\n\n")
    else:
        gathers = setup.batches > 1
        print(gather_rows(results, setup.batches) if gathers else rows(results), end="\n\n")
    if all(result.peak_bytes is None for result in results):
        print("Memory was not measured: this system has no /proc/self/clear_refs to reset peaks.")
    return stay


def _measure_others(asked: Sequence[str], findings: Findings, *, quick: bool) -> list[str]:
    """Measure the small tables, always on the CPU with a tiny model."""
    faults = []
    for name, measure in (("sites", _measure_sites), ("checks", _measure_checks)):
        if name in asked:
            say(name)
            try:
                measure(findings, quick=quick)
            except ProbeError as error:
                faults.append(f"{name}: {error}")
    return faults


def _measure_sites(findings: Findings, *, quick: bool) -> None:
    found = probe(Order(replace(QUICK, threads=1), tiny="sites", repeats=2 if quick else 12))
    findings.put("sites", {"microseconds": found})
    print(site_rows(found), *site_targets(found, FORWARDS), sep="\n", end="\n\n")


def _measure_checks(findings: Findings, *, quick: bool) -> None:
    found = probe(Order(replace(QUICK, threads=1), tiny="checks", repeats=2 if quick else 5))
    findings.put("checks", found)
    print(
        "checks: {site:.1f} us per site and shape, {field:.0f} us per field and block\n".format(
            **found
        )
    )


def _given(**options: int | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _chosen(cases: Iterable[str]) -> Iterator[tuple[Table, list[Way]]]:
    """Put the requested ways in the order of their tables, with their limits."""
    asked = set(cases)
    unknown = sorted(asked - {*TABLES, *SWEEPS, *WAYS, *OTHERS})
    lacking = sorted({WAYS[case].model for case in asked & {*WAYS}} & WITHOUT)
    if unknown:
        known = f"choose from {CASES}, or a way of them, which --list lists"
        raise typer.BadParameter(
            f"there is no case {', '.join(unknown)}; {known}", param_hint="--case"
        )
    if lacking:
        why = f'not installed: {", ".join(lacking)}; pip install -e ".[bench]"'
        raise typer.BadParameter(why, param_hint="--case")
    for table in TABLES.values():
        whole = bool(asked & {table.name, table.sweep})
        ways = [
            way
            for way in table.ways
            if (whole or (way.name in asked and CHOSEN_IN[way.name] == table.name))
            and way.model not in WITHOUT
        ]
        limits = {way.limit for way in ways}
        if ways:
            yield table, [way for way in table.ways if way in ways or way.name in limits]


def _listing() -> Iterator[str]:
    """List everything that can be chosen."""
    for table in TABLES.values():
        swept = f" (of {table.sweep})" if table.sweep else ""
        yield f"{table.name}{swept}: {table.title}"
        for way in table.ways:
            if CHOSEN_IN[way.name] == table.name:
                yield f"    {way.name}: {way.title.replace('*', '')}"
    for name, why in OTHERS.items():
        yield f"{name}: {why}"


if __name__ == "__main__":
    typer.run(main)
