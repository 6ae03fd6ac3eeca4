"""`actctx plan`, which reads a config and no weights."""

import json
import shutil

import pytest
import torch
import transformers
from commands import RESID, actctx
from models import GENERATION

from actctx import capture
from actctx._capture.cache_size import count_cache_bytes
from actctx._text import format_bytes

if GENERATION < 3:
    pytest.skip("bridges", allow_module_level=True)


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """Makes a directory that holds a config, and nothing else."""

    def save(config):
        directory = tmp_path_factory.mktemp("config")
        config.save_pretrained(directory)
        return str(directory)

    return save


def shown(*arguments):
    result = actctx("plan", *arguments)
    assert result.exit_code == 0, result.output
    *table, said = result.stdout.splitlines()
    return [line.split(maxsplit=1)[0] for line in table[1:]], said, result


def test_plan_tells_what_capture_would_leave(tiny, loaded):
    options = "--batch", 2, "--length", 5, "--slice", "pos=-1", "--dtype", "float16"
    names, said, result = shown(tiny, "blocks.*.hook_resid_post", *options)
    tokens = torch.ones(2, 5, dtype=torch.long)
    with capture(loaded, "blocks.*.hook_resid_post", slice=-1, dtype=torch.float16) as acts:
        loaded(tokens)
    assert names == [*acts]
    assert "batch d_model  (2, 32)  float16" in result.stdout
    held = count_cache_bytes(loaded, lambda: loaded(tokens))
    assert said == (
        f"{format_bytes(acts.nbytes)} would be captured; run_with_cache would hold "
        f"{format_bytes(held)} for 2 texts of 5 tokens"
    )


def test_plan_needs_the_config_alone(tiny, tmp_path):
    shutil.copy(f"{tiny}/config.json", tmp_path)
    assert shown(tmp_path, RESID)[1:2] == shown(tiny, RESID)[1:2]


def test_a_plan_is_as_long_as_the_model_reads_unless_told(tiny):
    assert shown(tiny, RESID)[1].endswith("for 8 texts of 8 tokens")


def test_more_tokens_than_the_model_reads_are_refused(tiny):
    result = actctx("plan", tiny, RESID, "--length", 9)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: --length 9 is more than the 8 tokens that {tiny} reads; give fewer\n"
    )


def test_what_a_pattern_matches_and_never_fires_is_said(tiny):
    result = shown(tiny, "blocks.0.attn.hook_[qr]*")[2]
    assert result.stderr == (
        "note: matched, but would never fire: blocks.0.attn.hook_q_input, "
        "blocks.0.attn.hook_result\n"
    )


def test_an_encoder_and_its_decoder_are_planned(config_of):
    config = transformers.T5Config(
        architectures=["T5ForConditionalGeneration"],
        d_model=32,
        num_layers=1,
        num_heads=4,
        d_kv=8,
        decoder_start_token_id=0,
    )
    names, _, _ = shown(config_of(config), "*blocks.*.hook_resid_post", "--length", 300)
    assert names == ["encoder_blocks.0.hook_resid_post", "decoder_blocks.0.hook_resid_post"]


@pytest.mark.thorough
def test_weights_that_no_machine_has_are_planned(config_of):
    """7 billion parameters, which would take 27 GB."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=32, max_position_embeddings=4096
    )
    _, said, _ = shown(config_of(config), "blocks.31.hook_resid_post", "--slice", "pos=-1")
    assert said.startswith("128.0 KiB would be captured; run_with_cache would hold 153.6 GiB")


def test_a_directory_without_a_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    result = actctx("plan", tmp_path, RESID)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: cannot make '{tmp_path}' without its weights: ")
