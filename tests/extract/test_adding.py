"""More sites for the rows of a data set that is there."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from extracted import RESID, TESTS, Read, Z, batches, refusal, same
from models import bridge, other_weights

from actctx import DataError, OptionError
from actctx.extract import extract

lance = pytest.importorskip("lance")

DROP = {"position": [0]}
MLP = "blocks.0.hook_mlp_out"


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "acts.lance"
    extract(bridge(), batches(6), RESID, path, drop=DROP)
    return path


def check(out, tmp_path, dtype=None, count=6):
    read = Read(out)
    extract(bridge(), batches(count), [Z, MLP], tmp_path / "alone.lance", drop=DROP, dtype=dtype)
    alone = Read(tmp_path / "alone.lance")
    assert [site.name for site in read.layout.sites] == [RESID, Z, MLP]
    assert torch.equal(read[Z], alone[Z])
    assert torch.equal(read[MLP], alone[MLP])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["acts.lance", "alone.lance"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_sites_are_added_to_the_rows_that_are_there(out, tmp_path, dtype):
    before = {file.name for file in (out / "data").iterdir()}
    was = Read(out)[RESID]
    done = extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True, dtype=dtype)
    assert (done.rows, done.new_rows) == (180, 0)
    assert before < {file.name for file in (out / "data").iterdir()}
    assert torch.equal(Read(out)[RESID], was)
    check(out, tmp_path, dtype)


def test_adding_that_broke_goes_on(out, tmp_path):
    def breaks():
        yield from batches(3)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        extract(bridge(), breaks(), [Z, MLP], out, drop=DROP, add=True)
    assert [site.name for site in Read(out).layout.sites] == [RESID]
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


@pytest.mark.parametrize(
    "where",
    [
        "lance.LanceDataset.add_columns",
        "lance.LanceDataset.update_schema_metadata",
        "pathlib.Path.rename",
        "actctx._store.destination.shutil.rmtree",
    ],
)
def test_adding_that_ended_between_its_steps_goes_on(out, tmp_path, monkeypatch, where):
    extract(bridge(), batches(6), [Z, MLP], tmp_path / "acts.lance.adding", drop=DROP)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, dies)
        with pytest.raises(KeyboardInterrupt):
            extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    assert len(Read(out)) == 180
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


# What is killed, by itself, before or behind a step of the last part.
KILLED = f"""
import importlib, os, signal, sys
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from models import bridge, tokens
from actctx.extract import extract

module, owner, name = sys.argv[2].split(":")
when, number = sys.argv[3], int(sys.argv[4])
owner = getattr(importlib.import_module(module), owner)
step = getattr(owner, name)
calls = []

def dies(*args, **kwargs):
    calls.append(1)
    if when == "before" and len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    result = step(*args, **kwargs)
    if when == "behind" and len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, dies)
