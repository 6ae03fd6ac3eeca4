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
from models import bridge, tokens
from power import Disk, Image, has_images
from test_extract import RESID, Read, Z, refusal

from actctx import DataError
from actctx._extract import writer
from actctx._files import sync
from actctx._store.versions import manifests
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")

MLP = "blocks.0.hook_mlp_out"
DROP = {"position": [0]}
BATCHES = 12
CUT = "not whole, as after a cut of power"


@pytest.fixture(autouse=True)
def commits(monkeypatch):
    """Commit every few rows."""
    monkeypatch.setattr(writer, "_COMMIT_BYTES", 5000)


def batches(count=BATCHES):
    return [tokens(5, 7, seed) for seed in range(count)]


def write(out, names=(RESID, Z), *, count=BATCHES, **options):
    return extract(bridge(), batches(count), [*names], out, drop=DROP, **options)


def check(out, wanted, rows):
    """Read what a cut left, and finish it: as it was written, and all that had been promised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{CUT}")
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
    assert verified.unchecked == ()
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
    append = writer.Target.append

    def told(self, rows):
        append(self, rows)
        promised[0] = self.rows

    def noted(path):
        if draw.random() < 0.5 and len(left) < cuts:
            left.append((tmp_path / f"cut{len(left)}", promised[0]))
            disk.cut(left[-1][0])
        sync(path)
        disk.note(path)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Target, "append", told)
        patch.setattr("actctx._store.commits.sync", noted)
        write(root / "acts.lance")
    assert len(left) == cuts
    for where, rows in left:
        check(where / "acts.lance", Read(wanted), rows)


def test_a_cut_of_power_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    check_cuts(tmp_path, monkeypatch, seed=0, cuts=8)


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
    append = writer.Target.append

    def told(self, rows):
        append(self, rows)
        promised[0] = self.rows

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
        promised[0], writer.Target.append = 0, told
        running = threading.Thread(target=run, args=(image.root / "acts.lance",))
        running.start()
        time.sleep(draw.uniform(0.2, 0.2 * BATCHES + 1))
        rows = promised[0]
        image.cut()
        running.join()
        writer.Target.append = append
        image.power_on()
        print(f"cut after {rows} rows", flush=True)  # noqa: T201
        check(image.root / "acts.lance", wanted, rows)
        shutil.rmtree(image.root / "acts.lance")
    image.close()


@pytest.mark.slow
def test_cuts_of_a_real_file_system_lose_nothing_that_was_committed(tmp_path):
    if not has_images():
        pytest.skip("it takes root and loop devices")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "from pathlib import Path\nfrom test_power import check_image\n"
    code += f"check_image(Path({str(tmp_path)!r}), seed=0, cuts=50)"
    run = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cut after") == 50
