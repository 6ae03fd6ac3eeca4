"""Data sets to and from what other libraries read."""

import json
import subprocess
import sys

import pytest
import torch
from models import tiny_transformer
from models import tokens as tokens_of
from stored import RESID, Z, heads, resid, tokens, write

from actctx import DataError, OptionError
from actctx._model.fingerprint import fingerprint
from actctx.dataset import ActivationDataset

ROWS = 100


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", ROWS)


@pytest.fixture
def data(path):
    return ActivationDataset(path, sites=Z)


def test_datasets_reads_what_is_written_for_saelens(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    assert data.to_saelens(tmp_path / "cached", context=16) == ROWS % 16 > 0
    cached = datasets.load_from_disk(tmp_path / "cached")
    assert cached.features[Z].shape == (16, 6)
    assert cached.features[Z].dtype == "float16"
    assert cached.features["token_ids"].length == 16
    assert len(cached) == ROWS // 16
    batch = cached.with_format("torch")[:]
    assert torch.equal(batch[Z].flatten(), heads(torch.arange(96)).flatten())
    assert torch.equal(batch["token_ids"].flatten(), tokens(torch.arange(96)).long())


def test_rows_are_shuffled_for_saelens_where_asked(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = []
    for seed in (1, 1, 2):
        path = tmp_path / f"cached{len(found)}"
        assert data.to_saelens(path, context=16, shuffle=True, seed=seed) == ROWS % 16
        batch = datasets.load_from_disk(path).with_format("torch")[:]
        rows = batch[Z].reshape(-1, 6)[:, 0].long()
        assert torch.equal(batch[Z].reshape(-1, 2, 3), heads(rows))
        assert torch.equal(batch["token_ids"].flatten(), tokens(rows).long())
        assert len(rows.unique()) == len(rows) == 96
        found.append(rows.tolist())
    assert found[0] == found[1] != found[2]
    assert sum(abs(a - b) == 1 for a, b in zip(found[0], found[0][1:], strict=False)) < 10


def test_bfloat16_is_written_for_saelens_as_float32_with_a_warning(path, tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.warns(UserWarning, match="do not support bfloat16") as caught:
        ActivationDataset(path, sites=RESID).to_saelens(tmp_path / "cached", context=10)
    assert str(caught[0].message) == (
        f"SAELens' files do not support bfloat16: {RESID!r} is written as float32, which has the "
        "same values and takes twice the space"
    )
    cached = datasets.load_from_disk(tmp_path / "cached").with_format("torch")
    assert torch.equal(cached[:][RESID].reshape(-1, 4), resid(torch.arange(ROWS)).float())


def test_sites_are_renamed_for_saelens(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    data.to_saelens(tmp_path / "cached", context=10, rename={Z: "z"})
    assert datasets.load_from_disk(tmp_path / "cached").column_names == ["z", "token_ids"]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            {"hook_q": "z"},
            f"rename names 'hook_q', which is not a site that is read; the sites are {RESID!r}, "
            f"{Z!r}",
        ),
        (
            {"z": Z},
            f"rename names 'z', which is not a site that is read; the sites are {RESID!r}, {Z!r}; "
            "give the site's own name first, then the new one",
        ),
        ({Z: RESID}, f"rename gives 2 columns the name {RESID!r}; give each a different name"),
        ({Z: "x", RESID: "x"}, "rename gives 2 columns the name 'x'; give each a different name"),
        (
            {Z: "token_ids"},
            "rename gives 2 columns the name 'token_ids'; give each a different name",
        ),
    ],
)
def test_names_for_saelens_that_make_no_sense_are_refused(path, tmp_path, rename, message):
    pytest.importorskip("datasets")
    with pytest.raises(OptionError) as caught:
        ActivationDataset(path).to_saelens(tmp_path / "cached", context=10, rename=rename)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_a_slash_at_the_end_of_a_path_is_no_part_of_it(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    data.to_saelens(f"{tmp_path}/new/cached/", context=10)
    assert len(datasets.load_from_disk(tmp_path / "new" / "cached")) == ROWS // 10
    ActivationDataset.from_saelens(f"{tmp_path}/new/cached/", f"{tmp_path}/new/back.lance/")
    assert {each.name for each in (tmp_path / "new").iterdir()} == {"cached", "back.lance"}


def test_what_saelens_cannot_be_given_whole_leaves_nothing(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "out" / "cached.partial").mkdir(parents=True)  # of somebody else
    data = ActivationDataset(write(tmp_path / "a.lance", ROWS), sites=Z)
    for file in (tmp_path / "a.lance" / "data").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"^rows of '.*a\.lance' cannot be read: .*repair'$"):
        data.to_saelens(tmp_path / "out" / "cached", context=10)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["cached.partial"]


FULL = """
import resource, signal, sys
from pathlib import Path

from actctx import DataError
from actctx.dataset import ActivationDataset

folder = Path(sys.argv[1])
data = ActivationDataset(folder / "a.lance", sites=sys.argv[2])
data.to_saelens(folder / "cached", context=16)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
for write in (
    lambda: data.to_saelens(folder / "full", context=16),
    lambda: ActivationDataset.from_saelens(folder / "cached", folder / "full"),
    lambda: data.to_safetensors(folder / "full"),
):
    try:
        write()
    except DataError as error:
        print(str(error).replace(str(folder), ""))
"""


def test_a_disk_that_is_full_is_said(tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("resource", reason="only Unix limits the size of files")
    write(tmp_path / "a.lance", 2**14)
    run = [sys.executable, "-c", FULL, str(tmp_path), Z]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, reason in zip(
        said,
        (
            "File too large",
            "File too large (os error 27)",
            "Error while serializing: I/O error: File too large (os error 27)",
        ),
        strict=True,
    ):
        assert line == f"cannot write to '/full': {reason}; free space there, or give another path"
    assert {each.name for each in tmp_path.iterdir()} == {"a.lance", "cached"}


def test_a_filter_leaves_its_rows_to_saelens(path, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = ActivationDataset(path, sites=Z, where="position > 0")
    data.to_saelens(tmp_path / "cached", context=5)
    cached = datasets.load_from_disk(tmp_path / "cached").with_format("torch")
    assert torch.equal(cached[:]["token_ids"].flatten(), data[:90]["token"].long())


def test_what_saelens_cached_is_read(data, tmp_path):
    pytest.importorskip("datasets")
    data.to_saelens(tmp_path / "cached", context=16)
    back = ActivationDataset.from_saelens(tmp_path / "cached", tmp_path / "back.lance")
    rows = torch.arange(96)
    assert torch.equal(back[:][Z], heads(rows).flatten(1))
    assert torch.equal(back.tokens, tokens(rows))
    assert torch.equal(back[:]["sequence"], rows // 16)
    assert torch.equal(back[:]["position"], (rows % 16).int())
    assert back.layout.finished


def test_a_model_is_not_held_against_what_saelens_cached(data, tmp_path, mlp):
    pytest.importorskip("datasets")
    data.to_saelens(tmp_path / "cached", context=16)
    back = ActivationDataset.from_saelens(tmp_path / "cached", tmp_path / "back.lance")
    with pytest.raises(DataError) as caught:
        back.check(mlp)
    assert str(caught.value) == (
        f"'{tmp_path / 'back.lance'}' does not say which model its activations come from, like "
        "everything that from_saelens made, so they cannot be compared with a Mlp with the "
        f"fingerprint {fingerprint(mlp)}; leave out model= and check()"
    )


def test_what_cannot_be_read_whole_from_saelens_leaves_nothing(tmp_path):
    datasets = pytest.importorskip("datasets")
    runs, context = 600, 8
    features = datasets.Features(
        {
            RESID: datasets.Array2D(shape=(context, 2), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int64"), length=context),
        }
    )
    ids = [[0] * context for _ in range(runs)]
    ids[-1][0] = 2**40  # is no int32, as is found behind the first of the batches
    rows = {RESID: [[[0.0, 1.0]] * context] * runs, "token_ids": ids}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "cached")
    with pytest.raises(DataError, match=r"^'.*cached' cannot be read whole: Integer value 1099511"):
        ActivationDataset.from_saelens(tmp_path / "cached", tmp_path / "back.lance")
    assert [each.name for each in tmp_path.iterdir()] == ["cached"]


@pytest.mark.filterwarnings("ignore")  # SAELens' own
def test_saelens_trains_from_what_is_written(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    datasets = pytest.importorskip("datasets")
    from actctx.extract import extract

    model, ids = tiny_transformer(), tokens_of(batch=64, pos=8)
    extract(model, ids, RESID, tmp_path / "a.lance", dtype=torch.float32)
    data = ActivationDataset(tmp_path / "a.lance", model=model)
    data.to_saelens(tmp_path / "cached", context=8)
    width = data.sites[RESID].width
    sae = sae_lens.StandardTrainingSAEConfig(d_in=width, d_sae=2 * width, l1_coefficient=1e-3)
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=RESID,
        use_cached_activations=True,
        cached_activations_path=str(tmp_path / "cached"),
        context_size=8,
        training_tokens=64 * 300,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        lr=1e-2,
        n_eval_batches=0,
        n_checkpoints=0,
        device="cpu",
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        output_path=str(tmp_path / "sae"),
        checkpoint_path=None,
    )
    texts = datasets.Dataset.from_dict({"tokens": ids.tolist()})
    runner = sae_lens.LanguageModelSAETrainingRunner(
        config, override_dataset=texts, override_model=model
    )
    read, read_ids = runner.activations_store.get_raw_llm_batch()
    assert torch.equal(read_ids, ids[:4].flatten())
    assert torch.equal(read, model.run_with_cache(ids)[1][RESID][:4].flatten(0, 1))

    trained = runner.run()
    left = data.read(RESID)
    error = (trained(left) - left).pow(2).sum()
    assert error < 0.1 * (left - left.mean(0)).pow(2).sum()


def test_safetensors_hold_all_columns_of_numbers(path, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    ActivationDataset(path).to_safetensors(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == {RESID, Z, "token", "sequence", "position", "label"}
    assert torch.equal(tensors[RESID], resid(torch.arange(ROWS)))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["axes"])[Z] == "token head d_head"
    assert metadata["model"] == "Tiny"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (".", "it is a directory; give the path of a file"),
        (
            "no/such/a.safetensors",
            "there is no directory '{folder}/no/such'; create it, or give another path",
        ),
        ("x" * 300, "File name too long; give another path"),
    ],
)
def test_a_file_that_cannot_be_written_is_said(path, tmp_path, place, reason):
    with pytest.raises(DataError) as caught:
        ActivationDataset(path).to_safetensors(tmp_path / place)
    said = reason.replace("{folder}", str(tmp_path))
    assert str(caught.value) == f"cannot write to '{tmp_path / place}': {said}"
    assert not list(tmp_path.iterdir())


def test_paths_may_begin_at_home(path, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    data = ActivationDataset(path, sites=Z)
    data.to_saelens("~/cached", context=8)
    assert len(ActivationDataset.from_saelens("~/cached", "~/back.lance")) == 96
    data.to_safetensors("~/a.safetensors")
    assert not [*(tmp_path / "here").iterdir()]
    assert {each.name for each in (tmp_path / "home").iterdir()} == {
        *("cached", "back.lance", "a.safetensors")
    }


def test_object_stores_are_not_written_to(data, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for move in (data.to_safetensors, lambda path: data.to_saelens(path, context=8)):
        with pytest.raises(DataError) as caught:
            move("s3://bucket/a")
        assert str(caught.value) == (
            "cannot write to 's3://bucket/a': object stores cannot be written to; write to a local "
            "path, and upload the result"
        )
    assert not [*tmp_path.iterdir()]


def test_an_existing_path_is_not_written_over(data, tmp_path):
    pytest.importorskip("datasets")
    data.to_saelens(tmp_path / "cached", context=16)
    for move in (
        lambda: data.to_saelens(tmp_path, context=16),
        lambda: ActivationDataset.from_saelens(tmp_path / "cached", tmp_path),
    ):
        with pytest.raises(DataError) as caught:
            move()
        assert str(caught.value) == (
            f"'{tmp_path}' already exists; give another path, or remove it"
        )
    assert [each.name for each in tmp_path.iterdir()] == ["cached"]


def test_an_existing_file_is_not_written_over(data, tmp_path):
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(DataError) as caught:
        data.to_safetensors(tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"'{tmp_path / 'a.safetensors'}' already exists; give another path, or remove it"
    )
    assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_a_context_longer_than_the_data_is_refused(data, tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(OptionError) as caught:
        data.to_saelens(tmp_path / "cached", context=101)
    assert str(caught.value) == (
        "context=101 does not fit 100 rows; give the context_size of SAELens' config, and no more "
        "than there are rows"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("16", "context='16' is not an int; give 1 or more"),
        (0, "context=0 is too small; give 1 or more"),
    ],
)
def test_a_context_that_is_no_number_of_rows_is_refused(data, tmp_path, context, message):
    with pytest.raises(OptionError) as caught:
        data.to_saelens(tmp_path / "cached", context=context)
    assert str(caught.value) == message


def test_a_directory_of_something_else_is_not_read_as_saelens(tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="is not a directory of SAELens' cached activations"):
        ActivationDataset.from_saelens(tmp_path, tmp_path / "out.lance")
    datasets.Dataset.from_dict({"x": [1], "y": [2]}).save_to_disk(tmp_path / "xy")
    with pytest.raises(DataError) as caught:
        ActivationDataset.from_saelens(tmp_path / "xy", tmp_path / "out.lance")
    assert str(caught.value) == (
        f"'{tmp_path / 'xy'}' does not contain activations as SAELens caches them, which are "
        "columns of the type Array2D; its columns are x, y"
    )


@pytest.mark.parametrize(
    ("runs", "name", "message"),
    [
        (
            [],
            RESID,
            "does not contain activations: its dataset has no rows; let SAELens cache some",
        ),
        (
            None,  # a file of no rows
            RESID,
            "does not contain activations: its dataset has no rows; let SAELens cache some",
        ),
        (
            [[[0.0, 1.0]] * 4],
            "token",
            "has activations in a column 'token', which is the name of another column of a data "
            "set; give it the hook's name, with rename_column('token', ...) of datasets",
        ),
    ],
)
def test_what_makes_no_data_set_is_refused_before_it_is_written(tmp_path, runs, name, message):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({name: datasets.Array2D(shape=(4, 2), dtype="float32")})
    made = datasets.Dataset.from_dict({name: runs or []}, features=features)
    made.save_to_disk(tmp_path / "cached")
    if runs is None:
        schema = features.arrow_schema
        with datasets.arrow_writer.ArrowWriter(
            path=str(tmp_path / "cached" / "none.arrow"), features=features
        ) as writer:
            writer.write_table(schema.empty_table())
            writer.finalize()
        state = json.loads((tmp_path / "cached" / "state.json").read_text())
        state["_data_files"] = [{"filename": "none.arrow"}]
        (tmp_path / "cached" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError) as caught:
        ActivationDataset.from_saelens(tmp_path / "cached", tmp_path / "back.lance")
    assert str(caught.value) == f"'{tmp_path / 'cached'}' {message}"
    assert [each.name for each in tmp_path.iterdir()] == ["cached"]


def test_datasets_is_asked_for_where_it_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for move in (
        lambda: data.to_saelens(tmp_path / "cached", context=16),
        lambda: ActivationDataset.from_saelens(tmp_path / "cached", tmp_path / "back.lance"),
    ):
        with pytest.raises(OptionError) as caught:
            move()
        assert str(caught.value) == (
            "SAELens' directories need datasets, which is not installed; install it with: pip "
            "install datasets"
        )
