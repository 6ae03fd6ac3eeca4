"""The ways beside SAELens yield the same, tiny as they are here."""

from dataclasses import replace

import pytest

pytest.importorskip("sae_lens")
from benchmarks.measuring.devices import meter_of
from benchmarks.measuring.probe import measure_memory
from benchmarks.reporting.report import Result, find_disagreement
from benchmarks.ways.models import Setup
from benchmarks.ways.tables import TABLES

TINY = Setup(batch=2, tokens=8, layers=2, heads=4, d_model=16, vocab=50, context=64, threads=1)


@pytest.mark.filterwarnings("ignore")  # of SAELens and what it imports
@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("saelens")])
def test_all_ways_beside_saelens_yield_the_same(name):
    table, cpu = TABLES[name], meter_of("cpu")
    setup = replace(TINY, **table.varied)
    results = [Result(way.name, **measure_memory(setup, way, cpu)) for way in table.ways]
    assert find_disagreement(results) is None
    assert all(each.sha256 for each in results if not each.way.endswith("bare"))
