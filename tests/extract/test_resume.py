"""An extraction that ends early, in any way, is gone on with at the row where it ended."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from extracted import RESID, TESTS, Read, Z, batches, refusal, same, sequences
from models import Mlp, bridge, huggingface, other_weights, tokens

from actctx import DataError, Site
from actctx._extract.inputs import Batch
from actctx._extract.writer import commit_seconds
from actctx._model.fingerprint import describe_model
from actctx._store.destination import Target
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")

BATCHES = 60
# What is killed: a batch a hundredth of a second, a commit every few of them.
CHILD = f"""
import sys, time
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx._extract import writer
from actctx.extract import extract
writer._COMMIT_BYTES = 10_000
append = writer.Target.append

def told(self, batches):
    append(self, batches)
    print("committed", flush=True)

writer.Target.append = told

def batches():
    print("begun", flush=True)
    for seed in range({BATCHES}):
        time.sleep(0.01)
        yield tokens(5, 7, seed)

extract(bridge(), batches(), {[RESID, Z]!r}, sys.argv[1], drop={{"position": [0]}})
print("ended", flush=True)
"""


@pytest.fixture
def out(tmp_path):
    return tmp_path / "acts.lance"


@pytest.fixture
def commits(monkeypatch):
    """Commit every few rows."""
    monkeypatch.setattr("actctx._extract.writer._COMMIT_BYTES", 5000)


def unbroken(path, count=BATCHES, **options):
    extract(bridge(), batches(count), [RESID, Z], path, drop={"position": [0]}, **options)
    return Read(path)


def child(out):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def killed_at(out, seconds, commits):
    """Kill an extraction so many seconds after as many commits, and tell whether it had ended."""
    process = child(out)
    assert process.stdout.readline() == "begun\n"
    for _ in range(commits):
        process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return "ended" in process.communicate()[0]


def check_kills(tmp_path, seed, kills):
    out, draw = tmp_path / "acts.lance", random.Random(seed)  # noqa: S311
    wanted = unbroken(tmp_path / "whole.lance")
    counts = []
    for number in range(kills):
        if killed_at(out, draw.uniform(0, 0.1), commits=number):
            break
        if (out / "_versions").is_dir() and [*(out / "_versions").glob("*.manifest")]:
            read = Read(out)
            counts.append(len(read))
            rows = wanted.table.slice(0, len(read))
            assert read.table.equals(rows.cast(read.table.schema))
    assert counts == sorted(counts)
    assert any(0 < count < len(wanted) for count in counts)
    unbroken(out)
    assert same(Read(out), wanted)
    assert not any(name.suffix != ".lance" for name in (out / "data").iterdir())
    assert ActivationDataset(out).verify().unchecked == ()
    return counts


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
def test_what_was_killed_is_whole_and_goes_on_where_it_ended(tmp_path, seed):
    check_kills(tmp_path, seed, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 184))
def test_what_was_killed_again_and_again_is_whole(tmp_path, seed):
    check_kills(tmp_path, seed, kills=6)


def test_what_a_killed_writer_left_over_is_deleted(out):
    unbroken(out, 2)
    (out / "data" / "0000.lance").write_bytes(b"half")
    unbroken(out, 4)
    assert not (out / "data" / "0000.lance").exists()


def test_a_data_set_that_was_killed_while_it_was_made_is_made_anew(out):
    (out / "_transactions").mkdir(parents=True)
    (out / "writing.lock").touch()
    assert len(unbroken(out, 2)) == 60


@pytest.mark.usefixtures("commits")
def test_an_exception_in_the_iterator_reaches_the_caller_and_keeps_what_came(tmp_path):
    class Broken(Exception):
        pass

    def breaks():
        yield from batches(7)
        raise Broken

    out = tmp_path / "acts.lance"
    with pytest.raises(Broken):
        extract(bridge(), breaks(), [RESID, Z], out, drop={"position": [0]})
    read = Read(out)
    assert len(read) == 7 * 30
    assert not read.layout.finished
    unbroken(out)
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))


@pytest.mark.usefixtures("commits")
def test_an_exception_in_the_model_reaches_the_caller_and_keeps_what_came(tmp_path):
    out, model, ran = tmp_path / "acts.lance", bridge(), []

    def break_at_last(*_):
        ran.append(1)
        if len(ran) == 8:
            raise ZeroDivisionError

    hook = model.register_forward_pre_hook(break_at_last)
    with pytest.raises(ZeroDivisionError):
        extract(model, batches(), [RESID, Z], out, drop={"position": [0]})
    hook.remove()
    assert len(Read(out)) == 7 * 30
    extract(model, batches(), [RESID, Z], out, drop={"position": [0]})
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))


def test_an_interrupt_keeps_what_came(out):
    def interrupted():
        yield from batches(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(bridge(), interrupted(), [RESID, Z], out, drop={"position": [0]})
    assert len(Read(out)) == 90


INTERRUPTED = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx._extract import writer
from actctx.extract import extract

append, model = writer.Target.append, bridge()

def slow(self, batches):
    print("committing", flush=True)
    sys.stdin.readline()
    append(self, batches)

def run():
    batches = [tokens(5, 7, seed) for seed in range(6)]
    return extract(model, batches, {[RESID, Z]!r}, sys.argv[1], drop={{"position": [0]}})

writer.Target.append = slow
try:
    run()
except KeyboardInterrupt:
    print("interrupted", flush=True)
writer.Target.append = append
run()
time.sleep(1)  # for what would still be written
"""


