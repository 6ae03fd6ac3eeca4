"""The command `actctx capture`: what it captures of which texts, and with which options."""

import json
import shutil
import sys

import pytest
import torch
from commands import MINILM_RESID, RESID, TEXTS, WORDS, actctx, capture, plainly, refusal
from models import GENERATION, bridge, hooks_of
from safetensors import safe_open
from safetensors.torch import load_file

from actctx import JoinError
from actctx import load as load_acts
from actctx._capture.cache_size import count_cache_bytes
from actctx._cli.load_model import load
from actctx._cli.texts import count_caches, in_batches, run
from actctx._text import format_bytes


@pytest.fixture
def out(tmp_path):
    return tmp_path / "acts.safetensors"


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# capture


def test_the_last_position_is_the_last_token_of_each_text(minilm, out):
    texts = ["A fox.", "The quick brown fox jumps.", "Over the lazy dog, again.", "A dog."]
    capture("minilm", MINILM_RESID, "--slice", "pos=-1", "--out", out, texts=texts)
    alone = plainly(minilm, texts, MINILM_RESID)
    rows = load_file(out)[MINILM_RESID]
    assert rows.shape == (4, 384)
    # The same in exact arithmetic: torch adds in another order for a batch of another size.
    torch.testing.assert_close(rows, torch.stack([row[-1] for row in alone]), rtol=0, atol=1e-5)


def test_one_text_a_batch_is_bit_for_bit_what_a_plain_hook_sees(tiny, loaded, out):
    capture(tiny, RESID, "--slice", "pos=-1", "--batch-size", 1, "--out", out)
    alone = plainly(loaded, TEXTS, RESID)
    assert torch.equal(load_file(out)[RESID], torch.stack([row[-1] for row in alone]))


def test_shorter_rows_end_in_zeros_and_that_is_said(tiny, loaded, out):
    result = capture(tiny, RESID, "--batch-size", 1, "--out", out)
    rows = load_file(out)[RESID]
    alone = plainly(loaded, TEXTS, RESID)
    for row, expected in zip(rows, alone, strict=True):
        assert torch.equal(row[: len(expected)], expected)
        assert not row[len(expected) :].any()
    assert json.loads(metadata(out)["lengths"]) == [len(expected) for expected in alone]
    shortest, longest = len(alone[3]), len(alone[1])
    assert result.stderr == (
        f"note: the texts have {shortest} to {longest} tokens: shorter rows end in zeros\n"
    )


def test_texts_of_one_length_are_not_filled_up(tiny):
    assert capture(tiny, RESID, texts=["one two", "three four"]).stderr == ""


def test_attention_patterns_are_filled_up_along_both_of_their_axes(tiny, loaded, out):
    name = "blocks.0.attn.hook_pattern"
    capture(tiny, name, "--batch-size", 1, "--slice", "head=0,3", "--out", out)
    rows = load_file(out)[name]
    for row, expected in zip(rows, plainly(loaded, TEXTS, name), strict=True):
        size = expected.shape[-1]
        assert torch.equal(row[:, :size, :size], expected[[0, 3]])
        assert not row[:, size:].any()
        assert not row[:, :, size:].any()


@pytest.mark.parametrize(
    ("option", "index"), [("pos=1", 1), ("pos=0:2", slice(0, 2)), ("pos=::2", slice(None, None, 2))]
)
def test_slices_select_as_in_python(tiny, loaded, out, option, index):
    capture(tiny, RESID, "--slice", option, "--out", out, texts=["one two three"])
    expected = plainly(loaded, ["one two three"], RESID)[0][index]
    assert torch.equal(load_file(out)[RESID][0], expected)


def test_a_dtype_casts_what_is_kept(tiny, loaded, out):
    capture(tiny, RESID, "--dtype", "float16", "--out", out, texts=["one two"])
    assert torch.equal(load_file(out)[RESID][0], plainly(loaded, ["one two"], RESID)[0].half())


