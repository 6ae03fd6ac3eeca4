"""Conditions on the rows of a data set that make no sense."""

import pytest
import torch
from models import bridge, tokens
from stored import RESID, Z, write

from actctx import OptionError
from actctx.dataset import ActivationDataset
from actctx.extract import extract


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ActivationDataset(write(tmp_path_factory.mktemp("data") / "a.lance", 100))


def test_a_condition_that_lance_does_not_understand_is_refused(data):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, where="position >")
    message = str(caught.value)
    assert message.startswith("where='position >' is not a condition on rows: ")
    assert "Expected: an expression, found: EOF" in message
    assert "/rust/" not in message


def test_a_column_that_is_not_there_is_named_beside_those_that_are(data):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, where="text = yes")
    assert str(caught.value) == (
        "where='text = yes' is not a condition on rows: there is no column yes; there are token, "
        f"sequence, position, label, text, `{RESID}`, `{Z}`; a string stands in single quotes, as "
        "in label = 'yes'"
    )


@pytest.mark.parametrize("where", [f"`{RESID}`[1] > 0", "position > 3 AND resid[1] > 0"])
def test_values_in_bfloat16_are_no_condition(tmp_path, where):
    name = RESID if RESID in where else "resid"
    path = tmp_path / "a.lance"
    extract(bridge(), tokens(), {name: RESID}, path, dtype=torch.bfloat16)
    with pytest.raises(OptionError) as caught:
        ActivationDataset(path, where=where)
    assert str(caught.value) == (
        f"where={where!r} compares {name!r}, which is bfloat16, as Lance cannot; read the rows and "
        f"compare them, as in data[:][{name!r}] > 0"
    )
    assert len(ActivationDataset(path, where="position > 3")) == 9


CONDITIONS = [
    (
        f"{Z}[1] > 5",
        f"where='{Z}[1] > 5' names {Z!r} without backticks, which names with dots need; write "
        f"`{Z}`",
    ),
    (
        "`blocks/0/attn/hook_z`[1] > 5",
        "where='`blocks/0/attn/hook_z`[1] > 5' is not a condition on rows: the data set has no "
        f"'blocks/0/attn/hook_z'; closest: {Z!r}; it holds {RESID!r}, {Z!r}, 'token', "
        "'sequence', 'position', 'label', 'text'",
    ),
]


@pytest.mark.parametrize(("where", "message"), CONDITIONS)
def test_a_condition_that_names_a_site_in_another_way_is_refused(data, where, message):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, sites=RESID, where=where)
    assert str(caught.value) == message


def test_what_lance_says_of_a_condition_has_the_names_of_sites(data):
    for where in ("nothing_alike > 0", f"`{Z}` = 'x'"):
        with pytest.raises(OptionError) as caught:
            ActivationDataset(data.path, sites=RESID, where=where)
        assert "blocks/0" not in str(caught.value)
        assert f"`{Z}`" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_a_condition_is_a_string(data):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, where=5)
    assert str(caught.value) == (
        "where=5 is not a condition; give a string, as in SQL, such as 'position > 0'"
    )
    with pytest.raises(OptionError, match=r"^where=<function .* is not a condition"):
        ActivationDataset(data.path, where=lambda row: row)