@pytest.mark.thorough
def test_after_an_interrupt_of_a_commit_the_same_process_goes_on(tmp_path):
    out = tmp_path / "acts.lance"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "committing\n"
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # the commit ends only then
    assert process.communicate("\n")[0] == "interrupted\n"
    assert process.returncode == 0
    assert same(Read(out), unbroken(tmp_path / "whole.lance", 6))


def test_what_is_on_disk_is_not_run_again(out):
    unbroken(out, 4)
    model, ran = bridge(), []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    done = extract(model, batches(6), [RESID, Z], out, drop={"position": [0]})
    hook.remove()
    assert (done.new_rows, len(ran)) == (60, 2)


@pytest.mark.parametrize("first", [1, 29, 30, 31, 100])
def test_a_larger_number_of_tokens_goes_on_within_a_batch(tmp_path, first):
    out = tmp_path / "acts.lance"
    unbroken(out, max_tokens=first)
    unbroken(out, max_tokens=200)
    assert same(Read(out), unbroken(tmp_path / "whole.lance", max_tokens=200))


def test_a_finished_data_set_is_left_as_it_is(out):
    unbroken(out, 3)
    before = lance.dataset(str(out)).count_rows()
    done = extract(bridge(), batches(3), [RESID, Z], out, drop={"position": [0]})
    assert (done.rows, done.new_rows) == (before, 0)
    assert Read(out).layout.finished


def test_a_finished_data_set_that_does_not_grow_gets_no_new_version(out):
    unbroken(out, 3)
    before = lance.dataset(str(out)).version
    unbroken(out, 3)
    refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert lance.dataset(str(out)).version == before
    assert Read(out).layout.finished


def test_a_finished_data_set_grows_with_its_input(tmp_path):
    out = tmp_path / "acts.lance"
    unbroken(out, 2)
    unbroken(out, 3, max_tokens=70)
    assert Read(out).layout.finished
    unbroken(out, 5)
    assert same(Read(out), unbroken(tmp_path / "whole.lance", 5))


def killed_before_the_note(out, monkeypatch):
    """Reach the number of tokens, but not the note of it."""

    def dies(*_, finished):
        if finished:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("actctx._store.destination.Target.note_finished", dies)
        with pytest.raises(KeyboardInterrupt):
            unbroken(out, 3, max_tokens=70)
    assert (len(Read(out)), Read(out).layout.finished) == (70, False)


def test_what_has_all_its_tokens_is_finished_later(out, monkeypatch):
    killed_before_the_note(out, monkeypatch)
    unbroken(out, 3, max_tokens=70)
    assert Read(out).layout.finished


def test_what_has_all_its_tokens_refuses_another_input(out, monkeypatch):
    killed_before_the_note(out, monkeypatch)
    options = {"drop": {"position": [0]}, "max_tokens": 70}
    message = refusal(DataError, bridge(), batches(6)[3:], [RESID, Z], out, **options)
    assert message.startswith("the rows on disk came from another input: row 0 is token ")