def test_the_table_shows_sites_and_what_run_with_cache_would_have_held(tiny, loaded):
    result = capture(tiny, "blocks.*.hook_resid_post", "--slice", "pos=-1", "--dtype", "float16")
    held = sum(
        cache_bytes(loaded, batch.tokens)
        for batch in in_batches([loaded.to_tokens(text)[0] for text in TEXTS], 8)
    )
    assert result.stdout == (
        "site                      axes           shape    dtype    bytes\n"
        "blocks.0.hook_resid_post  batch d_model  (4, 32)  float16  256 B\n"
        "blocks.1.hook_resid_post  batch d_model  (4, 32)  float16  256 B\n"
        f"512 B captured; run_with_cache would have held {format_bytes(held)} "
        "for the same 4 texts\n"
        "not saved, which --out FILE does\n"
    )


def cache_bytes(model, tokens):
    """The bytes that a cache does hold, each storage once."""
    _, cache = model.run_with_cache(tokens)
    storages = [value.untyped_storage() for value in cache.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("model", ["loaded", "minilm"])
def test_the_cache_is_counted_to_the_byte(model, request):
    model = request.getfixturevalue(model)
    tokens = model.to_tokens("one two three")
    held = cache_bytes(model, tokens)
    hooks = hooks_of(model)
    assert count_cache_bytes(model, lambda: model(tokens)) == held
    assert hooks_of(model) == hooks


def test_caches_of_many_shapes_are_counted_to_the_byte(loaded):
    sequences = [torch.arange(length) for length in (1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8)]
    batches = in_batches(sequences, 2)
    each = sum(cache_bytes(loaded, batch.tokens) for batch in batches)
    forwards = []
    handle = loaded.register_forward_pre_hook(lambda _, args: forwards.append(args[0].shape))
    assert count_caches(loaded, batches) == each
    handle.remove()
    assert len(forwards) == 7 < len(batches)


def test_the_file_says_what_it_holds(tiny, out):
    capture(tiny, RESID, "--slice", "pos=-1", "--out", out)
    found = metadata(out)
    assert found["model_name"] == tiny
    assert json.loads(found["hooks"]) == [RESID]
    assert json.loads(found["slice"]) == ["pos=-1"]
    assert found["text"] == "--prompt"
    assert json.loads(found["axes"]) == {RESID: "batch d_model"}


def test_sites_that_matched_and_never_fired_are_named(tiny):
    result = capture(tiny, "blocks.*.attn.hook_[rz]*", texts=["one"])
    missing = [word.rstrip(",") for word in result.stderr.split() if word.startswith("blocks.")]
    assert result.stderr.startswith("note: matched, but never fired: blocks.0.attn.hook_r")
    assert {"blocks.0.attn.hook_result", "blocks.1.attn.hook_result"} <= {*missing}
    assert "blocks.0.attn.hook_z" in result.stdout


def test_a_glob_of_what_is_switched_off_is_refused(tiny):
    said = refusal("capture", tiny, "blocks.*.attn.hook_res*", "--prompt", "one")
    assert said == (
        "'blocks.*.attn.hook_res*' would never fire, since it matches only "
        "'blocks.0.attn.hook_result', 'blocks.1.attn.hook_result': use_attn_result is off, which "
        "only Python can change, with model.set_use_attn_result(True)"
    )


@pytest.mark.parametrize("name", ["hook_z", "attn.hook_z", "blocks.*.attn.hook_z", "**.hook_[z]"])
def test_a_name_means_the_same_to_names_and_capture(tiny, name):
    expected = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    listed = actctx("names", tiny, name).stdout.splitlines()
    assert [line.split()[1] for line in listed] == expected
    shown = capture(tiny, name, texts=["one"]).stdout.splitlines()
    assert [line.split()[0] for line in shown if "hook_z" in line] == expected


def test_a_bracket_that_means_nothing_is_refused(tiny):
    for command in (["names"], ["capture", "--prompt", "one"]):
        said = refusal(command[0], tiny, "blocks.[0:3].hook_out", *command[1:])
        assert said.startswith("'[0:3]' in 'blocks.[0:3].hook_out' is not a valid bracket: ")
        assert said.endswith("write '[0-2]'")


def test_forwards_stop_after_the_last_site(loaded):
    blocks = []
    handles = [
        block.register_forward_pre_hook(lambda *_, at=at: blocks.append(at))
        for at, block in enumerate(loaded.blocks)
    ]
    batches = in_batches([torch.arange(3), torch.arange(5)], 8)
    run(loaded, ["blocks.0.hook_resid_post"], batches, slice={}, dtype=None)
    for handle in handles:
        handle.remove()
    assert blocks == [0, 0]


def test_the_longest_texts_come_first_since_they_need_the_most_memory():
    batches = in_batches([torch.arange(length) for length in (1, 3, 2, 3, 3)], 2)
    assert [batch.tokens.shape for batch in batches] == [(2, 3), (1, 3), (1, 2), (1, 1)]
    assert [batch.rows for batch in batches] == [[1, 3], [4], [2], [0]]


@pytest.mark.skipif(GENERATION < 4, reason="routers before 4 have no hook points of their own")
def test_a_site_without_rows_is_refused_where_there_are_several_batches():
    model = bridge("MixtralForCausalLM")
    batches = in_batches([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], 8)
    with pytest.raises(JoinError) as refused:
        run(model, ["blocks.0.mlp.gate.hook_out"], batches, slice={}, dtype=None)
    assert str(refused.value) == (
        "'blocks.0.mlp.gate.hook_out' does not leave a row for each sequence (its axes are "
        "'token expert'), so several batches do not join; give one text, or texts of one length "
        "and a batch size that holds them all"
    )


# texts


def test_paragraphs_of_a_file_are_texts(tiny, loaded, out, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\none two\nthree\n\n \n\nfour\n", encoding="utf-8")
    result = actctx("capture", tiny, RESID, "--text", file, "--slice", "pos=-1", "--out", out)
    assert result.exit_code == 0
    expected = [row[-1] for row in plainly(loaded, ["one two three", "four"], RESID)]
    assert torch.equal(load_file(out)[RESID], torch.stack(expected))
    assert metadata(out)["text"] == str(file)


def test_a_dash_reads_the_standard_input(tiny):
    result = actctx("capture", tiny, RESID, "--text", "-", stdin="one\n\ntwo\n")
    assert "for the same 2 texts" in result.stdout


def test_cut_tokens_are_counted(tiny, loaded):
    long = " ".join(WORDS)
    whole = loaded.to_tokens(long, truncate=False).shape[1]
    assert capture(tiny, RESID, texts=[long, "one"]).stderr.splitlines()[0] == (
        f"note: {whole - 8} tokens cut off at the ends of 1 of the 2 texts: the model reads 8 at "
        "once"
    )


def test_the_tokenizer_knows_better_than_the_config_how_much_a_model_reads(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 6}))
    assert load(str(copy)).cfg.n_ctx == 6


