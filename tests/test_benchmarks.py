"""What the benchmarks refuse to report, what they fail for, and how they measure."""

import json
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("typer")
from benchmarks.__main__ import main
from benchmarks._devices import Accelerator, Cpu, meter_of
from benchmarks._models import BRIDGE, PLAIN, Setup, build, make_tokens, of_model
from benchmarks._probe import measure_memory, measure_time
from benchmarks._report import Result, disk_rows, find_disagreement, find_regressions
from benchmarks._tables import TABLES, WAYS
from benchmarks._targets import targets

TINY = Setup(batch=2, tokens=8, layers=4, heads=4, d_model=16, vocab=50, context=64, threads=1)
MIB = 2**20


def _result(way, *, peak=100, payload=10, sha256="a", difference=None):
    return Result(way, peak, payload, sha256, difference)


LIMIT = Result("plain-bare-stopped", 100)


def test_other_values_within_one_attention_are_a_disagreement():
    results = [_result("plain-hidden"), _result("plain-capture"), LIMIT]
    assert find_disagreement(results) is None
    results.append(_result("plain-capture-stop", sha256="b"))
    assert find_disagreement(results) == (
        "plain-capture-stop did not yield the activation that the other ways did"
    )


def test_eager_attention_may_differ_from_sdpa_by_rounding_only():
    near = _result("plain-bridge", sha256="b", difference=1e-6)
    assert find_disagreement([_result("plain-hidden"), near, LIMIT]) is None
    far = _result("plain-bridge", sha256="b", difference=1e-3)
    assert find_disagreement([_result("plain-hidden"), far, LIMIT]) == (
        "plain-bridge did not yield sdpa's activation to 0.0001"
    )


def test_what_is_no_number_and_what_yields_nothing_is_a_disagreement():
    nan = _result("plain-bridge", sha256="b", difference=float("nan"))
    assert find_disagreement([_result("plain-hidden"), nan, LIMIT]) == (
        "plain-bridge did not yield sdpa's activation to 0.0001"
    )
    assert find_disagreement([_result("plain-capture", sha256=None), LIMIT]) == (
        "plain-capture yielded nothing"
    )
    lost = Result("plain-capture", does_not_fit=True)
    assert find_disagreement([_result("plain-hidden"), lost, LIMIT]) is None


def test_what_goes_to_disk_is_not_compared_with_what_is_captured():
    results = [replace(_result("extract-lance", peak=100 * MIB), seconds=[(2.0, 1.0), (3.0, 1.0)])]
    assert disk_rows(results).splitlines()[2] == (
        "| **`extract(model, batches, name, path)`** | 100 | 2.50 | 2.500 | 2.000 to 3.000 |"
    )


def test_a_capture_that_takes_too_much_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks._report.MOST_QUICK", 0.5)
    with pytest.raises(SystemExit, match=r"^plain-capture-stop takes \S+ x .*, at most 0\.5$"):
        main(case=["plain-capture-stop"], quick=True)
    assert "| **`capture(model, name, stop=True)`** |" in capsys.readouterr().out


def test_a_case_that_is_none_is_refused():
    from typer import BadParameter

    with pytest.raises(BadParameter, match=r"^there is no case nothing; choose from bridge,"):
        main(case=["nothing"], quick=True)


def test_a_capture_that_takes_a_tenth_more_than_the_limit_is_a_regression():
    assert find_regressions([_result("plain-capture-stop", peak=110), LIMIT]) == []
    assert find_regressions([_result("plain-capture-stop", peak=122), LIMIT]) == [
        "plain-capture-stop takes 1.11 x (limit + captured) of memory, at most 1.1"
    ]


def test_targets_say_by_how_much_they_are_missed():
    limit = Result("bare-stopped", 90, seconds=[(1.0, 1.0)])
    missed = replace(_result("capture-stop", peak=106), seconds=[(1.01, 1.0)])
    assert targets([missed, limit]) == [
        "memory, bridge: capture(stop=True) / (limit + captured): 1.060, at most 1.03: "
        "MISSED by 2.9%",
        "time, bridge: capture(stop=True) / limit: 1.010, at most 1.02: reached",
    ]


