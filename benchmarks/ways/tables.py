"""All tables."""

from benchmarks.ways.bridge import BRIDGE_TABLE
from benchmarks.ways.extract import EXTRACT_TABLE, FLAT_TABLE
from benchmarks.ways.gather import GATHER_TABLE, LAST_TABLE
from benchmarks.ways.generate import GENERATE_TABLE
from benchmarks.ways.load import LOAD_TABLE
from benchmarks.ways.plain import PLAIN_TABLE
from benchmarks.ways.saelens import SAELENS_EXTRACT_TABLE, SAELENS_SMALL_TABLE, SAELENS_TABLE
from benchmarks.ways.sweeps import SWEEP_TABLES
from benchmarks.ways.work import WORK_TABLE

TABLES = {
    table.name: table
    for table in (
        BRIDGE_TABLE,
        PLAIN_TABLE,
        WORK_TABLE,
        GENERATE_TABLE,
        GATHER_TABLE,
        LAST_TABLE,
        SAELENS_TABLE,
        EXTRACT_TABLE,
        FLAT_TABLE,
        SAELENS_EXTRACT_TABLE,
        SAELENS_SMALL_TABLE,
        LOAD_TABLE,
        *SWEEP_TABLES,
    )
}
WAYS = {way.name: way for table in TABLES.values() for way in table.ways}
