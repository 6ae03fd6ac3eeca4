"""The command line, called in this process and in others, and a tiny model on disk for it."""

import os
import subprocess
import sys

import torch
import transformers
from models import plainly_hooked
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from actctx._cli.app import app

RESID = "blocks.1.hook_resid_post"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEXTS = ["one two", "three four five six", "seven eight", "nine"]
MINILM_RESID = "blocks.5.hook_resid_post"


def actctx(*arguments, stdin=None, **env):
    return CliRunner(env=env).invoke(app, [str(argument) for argument in arguments], input=stdin)


def save_gpt2(directory):
    """Save a tiny GPT-2, which reads 8 tokens at once, with a tokenizer of WORDS."""
    unknown, end = "<unk>", "<end>"
    vocab = {word: number for number, word in enumerate([unknown, end, *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=unknown,
        bos_token=end,
        eos_token=end,
        pad_token=end,
    ).save_pretrained(directory)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=8, vocab_size=len(vocab)
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)


def command(*arguments, **env):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def capture(*arguments, texts=TEXTS, **env):
    prompts = [part for text in texts for part in ("--prompt", text)]
    result = actctx("capture", *arguments, *prompts, **env)
    assert result.exit_code == 0, result.output
    return result


def refusal(*arguments, **options):
    """The message of a command that is refused."""
    result = actctx(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def plainly(model, texts, name):
    """What a plain hook sees of each text by itself."""
    return [plainly_hooked(model, model.to_tokens(text), name)[name][0][0] for text in texts]
