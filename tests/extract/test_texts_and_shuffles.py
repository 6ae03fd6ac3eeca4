"""Texts that are tokenized again, and inputs that are shuffled, when an extraction is resumed."""

import pytest
import torch
from extracted import RESID, Read, refusal
from marked import check_same, ids
from models import tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from actctx import DataError
from actctx.extract import extract

pytest.importorskip("lance")
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("small_commits")]


WORDS = ["one", "two", "three", "four"]


def texts(count=200):
    return [" ".join(WORDS[(n + k) % 4] for k in range(n % 5 + 1)) for n in range(count)]


def tokenizer(words=WORDS, cls=PreTrainedTokenizerFast):
    vocabulary = {word: number + 1 for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel({"?": 0, **vocabulary}, unk_token="?"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return cls(tokenizer_object=made, unk_token="?")  # noqa: S106


class Counted:
    """A tokenizer whose calls are counted."""

    def __init__(self, wrapped):
        self.wrapped, self.texts = wrapped, 0

    def install(self, monkeypatch):
        whole = type(self.wrapped).__call__

        def call(wrapped, given, **options):
            self.texts += len(given)
            return whole(wrapped, given, **options)

        monkeypatch.setattr(type(self.wrapped), "__call__", call)


def test_texts_that_are_known_are_not_tokenized_again(model, out, monkeypatch):
    words = tokenizer()
    rows = extract(model, texts(), RESID, out.parent / "whole.lance", tokenizer=words).rows
    options = {"batch_size": 8, "tokenizer": words}
    extract(model, iter(texts()), RESID, out, max_tokens=rows // 2, **options)
    counted = Counted(words)
    counted.install(monkeypatch)
    extract(model, iter(texts()), RESID, out, **options)
    assert counted.texts < 160
    assert len(Read(out)) == rows


def test_another_tokenizer_is_told_from_what_it_makes(model, out):
    rows = extract(model, texts(), RESID, out.parent / "whole.lance", tokenizer=tokenizer()).rows
    options = {"batch_size": 8, "max_tokens": rows // 2}
    extract(model, iter(texts()), RESID, out, tokenizer=tokenizer(), **options)
    other = tokenizer([*WORDS[::-1]])
    message = refusal(DataError, model, iter(texts()), RESID, out, batch_size=8, tokenizer=other)
    assert message.startswith("the rows on disk came from another input: row 0 is token ")
    same = tokenizer([*WORDS, "five"])  # other by itself, but not for these texts
    assert extract(model, iter(texts()), RESID, out, batch_size=8, tokenizer=same).rows == rows


def test_a_tokenizer_that_is_not_known_tokenizes_all_again(model, out):
    words, seen = tokenizer(), []

    def unknown(given):
        seen.extend(given)
        return words(given)

    options = {"batch_size": 8, "tokenizer": unknown}
    extract(model, texts(), RESID, out, max_tokens=300, **options)
    seen.clear()
    extract(model, texts(), RESID, out, **options)
    assert seen == texts()


def test_a_dataloader_that_shuffles_without_a_seed_is_refused_at_the_start(model, out):
    given = [torch.tensor(each) for each in ids(20, 2)]
    options = {"batch_size": 4, "shuffle": True}
    assert refusal(DataError, model, DataLoader(given, **options), RESID, out) == (
        "data is a DataLoader that shuffles without a seed, so its order differs each time, and "
        "the run could never be resumed; give it generator=torch.Generator().manual_seed(0), or "
        "give resume=False"
    )
    assert not out.exists()
    assert extract(model, DataLoader(given, **options), RESID, out, resume=False).rows == 20


def test_a_dataloader_that_shuffles_with_a_seed_is_resumed(model, out):
    def loader():
        generator = torch.Generator().manual_seed(0)
        return DataLoader(tokens(60), batch_size=4, shuffle=True, generator=generator)

    extract(model, loader(), RESID, out, max_tokens=200)
    extract(model, loader(), RESID, out)
    extract(model, loader(), RESID, out.parent / "whole.lance")
    check_same(out, Read(out.parent / "whole.lance"))


def test_a_stream_that_shuffles_without_a_seed_is_refused_at_the_start(model, out):
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_list([{"input_ids": [1, 2]}]).to_iterable_dataset()
    for shuffled in (given.shuffle().take(1), DataLoader(given.shuffle(), batch_size=8)):
        assert refusal(DataError, model, shuffled, RESID, out) == (
            "data is a stream of datasets that shuffles without a seed, so its order differs each "
            "time, and the run could never be resumed; give it a seed, as in shuffle(seed=0), or "
            "give resume=False"
        )
    extract(model, given.shuffle(seed=0), RESID, out)