def test_texts_or_prompts_are_needed(tiny):
    assert refusal("capture", tiny, RESID) == (
        "give either --text FILE or --prompt TEXT to capture from; neither was given"
    )
    assert refusal("capture", tiny, RESID, "--text", "-", "--prompt", "one") == (
        "give either --text FILE or --prompt TEXT to capture from; both were given"
    )


def test_a_file_that_cannot_be_read_is_refused(tiny, tmp_path):
    missing, blank, binary = (tmp_path / name for name in ("missing", "blank", "binary"))
    blank.write_text(" \n\n")
    binary.write_bytes(b"\xff\xfe\xff")
    assert refusal("capture", tiny, RESID, "--text", missing) == (
        f"cannot read --text '{missing}': No such file or directory; "
        "give a text file, or '-' for stdin"
    )
    assert refusal("capture", tiny, RESID, "--text", binary) == (
        f"cannot read --text '{binary}': it is not UTF-8; give a text file, or '-' for stdin"
    )
    assert refusal("capture", tiny, RESID, "--text", blank) == (
        f"--text '{blank}' contains no text; give a file that does"
    )


# options


@pytest.mark.parametrize("option", ["pos", "pos=", "pos=a", "pos=1:2:3:4", "pos=1,,2"])
def test_a_slice_that_cannot_be_read_is_refused(tiny, option):
    assert refusal("capture", tiny, RESID, "--prompt", "one", "--slice", option) == (
        f"--slice {option!r} is not AXIS=INDEX, with an int, a range a:b or a:b:c, or positions "
        "a,b,c; give one such as pos=-1, pos=0:10 or head=0,3"
    )