SENTENCES = [torch.tensor([[1, 2, 9], [3, 4, 9]]), torch.tensor([[5, 6, 9], [7, 8, 9]])]
OTHER = (
    "the rows on disk came from another input: row {row} is token 9 of sequence {row}, position 2 "
    "in both, but its sequence has other tokens, or other arguments of the forward, or other "
    "values of what is carried; give the same input in the same order, or another path"
)


@pytest.mark.parametrize(
    "options", [{"slice": -1}, {"pool": "mean"}, {"drop": {"token": range(9)}}]
)
def test_other_tokens_are_refused_where_they_leave_no_rows(options, out):
    extract(bridge(), SENTENCES[:1], RESID, out, **options)
    for add, site in ((False, RESID), (True, Z)):
        message = refusal(DataError, bridge(), SENTENCES[1:], site, out, add=add, **options)
        assert message == OTHER.format(row=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"label": [0, 1]}, {"label": [0, 7]}),
        (
            {"label": [0, 0], "position_ids": torch.arange(3).expand(2, 3)},
            {"label": [0, 0], "position_ids": torch.tensor([[0, 1, 2], [2, 1, 0]])},
        ),
    ],
)
def test_other_labels_or_arguments_of_the_forward_are_another_input(first, second, out):
    one, other = ({"input_ids": SENTENCES[0], **more} for more in (first, second))
    model = huggingface("GPT2LMHeadModel")
    extract(model, [one], RESID, out, slice=-1, carry="label")
    message = refusal(DataError, model, [other], RESID, out, slice=-1, carry="label")
    assert message == OTHER.format(row=1)
    assert extract(model, [one, other], RESID, out, slice=-1, carry="label").rows == 4


def test_digests_tell_apart_what_is_given_in_any_shape():
    def digests(**given):
        return Batch(SENTENCES[0], None, torch.arange(2), given).digests.tolist()

    ways = [
        digests(),
        digests(scale=torch.tensor(2.0)),
        digests(scale=2.5),
        digests(bias=torch.ones(1, 3)),
        digests(bias=torch.ones(2, 3, dtype=torch.bfloat16) * 2),
    ]
    assert len({number for way in ways for number in way}) == 2 * len(ways)
    assert digests(attention_mask=torch.ones(2, 3)) == digests()


