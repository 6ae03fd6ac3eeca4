"""What of an input is read again when an extraction is resumed, and what is not."""

import functools
import itertools
import json
import tempfile

import pytest
import torch
from extracted import RESID, Read, refusal
from marked import check_same, ids
from models import tokens

from actctx import DataError
from actctx._extract.row_choice import RowChoice
from actctx._store.marks import Mark, Marks, decoded, encoded
from actctx.extract import extract

pytest.importorskip("lance")
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("small_commits")]


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
    assert "so they came from another input" in message or "came from another input" in message


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
    with pytest.warns(UserWarning, match="only up to rounding"):
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