def test_a_slice_that_cannot_be_is_refused(tiny):
    ask = ("capture", tiny, RESID, "--prompt", "one", "--slice")
    assert refusal(*ask, "pos=1", "--slice", "pos=2") == (
        "--slice selects twice along 'pos'; give one index for it"
    )
    assert refusal(*ask, "batch=0") == (
        "--slice batch=0 is not supported: the command line makes the batches; give fewer texts"
    )
    assert refusal(*ask, "head=0") == (
        f"'{RESID}' has no axis 'head'; its axes are 'batch pos d_model'; select along one of "
        "these, or by position with a tuple"
    )


def test_a_position_that_a_text_does_not_have_is_refused(tiny, loaded):
    size = loaded.to_tokens("nine").shape[1]
    assert refusal("capture", tiny, RESID, "--prompt", "nine", "--slice", "pos=5") == (
        f"'{RESID}' has the size {size} along 'pos', so there is no position 5; "
        f"choose from {-size} to {size - 1}"
    )


def test_a_file_is_replaced_only_with_force(tiny, out):
    out.write_text("precious")
    # The model does not exist either, but nothing is loaded before.
    assert refusal("capture", "./nowhere", RESID, "--prompt", "one", "--out", out) == (
        f"'{out}' exists; give --force to replace it, or another --out"
    )
    assert out.read_text() == "precious"
    beside = out.with_name(f"{out.name}.partial")
    beside.write_text("mine")
    result = capture(tiny, RESID, "--out", out, "--force", texts=["one"])
    assert result.stdout.endswith(f"\nsaved {out}\n")
    assert beside.read_text() == "mine"
    acts = load_acts(out)
    assert torch.equal(acts["blocks.1.hook_out"], load_file(out)[RESID])
    assert acts.axes(RESID) == ("batch", "pos", "d_model")
    assert acts.stack("hook_resid_post").shape[0] == 1
    assert RESID in load_file(out)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    ask = ("capture", "./nowhere", RESID, "--prompt", "one", "--out")
    assert refusal(*ask, tmp_path) == (
        f"cannot save to '{tmp_path}': it is a directory; give --out the path of a file"
    )
    assert refusal(*ask, tmp_path / "no" / "acts") == (
        f"cannot save to '{tmp_path}/no/acts': its directory does not exist; give --out the path "
        "of a file"
    )
    assert refusal(*ask, tmp_path / ("x" * 300)) == (
        f"cannot save to '{tmp_path / ('x' * 300)}': the system says 'file name too long'; "
        "give --out the path of a file"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="root could write to any other directory")
def test_a_file_in_a_directory_that_takes_none_is_refused():
    place = "/proc/acts"
    message = refusal("capture", "./nowhere", RESID, "--prompt", "one", "--out", place)
    assert message.startswith(f"cannot save to '{place}': the system says '")


def test_a_refused_command_leaves_no_file_and_no_file_out(tmp_path):
    (tmp_path / "acts.partial").write_text("mine")
    refusal("capture", "./nowhere", RESID, "--prompt", "one", "--out", tmp_path / "acts")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [
        ("acts.partial", "mine")
    ]


def test_a_bar_is_shown_on_a_terminal_when_there_are_several_batches(tiny):
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "100"}
    assert "batches" in capture(tiny, RESID, **terminal).stderr
    assert "batches" not in capture(tiny, RESID, texts=["one"], **terminal).stderr
    assert "batches" not in capture(tiny, RESID).stderr
