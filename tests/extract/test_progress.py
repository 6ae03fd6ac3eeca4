"""What an extraction says of its work: its size beforehand, and a bar while it runs."""

import os
import re
import shutil
import sys

import pytest
import torch
from extracted import RESID, refusal
from models import tokens

from actctx import DataError
from actctx.extract import extract


def test_what_does_not_fit_on_the_disk_is_refused_before_any_forward(gpt2, out):
    ran = []
    handle = gpt2.embed.register_forward_hook(lambda *args: ran.append(args))
    message = refusal(DataError, gpt2, iter([tokens()]), RESID, out, max_tokens=10**15)
    handle.remove()
    assert message.startswith(
        f"'{out}' has too little space: 1000000000000000 rows of 152 bytes are 1"
    )
    assert not ran
    assert not [*out.glob("_versions/*")]


@pytest.mark.parametrize("as_list", [True, False])
def test_rows_are_counted_beforehand_where_the_batches_are_at_hand(gpt2, as_list, out, monkeypatch):
    free = shutil.disk_usage(out.parent)._replace(free=21 * 152 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    data = [{"input_ids": tokens()}] if as_list else tokens()
    message = refusal(DataError, gpt2, data, RESID, out)
    assert message.startswith(
        f"'{out}' has too little space: 21 rows of 152 bytes are 3.1 KiB, but 3.1 KiB"
    )


@pytest.mark.parametrize("data", [[[1, 2, 3]], [{"tokens": [1, 2, 3]}], [torch.arange(3)]])
def test_max_tokens_beyond_the_input_take_no_room(gpt2, out, data):
    assert extract(gpt2, data, RESID, out, max_tokens=10**15).rows == 3


def test_the_plan_is_logged(gpt2, out, caplog):
    with caplog.at_level("INFO", "actctx"):
        extract(gpt2, tokens(), RESID, out)
    assert [record.name for record in caplog.records] == ["actctx"]
    assert caplog.messages[0].startswith("21 rows of 152 bytes are 3.1 KiB, ")
    assert caplog.messages[0].endswith(" are free")


def test_no_bar_is_shown_without_a_terminal(gpt2, out, capfd):
    extract(gpt2, tokens(), RESID, out)
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal_shows_rate_bytes_and_the_time_left(gpt2, out, monkeypatch):
    termios = pytest.importorskip("termios")
    read, write = os.openpty()
    termios.tcsetwinsize(write, (24, 120))
    with open(write, "w") as terminal, open(read, "rb", buffering=0) as screen:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", terminal)
        extract(gpt2, tokens(), RESID, out)
        terminal.flush()
        shown = screen.read(2**12).decode()
    assert "21 rows of 152 bytes are 3.1 KiB, " in shown
    assert re.search(r"21/21 \[00:\d\d<00:00, [\d.]+k? tokens/s, 3.1 KiB\]", shown), shown
