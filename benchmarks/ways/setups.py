"""The setup of each table, and the tables that do not apply to a model."""

from dataclasses import asdict, replace
from typing import Any

from benchmarks.ways.generate import GENERATE_TABLE, STEPS
from benchmarks.ways.load import LOAD_TABLE
from benchmarks.ways.models import Setup, of_model
from benchmarks.ways.way import USUAL, Table

QUICK = Setup(batch=2, tokens=128, heads=4, d_model=256, vocab=1001, context=2048)
SIZES = ("layers", "heads", "d_model", "vocab")
"""The fields of a setup that a loaded model provides."""


def setup_of(table: Table, *, quick: bool, **given: Any) -> Setup:
    """Combine the setup of a table with the given options; what the table varies is kept."""
    kept: dict[str, Any] = given | table.varied
    setup = of_model(replace(QUICK if quick else table.setup, **kept))
    return (
        setup if setup.model else replace(setup, context=max(setup.context, _reach(table, setup)))
    )


def why_not(table: Table, setup: Setup) -> str:
    """Explain why a table cannot be measured with the model and device of a setup, if it cannot."""
    if table.name == LOAD_TABLE.name and setup.device != "cpu":
        return "it reads into the memory of the CPU"
    if table.sweep == "asked" and table.x >= setup.layers:
        return f"it asks for {table.x} layers below the last, the model has {setup.layers}"
    if _reach(table, setup) > setup.context:
        return f"it needs {_reach(table, setup)} positions, the model has {setup.context}"
    usual, has = asdict(USUAL), asdict(setup)
    own = {what: n for what, n in asdict(table.setup).items() if n != usual[what]} | table.varied
    other = [what for what in SIZES if what in own and own[what] != has[what]]
    if setup.model and other:
        its_own, theirs = (", ".join(f"{of[what]} {what}" for what in other) for of in (own, has))
        return f"it is of a model of {its_own}, {setup.model} has {theirs}"
    return ""


def _reach(table: Table, setup: Setup) -> int:
    """Return the number of positions of a sequence."""
    return setup.tokens + (STEPS if table.name == GENERATE_TABLE.name else 0)
