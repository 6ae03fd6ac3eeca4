"""Data sets of `extract`, read without actctx's reader, and the errors of refused calls."""

from pathlib import Path

import pytest
import torch
from models import plainly_hooked, tokens

from actctx._store.layout import Layout
from actctx._store.site_columns import as_tensor
from actctx.extract import extract

lance = pytest.importorskip("lance")  # so that the tests are skipped where there is none

TESTS = str(Path(__file__).parent)
RESID = "blocks.1.hook_resid_post"
Z = "blocks.0.attn.hook_z"


class Read:
    """A data set, read the plain way."""

    def __init__(self, path):
        dataset = lance.dataset(str(path))
        self.layout = Layout.of(dataset.schema, path)
        self.table = dataset.to_table()
        self.commits = len(dataset.get_fragments())

    def __getitem__(self, name):
        for site in self.layout.sites:
            if site.name == name:
                return as_tensor(self.table.column(site.column), site)
        return self.table.column(name).to_pylist()

    def __len__(self):
        return self.table.num_rows


def same(first, second):
    """Whether two data sets have the same rows, to the bit, and say the same about themselves."""
    return first.table.equals(second.table) and first.layout == second.layout


def resid(model, ids, **given):
    return plainly_hooked(model, ids, "blocks.1.hook_out", **given)["blocks.1.hook_out"][0]


def batches(count=60):
    return [tokens(5, 7, seed) for seed in range(count)]


def sequences(count=40, most=12):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, most, (count,), generator=generator)
    return [tokens(1, int(length), seed=n)[0] for n, length in enumerate(lengths)]


def refusal(error, *arguments, **options):
    with pytest.raises(error) as refused:
        extract(*arguments, **options)
    return str(refused.value)


class Words:
    """A tokenizer whose words are numbers."""

    eos_token_id, pad_token_id, name_or_path = 9, 0, "words"

    def __init__(self, *, first="", last=""):
        self.first, self.last = first, last

    def __call__(self, texts, **_):
        return {"input_ids": [[*map(int, (self.first + t + self.last).split())] for t in texts]}
