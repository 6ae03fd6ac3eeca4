"""Conditions on the rows of a data set that make no sense."""

import pytest
from stored import RESID, Z, write

from actctx import OptionError
from actctx.dataset import ActivationDataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ActivationDataset(write(tmp_path_factory.mktemp("data") / "a.lance", 100))


def test_a_condition_that_lance_does_not_understand_is_refused(data):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, where="positon > 0")
    message = str(caught.value)
    assert message.startswith("where='positon > 0' is no condition on rows: ")
    assert "No field named positon" in message
    assert "/rust/" not in message


CONDITIONS = [
    (
        f"{Z}[1] > 5",
        f"where='{Z}[1] > 5' names {Z!r} without backticks, which names with dots need; write "
        f"`{Z}`",
    ),
    (
        "`blocks/0/attn/hook_z`[1] > 5",
        "where='`blocks/0/attn/hook_z`[1] > 5' is no condition on rows: the data set has no "
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
        "where=5 is no condition; give a string, as in SQL, such as 'position > 0'"
    )
    with pytest.raises(OptionError, match=r"^where=<function .* is no condition"):
        ActivationDataset(data.path, where=lambda row: row)
