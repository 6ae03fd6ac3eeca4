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
    assert "Expected: an expression, found: )" in message
    assert "/rust/" not in message


def test_a_column_that_is_not_there_is_named_beside_those_that_are(data):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, where="text = yes")
    assert str(caught.value) == (
        "where='text = yes' is not a condition on rows: there is no column yes; the columns are "
        f"token, sequence, position, label, text, `{RESID}`, `{Z}`; strings need single quotes, as "
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
        f"`{Z}`[1][2] > 5",
        f"where='`{Z}`[1][2] > 5' is not a condition on rows: a condition numbers the elements of "
        f"a site in one line, from 1 on; of `{Z}`, with the shape (2, 3), give one number from 1 "
        "to 6",
    ),
    (
        f"{Z}[1] > 5",
        f"where='{Z}[1] > 5' names {Z!r} without backticks, which names with dots need; write "
        f"`{Z}`",
    ),
    (
        "`blocks/0/attn/hook_z`[1] > 5",
        "where='`blocks/0/attn/hook_z`[1] > 5' is not a condition on rows: the data set has no "
        f"'blocks/0/attn/hook_z'; closest: {Z!r}; it has {RESID!r}, {Z!r}, 'token', "
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


@pytest.mark.parametrize(
    "where",
    [
        "position = 1 foo",
        "position = 1 token > 5",
        "position = 1 limit 1",
        "position = 1; true",
        "position = 1\0",
        "position = 1 'a'",
    ],
)
def test_a_condition_that_goes_on_after_its_end_is_refused(data, where):
    with pytest.raises(OptionError, match="is not a condition on rows: "):
        ActivationDataset(data.path, where=where)


def test_a_condition_may_end_in_a_comment(data):
    assert len(ActivationDataset(data.path, where="position = 1 -- the second")) > 0


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "position = 1) OR (true",
            "where='position = 1) OR (true' is not a condition on rows: it closes a parenthesis "
            "that it does not open",
        ),
        (
            "position = ?",
            "where='position = ?' has the placeholder '?'; write the value itself, as in an "
            "f-string",
        ),
        (
            "position = $1",
            "where='position = $1' has the placeholder '$1'; write the value itself, as in an "
            "f-string",
        ),
        (
            "position = :x",
            "where='position = :x' has the placeholder ':x'; write the value itself, as in an "
            "f-string",
        ),
    ],
)
def test_a_condition_that_is_not_whole_is_refused(data, where, message):
    with pytest.raises(OptionError) as caught:
        ActivationDataset(data.path, where=where)
    assert str(caught.value) == message


def test_quotes_hold_what_would_be_a_placeholder(data):
    assert len(ActivationDataset(data.path, where="text = ':) ?' OR position::int = 1")) > 0


def test_an_alias_with_backticks_is_named_with_two_for_each(tmp_path):
    path = tmp_path / "a.lance"
    extract(bridge(), tokens(), {"a`b": RESID, "``": "blocks.0.hook_resid_post"}, path)
    whole = ActivationDataset(path)
    assert [*whole.sites] == ["a`b", "``"]
    for where, name in (("`a``b`[1] > 0", "a`b"), ("`````` [1] > 0", "``")):
        above = whole.read(name)[:, 0] > 0
        assert torch.equal(ActivationDataset(path, where=where).read(name), whole.read(name)[above])
    with pytest.raises(OptionError) as caught:
        ActivationDataset(path, where="a`b[1] > 0")
    assert str(caught.value) == (
        "where='a`b[1] > 0' names 'a`b' without backticks, which names with such characters need; "
        "write `a``b`"
    )
