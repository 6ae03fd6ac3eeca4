"""Inputs of sequences, and the rows that are resumed from marks."""

import torch
from extracted import RESID, Read
from models import tokens

COLUMNS = ["token", "sequence", "position", "_input"]


def ids(count=200, most=9):
    lengths = torch.randint(1, most, (count,), generator=torch.Generator().manual_seed(0))
    return [tokens(1, int(length), seed=n)[0].tolist() for n, length in enumerate(lengths)]


def check_same(out, whole):
    read = Read(out)
    assert read.table.select(COLUMNS).equals(whole.table.select(COLUMNS))
    torch.testing.assert_close(read[RESID], whole[RESID], atol=1e-5, rtol=0)
