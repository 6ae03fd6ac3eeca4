"""Runs of days: what is told of them without a terminal, and how a signal ends them."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from commands import actctx
from extracted import RESID, TESTS, Read
from models import huggingface, tokens

from actctx._extract.pipe import Pipe
from actctx._extract.signals import signals_raised
from actctx.extract import extract

pytest.importorskip("lance")
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def model():
    return huggingface("GPT2LMHeadModel")


def slow(lines, count=3):
    """Yield batches, each once there is one more line."""
    for seed in range(count):
        yield tokens(2, 7, seed)
        while len(lines()) <= seed:
            threading.Event().wait(0.01)


@pytest.fixture
def _often(monkeypatch):
    monkeypatch.setattr("actctx._store.progress._SECONDS", 0.05)


LINE = re.compile(
    r"acts\.lance: \d+ of 42 tokens, [\d.,]+ a second(, [\d.]+ [KM]?i?B)?(, \d+:\d\d left)?"
)


@pytest.mark.usefixtures("_often")
def test_without_a_terminal_a_line_goes_to_stderr_now_and_then(model, out, capfd):
    seen = []

    def lines():
        seen.append(capfd.readouterr().err)
        return "".join(seen).splitlines()

    extract(model, slow(lines), RESID, out, max_tokens=42)
    for line in lines():
        day, time, shown = line.split(" ", 2)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", f"{day} {time}")
        assert LINE.fullmatch(shown), shown
    assert any("B" in line for line in lines())


@pytest.mark.usefixtures("_often")
def test_who_listens_to_the_logger_gets_the_lines_there(model, out, caplog, capfd):
    with caplog.at_level(logging.INFO, "actctx"):
        extract(model, slow(lambda: caplog.messages), RESID, out, max_tokens=42)
    assert any(LINE.fullmatch(message) for message in caplog.messages)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("_often")
def test_no_line_is_shown_where_none_is_wanted(model, out, capfd):
    def waits():
        yield tokens(2, 7)
        threading.Event().wait(0.3)

    extract(model, waits(), RESID, out, progress=False)
    assert capfd.readouterr().err == ""


CHILD = f"""
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
for number in (signal.SIGTERM, signal.SIGHUP):  # the second is one that nohup ignores
    signal.signal(number, signal.SIG_DFL)
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import huggingface, tokens
from actctx.extract import extract

def waits():
    for seed in range(3):
        yield tokens(2, 7, seed)
    while len(ran) < 3:
        threading.Event().wait(0.01)
    print("waiting", flush=True)
    threading.Event().wait()

model, ran = huggingface("GPT2LMHeadModel"), []
model.register_forward_pre_hook(lambda *_: ran.append(1))
{{before}}
try:
    extract(model, waits(), {RESID!r}, sys.argv[1])
finally:
    print("left", flush=True)
"""


def ended_by(number, out, before=""):
    """Run an extraction that is sent a signal while it runs the last of three batches, or waits.

    Returns:
        Its exit code, what it printed, what it wrote to stderr, and the rows that it left.

    """
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(before=before), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    left, said = process.communicate(timeout=120)
    rows = len(Read(out))
    assert rows in {28, 42}
    return process.returncode, left, said, rows


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_commits_what_is_whole_and_ends(out, name):
    number = getattr(signal, name)
    returned, left, said, rows = ended_by(number, out)
    assert (returned, left) == (128 + number, "left\n")
    assert f"'{out}' keeps {rows} rows; the same call resumes after them" in said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_signal_that_does_not_wake_the_main_thread_is_handled_soon():
    """As one that arrives just before the thread blocks; here, one that another thread gets."""

    was_woken = []

    def end(*_):
        was_woken.append(bool(pipe._items))
        handled.set()
        raise SystemExit(7)

    def send():
        threading.Event().wait(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        handled.wait(20)
        pipe.put("too late")

    pipe, handled, before = Pipe(1), threading.Event(), signal.signal(signal.SIGUSR1, end)
    try:
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(SystemExit, match="7"):
            pipe.take()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert was_woken == [False]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_an_interrupt_says_what_is_kept(out):
    returned, left, said, rows = ended_by(signal.SIGINT, out)
    assert left == "left\n"
    assert returned
    assert said.endswith(
        f"KeyboardInterrupt\n'{out}' keeps {rows} rows; the same call resumes after them\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_handler_of_the_user_is_left_alone(out):
    before = "signal.signal(signal.SIGTERM, lambda *_: sys.exit('mine'))"
    returned, _, said, _ = ended_by(signal.SIGTERM, out, before)
    assert returned == 1
    assert said.endswith("mine\n")


def test_handlers_are_put_back(model, out):
    before = signal.getsignal(signal.SIGTERM)
    within = []

    def looks():
        within.append(signal.getsignal(signal.SIGTERM))
        yield tokens(2, 7)

    extract(model, looks(), RESID, out)
    assert within[0] is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_interrupt_what_the_first_began():
    with pytest.raises(SystemExit) as ended, signals_raised():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


def test_another_thread_leaves_signals_alone():
    seen = []

    def run():
        with signals_raised():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_an_error_says_what_is_kept(model, out):
    def breaks():
        yield tokens(2, 7)
        raise ConnectionError

    with pytest.raises(ConnectionError) as broken:
        extract(model, breaks(), RESID, out)
    note = f"'{out}' keeps 14 rows; the same call resumes after them"
    assert broken.value.__notes__ == [note]


def test_an_interrupt_before_the_first_rows_says_so(model, out):
    def interrupted():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt) as ended:
        extract(model, interrupted(), RESID, out)
    assert ended.value.__notes__ == [
        f"no rows are in '{out}' yet; the same call starts from the beginning"
    ]


def test_the_command_line_says_what_an_interrupt_keeps(tiny, tmp_path, out, monkeypatch):
    text = tmp_path / "texts.txt"
    text.write_text("one two\n\nthree")

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    run = ["extract", tiny, RESID, "--data", text, "--out", out]
    assert actctx(*run, "--max-tokens", 2).exit_code == 0
    monkeypatch.setattr("actctx._extract.run._Run._forward", interrupted)
    result = actctx(*run)
    assert result.exit_code == 130
    assert f"'{out}' keeps 2 rows; the same call resumes after them\n" in result.stderr
