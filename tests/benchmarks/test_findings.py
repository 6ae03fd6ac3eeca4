"""What is kept of what was measured before."""

import json
from dataclasses import replace

import pytest

from benchmarks.reporting.findings import Findings, FindingsError
from benchmarks.reporting.report import Result
from benchmarks.ways.tables import TABLES
from benchmarks.ways.way import USUAL

BRIDGE, PLAIN = TABLES["bridge"], TABLES["plain"]
CAPTURE = Result("capture-stop", 100, 10, "a", seconds=[(1.0, 1.0)])
LIMIT = Result("bare-stopped", 90, seconds=[(1.0, 1.0)])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "found.json"
    Findings(path).put_results(BRIDGE, USUAL, [CAPTURE, LIMIT])
    return path


def _results(path, table="bridge"):
    return {each["way"]: each for each in json.loads(path.read_text())[table]["results"]}


def test_a_table_is_kept_beside_others_with_its_machine_and_date(path):
    Findings(path).put_results(PLAIN, PLAIN.setup, [])
    tables = json.loads(path.read_text())
    assert list(tables) == ["bridge", "plain"]
    assert all({"date", "torch", "actctx"} <= each["machine"].keys() for each in tables.values())


def test_a_way_is_kept_beside_others_of_its_table_which_say_where_they_were_measured(path):
    first = json.loads(path.read_text())["bridge"]["machine"]
    assert Findings(path).put_results(BRIDGE, USUAL, [Result("cache", 500), LIMIT]) == []
    found = _results(path)
    assert list(found) == ["cache", "capture-stop", "bare-stopped"]  # as in the table
    assert found["capture-stop"]["seconds"] == [[1.0, 1.0]]
    for _ in range(2):  # also behind a run that measured nothing of it
        earlier = json.loads(path.read_text())["bridge"]["earlier"]
        assert list(earlier) == ["capture-stop"]
        assert earlier["capture-stop"]["machine"] == first
        Findings(path).put_results(BRIDGE, USUAL, [Result("cache", 500), LIMIT])


def test_what_has_no_times_yet_or_failed_does_not_replace_what_has(path):
    findings = Findings(path)
    for less in (replace(CAPTURE, seconds=[]), Result("capture-stop", failed="torn")):
        assert findings.put_results(BRIDGE, USUAL, [less]) == ["capture-stop"]
        assert _results(path)["capture-stop"]["seconds"] == [[1.0, 1.0]]
    again = replace(CAPTURE, peak_bytes=200)
    assert findings.put_results(BRIDGE, USUAL, [again]) == []
    assert _results(path)["capture-stop"]["peak_bytes"] == 200


def test_ways_that_a_table_has_no_more_are_taken_out_and_named(path, capsys):
    tables = json.loads(path.read_text())
    tables["bridge"]["results"].append({"way": "of-old"})
    path.write_text(json.dumps(tables))
    Findings(path).put_results(BRIDGE, USUAL, [CAPTURE])
    assert "of-old" not in _results(path)
    assert "bridge has no ways of-old any more" in capsys.readouterr().out


def test_what_another_run_wrote_meanwhile_is_kept(path):
    one, other = Findings(path), Findings(path)
    one.put("checks", {"site": 1.0})
    other.put("sites", {"microseconds": {}})
    assert list(json.loads(path.read_text())) == ["bridge", "checks", "sites"]


def test_a_table_of_another_setup_is_refused(path):
    findings = Findings(path)
    findings.check(BRIDGE, USUAL)
    findings.check(PLAIN, PLAIN.setup)
    with pytest.raises(FindingsError, match=r"table bridge of another setup \(batch 8, now 2\); "):
        findings.check(BRIDGE, replace(USUAL, batch=2))


def test_quick_and_whole_runs_are_not_kept_in_one_file(path, tmp_path):
    with pytest.raises(FindingsError, match=r"has the figures of a whole run; give another file$"):
        Findings(path, quick=True)
    quick = tmp_path / "quick.json"
    Findings(quick, quick=True).put("checks", {})
    with pytest.raises(FindingsError, match=r"has the figures of a quick run; give another file$"):
        Findings(quick)


def test_a_file_that_is_none_of_findings_is_refused(tmp_path):
    with pytest.raises(FindingsError, match=r"^there is no folder .*nowhere; create it first$"):
        Findings(tmp_path / "nowhere" / "found.json")
    other = tmp_path / "notes.json"
    other.write_text("[1]")
    with pytest.raises(FindingsError, match=r"is not a file of findings; give another one$"):
        Findings(other)
    assert other.read_text() == "[1]"


def test_the_command_refuses_before_anything_is_measured(path):
    typer = pytest.importorskip("typer")
    from benchmarks.__main__ import main

    kept = path.read_text()
    for options in ({"quick": True}, {"batch": 2}):
        with pytest.raises(typer.BadParameter, match="give another file"):
            main(case=["capture-stop"], json_file=path, **options)
    assert path.read_text() == kept