batches = [tokens(5, 7, seed) for seed in range(6)]
names = {[Z, MLP]!r}
extract(bridge(), batches, names, sys.argv[1], drop={DROP!r}, add=True)
"""
STEPS = [
    ("actctx._store.destination:Destination:create", "behind", 1),
    ("actctx._store.contents:Contents:take_columns", "before", 1),
    ("lance:LanceDataset:update_schema_metadata", "before", 2),
    ("lance:LanceDataset:add_columns", "before", 1),
    ("lance:LanceDataset:add_columns", "behind", 1),
    ("pathlib:Path:rename", "behind", 1),
    ("shutil:os:unlink", "behind", 1),
    ("shutil:os:unlink", "behind", 4),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("step", "when", "number"), STEPS)
def test_what_was_killed_has_the_sites_or_not_and_goes_on(out, tmp_path, step, when, number):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), step, when, str(number)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    read = Read(out)
    assert len(read) == 180
    assert [site.name for site in read.layout.sites] in ([RESID], [RESID, Z, MLP])
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


def test_what_was_killed_while_it_was_deleted_is_done(out, tmp_path):
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    done = tmp_path / "acts.lance.adding.done"
    (done / "_transactions").mkdir(parents=True)
    (done / "writing.lock").touch()
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


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

batches = [tokens(5, 7, seed) for seed in range(60)]
extract(bridge(), batches, {[Z, MLP]!r}, sys.argv[1], drop={DROP!r}, add=True)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_disk_that_is_full_while_sites_are_added_loses_nothing(out, tmp_path):
    extract(bridge(), batches(60), RESID, out, drop=DROP)  # one file, so that one is added to it
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, check=False
    )
    assert run.stderr.splitlines()[-1] == (
        f"actctx.DataError: cannot add the sites to '{out}': File too large (os error 27); nothing "
        f"is lost, since the new columns are in '{tmp_path / 'acts.lance.adding'}': free space, "
        "then the same call resumes"
    )
    assert [site.name for site in Read(out).layout.sites] == [RESID]
    model, ran = bridge(), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    extract(model, batches(60), [Z, MLP], out, drop=DROP, add=True)
    assert not ran
    check(out, tmp_path, count=60)


def test_room_is_needed_for_what_is_added_and_for_its_copy(out, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=90_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    assert refusal(DataError, bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True) == (
        f"'{tmp_path / 'acts.lance.adding'}' has too little space: 180 rows of 280 bytes are "
        "49.2 KiB, with 45.0 KiB more while they are added, but 87.9 KiB are free; give a smaller "
        "dtype, fewer sites or tokens, or another disk"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["acts.lance"]


def die_adding(out, monkeypatch, number=6):
    """Interrupt an addition before its columns are there."""

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lance.LanceDataset.add_columns", dies)
        with pytest.raises(KeyboardInterrupt):
            extract(bridge(), batches(number), [Z, MLP], out, drop=DROP, add=True)


def test_all_rows_are_gone_on_with_after_an_addition_that_died(out, tmp_path, monkeypatch):
    die_adding(out, monkeypatch)
    assert extract(bridge(), batches(8), RESID, out, drop=DROP).new_rows == 60
    assert [site.name for site in Read(out).layout.sites] == [RESID]
    extract(bridge(), batches(8), [Z, MLP], out, drop=DROP, add=True)
    extract(bridge(), batches(8), [RESID, Z, MLP], tmp_path / "alone.lance", drop=DROP)
    assert Read(out).table.equals(Read(tmp_path / "alone.lance").table)


def test_an_addition_that_is_half_done_is_not_taken_for_another(out, tmp_path, monkeypatch):
    die_adding(out, monkeypatch)
    beside = tmp_path / "acts.lance.adding"
    for names in (RESID, [RESID, Z], Z):
        message = refusal(DataError, bridge(), batches(6), names, out, drop=DROP, add=True)
        asked = [names] if isinstance(names, str) else names
        assert message == (
            f"'{beside}' contains an unfinished addition of {[Z, MLP]}, not of {asked}; finish it "
            "first, with its sites, or delete that directory"
        )
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


def test_an_addition_that_is_half_done_is_gone_on_with_as_it_began(out, tmp_path, monkeypatch):
    die_adding(out, monkeypatch)
    beside, options = tmp_path / "acts.lance.adding", {"drop": DROP, "add": True}
    message = refusal(
        DataError, bridge(), batches(6), [Z, MLP], out, dtype=torch.float16, **options
    )
    assert message == (
        f"cannot resume '{beside}': its dtype of '{Z}' is 'float32', not 'float16'; give the same, "
        "or delete that directory"
    )
    message = refusal(DataError, bridge(), batches(6), [Z, MLP], out, resume=False, **options)
    assert message == (
        f"'{beside}' exists; give resume=True to resume it, or delete that directory"
    )


def test_an_addition_to_another_data_set_is_not_gone_on_with(tmp_path, out, monkeypatch):
    die_adding(out, monkeypatch)
    out.rename(tmp_path / "away")
    extract(bridge(), batches(3), RESID, out, drop=DROP)
    beside = tmp_path / "acts.lance.adding"
    assert refusal(DataError, bridge(), batches(3), [Z, MLP], out, drop=DROP, add=True) == (
        f"'{beside}' holds 180 rows of an unfinished addition, but '{out}' has 90, so it belongs "
        "to another data set; delete that directory"
    )


def other_input():
    given = batches(6)
    given[0][0, 2] = 0
    return given


def poisoned():
    """Make a model with the same weights that yields no numbers."""
    model = bridge()
    inner = model.blocks[0].mlp.original_component
    inner.register_forward_hook(lambda _module, _args, output: output * float("nan"))
    return model


@pytest.mark.parametrize(
    ("model", "given", "options"),
    [
        (other_weights, batches(6), {}),
        (bridge, other_input(), {}),
        (bridge, batches(6), {"dtype": torch.float64}),
        (bridge, batches(6), {"drop": {}}),
        (bridge, batches(6), {"max_tokens": 9}),
        (poisoned, batches(6), {}),
    ],
)
def test_an_addition_that_is_refused_leaves_nothing(out, tmp_path, model, given, options):
    options = {"drop": DROP, "add": True, **options}
    refusal((DataError, OptionError), model(), given, [Z, MLP], out, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["acts.lance"]
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    check(out, tmp_path)


def test_sites_are_added_to_all_rows(out):
    options = {"drop": DROP, "add": True, "max_tokens": 100}
    assert refusal(OptionError, bridge(), batches(6), Z, out, **options) == (
        "max_tokens=100 does not work with add=True, which adds to all existing rows; leave "
        "max_tokens out"
    )


def test_a_column_of_somebody_else_is_not_written_over(out):
    lance.dataset(str(out)).add_columns({"blocks/0/hook_mlp_out": "token + 1"})
    drop = "lance.dataset(path).drop_columns(['blocks/0/hook_mlp_out'])"
    assert refusal(DataError, bridge(), batches(6), MLP, out, drop=DROP, add=True) == (
        f"cannot add '{MLP}' to '{out}': it has a column 'blocks/0/hook_mlp_out' that extract() "
        f"did not write; drop it, with {drop}, or give the site an alias, as in {{'resid': ...}}"
    )
    assert refusal(DataError, bridge(), batches(8), RESID, out, drop=DROP) == (
        f"cannot resume '{out}': it has a column 'blocks/0/hook_mlp_out' that extract() did not "
        f"write, so new rows would have no value in it; drop it, with {drop}, or give another path"
    )
    lance.dataset(str(out)).drop_columns(["blocks/0/hook_mlp_out"])
    assert extract(bridge(), batches(8), RESID, out, drop=DROP).new_rows == 60


def test_what_stands_in_the_way_is_not_deleted(out, tmp_path):
    done = tmp_path / "acts.lance.adding.done"
    done.mkdir()
    (done / "mine.txt").touch()
    assert refusal(DataError, bridge(), batches(6), Z, out, drop=DROP, add=True) == (
        f"'{done}' is a directory with other content, but adding sites needs that path; move it"
    )
    assert (done / "mine.txt").exists()


def test_all_of_them_are_gone_on_with_together(out):
    extract(bridge(), batches(6), [Z, MLP], out, drop=DROP, add=True)
    done = extract(bridge(), batches(8), [RESID, Z, MLP], out, drop=DROP)
    assert done.new_rows == 60


def test_a_pattern_goes_on_with_a_site_that_was_added(tmp_path):
    path, pattern = tmp_path / "acts.lance", "blocks.*.hook_resid_post"
    extract(bridge(), batches(2), RESID, path, drop=DROP)
    extract(bridge(), batches(2), "blocks.0.hook_resid_post", path, drop=DROP, add=True)
    assert [site.name for site in Read(path).layout.sites] == [RESID, "blocks.0.hook_resid_post"]
    assert extract(bridge(), batches(3), pattern, path, drop=DROP).new_rows == 30
    extract(bridge(), batches(3), pattern, tmp_path / "alone.lance", drop=DROP)
    alone = Read(tmp_path / "alone.lance")
    for name in (RESID, "blocks.0.hook_resid_post"):
        assert torch.equal(Read(path)[name], alone[name])


def test_an_addition_that_is_half_done_goes_on_in_any_order(out, tmp_path, monkeypatch):
    die_adding(out, monkeypatch)
    extract(bridge(), batches(6), [MLP, Z], out, drop=DROP, add=True)
    check(out, tmp_path)


def test_sites_are_not_added_twice(out):
    before = Read(out)
    assert refusal(DataError, bridge(), batches(6), [RESID, Z], out, drop=DROP, add=True) == (
        f"'{out}' has '{RESID}' already; leave it out, or give another an alias, as in "
        "{'resid': ...}"
    )
    assert refusal(
        DataError, bridge(), batches(6), RESID, out, drop=DROP, add=True, dtype=torch.float16
    ).startswith(f"cannot add to '{out}': its dtype of '{RESID}' is 'float32', not 'float16'")
    done = extract(bridge(), batches(6), RESID, out, drop=DROP, add=True)  # a script runs again
    assert (done.rows, done.new_rows) == (len(before), 0)
    assert same(Read(out), before)


def test_sites_are_added_to_what_there_is(tmp_path):
    path = tmp_path / "none.lance"
    assert refusal(DataError, bridge(), batches(6), Z, path, drop=DROP, add=True) == (
        f"'{path}' has no rows to add sites to; extract to it without add=True first"
    )
    assert not [*tmp_path.iterdir()]


def test_another_input_is_not_added(out):
    other = batches(6)
    other[1][0, 2] = 0
    message = refusal(DataError, bridge(), other, Z, out, drop=DROP, add=True)
    assert message.startswith("the rows on disk came from another input: row 31 is token ")


def test_a_shorter_input_is_not_added(out):
    assert refusal(DataError, bridge(), batches(5), Z, out, drop=DROP, add=True) == (
        f"the input leaves 150 rows, but '{out}' has 180; give the input that they came from"
    )


def test_rows_that_are_chosen_otherwise_are_not_added(out):
    assert refusal(DataError, bridge(), batches(6), Z, out, add=True) == (
        f"cannot add to '{out}': its drop is {{'position': [0]}}, not {{}}; give the same, or "
        "another path"
    )


def test_rows_of_other_positions_are_not_added(tmp_path):
    path, same = tmp_path / "one.lance", [torch.full((2, 5), 7)]
    extract(bridge(), same, RESID, path, slice={"pos": [0]})
    options = {"slice": {"pos": [4]}, "add": True}
    assert refusal(DataError, bridge(), same, Z, path, **options) == (
        f"cannot add to '{path}': its slice along the tokens is 'token [0]', not 'token [4]'; give "
        "the same, or another path"
    )
    extract(bridge(), same, Z, path, slice={"pos": [0], "head": 0}, add=True)
    assert len(Read(path)[Z]) == 2


def test_equal_tokens_at_other_positions_are_another_input(tmp_path):
    path = tmp_path / "acts.lance"
    batch = {"input_ids": torch.full((1, 4), 7), "loss": torch.tensor([[1, 1, 0, 0]])}
    extract(bridge(), [batch], RESID, path, mask="loss")
    other = {**batch, "loss": torch.tensor([[1, 0, 0, 1]])}
    message = refusal(DataError, bridge(), [other], Z, path, mask="loss", add=True)
    assert message == (
        "the rows on disk came from another input: row 1 is token 7 of sequence 0, position 1 "
        "there, but token 7 of sequence 0, position 3 in the input; give the same input in the "
        "same order, or another path"
    )
