"""Odd inputs and options: each is read, or refused in words."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from extracted import refusal
from models import tokens
from stored import Z, write
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import actctx
from actctx import DataError, OptionError, capture
from actctx.dataset import ActivationDataset
from actctx.extract import extract

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("unchecked")
LAYER = "blocks.1.hook_resid_post"
CLEAR = "a list of texts, or of sequences of token ids"
THROUGH = "an iterable over it, such as torch.utils.data.DataLoader(data, batch_size=None)"


class Mapped(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([1, 2, 3 + index])}


class Iterated(IterableDataset):
    def __iter__(self):
        return iter(Mapped()[index] for index in range(3))


def split():
    return datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})


TABLE = pa.table({"input_ids": [[1, 2], [3]]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Mapped(), f"data is one Mapped, not an iterable of inputs; give {THROUGH}"),
        (
            TensorDataset(tokens()),
            f"data is one TensorDataset, not an iterable of inputs; give {THROUGH}",
        ),
        (
            datasets.DatasetDict({"dev": split()}),
            "data is one DatasetDict, not an iterable of inputs; give one split, such as "
            "data['dev']",
        ),
        (
            datasets.IterableDatasetDict({"dev": split().to_iterable_dataset()}),
            "data is one IterableDatasetDict, not an iterable of inputs; give one split, such as "
            "data['dev']",
        ),
        (
            TABLE,
            "data is one Table, and iterating over it does not yield its rows; give "
            "data.to_pylist()",
        ),
        (
            TABLE["input_ids"],
            "data is one ChunkedArray, and iterating over it does not yield its rows; give "
            "data.to_pylist()",
        ),
        (
            TABLE.to_reader(),
            "data is one RecordBatchReader, and iterating over it does not yield its rows; give "
            "those of its batches, (row for batch in data for row in batch.to_pylist())",
        ),
        (
            TABLE.to_batches(),
            "from sequence 0 on, the input holds a RecordBatch of Arrow; give Python values, as "
            "its to_pylist() returns them",
        ),
        (
            [pa.scalar([1, 2])],
            "from sequence 0 on, the input holds a ListScalar of Arrow; give Python values, as its "
            "as_py() returns them",
        ),
        (
            pd.DataFrame({"input_ids": [[1]]}),
            "data is a table, and iterating over it yields the names of its columns; give its "
            "rows, data.to_dict('records')",
        ),
        (
            pd.DataFrame({"input_ids": [[1]]}).iterrows(),
            "from sequence 0 on, the input holds a tuple, which is not a tensor of token ids; give "
            "a tensor, or lists of ints",
        ),
        (None, f"data is one NoneType, not an iterable of inputs; give {CLEAR}"),
        (Path("x"), f"data is one PosixPath, not an iterable of inputs; give {CLEAR}"),
        (list, "data is the class 'list'; give an instance of it"),
        (
            b"text",
            "data is one bytes, not an iterable of inputs; give texts, such as [data.decode()]",
        ),
        (
            {"text": ["a", "b"]},
            "data is one dict, not an iterable of inputs; give the texts, data['text']",
        ),
        (
            [{}],
            "data holds empty dicts, none of which is input_ids, tokens or text; rename the entry "
            "with the tokens",
        ),
        (
            tokens().to("meta"),
            "data is a tensor on the meta device, which has no values; give token ids as a plain "
            "tensor",
        ),
        (
            tokens().to_sparse(),
            "data is a tensor that is sparse; give token ids as a plain tensor",
        ),
        (
            torch.nested.nested_tensor([torch.ones(2).long()], layout=torch.jagged),
            "data is a tensor that is nested; give token ids as a plain tensor",
        ),
        (
            [tokens().to("meta")],
            "the input holds a tensor on the meta device, which has no values; give a plain tensor",
        ),
        (
            [[1j]],
            "from sequence 0 on, the input holds a tensor of complex64 (1,), which are not token "
            "ids; give integers",
        ),
        (
            tokens().cfloat(),
            "from sequence 0 on, the input holds a tensor of complex64 (3, 7), which are not token "
            "ids; give integers",
        ),
        (
            np.ma.masked_array([[1, 2]], [[False, True]]),
            "the input holds a masked array, but torch ignores its mask; give array.data, with an "
            "attention_mask",
        ),
        (
            np.full((1, 2), 2**63, dtype=np.uint64),
            "from sequence 0 on, the input holds token ids of 2**63 or more; give the ids of the "
            "model's own tokenizer",
        ),
        (
            [bytearray(b"ab")],
            "from sequence 0 on, the input holds a bytearray, which are not token ids; give text",
        ),
        (
            [[np.array(1)]],
            "from sequence 0 on, the input holds a list, which is not a tensor of token ids; give "
            "a tensor, or lists of ints",
        ),
        (
            [{"input_ids": tokens(2), "attention_mask": torch.ones(2, 7, device="meta")}],
            "the input holds a tensor on the meta device, which has no values; give a plain tensor",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_input_is_refused_with_its_remedy(gpt2, out, data, message):
    assert refusal(DataError, gpt2, data, LAYER, out) == message
    assert not out.exists()


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (DataLoader(Mapped(), batch_size=None), 9),
        (DataLoader(TensorDataset(tokens()), batch_size=None), 21),
        (Iterated(), 9),
        (split(), 3),
        (datasets.IterableDatasetDict({"dev": split().to_iterable_dataset()})["dev"], 3),
        (TABLE.to_pylist(), 3),
        ((row for batch in TABLE.to_reader() for row in batch.to_pylist()), 3),
        (pd.DataFrame({"input_ids": [[1, 2], [3]]}).to_dict("records"), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_remedies_work(gpt2, out, data, rows):
    assert extract(gpt2, data, LAYER, out, progress=False).rows == rows


@pytest.mark.parametrize(
    "data",
    [
        lambda ids: ids[:, ::-1],
        lambda ids: ids.astype(">i8"),
        np.asfortranarray,
        lambda ids: ids.astype(object),
        lambda ids: ids.astype(np.uint16),
        lambda ids: [*ids[:, ::-1]],
        lambda ids: np.broadcast_to(ids[:1], ids.shape),
    ],
)
def test_arrays_of_any_layout_are_read(gpt2, out, data):
    data = data(tokens().numpy())
    extract(gpt2, data, LAYER, out, progress=False)
    wanted = [int(token) for row in data for token in row]
    stored = ActivationDataset(out)
    found = stored.tokens[torch.argsort(stored.read("sequence"), stable=True)]
    assert found.tolist() == wanted


def test_numpys_strings_are_texts(gpt2, out):
    def tokenizer(texts):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    data = np.array(["a bb", "ccc"])
    extract(gpt2, data, LAYER, out, tokenizer=tokenizer, progress=False)
    assert sorted(ActivationDataset(out).tokens.tolist()) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"slice": {"pos": slice("a")}},
            f"the slice of {LAYER!r} cannot select with slice(None, 'a', None); give an int, a "
            "slice, a range, a list of ints, a one-dimensional index tensor or a bool mask of the "
            "whole axis",
        ),
        (
            {"names": {5: LAYER}},
            "the alias 5 is not a string; give one, as in {'resid': 'blocks.0.hook_resid_post'}",
        ),
        (
            {"names": {"\ud800": LAYER}},
            "'\\ud800' cannot be the name of a column; give the site an alias, as in {'resid': "
            "...}",
        ),
        (
            {"carry": ["\ud800"]},
            "carry names '\\ud800', which cannot be the name of a column; rename it to a string "
            "without . / `",
        ),
        (
            {"tokenizer": lambda _: {"input_ids": 5}, "data": ["a"]},
            "the tokenizer returned a dict without 'input_ids'; give one that returns a dict of "
            "them, such as AutoTokenizer.from_pretrained(...)",
        ),
        (
            {"out": "\ud800"},
            "'\\ud800' is not a path: it has characters that the system does not support; give "
            "another",
        ),
        (
            {"out": "a\0b"},
            "'a\\x00b' is not a path; give a string, or a pathlib.Path, without NUL characters",
        ),
    ],
)
def test_odd_options_are_refused(gpt2, out, options, message):
    given = {"data": tokens(), "names": LAYER, "out": out, **options}
    data, names, place = (given.pop(name) for name in ("data", "names", "out"))
    assert refusal(OptionError, gpt2, data, names, place, **given) == message
    assert not out.exists()


def test_a_carried_text_that_cannot_be_written_is_refused(gpt2, out):
    data = [{"input_ids": [1, 2], "name": "\ud800"}]
    assert refusal(DataError, gpt2, data, LAYER, out, carry="name") == (
        "carry names 'name', which in sequence 0 of the input is '\\ud800', which has characters "
        "that UTF-8 cannot encode; replace them"
    )


def test_numpys_truth_values_are_options(gpt2, out):
    done = extract(gpt2, [[1, 2]], LAYER, out, equal_lengths=np.bool_(True), progress=False)  # noqa: FBT003
    assert done.rows == 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", 100)


@pytest.fixture
def data(path):
    return ActivationDataset(path)


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor(True),  # noqa: FBT003
        torch.tensor([1], device="meta"),
        torch.tensor(1, device="meta"),
        np.ma.masked_array([1, 2], [False, True]),
        bytearray(b"a"),
    ],
    ids=repr,
)
def test_odd_indices_are_refused(data, index):
    with pytest.raises(OptionError, match=r"^cannot select rows by "):
        data[index]


@pytest.mark.parametrize("name", [None, 5, ["token"], b"token"])
def test_what_is_no_name_is_not_there(data, name):
    with pytest.raises(actctx.NotCapturedError, match=r"^the data set has no "):
        data.read(name)


@pytest.mark.parametrize("model", [5, "gpt2", torch.nn.Linear])
def test_what_is_no_model_is_refused(path, data, model):
    for ask in (data.check, lambda model: ActivationDataset(path, model=model)):
        with pytest.raises(OptionError, match=r" is not a model; give a torch\.nn\.Module$"):
            ask(model)


def test_a_local_address_is_a_path(gpt2, path, tmp_path):
    assert len(ActivationDataset(f"file://{path}")) == 100
    done = extract(gpt2, tokens(), LAYER, f"file://{tmp_path}/a%20b.lance", progress=False)
    assert done.path == tmp_path / "a b.lance"


def test_a_path_that_is_too_long_holds_no_data_set(tmp_path):
    with pytest.raises(
        DataError, match=r"File name too long; give the path that extract\(\) wrote"
    ):
        ActivationDataset(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            5,
            "rename=5 is not a dict; give SAELens' hook_name for sites, as in rename={'resid': "
            "'blocks.3.hook_resid_post'}",
        ),
        ({Z: 5}, f"rename has 5 for {Z!r}, which are not both names; give strings"),
        ({5: "z"}, "rename has 'z' for 5, which are not both names; give strings"),
        ({Z: "\ud800"}, f"rename has '\\ud800' for {Z!r}, which are not both names; give strings"),
    ],
)
def test_names_for_saelens_are_strings(path, tmp_path, rename, message):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(path, sites=Z).to_saelens(tmp_path / "a", context=10, rename=rename)
    assert str(caught.value) == message


def test_rows_that_cannot_be_read_are_said_by_whoever_reads_them(gpt2, ids, out):
    extract(gpt2, ids, LAYER, out, progress=False)
    kind = b"/lance.encodings.ColumnEncoding"
    for file in (out / "data").iterdir():
        file.write_bytes(file.read_bytes().replace(kind, kind[:-4] + b"\0" + kind[-3:]))
    for read in (
        lambda: ActivationDataset(out)[:],
        lambda: next(iter(ActivationDataset(out).loader(4))),
        lambda: ActivationDataset(out, where="token > 3"),
        lambda: extract(gpt2, [ids, ids], LAYER, out, progress=False),
        lambda: extract(gpt2, ids, "blocks.0.hook_resid_post", out, add=True, progress=False),
    ):
        with pytest.raises(DataError, match=rf"^rows of '{out}' cannot be read: .*repair'$"):
            read()


@pytest.mark.parametrize(
    ("python", "typed"),
    [
        (
            "'a' exists; give resume=True to resume it, or another path",
            "'a' exists; leave out --no-resume to resume it, or give another path",
        ),
        (
            "'a' exists; give resume=True to resume it, or delete that directory",
            "'a' exists; leave out --no-resume to resume it, or delete that directory",
        ),
        ("finite=False writes it as it is", "--no-finite writes it as it is"),
        (
            "pack=True joins, context= cuts, slice= selects",
            "--pack joins, --context cuts, --slice selects",
        ),
        (
            "max_tokens=3 does not work with add=True; leave max_tokens out",
            "--max-tokens 3 does not work with --add; leave --max-tokens out",
        ),
        (
            "give dtype=torch.float16, such as drop={'position': [0]}",
            "give --dtype float16, such as --drop position=0",
        ),
        ("'/a/dtype=x/pool=mean' is a file", "'/a/dtype=x/pool=mean' is a file"),
        (
            "the model's 'max_tokens' and the texts' tokens",
            "the model's 'max_tokens' and the texts' tokens",
        ),
    ],
)
def test_the_command_line_names_options_as_they_are_typed(capsys, python, typed):
    typer = pytest.importorskip("typer")
    from actctx._cli.options import errors_as_messages

    with pytest.raises(typer.Exit), errors_as_messages("model"):
        raise OptionError(python)
    assert capsys.readouterr().err == f"error: {typed}\n"


def test_a_batch_may_be_as_large_as_one_likes(gpt2, out):
    assert extract(gpt2, [[1, 2]], LAYER, out, batch_size=10**30, progress=False).rows == 2


def in_utf8(texts):
    return {"input_ids": [[len(text.encode())] for text in texts]}


def test_a_text_that_a_tokenizer_does_not_take_is_said(gpt2, out):
    data = ["one", "\ud800"]
    assert refusal(DataError, gpt2, data, LAYER, out, tokenizer=in_utf8) == (
        "sequence 1 of the input has characters that UTF-8 cannot encode, which the tokenizer does "
        "not accept; replace them, as text.encode(errors='replace').decode() does"
    )


def test_an_alias_may_have_backticks(gpt2, ids, out):
    extract(gpt2, ids, {"a`b": LAYER}, out, progress=False)
    with capture(gpt2, LAYER) as acts:
        gpt2(ids)
    assert torch.equal(ActivationDataset(out).read("a`b"), acts.tensor.flatten(0, 1))
