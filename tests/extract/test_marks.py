"""What of an input is read again when an extraction is resumed, and what is not."""

import functools
import itertools
import json
import tempfile

import pytest
import torch
from extracted import RESID, Read, refusal
from models import huggingface, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from actctx import DataError, Site
from actctx._extract.row_choice import RowChoice
from actctx._store.marks import Mark, Marks, decoded, encoded
from actctx.extract import extract

pytest.importorskip("lance")

COLUMNS = ["token", "sequence", "position", "_input"]
WORDS = ["one", "two", "three", "four"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "acts.lance"


@pytest.fixture(autouse=True)
def _commits(monkeypatch):
    """Commit every few rows, and sort and join every few sequences."""
    monkeypatch.setattr("actctx._extract.writer._COMMIT_BYTES", 20_000)
    monkeypatch.setattr("actctx._extract.inputs._WINDOW", 4)
    monkeypatch.setattr("actctx._extract.inputs._AT_ONCE", 16)


@pytest.fixture(scope="module")
def model():
    return huggingface("GPT2LMHeadModel")


class Stream:
    """Knows its place, and counts what is read of it."""

    def __init__(self, items):
        self.items = items
        self.at = self.read = 0

    def __iter__(self):
        while self.at < len(self.items):
            self.at += 1
            self.read += 1
            yield self.items[self.at - 1]

    def state_dict(self):
        return {"at": self.at, "kept": (torch.tensor([self.at]), b"\0")}

    def load_state_dict(self, state):
        assert state == {"at": state["at"], "kept": (torch.tensor([state["at"]]), b"\0")}
        self.at = state["at"]


def ids(count=200, most=9):
    lengths = torch.randint(1, most, (count,), generator=torch.Generator().manual_seed(0))
    return [tokens(1, int(length), seed=n)[0].tolist() for n, length in enumerate(lengths)]


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


KINDS = {
    "sequences": (ids, {"batch_size": 8}),
    "batches": (lambda: [tokens(2, 7, seed) for seed in range(24)], {}),
    "packed": (ids, {"pack": True, "context": 5, "batch_size": 8}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@functools.cache
def unbroken(model, kind):
    """Return the rows that were written without a break."""
    make, options = KINDS[kind]
    with tempfile.TemporaryDirectory() as directory:
        extract(model, make(), RESID, f"{directory}/whole.lance", **options)
        return Read(f"{directory}/whole.lance")


def half_done(model, kind, out, data=None):
    """Write about half of a data set, and return all rows there will be."""
    make, options = KINDS[kind]
    whole = unbroken(model, kind)
    extract(model, data or make(), RESID, out, max_tokens=len(whole) // 2, **options)
    return whole


def check_same(out, whole):
    read = Read(out)
    assert read.table.select(COLUMNS).equals(whole.table.select(COLUMNS))
    torch.testing.assert_close(read[RESID], whole[RESID], atol=1e-5, rtol=0)


def test_an_input_that_knows_its_place_is_put_there(model, kind, out):
    make, options = KINDS[kind]
    whole = half_done(model, kind, out, Stream(make()))
    stream = Stream(make())
    extract(model, stream, RESID, out, **options)
    check_same(out, whole)
    assert stream.read < 0.8 * len(stream.items)


def test_an_input_that_lost_its_place_is_read_from_its_start(model, kind, out):
    make, options = KINDS[kind]
    whole = half_done(model, kind, out, Stream(make()))

    class Shuffled(Stream):
        def load_state_dict(self, state):  # as those of which a buffer is lost
            self.at = max(0, state["at"] - 3)

    stream = Shuffled(make())
    extract(model, stream, RESID, out, **options)
    check_same(out, whole)
    assert stream.read > len(stream.items)


@pytest.mark.parametrize("broken", ["state_dict", "load_state_dict"])
def test_an_input_that_does_not_tell_its_place_is_read(model, out, broken, monkeypatch):
    kind = "sequences"
    make, options = KINDS[kind]

    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr(Stream, broken, fails)
    whole = half_done(model, kind, out, Stream(make()))
    extract(model, Stream(make()), RESID, out, **options)
    check_same(out, whole)


def test_an_input_that_cannot_go_on_at_its_place_is_read_from_its_start(model, out):
    class Strict(Stream):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.is_lost = bool(self.at)

        def __iter__(self):
            if self.__dict__.pop("is_lost", False):
                raise KeyError("shard")
            return super().__iter__()

    whole = half_done(model, "sequences", out, Stream(ids()))
    extract(model, Strict(ids()), RESID, out, batch_size=8)
    check_same(out, whole)


def test_an_input_that_is_put_at_its_place_has_to_leave_the_rows_on_disk(model, kind, out):
    make, options = KINDS[kind]
    half_done(model, kind, out, Stream(make()))
    other = make()[::-1]
    message = refusal(DataError, model, Stream(other), RESID, out, **options)
    assert message.startswith("the rows on disk came from another input: row ")


def test_a_stream_of_hugging_face_goes_on_at_its_place(model, out):
    datasets = pytest.importorskip("datasets")
    read = []

    def stream():
        given = datasets.Dataset.from_list([{"input_ids": each} for each in ids()])
        read.clear()
        return given.to_iterable_dataset().map(lambda row: read.append(1) or row)

    whole = half_done(model, "sequences", out, stream())
    given = stream()
    extract(model, given, RESID, out, batch_size=8)
    assert len(read) < 160
    check_same(out, whole)
    assert len([*given]) == 200  # as if nobody had put it anywhere


def test_a_shuffled_stream_of_hugging_face_is_resumed(model, out):
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_list([{"input_ids": each} for each in ids()])
    stream = given.to_iterable_dataset().shuffle(seed=0, buffer_size=50)
    extract(model, stream, RESID, out, max_tokens=450, batch_size=8)
    extract(model, stream, RESID, out, batch_size=8)
    extract(model, stream, RESID, out.parent / "whole.lance", batch_size=8)
    check_same(out, Read(out.parent / "whole.lance"))


def test_a_dataset_of_hugging_face_is_entered_by_its_index(model, out):
    datasets = pytest.importorskip("datasets")
    read = []

    def dataset(rows):
        given = datasets.Dataset.from_list([{"input_ids": each} for each in rows])
        return given.with_transform(lambda rows: read.append(len(rows["input_ids"])) or rows)

    whole = half_done(model, "sequences", out, dataset(ids()))
    read.clear()
    given = dataset(ids())
    given._fingerprint = json.loads((out / "resume.jsonl").read_text().splitlines()[-1])["dataset"]
    extract(model, given, RESID, out, batch_size=8)
    assert sum(read) < 160
    check_same(out, whole)


def test_another_dataset_of_hugging_face_is_refused(model, out):
    datasets = pytest.importorskip("datasets")

    def dataset(rows):
        return datasets.Dataset.from_list([{"input_ids": each} for each in rows])

    half_done(model, "sequences", out, dataset(ids()))
    rows = ids()
    rows[5] = [*rows[5][:-1], 49]
    message = refusal(DataError, model, dataset(rows), RESID, out, batch_size=8)
    assert message.startswith("the rows on disk came from another input: row ")
    assert "of sequence 5, " in message


@pytest.mark.parametrize("wrap", [list, iter])
def test_other_inputs_are_read_but_the_rows_of_known_ones_are_not_chosen(
    model, kind, out, wrap, monkeypatch
):
    make, options = KINDS[kind]
    whole = half_done(model, kind, out, wrap(make()))
    chosen, choose = [], RowChoice.choose

    def counted(self, batch):
        chosen.append(batch.tokens.numel())
        return choose(self, batch)

    monkeypatch.setattr(RowChoice, "choose", counted)
    extract(model, wrap(make()), RESID, out, **options)
    check_same(out, whole)
    assert sum(chosen) < 0.8 * len(whole) * (1 + (kind == "batches" and wrap is list))


@pytest.mark.parametrize("wrap", [list, iter])
def test_a_change_before_the_mark_is_refused_with_its_row(model, kind, out, wrap):
    make, options = KINDS[kind]
    half_done(model, kind, out)
    other = make()
    other[3] = tokens(2, 7, 99) if kind == "batches" else [49, 48, 47]
    message = refusal(DataError, model, wrap(other), RESID, out, **options)
    assert message.startswith("the rows on disk came from another input: row ")


@pytest.mark.parametrize("wrap", [list, iter])
def test_the_same_padded_otherwise_is_the_same_input(model, out, wrap):
    def padded(by):
        for seed in range(24):
            mask = torch.nn.functional.pad(torch.ones(2, 7, dtype=int), (0, by))
            given = torch.nn.functional.pad(tokens(2, 7, seed), (0, by))
            yield {"input_ids": given, "attention_mask": mask}

    whole = half_done(model, "batches", out, [*padded(1)])
    extract(model, wrap([*padded(2)]), RESID, out)
    check_same(out, whole)


def test_a_tensor_that_the_caller_fills_anew_is_the_input_that_it_was(model, out):
    def refilled(by=0):
        given = torch.empty(2, 7 + by, dtype=int)
        for seed in range(24):
            given[:, :7] = tokens(2, 7, seed)
            mask = torch.nn.functional.pad(torch.ones(2, 7, dtype=int), (0, by))
            yield {"input_ids": given.fmod_(50), "attention_mask": mask}

    whole = half_done(model, "batches", out, refilled())
    extract(model, refilled(by=2), RESID, out)
    check_same(out, whole)


def test_a_shorter_input_is_refused(model, kind, out):
    make, options = KINDS[kind]
    half_done(model, kind, out)
    message = refusal(DataError, model, iter(make()[:5]), RESID, out, **options)
    assert "so they came from another one" in message or "came from another input" in message


def test_an_input_that_breaks_within_what_is_known_says_so(model, out):
    def breaks():
        yield from ids()[:20]
        raise ConnectionError

    half_done(model, "sequences", out)
    with pytest.raises(ConnectionError):
        extract(model, breaks(), RESID, out, batch_size=8)


def test_a_finished_data_set_grows_from_its_marks(model, kind, out):
    make, options = KINDS[kind]
    options = {**options, "max_tokens": 180}
    extract(model, Stream(make()), RESID, out, **options)
    for most in (200, 240):
        extract(model, Stream(make()), RESID, out, **{**options, "max_tokens": most})
    extract(model, make(), RESID, out.parent / "whole.lance", **{**options, "max_tokens": 240})
    check_same(out, Read(out.parent / "whole.lance"))


def test_another_batch_size_goes_on_from_the_same_marks(model, out):
    whole = half_done(model, "sequences", out, Stream(ids()))
    stream = Stream(ids())
    with pytest.warns(UserWarning, match="up to rounding only"):
        extract(model, stream, RESID, out, batch_size=5)
    check_same(out, whole)
    assert stream.read < 200


def test_sites_are_added_from_marks(model, out, monkeypatch):
    site = "blocks.0.hook_resid_post"
    rows = extract(model, ids(), RESID, out, batch_size=8).rows

    def breaks():
        for number, each in enumerate(ids()):
            if number == 150:
                raise ConnectionError
            yield each

    with pytest.raises(ConnectionError) as broken:
        extract(model, breaks(), site, out, batch_size=8, add=True)
    assert "acts.lance.adding' keeps " in broken.value.__notes__[0]
    chosen, choose = [], RowChoice.choose
    monkeypatch.setattr(
        RowChoice, "choose", lambda self, batch: chosen.append(1) or choose(self, batch)
    )
    extract(model, ids(), site, out, batch_size=8, add=True)
    assert len(chosen) < 160
    extract(model, ids(), [RESID, site], out.parent / "whole.lance", batch_size=8)
    assert torch.equal(Read(out)[site], Read(out.parent / "whole.lance")[site])
    assert len(Read(out)) == rows


@pytest.mark.parametrize("damage", ["", "{", '{"rows": -1}\n{"items": "x"}\n[]\nnull', "\0\xff"])
def test_damaged_marks_cost_time_only(model, out, damage):
    kind = "packed"
    make, options = KINDS[kind]
    whole = half_done(model, kind, out)
    (out / "resume.jsonl").write_text(damage)
    extract(model, make(), RESID, out, **options)
    check_same(out, whole)


def test_marks_of_another_input_are_not_believed(model, out):
    half_done(model, "sequences", out, Stream(ids()))
    lines = (out / "resume.jsonl").read_text().splitlines()
    marks = [{**json.loads(line), "items": 7, "sequences": 7} for line in lines if line]
    (out / "resume.jsonl").write_text("".join(f"\n{json.dumps(mark)}" for mark in marks))
    extract(model, Stream(ids()), RESID, out, batch_size=8)
    check_same(out, unbroken(model, "sequences"))


def test_marks_beyond_the_rows_are_deleted_before_more_is_written(tmp_path):
    marks = Marks(tmp_path, 100)
    for rows in (10, 50, 90):
        marks.reach(Mark(kind="batches", rows=rows, items=rows, size=2**21 * rows))
    marks.save()
    again = Marks(tmp_path, 60)
    assert [mark.rows for mark in again.there] == [10, 50]
    again.begin()
    assert [mark.rows for mark in Marks(tmp_path, 100).there] == [10, 50]


def test_marks_lie_apart(tmp_path):
    marks = Marks(tmp_path, 100)
    for size in range(0, 2**22, 2**15):
        marks.reach(Mark(kind="batches", size=size, state={"dict": []}))
    marks.save()
    kept = Marks(tmp_path, 100).there
    sizes = [mark.size for mark in kept]
    assert sizes[-1] == 2**22 - 2**15
    steps = [late - soon for soon, late in itertools.pairwise(sizes)]
    assert steps == [2**20 - 2**15] * (len(steps) - 1) + [sizes[-1] - sizes[-2]]
    assert [mark.state is None for mark in kept] == [True] * (len(kept) - 1) + [False]


def test_states_are_read_as_they_were_written():
    state = {"a": [1, 2.5, None, True], 3: ("x", b"\0\1"), "bf": torch.ones(2, 1).bfloat16()}
    found = decoded(json.loads(json.dumps(encoded(state))))
    assert torch.equal(found.pop("bf"), state.pop("bf"))
    assert found == state
    with pytest.raises(TypeError, match="a state holds a object"):
        encoded({"a": object()})


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
        "data is a DataLoader that shuffles without a seed, so its order is another each time, and "
        "what is written could never be resumed; give it "
        "generator=torch.Generator().manual_seed(0), or give resume=False"
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
            "data is a stream of datasets that shuffles without a seed, so its order is another "
            "each time, and what is written could never be resumed; give it a seed, as in "
            "shuffle(seed=0), or give resume=False"
        )
    extract(model, given.shuffle(seed=0), RESID, out)


EMPTY = {
    "no tokens": ([[1, 2], [], [3], []], {}, 2),
    "dropped": ([[1, 2], [3], [4, 3]], {"drop": {"token": [3]}}, 1),
    "sliced away": ([[1, 2], [3]], {"slice": {"pos": slice(1, None)}}, 1),
    "packed": ([[1, 2], [], [3], []], {"pack": True, "context": 2}, 2),
    "equal lengths": (
        [{"input_ids": tokens(3, 2), "attention_mask": torch.tensor([[1, 1], [0, 0], [1, 0]])}],
        {"equal_lengths": True},
        1,
    ),
    "pooled": ([[1, 2], [3]], {"pool": "mean", "drop": {"token": [3]}}, 1),
    "a window of them": ([[]] * 64 + [[1, 2]] + [[]] * 70, {}, 134),
}


@pytest.mark.parametrize("case", EMPTY)
def test_sequences_without_rows_are_counted(model, out, case):
    data, options, count = EMPTY[case]
    assert extract(model, data, RESID, out, **options).empty == count


def test_sequences_without_rows_are_counted_of_what_is_read_now(model, out):
    data = [[1, 2], [], [3, 4], [5], [6, 7]] * 2
    options = {"drop": {"token": [5]}, "batch_size": 100}
    first = extract(
        model, [torch.tensor([each]) for each in data if each], RESID, out, max_tokens=7
    )
    assert first.empty == 0
    batch = {
        "input_ids": torch.tensor([[1, 2], [5, 5], [3, 4], [5, 5], [6, 7]]),
        "attention_mask": torch.ones(5, 2, dtype=int),
    }
    other = out.parent / "other.lance"
    assert extract(model, [batch], RESID, other, max_tokens=3, **options).empty == 1
    assert extract(model, [batch], RESID, other, **options).empty == 1


class Scaled(torch.nn.Module):
    """Yields rows of some size."""

    def __init__(self, scale):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        with torch.no_grad():
            self.embed.weight.fill_(3.0) if scale is None else self.embed.weight.mul_(scale)

    def forward(self, ids):
        return self.embed(ids)


EMBED = Site("embed", axes="batch pos d")


@pytest.mark.parametrize(
    ("scale", "ids", "what"),
    [(0.0, tokens(), "all 21 {}are 0"), (None, tokens(), "all 21 {}have the same")],
)
def test_a_site_that_is_constant_is_a_warning(out, scale, ids, what):
    with pytest.warns(UserWarning, match=what.format("rows of 'embed' that were written ")) as seen:
        extract(Scaled(scale), ids, EMBED, out)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_a_site_that_is_constant_is_a_warning_before_the_end(out):
    def breaks():
        for _ in range(400):
            yield tokens(1, 4)
        raise ConnectionError

    warned = pytest.warns(UserWarning, match="rows of 'embed' that were written have the same")
    with warned, pytest.raises(ConnectionError):
        extract(Scaled(None), breaks(), EMBED, out)


def test_rows_of_one_token_may_be_alike(out):
    extract(Scaled(1.0), torch.ones(2, 3).long(), EMBED, out)


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}])
def test_values_that_a_cast_makes_zero_are_a_warning(out, options):
    with pytest.warns(UserWarning, match="'embed'") as seen:
        extract(Scaled(3e-9), tokens(), EMBED, out, dtype=torch.float16, **options)
    assert str(seen[0].message) == (
        "'embed' loses values in its cast: 100% of the values other than 0 are 0 in float16, whose "
        "smallest is 6e-08; give dtype=torch.bfloat16 or torch.float32"
    )


def test_values_that_a_cast_makes_infinite_are_a_warning(out):
    with pytest.warns(UserWarning, match=r"\d+ values are beyond the end of float16, 65504; "):
        extract(Scaled(1e6), tokens(), EMBED, out, dtype=torch.float16, finite=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_that_a_cast_keeps_are_no_warning(out, dtype):
    extract(Scaled(1.0), tokens(), EMBED, out, dtype=dtype)