MASKED = {"input_ids": SENTENCES[0], "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
OTHERWISE = {**MASKED, "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])}


def test_another_mask_is_another_input_where_padding_leaves_rows(out):
    extract(bridge(), [MASKED], RESID, out, mask=None)
    for add, site in ((False, RESID), (True, Z)):
        message = refusal(DataError, bridge(), [OTHERWISE] * 2, site, out, mask=None, add=add)
        assert message.startswith(
            "the rows on disk came from another input: row 0 is token 1 of sequence 0, position 0 "
            "in both, but its sequence has other tokens, or other arguments of the forward"
        )
    assert extract(bridge(), [MASKED] * 2, RESID, out, mask=None).new_rows == 6


def test_other_tokens_to_pool_are_another_input(out):
    rows = [{"input_ids": [1, 2, 9], "kept": kept} for kept in ([0, 1, 1], [1, 1, 1])]
    options = {"mask": "kept", "pool": "mean"}
    extract(bridge(), rows[:1], RESID, out, **options)
    message = refusal(DataError, bridge(), rows[1:], RESID, out, **options)
    assert message == OTHER.format(row=0)


def test_the_same_sequences_padded_otherwise_are_the_same_input(out):
    ids, mask = torch.tensor([[1, 2, 9, 0], [3, 4, 5, 9]]), torch.tensor([[1, 1, 1, 0], [1] * 4])
    extract(bridge(), [{"input_ids": ids, "attention_mask": mask}], RESID, out, slice=-1)
    longer = {"input_ids": torch.zeros(2, 6).long(), "attention_mask": torch.zeros(2, 6).long()}
    longer["input_ids"][:, :4], longer["attention_mask"][:, :4] = ids, mask
    assert extract(bridge(), [longer], RESID, out, slice=-1).new_rows == 0


def test_fewer_tokens_than_there_are_rows_are_refused(out):
    unbroken(out, 3)
    options = {"drop": {"position": [0]}, "max_tokens": 70}
    assert refusal(DataError, bridge(), batches(3), [RESID, Z], out, **options) == (
        f"'{out}' has 90 rows, more than max_tokens=70; give max_tokens=90 or more, or another path"
    )


def test_another_input_is_refused(out):
    unbroken(out, 3)
    other = batches(3)
    other[2][1, 4] = 0
    was = int(batches(3)[2][1, 4])
    message = refusal(DataError, bridge(), other, [RESID, Z], out, drop={"position": [0]})
    assert message == (
        f"the rows on disk came from another input: row 69 is token {was} of sequence 11, "
        "position 4 there, but token 0 of sequence 11, position 4 in the input; give the same "
        "input in the same order, or another path"
    )


def test_a_shorter_input_is_refused(out):
    unbroken(out, 3)
    message = refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert message == (
        "the input leaves 60 rows, but 90 are on disk already, so they came from another one; "
        "give the same input, or another path"
    )


def test_a_change_of_one_weight_is_refused(out):
    unbroken(out, 3)
    message = refusal(
        DataError, other_weights(), batches(), [RESID, Z], out, drop={"position": [0]}
    )
    assert message.startswith(
        f"cannot go on with '{out}': its weight 'transformer.wte._original_component.weight' is '"
    )


class Named:
    """A tokenizer, of which only the name is looked at."""

    def __init__(self, name):
        self.name_or_path = name

    def __call__(self, texts, **_):
        raise AssertionError(texts)


def test_the_same_weights_and_tokens_from_another_path_go_on(out):
    for count, path in ((3, "gpt2"), (4, "/models/gpt2")):
        model = huggingface("LlamaForCausalLM")
        model.config._name_or_path = path
        site = {"resid": "blocks.0.hook_resid_post"}
        done = extract(model, batches(count), site, out, tokenizer=Named(path))
    assert done.rows == 4 * 35
    assert Read(out).layout.model["name"] == "gpt2"
    assert Read(out).layout.input["tokenizer"] == "gpt2"


def test_a_compiled_model_goes_on_where_it_was_not_compiled(out):
    site = {"resid": "blocks.0.hook_resid_post"}
    extract(huggingface("LlamaForCausalLM"), batches(3), site, out)
    compiled = torch.compile(huggingface("LlamaForCausalLM"), backend="eager")
    done = extract(compiled, batches(4), site, out)
    assert done.new_rows == 35


def test_parts_that_are_compiled_leave_the_fingerprint(mlp):
    before = describe_model(mlp)
    mlp.block = torch.compile(mlp.block, backend="eager")
    assert describe_model(mlp) == before
    assert describe_model(torch.compile(mlp, backend="eager")) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_where_weights_lie_leaves_the_fingerprint(dtype, offset):
    model = torch.nn.Linear(4, 2).to(dtype)
    moved = torch.nn.Linear(4, 2)
    for name, weights in model.named_parameters():
        lies = torch.empty(weights.numel() + offset, dtype=dtype)
        lies[offset:] = weights.detach().flatten()
        setattr(moved, name, torch.nn.Parameter(lies[offset:].view_as(weights)))
    assert describe_model(moved) == describe_model(model)


def test_other_axes_are_refused(out, mlp):
    extract(mlp, batches(2), Site("block", axes="batch pos d"), out)
    site = Site("block", axes="batch pos neuron")
    assert refusal(DataError, mlp, batches(3), site, out) == (
        f"cannot go on with '{out}': its list of axes of 'block' is ['d'], not ['neuron']; give "
        "the same, or another path"
    )
    assert Read(out).layout.finished


@pytest.mark.parametrize(
    ("was", "now", "shown"),
    [
        ({"io": "in"}, {"io": "out"}, "'in', not 'out'"),
        ({"firing": 0}, {"firing": 1}, "'out, firing 0', not 'out, firing 1'"),
        ({}, {"output": 0}, "'out', not 'out 0'"),
    ],
)
@pytest.mark.parametrize("add", [False, True])
def test_another_tensor_of_the_same_place_is_refused(out, was, now, shown, add):
    mlp = Mlp()
    first, second = ({"x": Site("block", axes="batch pos d", **each)} for each in (was, now))
    where, rest = out, "another path"
    extract(mlp, batches(2), first, out)
    if add:
        where, rest = out.with_name("acts.lance.adding"), "delete that directory"
        out.rename(where)
        extract(mlp, batches(2), Site("head", axes="batch pos d"), out)
    assert refusal(DataError, mlp, batches(2), second, out, add=add) == (
        f"cannot go on with '{where}': its tensor of 'x' (io, output, firing) is {shown}; "
        f"give the same, or {rest}"
    )


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        ({}, [RESID], f"list of sites is ['{RESID}', '{Z}'], not ['{RESID}']"),
        (
            {"dtype": torch.float16},
            [RESID, Z],
            f"dtype of '{RESID}' is 'float32', not 'float16'",
        ),
        (
            {"slice": {"head": 0}},
            [Site(RESID, slice={}), Z],
            f"slice of '{Z}' is '', not 'axis 2 0'",
        ),
        (
            {"slice": {"pos": -1}},
            [RESID, Z],
            f"slice of '{RESID}' is '', not 'token -1'",
        ),
        (
            {},
            {RESID: "blocks.0.hook_resid_post", Z: Z},
            f"hook of '{RESID}' is 'blocks.1.hook_out', not 'blocks.0.hook_out'",
        ),
        (
            {"drop": {"position": [1]}},
            [RESID, Z],
            "drop is {'position': [0]}, not {'position': [1]}",
        ),
    ],
)
def test_what_would_make_other_rows_is_refused(out, options, names, message):
    unbroken(out, 3)
    options = {"drop": {"position": [0]}, **options}
    assert refusal(DataError, bridge(), batches(), names, out, **options) == (
        f"cannot go on with '{out}': its {message}; give the same, or another path"
    )
    assert len(Read(out)) == 90


