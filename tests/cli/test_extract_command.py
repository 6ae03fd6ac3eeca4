"""The command line: `actctx extract` and `actctx info`."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from commands import RESID, actctx
from extracted import Read
from models import plainly_hooked

from actctx import OptionError
from actctx._cli.corpus import read_corpus
from actctx._model.fingerprint import fingerprint, versions
from actctx.dataset import ActivationDataset
from actctx.extract import extract

pytest.importorskip("lance")

TEXTS = ["one two", "three four five six", "seven eight", "nine"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


def run(*arguments):
    result = actctx("extract", *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    result = actctx("extract", *arguments)
    assert result.exit_code == 2
    return result.stderr


def test_a_file_of_texts_goes_to_disk(tiny, loaded, text, out):
    result = run(tiny, RESID, "--data", text, "--out", out)
    assert result.stdout == f"13 rows in {out}, 13 of them new\n"
    read = Read(out)
    assert sorted(set(read["sequence"])) == [0, 1, 2, 3]
    for number, words in enumerate(TEXTS):
        rows = torch.tensor(read["sequence"]) == number
        ids = loaded.to_tokens(words)
        wanted = plainly_hooked(loaded, ids, "blocks.1.hook_out")["blocks.1.hook_out"][0][0]
        torch.testing.assert_close(read[RESID][rows], wanted, atol=1e-5, rtol=0)


def test_the_same_command_goes_on(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out, "--max-tokens", 5)
    result = run(tiny, RESID, "--data", text, "--out", out)
    assert result.stdout == f"13 rows in {out}, 8 of them new\n"


def test_a_data_set_is_gone_on_with_only_where_that_is_asked_for(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out, "--max-tokens", 5, "--no-resume")
    stderr = refused(tiny, RESID, "--data", text, "--out", out, "--no-resume")
    assert stderr == (
        f"error: '{out}' exists; leave out --no-resume to resume it, or give another path\n"
    )
    assert len(Read(out)) == 5


def test_sites_are_added(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out)
    result = run(tiny, "blocks.0.hook_mlp_out", "--data", text, "--out", out, "--add")
    assert result.stdout == f"13 rows in {out}, with the new columns\n"
    assert [site.name for site in Read(out).layout.sites] == [RESID, "blocks.0.hook_mlp_out"]


def test_a_model_without_a_tokenizer_is_given_one(tiny, text, tmp_path, out):
    bare, words = tmp_path / "bare", tmp_path / "words"
    for made in (bare, words):
        made.mkdir()
    for file in Path(tiny).iterdir():
        shutil.copy(file, words if file.name.startswith("tokenizer") else bare)
    run(bare, RESID, "--data", text, "--out", out, "--tokenizer", words)
    run(tiny, RESID, "--data", text, "--out", tmp_path / "own.lance")
    assert Read(out)["token"] == Read(tmp_path / "own.lance")["token"]
    assert refused(tiny, RESID, "--data", text, "--out", out, "--tokenizer", bare) == (
        f"error: the directory --tokenizer '{bare}' does not contain one; give the one that its "
        "save_pretrained wrote\n"
    )


def test_paths_may_begin_at_home(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run(tiny, RESID, f"--data=~/{text.name}", "--out=~/acts.lance")
    assert result.stdout == f"13 rows in {tmp_path}/acts.lance, 13 of them new\n"
    assert actctx("info", "~/acts.lance").exit_code == 0
    assert len(ActivationDataset("~/acts.lance")) == 13


def test_object_stores_are_not_written_to(tiny, text):
    assert refused(tiny, RESID, "--data", text, "--out", "s3://bucket/a.lance").startswith(
        "error: cannot write to 's3://bucket/a.lance': object stores cannot be written to; "
    )


def test_options_are_those_of_the_function(tiny, text, out):
    options = ["--slice", "pos=-1", "--dtype", "bfloat16", "--drop", "token=3", "--batch-size", 2]
    run(tiny, RESID, "--data", text, "--out", out, *options)
    read = Read(out)
    assert read[RESID].dtype == torch.bfloat16
    assert len(read) == 4
    assert 3 not in read["token"]
    assert read.layout.input["drop"] == {"token": [3]}


def test_rows_are_pooled(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out, "--pool", "mean")
    assert sorted(Read(out)["sequence"]) == [0, 1, 2, 3]


def test_texts_of_one_length_run_together(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out, "--equal-lengths")
    assert Read(out).layout.input["equal_lengths"] is True
    shown = actctx("info", out).stdout
    assert "equal_lengths: True" in shown


def test_a_mask_is_named(tiny, tmp_path, out):
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}))
    run(tiny, RESID, "--data", path, "--out", out, "--mask", "loss_mask")
    assert Read(out)["token"] == [2, 3]


def test_a_byte_order_mark_is_no_text(tiny, tmp_path, text, out):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    run(tiny, RESID, "--data", path, "--out", out)
    assert len(Read(out)) == 13


def test_the_corpus_is_looked_at_before_the_model_is_loaded(tmp_path, out):
    message = refused("no/such-model", RESID, "--data", tmp_path / "nothing.txt", "--out", out)
    assert message.startswith("error: cannot read --data")


def test_max_tokens_beyond_the_texts_take_no_room(loaded, out):
    assert extract(loaded, TEXTS, RESID, out, max_tokens=10**15).rows == 13


def test_lance_is_looked_for_before_the_model_is_loaded(text, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    assert refused("no/such-model", RESID, "--data", text, "--out", out) == (
        "error: data sets need lance, which is not installed; install it with: pip install "
        "'actctx[data]'\n"
    )


def test_what_is_not_finite_is_written_where_that_is_asked_for(tiny, text, tmp_path, out):
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny)
    model.transformer.h[1].mlp.c_proj.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    options = [RESID, "--data", text, "--out", out, "--tokenizer", tiny]
    assert "; --no-finite writes it as it is" in refused(tmp_path / "poisoned", *options)
    run(tmp_path / "poisoned", *options, "--no-finite")
    assert Read(out)[RESID][:, 0].isnan().all()


def test_texts_are_packed(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out, "--pack", "--context", 8)
    assert set(Read(out)["position"]) == {*range(8)}


def test_objects_bring_their_labels(tiny, tmp_path, out):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": words, "label": len(words)}) for words in TEXTS]
    path.write_text("\n".join(lines))
    run(tiny, RESID, "--data", path, "--out", out, "--carry", "label", "--slice", "pos=-1")
    read = Read(out)
    assert read["label"] == [len(TEXTS[number]) for number in read["sequence"]]


@pytest.mark.parametrize("suffix", [".JSONL", ".ndjson"])
def test_lines_of_objects_are_known_by_the_name_of_the_file(tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [*read_corpus(path)] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".CSV", ".tsv", ".parquet", ".arrow"])
def test_files_of_data_are_not_taken_for_text(tmp_path, out, suffix):
    path = tmp_path / f"texts{suffix}"
    path.write_text('[{"text": "one"}]')
    assert refused("no/such-model", RESID, "--data", path, "--out", out) == (
        f"error: --data '{path}' contains data, not text; write it as a .jsonl file, one object "
        "per line, or read it with datasets.load_dataset, and give the directory that "
        "save_to_disk writes\n"
    )


@pytest.mark.parametrize("state", ["{", "{}"])
def test_a_hugging_face_dataset_that_is_damaged_is_refused(tmp_path, out, state):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "corpus"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    (path / "state.json").write_text(state)
    stderr = refused("no/such-model", RESID, "--data", path, "--out", out)
    assert stderr.startswith(f"error: the Hugging Face dataset --data '{path}' is damaged: ")
    assert stderr.endswith("; write it again with Dataset.save_to_disk\n")


def test_a_hugging_face_dataset_is_read(tiny, tmp_path, out):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "corpus"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    run(tiny, RESID, "--data", path, "--out", out)
    assert len(Read(out)) == 13


def test_tokens_that_are_cut_off_are_noted(tiny, tmp_path, out):
    path = tmp_path / "long.txt"
    path.write_text("one two three four five six seven eight nine ten")
    result = run(tiny, RESID, "--data", path, "--out", out)
    assert result.stderr == (
        "note: 3 tokens cut off at the ends of texts, which are longer than the model reads "
        "at once\n"
    )


def test_a_data_set_is_described(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out, "--dtype", "float16")
    result = actctx("info", out)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["site", "hook", "axes", "shape", "dtype", "bytes"]
    assert lines[1].split() == [
        *(RESID, "blocks.1.hook_out", "d_model", "(13,", "32)", "float16", "832", "B"),
    ]
    assert lines[2].startswith("13 rows, one per token, finished, from ")
    assert "  drop: {}" in lines


def test_an_address_is_no_path(tiny, text, out):
    run(tiny, RESID, "--data", text, "--out", out)
    result = actctx("info", f"file://{out}")
    assert result.exit_code == 0
    assert result.stdout == actctx("info", out).stdout


def test_a_data_set_says_what_it_came_from(tiny, loaded, tmp_path, out):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "one", "label": 1, "source": "a"}))
    run(tiny, RESID, "--data", path, "--out", out, "--carry", "label", "--carry", "source")
    lines = actctx("info", out).stdout.splitlines()
    assert f"  fingerprint: {fingerprint(loaded)}" in lines
    assert "  carried: label int64, source string" in lines
    written = ", ".join(f"{package} {each}" for package, each in versions().items())
    assert f"  versions: {written}" in lines


def test_what_is_no_data_set_is_refused(tmp_path):
    result = actctx("info", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: no data set can be read from '{tmp_path}': the directory does not contain one; "
        "give the path that extract() wrote to\n"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--drop", "position"],
            "--drop 'position' is not WHAT=N; give one such as position=0 or token=50256,0",
        ),
        (
            ["--context", "9"],
            "--context 9 is more than the 8 tokens that the model reads; give 8 or less",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, text, out, option, message):
    stderr = refused(tiny, RESID, "--data", text, "--out", out, *option)
    assert stderr == f"error: {message}\n"


def test_a_corpus_that_is_not_there_is_refused(tiny, tmp_path, out):
    path = tmp_path / "missing.txt"
    assert refused(tiny, RESID, "--data", path, "--out", out) == (
        f"error: cannot read --data '{path}': No such file or directory; give a text file, a "
        ".jsonl file, or the directory of a Hugging Face dataset\n"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text"', "Expecting ':' delimiter"),
        ("9" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
        ("[" * 200_000, "maximum recursion depth exceeded"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path, line, reason):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(OptionError) as caught:
        [*read_corpus(path)]
    message = str(caught.value)
    assert message.startswith(f"--data '{path}' has invalid JSON in line 2: {reason}")
    assert message.endswith("; give one object per line")


@pytest.mark.parametrize("line", ["word\n", "word "])
def test_what_has_no_blank_lines_is_not_taken_for_one_text(tiny, tmp_path, out, line):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n" + line * 300_000)
    assert refused(tiny, RESID, "--data", path, "--out", out) == (
        f"error: --data '{path}' has a paragraph of more than 1048576 characters, which would be "
        "one text; put blank lines between texts, or write a .jsonl file, one object per line\n"
    )


def test_a_paragraph_may_be_long(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("word\n" * 200_000 + " \n" + "word\n" * 200_000)
    assert [len(text) for text in read_corpus(path)] == [999_999] * 2


def test_a_file_that_is_no_text_is_refused(tiny, tmp_path, out):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xff\xfe\xff")
    assert refused(tiny, RESID, "--data", path, "--out", out) == (
        f"error: cannot read --data '{path}': it is not UTF-8; give a text file that is\n"
    )


def test_a_directory_of_other_things_is_no_corpus(tiny, tmp_path, out):
    pytest.importorskip("datasets")
    (tmp_path / "corpus").mkdir()
    assert refused(tiny, RESID, "--data", tmp_path / "corpus", "--out", out) == (
        f"error: the directory --data '{tmp_path / 'corpus'}' is not a Hugging Face dataset; give "
        "what Dataset.save_to_disk wrote\n"
    )
