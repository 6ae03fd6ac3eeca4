"""All that is compared."""

from benchmarks._plain import PLAIN_TABLE
from benchmarks._ways import BRIDGE_TABLE, GATHER_TABLE
from benchmarks._work import WORK_TABLE

TABLES = {table.name: table for table in (BRIDGE_TABLE, PLAIN_TABLE, WORK_TABLE, GATHER_TABLE)}
WAYS = {way.name: way for table in TABLES.values() for way in table.ways}
