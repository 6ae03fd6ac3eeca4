"""Cuts of power: what was committed stays, and what is torn is neither read nor in the way."""

import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from extracted import RESID, TESTS, Read, Z
from models import bridge, tokens
from power import Disk, Image, has_images

from actctx import DataError
from actctx._extract import writer
from actctx._files import sync
from actctx._store.repair import repair
from actctx._store.versions import manifests
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")
pytestmark = pytest.mark.thorough

MLP = "blocks.0.hook_mlp_out"
DROP = {"position": [0]}
BATCHES = 12
NOT_WHOLE = "(is|are) incomplete"


@pytest.fixture(autouse=True)
def commits(monkeypatch):
    """Commit every few rows."""
    monkeypatch.setattr(writer, "_COMMIT_BYTES", 5000)


def batches(count=BATCHES):
    return [tokens(5, 7, seed) for seed in range(count)]


def write(out, names=(RESID, Z), *, count=BATCHES, **options):
    return extract(bridge(), batches(count), [*names], out, drop=DROP, **options)


def check(out, wanted, rows, *, syncs=True):
    """Read what a cut left, and finish it: as it was written, and all that had been promised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{NOT_WHOLE}")
        if rows or [*out.glob("_versions/*.manifest")]:
            try:
                data = ActivationDataset(out)
            except DataError:
                assert not rows
            else:
                assert len(data) >= rows
                assert data.tokens.tolist() == wanted["token"][: len(data)]
        write(out)
    assert Read(out).table.equals(wanted.table)
    verified = ActivationDataset(out).verify()
    assert not syncs or verified.unchecked == ()
    assert verified.rows == len(wanted)


def check_cuts(tmp_path, monkeypatch, seed, cuts):
    """Write to a disk that is cut at random moments, and check what each cut left."""
    draw = random.Random(seed)  # noqa: S311
    wanted = tmp_path / "whole.lance"
    write(wanted)
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, tmp_path / "shadow", draw)
    promised, left = [0], []
    append = writer.Contents.append

    def told(self, rows):
        append(self, rows)
        promised[0] = self.row_count

    def noted(path):
        if draw.random() < 0.5 and len(left) < cuts:
            left.append((tmp_path / f"cut{len(left)}", promised[0]))
            disk.cut(left[-1][0])
        sync(path)
        disk.note(path)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Contents, "append", told)
        patch.setattr("actctx._store.commits.sync", noted)
        write(root / "acts.lance")
    assert len(left) == cuts
    for where, rows in left:
        check(where / "acts.lance", Read(wanted), rows)


def test_a_cut_of_power_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    check_cuts(tmp_path, monkeypatch, seed=0, cuts=5)


def test_the_newest_whole_version_is_read_and_the_others_are_said_to_be_lost(tmp_path):
    out = tmp_path / "acts.lance"
    write(out)
    numbers = [*manifests(out)]
    for number, content in zip(numbers[:2], (b"", bytes(900)), strict=True):
        manifests(out)[number].write_bytes(content)
    whole = lance.dataset(str(out), version=numbers[2])
    rows = whole.count_rows()
    message = (
        f"versions {numbers[1]} and {numbers[0]} of '{out}' are incomplete, as after power loss: "
        f"its manifest is empty; version {numbers[2]}, of {rows} rows, is read, and what was "
        "written after it is lost; the same extract() writes it again"
    )
    with pytest.warns(UserWarning, match="are incomplete") as caught:
        data = ActivationDataset(out)
    assert [str(each.message) for each in caught] == [message]
    assert caught[0].filename == __file__
    assert len(data) == rows
    assert [*manifests(out)] == numbers  # reading deletes nothing
    with pytest.warns(UserWarning, match="are incomplete"):
        write(out)
    assert len(ActivationDataset(out)) == 30 * BATCHES


def test_a_version_whose_files_are_missing_is_not_whole(tmp_path):
    out = tmp_path / "acts.lance"
    write(out)
    *_, last = lance.dataset(str(out)).get_fragments()
    name = last.metadata.files[0].path
    (out / "data" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=f"its file 'data/{name}' is not whole; version"):
        assert len(ActivationDataset(out)) == 330
    with pytest.warns(UserWarning, match="are incomplete"):
        write(out)
    assert ActivationDataset(out).verify().rows == 360


def test_rows_behind_a_gap_are_not_given_up_for_an_older_version(tmp_path):
    out = tmp_path / "acts.lance"
    write(out)
    middle = lance.dataset(str(out)).get_fragments()[6].metadata.files[0].path
    (out / "data" / middle).unlink()
    for number in [*manifests(out)][1:-1]:  # as the next hour's writer does
        manifests(out)[number].unlink()
    said = f"of '{out}' is incomplete: its file 'data/{middle}' is missing; from row 180 on"
    with pytest.warns(UserWarning, match=said):
        data = ActivationDataset(out)
    assert len(data) == 360
    assert len(data[:180]["token"]) == 180
    with pytest.raises(DataError, match="'actctx repair "):
        write(out)
    repair(out, dry_run=False)
    write(out)
    assert ActivationDataset(out).verify().unchecked == ()


def test_a_data_set_that_was_cut_while_it_was_made_is_made_anew(tmp_path):
    out = tmp_path / "acts.lance"
    out.mkdir()
    (out / "writing.lock").touch()
    (out / "_versions").mkdir()
    (out / "_versions" / f"{2**64 - 2}.manifest").touch()
    write(out)
    assert ActivationDataset(out).verify().rows == 360


def test_a_version_of_a_later_lance_is_not_taken_for_a_torn_one(tmp_path):
    out = tmp_path / "acts.lance"
    write(out)
    dataset = lance.dataset(str(out))
    newest = manifests(out)[dataset.version]
    known = newest.read_bytes()
    later = newest.with_name(f"{2**64 - 2 - dataset.version}.manifest")
    later.write_bytes(known.replace(b"fixed_size_list:float", b"later_size_list:float"))
    with pytest.raises(DataError, match="cannot be read"):
        ActivationDataset(out)


@pytest.mark.parametrize("commit", [0, 1])
def test_an_addition_that_was_cut_off_is_finished(tmp_path, commit):
    out = tmp_path / "acts.lance"
    write(out)
    shutil.copytree(out, tmp_path / "before.lance")
    write(tmp_path / "acts.lance.adding", [MLP])
    shutil.copytree(tmp_path / "acts.lance.adding", tmp_path / "kept")
    write(out, [MLP], add=True)
    number = [*manifests(out)][commit]
    manifests(out)[number].write_bytes(b"")
    shutil.move(tmp_path / "kept", tmp_path / "acts.lance.adding")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{NOT_WHOLE}")
        write(out, [MLP], add=True)
    data = ActivationDataset(out)
    assert [*data.sites] == [RESID, Z, MLP]
    assert data.verify().unchecked == ()


def check_unsynced(tmp_path, monkeypatch, seed):
    """Without syncing, a cut may cost all, but leaves nothing wrong: a beginning, or an error."""
    draw = random.Random(seed)  # noqa: S311
    write(tmp_path / "whole.lance")
    wanted = Read(tmp_path / "whole.lance")
    root = tmp_path / "disk"
    root.mkdir()
    disk, left = Disk(root, tmp_path / "shadow", draw), []
    append = writer.Contents.append

    def told(self, rows):
        append(self, rows)
        for path in filter(lambda _: draw.random() < 0.8, root.rglob("*")):
            disk.note(path)  # as the system does by itself after a while
        disk.note(root)
        left.append(tmp_path / f"cut{len(left)}")
        disk.cut(left[-1])

    with monkeypatch.context() as patch:
        patch.setattr(writer.Contents, "append", told)
        write(root / "acts.lance", sync=False)
    goes_on = 0
    for where in left:
        out = where / "acts.lance"
        try:
            check(out, wanted, 0, syncs=False)
        except DataError as error:
            if "actctx repair" not in str(error):
                continue
            repair(out, dry_run=False)
            check(out, wanted, 0, syncs=False)
        goes_on += 1
    assert goes_on


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cuts_of_what_is_not_synced_leave_nothing_wrong(tmp_path, monkeypatch, seed):
    check_unsynced(tmp_path, monkeypatch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_cuts_of_power_lose_nothing_that_was_committed(tmp_path, monkeypatch, seed):
    check_cuts(tmp_path, monkeypatch, seed=seed, cuts=40)


def check_image(where: Path, seed: int, cuts: int, *, syncs: bool = True) -> None:
    """Cut a real file system while it is written to, and check what each cut left."""
    writer._COMMIT_BYTES = 5000
    draw = random.Random(seed)  # noqa: S311
    write(where / "whole.lance", count=BATCHES)
    wanted = Read(where / "whole.lance")
    image, promised = Image(where), [0]
    append = writer.Contents.append

    def told(self, rows):
        append(self, rows)
        promised[0] = self.row_count

    def slowly():
        for batch in batches():
            time.sleep(0.2)
            yield batch

    def run(out):
        try:
            extract(bridge(), slowly(), [RESID, Z], out, drop=DROP, sync=syncs)
        except (DataError, OSError):
            return

    for _ in range(cuts):
        promised[0], writer.Contents.append = 0, told
        running = threading.Thread(target=run, args=(image.root / "acts.lance",))
        running.start()
        time.sleep(draw.uniform(0.2, 0.2 * BATCHES + 1))
        rows = promised[0]
        image.cut()
        running.join()
        writer.Contents.append = append
        image.power_on()
        print(f"cut after {rows} rows", flush=True)  # noqa: T201
        check(image.root / "acts.lance", wanted, rows, syncs=syncs)
        shutil.rmtree(image.root / "acts.lance")
    image.close()


@pytest.mark.slow
def test_cuts_of_a_real_file_system_lose_nothing_that_was_committed(tmp_path):
    if not has_images():
        pytest.skip("it takes root and loop devices")
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), TESTS]!r}\n"
    code += "from pathlib import Path\nfrom test_power import check_image\n"
    code += f"check_image(Path({str(tmp_path)!r}), seed=0, cuts=50)"
    run = subprocess.run(
        [shutil.which("unshare"), "--mount", sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cut after") == 50
