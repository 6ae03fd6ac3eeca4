"""Damage on disk is found, named, and dropped."""

import json
import random
import shutil

import pyarrow as pa
import pytest
import stored
import torch
from commands import actctx
from extracted import RESID, Read, Z
from models import bridge, tokens

from actctx import DataError
from actctx._extract import writer
from actctx._store.digests import Digest
from actctx._store.repair import repair
from actctx.dataset import ActivationDataset
from actctx.extract import extract

lance = pytest.importorskip("lance")

MLP = "blocks.0.hook_mlp_out"
BATCHES = 6


def write(out, names=(RESID, Z), *, count=BATCHES, **options):
    data = [
        {"input_ids": ids, "label": [f"{seed}-{k}" for k in range(len(ids))]}
        for seed, ids in ((seed, tokens(5, 7, seed)) for seed in range(count))
    ]
    return extract(bridge(), data, [*names], out, carry=["label"], **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three commits of 70 rows, of two sites, and one that was added."""
    out = tmp_path_factory.mktemp("written") / "acts.lance"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_COMMIT_BYTES", 20_000)
        write(out)
        patch.setattr(writer, "_COMMIT_BYTES", 10_000)
        write(out, [MLP], add=True)
    return out


@pytest.fixture
def out(written, tmp_path):
    return shutil.copytree(written, tmp_path / "acts.lance")


def file_of(out, fragment, number=0):
    metadata = lance.dataset(str(out)).get_fragments()[fragment].metadata
    return out / "data" / metadata.files[number].path


def damage(file, values):
    """Flip a bit of the file where some values are."""
    content = file.read_bytes()
    at = content.index(values.numpy().tobytes())
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def refused(out):
    with pytest.raises(DataError) as caught:
        ActivationDataset(out).verify()
    return str(caught.value)


def test_what_is_whole_is_said_to_be(out):
    verified = ActivationDataset(out, sites=Z, where="token > 3").verify()
    assert verified.rows == 210
    assert verified.columns == (
        "token",
        "sequence",
        "position",
        "_input",
        "_back",
        "label",
        RESID,
        Z,
        MLP,
    )
    assert verified.unchecked == ()


@pytest.mark.parametrize(("name", "number"), [(RESID, 0), (Z, 0), (MLP, 1), ("token", 0)])
def test_a_flipped_bit_is_found_with_its_column_and_rows(out, name, number):
    commit = ActivationDataset(out)[70:140][name]
    damage(file_of(out, 1, number), commit[3])
    assert refused(out) == (
        f"'{out}' is damaged: {name!r} has other values than were written in rows 70 to 139; "
        f"'actctx repair {out}' keeps the rows before, and extract() rewrites the others"
    )


def test_every_flipped_byte_is_found(out):
    draw = random.Random(0)  # noqa: S311
    for _ in range(12):
        file = draw.choice(sorted((out / "data").iterdir()))
        content = file.read_bytes()
        at = draw.randrange(len(content) - 4)
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        assert "is damaged: " in refused(out)
        file.write_bytes(content)


def test_a_flipped_byte_of_what_it_says_about_itself_is_found(out):
    lines = (out / "digests.txt").read_text().splitlines(keepends=True)
    older = (
        line for line in lines if '{"manifest": ' not in line
    )  # as of older versions of actctx
    (out / "digests.txt").write_text("".join(older))
    newest = min((out / "_versions").glob("*.manifest"))
    newest.write_bytes(newest.read_bytes().replace(b'"context"', b'"contexu"'))
    assert "its metadata is not what was written" in refused(out)


def test_what_older_versions_wrote_cannot_be_compared(tmp_path):
    path = stored.write(tmp_path / "a.lance", 40, commits=2)
    verified = ActivationDataset(path).verify()
    assert verified == type(verified)(
        40, (), ("it has no digests, like data sets of older versions of actctx",)
    )


def test_what_an_older_version_began_is_compared_in_part(out):
    lines = (out / "digests.txt").read_text().splitlines(keepends=True)
    first = next(line for line in lines if '"rows": [0, 70], "columns": {"token"' in line)
    (out / "digests.txt").write_text("".join(line for line in lines if line != first))
    verified = ActivationDataset(out).verify()
    assert verified.columns == (MLP,)
    assert verified.unchecked[0] == "70 rows of 'token' have no digest"


def test_a_damaged_digest_is_not_taken_for_damaged_data(out):
    content = (out / "digests.txt").read_text()
    at = content.index('"rows": [70, 140], "columns": {"token": "') + 45
    (out / "digests.txt").write_text(content[:at] + "xx" + content[at + 2 :])
    assert ActivationDataset(out).verify().unchecked[0] == "70 rows of 'token' have no digest"


def test_columns_of_others_and_deleted_rows_cannot_be_compared(out):
    lance.dataset(str(out)).add_columns({"twice": "token * 2"})
    unchecked = ("'twice' is a column that actctx did not write",)
    assert ActivationDataset(out).verify().unchecked == unchecked
    lance.dataset(str(out)).delete("position = 3")
    assert ActivationDataset(out).verify().unchecked == (
        "rows were deleted from it, so digests do not apply to the others",
    )


def test_files_that_were_joined_are_compared_by_their_values(out):
    lance.dataset(str(out)).optimize.compact_files()
    assert len(lance.dataset(str(out)).get_fragments()) == 1
    assert ActivationDataset(out).verify().unchecked == ()
    damage(file_of(out, 0), ActivationDataset(out)[100][RESID])
    assert f"{RESID!r} has other values than were written in rows 70 to 139" in refused(out)


def test_a_copy_is_compared_as_well(out, tmp_path):
    copied = shutil.copytree(out, tmp_path / "elsewhere")
    assert ActivationDataset(f"file://{copied}").verify().unchecked == ()


@pytest.mark.parametrize("number", [0, 1])
def test_repair_keeps_the_rows_before_the_damage_and_extract_writes_the_others(out, number):
    whole = Read(out).table
    damage(file_of(out, 1, number), ActivationDataset(out)[90][(RESID, MLP)[number]])
    before = {file.name for file in out.rglob("*")}
    kept, dropped, said = repair(out, dry_run=True)
    assert (kept, dropped) == (70, 140)
    assert said == [
        f"{(RESID, MLP)[number]!r} has other values than were written in rows 70 to 139"
    ]
    assert {file.name for file in out.rglob("*")} == before
    assert repair(out, dry_run=False) == (kept, dropped, said)
    data = ActivationDataset(out)
    assert len(data) == 70
    assert not data.layout.finished
    assert data.verify().unchecked == ()
    write(out, [RESID, Z, MLP])
    assert Read(out).table.equals(whole)
    assert ActivationDataset(out).verify().unchecked == ()


def test_what_is_whole_is_not_repaired(out):
    version = lance.dataset(str(out)).version
    assert repair(out, dry_run=False) == (210, 0, [])
    assert lance.dataset(str(out)).version == version


def test_repair_of_nothing_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no data set can be read from"):
        repair(tmp_path / "missing", dry_run=False)
    assert not (tmp_path / "missing").exists()


def parts(column, sizes):
    for size in sizes:
        yield column[:size]
        column = column[size:]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(range(10), pa.int32()),
        pa.array([0.5, None, 1.5, None, 2, 3, 4, 5, 6, 7]),
        pa.array([True, False] * 5),
        pa.array(["a", "bc", "", None, "a", "é", "d", "e", "f", "g"]),
        pa.array(["a", "bc", "", None, "a", "é", "d", "e", "f", "g"]).dictionary_encode(),
        pa.FixedSizeListArray.from_arrays(pa.array(range(30), pa.uint8()), 3),
        pa.FixedSizeListArray.from_arrays(pa.array([True, False] + [True] * 28), 3),
        pa.array([[1], [], [2, 3], None, [4], [5], [6], [7], [8], [9]]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_digest_does_not_depend_on_batches_and_tells_values_apart(column):
    made = []
    for sizes in ((10,), (1, 2, 3, 4), (5, 5)):
        digest = Digest()
        for part in parts(column, sizes):
            digest.add(part)
        made.append(digest.hex())
    turned = Digest()
    turned.add(column.take(pa.array([1, 0, *range(2, 10)])))
    assert len({*made}) == 1
    assert turned.hex() != made[0]


def test_texts_have_one_digest_however_they_are_encoded():
    plain, encoded = Digest(), Digest()
    texts = pa.array(["a", None, "b", "a"])
    plain.add(texts)
    encoded.add(texts.dictionary_encode())
    assert plain.hex() == encoded.hex()


def test_bfloat16_is_compared_to_the_bit(tmp_path):
    out = tmp_path / "acts.lance"
    extract(bridge(), [tokens(5, 7, 0)], RESID, out, dtype=torch.bfloat16)
    assert ActivationDataset(out).verify().columns[-1] == RESID
    (out / "digests.txt").write_text(json.dumps({}))
    assert ActivationDataset(out).verify().unchecked


def test_what_saelens_cached_is_compared(tmp_path):
    pytest.importorskip("datasets")
    path = stored.write(tmp_path / "a.lance", 40)
    ActivationDataset(path, sites=stored.Z).to_saelens(tmp_path / "cached", context=10)
    back = ActivationDataset.from_saelens(tmp_path / "cached", tmp_path / "back.lance")
    assert back.verify().unchecked == ()
    assert back.verify().columns[-1] == stored.Z


def test_the_command_line_verifies_and_repairs(out):
    whole = actctx("verify", out)
    assert (whole.stdout, whole.exit_code) == (
        "9 columns of 210 rows are as they were written\n",
        0,
    )
    damage(file_of(out, 1), ActivationDataset(out)[90][RESID])
    said = f"{RESID!r} has other values than were written in rows 70 to 139"
    result = actctx("verify", out)
    assert result.exit_code == 2
    assert f"is damaged: {said}; 'actctx repair" in result.stderr
    result = actctx("repair", out, "--dry-run")
    assert (result.stdout, result.exit_code) == ("140 rows would be dropped, 70 rows kept\n", 0)
    assert result.stderr == f"note: {said}\n"
    assert actctx("repair", out).stdout == "140 rows dropped, 70 rows kept\n"
    assert actctx("repair", out).stdout == "nothing to drop: 70 rows are whole\n"


def test_the_command_line_says_what_it_cannot_compare(tmp_path):
    path = stored.write(tmp_path / "a.lance", 40)
    result = actctx("verify", path)
    assert result.stderr == (
        "note: not compared: it has no digests, like data sets of older versions of actctx\n"
    )
    assert result.stdout == "0 columns of 40 rows are as they were written\n"


def test_the_command_line_tells_of_versions_that_are_not_whole(out):
    newest = min((out / "_versions").glob("*.manifest"))
    newest.write_bytes(b"")
    result = actctx("info", out)
    assert "210 rows, one per token" in result.stdout
    assert "is incomplete, as after power loss: its manifest is empty" in result.stderr
    result = actctx("verify", out)
    assert result.exit_code == 2
    assert "is incomplete, as after power loss: its manifest is empty" in result.stderr
    assert actctx("repair", out).stderr.startswith("note: version ")
    assert not newest.exists()
    assert actctx("verify", out).exit_code == 0