def whole_and_in_parts(path, data, **options):
    """Extract with a batch size, and with another that is gone on with; return the rows of both."""
    whole, out = path / "whole.lance", path / "acts.lance"
    extract(bridge(), data, RESID, whole, batch_size=8, **options)
    extract(bridge(), data, RESID, out, batch_size=8, max_tokens=13, **options)
    assert Read(whole).layout.input["batch_size"] == 8
    return Read(whole), out


@pytest.mark.thorough
@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (tokens(30), {}),
        (tokens(30).numpy(), {}),
        (sequences(), {"pack": True, "context": 4}),
        (sequences(), {}),
        (sequences(), {"pool": "mean"}),
    ],
)
def test_another_batch_size_goes_on_in_the_same_order(tmp_path, monkeypatch, data, options, size):
    monkeypatch.setattr("actctx._extract.inputs._WINDOW", 2)
    wanted, out = whole_and_in_parts(tmp_path, data, **options)
    model, ran = bridge(), []
    hook = model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    # Batches of a sorted order are run in parts, but never joined.
    is_same = size > 8 and isinstance(data, list) and "pack" not in options
    with nullcontext() if is_same else pytest.warns(UserWarning, match="up to rounding only"):
        extract(model, data, RESID, out, batch_size=size, **options)
    hook.remove()
    read = Read(out)
    columns = ["token", "sequence", "position", "_input"]
    assert read.table.select(columns).equals(wanted.table.select(columns))
    torch.testing.assert_close(read[RESID], wanted[RESID], atol=1e-5, rtol=0)
    assert max(ran) <= size


def test_sites_are_added_with_another_batch_size(tmp_path):
    wanted, out = whole_and_in_parts(tmp_path, sequences())
    extract(bridge(), sequences(), Z, out, batch_size=3, add=True)
    with pytest.warns(UserWarning, match="up to rounding only"):
        extract(bridge(), sequences(), [RESID, Z], out, batch_size=5)
    assert Read(out)["sequence"] == wanted["sequence"]


def test_a_model_in_another_dtype_is_refused(out):
    site = {"resid": "blocks.0.hook_resid_post"}
    extract(huggingface("LlamaForCausalLM"), tokens(), site, out)
    model = huggingface("LlamaForCausalLM").bfloat16()
    message = refusal(DataError, model, tokens(), site, out)
    assert "is 'float32 (50, 32) " in message
    assert "', not 'bfloat16 (50, 32) " in message