@pytest.mark.parametrize("name", ["generate", "work", "asked-2", "batches-4", "load"])
def test_all_ways_of_a_table_yield_the_same(name):
    table, cpu = TABLES[name], meter_of("cpu")
    for library in table.needs:
        pytest.importorskip(library)
    setup = replace(TINY, **table.varied)
    results = [Result(way.name, **measure_memory(setup, way, cpu)) for way in table.ways]
    assert find_disagreement(results) is None
    assert all(each.sha256 for each in results if not each.way.endswith("bare"))


def test_a_model_is_loaded_from_a_path_with_its_sizes(tmp_path):
    build(TINY, PLAIN).save_pretrained(tmp_path)
    loaded = of_model(Setup(batch=2, tokens=8, threads=1, model=str(tmp_path)))
    assert replace(loaded, model="") == TINY
    tokens = make_tokens(TINY)
    with torch.no_grad():
        expected = build(TINY, PLAIN)(tokens).logits
        assert torch.equal(build(loaded, PLAIN)(tokens).logits, expected)
        torch.testing.assert_close(build(loaded, BRIDGE)(tokens), expected, atol=1e-5, rtol=0)


def test_times_are_pairs_of_a_way_and_its_limit():
    ways = [WAYS["plain-capture-stop"], WAYS["plain-bridge"]]
    found = measure_time(TINY, ways, meter_of("cpu"), repeats=2, seed=0)["seconds"]
    assert list(found) == ["plain-capture-stop", "plain-bridge"]
    assert all(len(pairs) == 2 and min(map(min, pairs)) > 0 for pairs in found.values())


def test_the_cpu_is_measured_by_the_clock_and_the_resident_memory():
    cpu = meter_of("cpu")
    assert isinstance(cpu, Cpu)
    assert 0.05 <= cpu.seconds_of(lambda: time.sleep(0.05)) < 0.5
    kept, peak = cpu.peak_of(lambda: torch.ones(64 * MIB // 4).sum())
    assert kept == 64 * MIB // 4
    assert peak is None or 63 * MIB < peak < 80 * MIB


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"^torch finds no cuda device on this machine$"):
        meter_of("cuda")


class _Library:
    """Counts as torch.cuda does, on no device."""

    def __init__(self):
        self.now, self.held, self.most = 0.0, 100, 500
        library = self

        class Event:
            def __init__(self, *, enable_timing):
                assert enable_timing

            def record(self):
                self.at = library.now

            def elapsed_time(self, end):
                return end.at - self.at

        self.Event = Event

    def allocate(self, size):
        self.held += size
        self.most = max(self.most, self.held)

    def synchronize(self, _device):
        self.now += 1000.0

    def reset_peak_memory_stats(self, _device):
        self.most = self.held

    def memory_allocated(self, _device):
        return self.held

    def max_memory_allocated(self, _device):
        return self.most

    def mem_get_info(self, _device):
        return 300, 1000


def test_an_accelerator_is_measured_by_its_allocator_and_its_events():
    library = _Library()
    meter = Accelerator(torch.device("cuda"), library)

    def run():
        library.allocate(70)
        library.allocate(-40)
        library.now += 250.0  # milliseconds

    assert meter.peak_of(run) == (None, 70)
    assert meter.seconds_of(run) == 0.25
    assert meter.capacity() == 1000


def test_plots_are_drawn_of_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks._plots import draw

    def measured(name, peak):
        ways = TABLES[name].ways
        return {
            "results": [
                {"way": way.name, "peak_bytes": peak * MIB, "seconds": [[0.1, 0.1]]} for way in ways
            ]
        }

    draw({"plain": measured("plain", 5), "asked-1": measured("asked-1", 5)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.png", "plain.svg"]
    draw({"asked-1": measured("asked-1", 5), "asked-2": measured("asked-2", 6)}, tmp_path)
    assert (tmp_path / "asked.png").exists()


def test_findings_are_kept_beside_those_of_other_runs(tmp_path):
    from benchmarks.__main__ import Findings

    path = tmp_path / "found.json"
    Findings(path).put("bridge", {"results": []})
    Findings(path).put("plain", {"results": []})
    assert list(json.loads(path.read_text())) == ["bridge", "plain"]
