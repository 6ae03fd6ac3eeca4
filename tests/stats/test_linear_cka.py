"""LinearCKA: how alike sites are, in one pass, in memory that does not grow."""

import copy

import pytest
import torch
from models import bridge, tokens
from observed import observed

from actctx import JoinError, OptionError, capture
from actctx.plot import layer_similarity, plot_similarity
from actctx.stats import JointStatistic, LinearCKA, Moments, Observation, load

NAMES = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(2))


def _layers(*, batch=6, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, 50, 8, generator=generator)
    noise = torch.randn(batch, 50, 5, generator=generator)
    mixing = torch.randn(8, 5, generator=torch.Generator().manual_seed(9))
    return {"one": base + mean, "two": base @ mixing + noise, "three": noise * 3 - mean}


def _seen(layers, first=0):
    cka = LinearCKA()
    cka.update_all({name: observed(each, first=first) for name, each in layers.items()})
    return cka


def _expected(layers):
    rows = [each.double().flatten(0, 1) for each in layers.values()]
    rows = [each - each.mean(0) for each in rows]
    return torch.tensor(
        [[(x.T @ y).norm() ** 2 / (x.T @ x).norm() / (y.T @ y).norm() for y in rows] for x in rows]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_it_is_that_of_all_rows_whatever_their_order(dtype, order):
    layers = {name: each.to(dtype) for name, each in _layers(mean=30.0).items()}
    parts = [{name: each[at : at + 2] for name, each in layers.items()} for at in (0, 2, 4)]
    cka = LinearCKA()
    for number in order:
        cka.merge(_seen(parts[number], 2 * number))
    assert cka.count == 300
    assert cka.names == ("one", "two", "three")
    torch.testing.assert_close(cka.similarity, _expected(layers).float(), rtol=1e-5, atol=1e-6)


def test_it_is_what_is_computed_of_captured_layers():
    model, batches = bridge(), [tokens(4, seed=0), tokens(4, seed=1)]
    with capture(model, "blocks.*.hook_resid_post") as acts:
        for batch in batches:
            model(batch)
    cka = LinearCKA()
    for first in (0, 4):
        cka.merge(_seen({name: acts[name][first : first + 4] for name in NAMES}, first))
    torch.testing.assert_close(cka.similarity, layer_similarity(acts), rtol=1e-5, atol=1e-6)


def test_it_is_drawn_by_layer():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    layers = dict(zip(NAMES, _layers().values(), strict=False))
    cka = _seen(layers)
    picture = plot_similarity(cka)
    assert torch.equal(layer_similarity(cka), cka.similarity)
    shown = [each.get_text() for each in picture.get_xticklabels()]
    assert [text for text in shown if text] == ["0", "1"]
    assert picture.images[0].get_array().tolist() == cka.similarity.tolist()
    pyplot.close(picture.figure)


def test_it_is_a_joint_statistic_alone():
    assert isinstance(LinearCKA(), JointStatistic)
    assert not isinstance(Moments(), JointStatistic)
    assert not hasattr(LinearCKA(), "update")


def test_its_memory_does_not_grow_and_files_hold_all_of_it(tmp_path):
    cka = _seen(_layers())
    held = cka.nbytes
    assert held == 8 * (8 + 5 + 5 + 8 * 8 + 2 * 8 * 5 + 3 * 5 * 5)
    cka.merge(_seen(_layers(seed=1), 6))
    assert cka.nbytes == held
    cka.save(tmp_path / "cka.safetensors")
    for again in (load(tmp_path / "cka.safetensors"), copy.deepcopy(cka)):
        assert torch.equal(again.similarity, cka.similarity)
        assert again.names == cka.names


def test_sites_with_other_rows_are_refused():
    with pytest.raises(JoinError) as error:
        _seen({"one": torch.ones(2, 3, 4), "two": torch.ones(2, 2, 4)})
    assert str(error.value) == (
        "sites are compared row by row, but they have 6 ('one'), 4 ('two') rows; give sites with "
        "the same positions, or select them with a slice"
    )


def test_other_sites_than_before_are_refused():
    cka = _seen({"one": torch.ones(2, 3, 4)})
    with pytest.raises(JoinError) as error:
        cka.update_all({"two": observed(torch.ones(2, 3, 5))})
    assert str(error.value) == (
        "linear CKA of one with (4,) features does not take two with (5,); compare the "
        "same sites in all forwards"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "the rows of 'two' are all the same"),
        (torch.nan, "'two' has NaN, infinite or too large values"),
    ],
)
def test_sites_that_cannot_be_compared_are_refused(value, message):
    layers = _layers() | {"two": torch.full((6, 50, 5), value)}
    with pytest.raises(OptionError, match=message):
        _seen(layers).similarity  # noqa: B018  it is read


def test_integers_are_refused():
    with pytest.raises(OptionError, match=r"^LinearCKA cannot be computed: it is int64"):
        LinearCKA().update_all(
            {"one": Observation(values=torch.ones(2, 2).long(), axes=("token", "d_model"))}
        )