@pytest.mark.parametrize("names", [RESID, [Z]])
def test_what_has_no_rows_fixes_nothing(out, tmp_path, monkeypatch, names):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("actctx._store.destination.Target.append", fails)
        refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert len(Read(out)) == 0
    options = {"drop": {"token": [0]}, "dtype": torch.bfloat16}
    extract(bridge(), batches(2), names, out, **options)
    extract(bridge(), batches(2), names, tmp_path / "whole.lance", **options)
    assert same(Read(out), Read(tmp_path / "whole.lance"))


@pytest.mark.parametrize("step", ["update_schema_metadata", "cleanup_old_versions"])
def test_a_disk_that_is_full_between_commits_is_told_of(out, monkeypatch, step):
    unbroken(out, 2)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"lance.LanceDataset.{step}", fails)
        message = refusal(DataError, bridge(), batches(3), [RESID, Z], out, drop={"position": [0]})
    assert message == (
        f"cannot write to '{out}': {os.strerror(errno.ENOSPC)}; 60 rows are on disk, and running "
        "it again goes on after them"
    )
    assert len(unbroken(out, 3)) == 90


def test_a_damaged_manifest_is_told_of(out):
    unbroken(out, 2)
    for manifest in (out / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"")
    message = refusal(DataError, bridge(), batches(3), [RESID, Z], out)
    assert message.startswith(f"the data set at '{out}' cannot be read: ")
    assert message.endswith("; put a copy of it in its place, or give another path")


def test_a_data_set_is_gone_on_with_only_where_that_is_asked_for(out):
    unbroken(out, 3)
    message = refusal(
        DataError, bridge(), batches(), [RESID, Z], out, drop={"position": [0]}, resume=False
    )
    assert message == f"'{out}' exists; give resume=True to go on with it, or another path"


def test_a_file_in_its_place_is_refused(out):
    out.write_text("mine")
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"'{out}' is a file, and no data set of actctx; give another path, or remove it"
    )
    assert out.read_text() == "mine"


