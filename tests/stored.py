"""Data sets for tests of reading: every value is known from its row."""

import numpy as np
import pytest
import torch

from actctx._store.layout import Layout
from actctx._store.site_columns import StoredSite, as_array, column_name

lance = pytest.importorskip("lance")  # so that the tests are skipped where there is none
pa = pytest.importorskip("pyarrow")

RESID = "blocks.1.hook_resid_post"
Z = "blocks.0.attn.hook_z"
HOOKS = ("blocks.1.hook_out", "blocks.0.attn.o.hook_in")
LENGTH = 16  # tokens of a sequence


def resid(rows):
    """The `d_model` activations of some rows."""
    return (rows[:, None] + torch.arange(4) / 4).bfloat16()


def heads(rows):
    """The `head d_head` activations of some rows."""
    return (rows[:, None, None] % 1000 + torch.arange(6).view(2, 3) / 8).half()


def tokens(rows):
    return (rows % 97).int()


def write(
    path, rows, *, finished=True, model=None, commits=1, names=(RESID, Z), hooks=HOOKS, width=0
):
    """Write a data set of two sites and two carried columns, of them a text of some width."""
    kinds = ((("d_model",), (4,), "bfloat16"), (("head", "d_head"), (2, 3), "float16"))
    sites = tuple(
        StoredSite(name, column_name(name), hook, *kind)
        for name, hook, kind in zip(names, hooks, kinds, strict=True)
    )
    layout = Layout(
        model=model or {"name": "tiny", "class": "Tiny", "fingerprint": "0"},
        sites=sites,
        rows="token",
        input={},
        versions={"actctx": "0.1.0"},
        carried=("label", "text"),
        finished=finished,
    )
    schema = layout.schema(pa.schema([("label", pa.int64()), ("text", pa.string())]))
    for k in range(commits):
        at = torch.arange(k * rows // commits, (k + 1) * rows // commits)
        columns = [
            pa.array(tokens(at).numpy()),
            pa.array((at // LENGTH).numpy()),
            pa.array((at % LENGTH).int().numpy()),
            pa.array((at // LENGTH).numpy()),
            pa.array((at // LENGTH % 3).numpy()),
            pa.array([f"row {row}".ljust(width) for row in at.tolist()]),
            as_array(resid(at)),
            as_array(heads(at)),
        ]
        table = pa.table(columns, schema=schema)
        lance.write_dataset(table, path, mode="append" if k else "create")
    return path


def numbers(batch):
    """The numbers of the rows of a batch."""
    return np.asarray([int(text.removeprefix("row ")) for text in batch["text"]])