def test_a_directory_of_other_things_is_refused(out):
    out.mkdir()
    (out / "notes.txt").touch()
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"'{out}' is a directory of other things, and no data set of actctx; give another path, "
        "or remove it"
    )
    assert [each.name for each in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("lock", [False, True])
def test_a_data_set_within_a_directory_of_other_things_stays_whole(out, lock):
    inner = out / "data" / "mine.lance"
    inner.parent.mkdir(parents=True)
    if lock:
        (out / "writing.lock").touch()
    unbroken(inner, 2)
    before = {each.name for each in inner.rglob("*")}
    for _ in range(2):
        assert refusal(DataError, bridge(), batches(), RESID, out) == (
            f"'{out}' is a directory of other things, and no data set of actctx; give another "
            "path, or remove it"
        )
    assert {each.name for each in inner.rglob("*")} == before
    assert len(Read(inner)) == 60


@pytest.mark.parametrize("name", ["_versions", "_transactions", "_indices"])
def test_a_directory_without_the_lock_was_not_begun(out, name):
    (out / name).mkdir(parents=True)
    message = refusal(DataError, bridge(), batches(), RESID, out)
    assert message.startswith(f"'{out}' is a directory of other things")
    assert [each.name for each in out.iterdir()] == [name]


def test_what_could_not_be_made_is_made_later(out, monkeypatch):
    def fails(*_, **__):
        (out / "_versions").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("lance.write_dataset", fails)
        refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert len(unbroken(out, 2)) == 60


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._acts.lance"])
def test_what_file_managers_leave_does_not_matter(out, name):
    out.mkdir()
    (out / name).touch()
    assert len(unbroken(out, 2)) == 60


def test_other_files_in_a_data_set_do_not_matter(out):
    unbroken(out, 2)
    (out / "notes.txt").touch()
    assert len(unbroken(out, 3)) == 90
    assert (out / "notes.txt").exists()


def test_a_dataset_of_others_is_refused(out):
    import pyarrow as pa

    lance.write_dataset(pa.table({"x": [1]}), str(out))
    there = {each.name for each in out.iterdir()}
    message = refusal(DataError, bridge(), batches(), RESID, out)
    assert message.startswith(f"'{out}' is a Lance dataset, but none of actctx")
    assert {each.name for each in out.iterdir()} == there


def test_who_opened_a_data_set_can_read_it_while_it_grows(out):
    unbroken(out, 2)
    opened = lance.dataset(str(out))
    unbroken(out, 3)
    unbroken(out, 4)
    assert lance.dataset(str(out), version=opened.version).to_table().num_rows == 60


@pytest.mark.thorough
def test_versions_that_were_replaced_long_ago_are_deleted_but_tagged_ones(out, monkeypatch):
    unbroken(out, 2)
    first = lance.dataset(str(out)).version
    lance.dataset(str(out)).tags.create("begun", 1)
    time.sleep(1.1)  # what is about as old as what is kept is kept, too
    unbroken(out, 3)
    second = lance.dataset(str(out)).version
    time.sleep(1.1)
    monkeypatch.setattr("actctx._store.destination._KEPT", timedelta(seconds=1))
    unbroken(out, 4)
    kept = [version["version"] for version in lance.dataset(str(out)).versions()]
    assert first not in kept
    assert second in kept
    assert lance.dataset(str(out), version="begun").count_rows() == 0


def test_rows_are_committed_while_the_input_stalls(out, monkeypatch):
    monkeypatch.setattr("actctx._extract.writer._COMMIT_SECONDS", 0.2)
    found = []

    def stalls():
        yield from batches(3)
        end = time.monotonic() + 30
        while time.monotonic() < end and found[-1:] != [90]:
            time.sleep(0.05)
            if [*out.glob("_versions/*.manifest")]:
                found.append(lance.dataset(str(out)).count_rows())
        yield from batches(4)[3:]

    extract(bridge(), stalls(), [RESID, Z], out, drop={"position": [0]})
    assert found[-1] == 90
    assert len(Read(out)) == 120


@pytest.mark.parametrize(("elapsed", "wanted"), [(0.0, 60.0), (6e3, 60.0), (6e5, 6e3)])
def test_commits_are_fewer_the_longer_it_takes(elapsed, wanted):
    assert commit_seconds(elapsed) == wanted


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    out = tmp_path / "missing" / "acts.lance"
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"cannot write to '{out}': {os.strerror(errno.ENOENT)}; make the directory '{out.parent}' "
        "first"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written_to_is_named(out, monkeypatch, number):
    def fails(self, **_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", fails)
    assert refusal(DataError, bridge(), batches(), RESID, out) == (
        f"cannot write to '{out}': {os.strerror(number)}; give another path"
    )


def test_a_slow_writer_holds_the_iterator_back(out, monkeypatch):
    append, read, seen = Target.append, [], []

    def slow(self, rows):
        while not seen or len(read) > seen[-1]:
            seen.append(len(read))
            time.sleep(0.3)
        append(self, rows)

    def counted():
        for batch in batches():
            read.append(batch)
            yield batch

    monkeypatch.setattr(Target, "append", slow)
    extract(bridge(), counted(), [RESID, Z], out)
    assert max(seen) <= 12  # 4 and 4 that wait, and those that are being read, run and written
    assert len(Read(out)) == BATCHES * 35


@pytest.mark.thorough
def test_two_writers_at_once_are_refused(tmp_path):
    out = tmp_path / "acts.lance"
    process = child(out)
    assert process.stdout.readline() == "begun\n"
    message = refusal(DataError, bridge(), batches(), [RESID, Z], out, drop={"position": [0]})
    assert message == (
        f"'{out}' is being written to by another extraction; wait until it has ended, or give "
        "another path"
    )
    assert process.communicate()[0].endswith("ended\n")
    assert process.returncode == 0
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))


FULL = f"""
import resource, sys
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx._extract import writer
from actctx.extract import extract
writer._COMMIT_BYTES = 20_000
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))

def batches():
    for seed in range(20):
        yield tokens(5, 7, seed)
    writer._COMMIT_BYTES = 10_000_000
    for seed in range(20, {BATCHES}):
        yield tokens(5, 7, seed)

extract(bridge(), batches(), {[RESID, Z]!r}, sys.argv[1], drop={{"position": [0]}})
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    out = tmp_path / "acts.lance"
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stderr
    rows = len(Read(out))
    assert rows
    assert f"DataError: cannot write to '{out}': " in run.stderr
    assert f"{rows} rows are on disk, and running it again goes on after them" in run.stderr
    unbroken(out)
    assert same(Read(out), unbroken(tmp_path / "whole.lance"))
