"""What the benchmarks refuse to report, what they fail for, and how they measure."""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from torch import tensor

pytest.importorskip("typer")
from typer import BadParameter

from benchmarks.__main__ import main
from benchmarks.measuring.devices import Accelerator, Cpu, meter_of
from benchmarks.measuring.machine import machine
from benchmarks.measuring.probe import (
    lacks_memory,
    measure_memory,
    measure_time,
    relative_difference,
)
from benchmarks.measuring.sites import CASES, LAYERS, _blocks, _check_alike
from benchmarks.reporting.report import (
    Result,
    disk_rows,
    find_disagreement,
    find_regressions,
    gather_rows,
)
from benchmarks.ways.models import BRIDGE, PLAIN, WITHOUT, Setup, build, make_tokens, of_model
from benchmarks.ways.setups import setup_of, why_not
from benchmarks.ways.tables import TABLES, WAYS

pytestmark = pytest.mark.thorough

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
        "plain-bridge did not yield sdpa's activation to 0.0001 of its largest value"
    )


def test_differences_are_relative_to_the_largest_value_and_never_hide_what_is_no_number():
    other = tensor([3000.0, 1.0])
    assert relative_difference([other + tensor([0.0, 0.03])], [other]) == pytest.approx(
        1e-5, rel=0.1
    )
    nan = tensor([float("nan"), 1.0])
    assert torch.tensor(relative_difference([other, nan], [other, other])).isnan()


def test_what_is_no_number_and_what_yields_nothing_is_a_disagreement():
    nan = _result("plain-bridge", sha256="b", difference=float("nan"))
    assert find_disagreement([_result("plain-hidden"), nan, LIMIT]) == (
        "plain-bridge did not yield sdpa's activation to 0.0001 of its largest value"
    )
    assert find_disagreement([_result("plain-capture", sha256=None), LIMIT]) == (
        "plain-capture yielded nothing"
    )
    lost = Result("plain-capture", does_not_fit=True)
    assert find_disagreement([_result("plain-hidden"), lost, LIMIT]) is None


def test_what_goes_to_disk_is_not_compared_with_what_is_captured():
    results = [replace(_result("extract-lance", peak=100 * MIB), seconds=[(2.0, 1.0), (3.0, 1.0)])]
    assert disk_rows(results).splitlines()[2] == (
        "| **`extract(model, batches, name, path)`** | 100 | 2.50 | 2.500 | 2.250 to 2.750 |"
    )


def test_what_is_gathered_is_told_with_the_quartiles_of_its_times():
    gathered = _result("gather-64-capture", peak=130 * MIB, payload=64 * MIB)
    times = [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]
    results = [replace(gathered, seconds=times), Result("gather-64-bare", 60 * MIB)]
    assert gather_rows(results, 64).splitlines()[2] == (
        "| **`capture(model, name, stop=True)`** | 130 | 2.00 | 1.05 | 2.00 | 2.000 | "
        "1.500 to 2.500 |"
    )


def test_a_capture_that_takes_too_much_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.reporting.report.MOST_QUICK", 0.5)
    with pytest.raises(SystemExit, match=r"^plain-capture-stop takes \S+ x .*, at most 0\.5$"):
        main(case=["plain-capture-stop"], quick=True)
    assert "| **`capture(model, name, stop=True)`** |" in capsys.readouterr().out


def test_results_that_differ_fail_the_command(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.reporting.report.TOLERANCE", 0)
    expected = (
        r"^plain: nothing can be compared: plain-bridge did not yield sdpa's activation to 0 "
    )
    with pytest.raises(SystemExit, match=expected):
        main(case=["plain-bridge"], quick=True)
    assert "| way |" not in capsys.readouterr().out


def test_a_case_that_is_none_is_refused(monkeypatch):
    with pytest.raises(
        BadParameter, match=r"^there is no case nothing; choose from bridge,.*--list"
    ):
        main(case=["nothing"], quick=True)
    monkeypatch.setattr("benchmarks.__main__.WITHOUT", {"nnsight"})
    with pytest.raises(
        BadParameter, match=r"^not installed: nnsight; pip install -e \"\.\[bench\]\"$"
    ):
        main(case=["plain-nnsight"], quick=True)


def test_all_cases_are_listed(capsys):
    main(list_cases=True)
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split(":")[0].split(" (")[0].strip() for line in lines]
    assert sorted(listed) == sorted([*TABLES, *WAYS, "sites", "checks"])


def test_what_a_quick_run_draws_replaces_no_plots(tmp_path):
    (tmp_path / "plain.png").touch()
    with pytest.raises(BadParameter, match=r"has plots, which those of a quick run would replace"):
        main(case=["plain-capture-stop"], quick=True, plot=tmp_path)


def test_tables_that_a_loaded_model_has_no_part_in_are_left_out():
    def why(name):
        loaded = {"layers": 6, "heads": 12, "d_model": 768, "context": 1024, "model": "it"}
        return why_not(TABLES[name], replace(setup_of(TABLES[name], quick=False), **loaded))

    assert why("bridge") == why("depth-6") == why("length-1024") == why("asked-3") == ""
    assert why("depth-12") == "it is of a model of 12 layers, it has 6 layers"
    assert why("length-2048") == "it needs 2048 positions, the model has 1024"
    assert why("asked-11") == "it asks for 11 layers below the last, the model has 6"
    assert why("saelens-small") == (
        "it is of a model of 4 heads, 64 d_model, it has 12 heads, 768 d_model"
    )
    assert not any(why_not(table, setup_of(table, quick=False)) for table in TABLES.values())
    load = TABLES["load"]
    assert why_not(load, setup_of(load, quick=False, device="cuda")) == (
        "it reads into the memory of the CPU"
    )


def test_nothing_but_a_lack_of_memory_is_one():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as error:
        torch.empty(2**50)
    assert lacks_memory(error.value)
    assert lacks_memory(MemoryError())
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not lacks_memory(RuntimeError("some elements refer to a single memory location"))


def test_what_is_measured_says_on_what_and_when():
    found = machine()
    assert {"date", "processor", "actctx", "torch", "transformer_lens", "datasets"} <= found.keys()
    assert all(found.values())
    assert "accelerator" not in found


def test_a_capture_that_takes_a_tenth_more_than_the_limit_is_a_regression():
    assert find_regressions([_result("plain-capture-stop", peak=110), LIMIT]) == []
    assert find_regressions([_result("plain-capture-stop", peak=122), LIMIT]) == [
        "plain-capture-stop takes 1.11 x (limit + captured) of memory, at most 1.1"
    ]


def test_what_does_not_fit_into_a_quick_run_or_is_not_measured_is_a_fault(monkeypatch):
    lost = Result("plain-capture-stop", does_not_fit=True)
    assert find_regressions([lost, LIMIT]) == ["plain-capture-stop does not fit into memory"]
    unmeasured = [_result("plain-capture-stop", peak=None), LIMIT]
    monkeypatch.setattr(sys, "platform", "linux")
    assert find_regressions(unmeasured) == ["the memory of plain-capture-stop was not measured"]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert find_regressions(unmeasured) == []


class Unmeasured:
    """Runs, and takes no time to collect garbage."""

    def peak_of(self, run):
        return run(), None


def yielded(name):
    """Run all ways of a table, of a tiny model."""
    table = TABLES[name]
    setup = replace(TINY, **table.varied)
    ways = [way for way in table.ways if way.model not in WITHOUT]
    return [Result(way.name, **measure_memory(setup, way, Unmeasured())) for way in ways]


@pytest.fixture(scope="module")
def apart():
    """A process of its own: nnsight changes torch where it is imported."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    "name",
    ["bridge", "plain", "generate", "work", "asked-3", "batches-8", "last", "load", "extract"],
)
def test_all_ways_of_a_table_yield_the_same(name, apart):
    for library in TABLES[name].needs:
        pytest.importorskip(library)
    results = apart.submit(yielded, name).result()
    assert find_disagreement(results) is None
    assert all(each.sha256 for each in results if WAYS[each.way].captures)


def test_sites_are_timed_only_if_all_ways_keep_the_same(monkeypatch):
    monkeypatch.delitem(CASES, "nnsight: `trace`, `save`", raising=False)  # it changes torch
    subjects = {kind: _blocks(TINY, kind) for kind in (PLAIN, BRIDGE)}
    _check_alike(subjects)
    monkeypatch.setitem(CASES, "another", (PLAIN, lambda *_: [torch.zeros(1)] * LAYERS))
    with pytest.raises(RuntimeError, match=r"from a plain model keep different things$"):
        _check_alike(subjects)


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
    assert 63 * MIB < peak < 80 * MIB if sys.platform == "linux" else peak is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"^torch finds no cuda device on this machine$"):
        meter_of("cuda")


class _Library:
    """Counts as torch.cuda does, on no device: where the tests run there hardly ever is one."""

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

    def device(self, _device):
        return nullcontext()

    def synchronize(self, _device=None):
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


def test_a_device_whose_peak_is_not_told_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True, raising=False)
    with pytest.raises(
        RuntimeError, match=r"^torch does not report the peak memory of mps devices"
    ):
        meter_of("mps")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is none")
def test_a_gpu_is_measured():
    meter = meter_of("cuda")
    kept, peak = meter.peak_of(lambda: torch.ones(64 * MIB // 4, device="cuda"))
    assert peak == kept.nbytes
    assert 0 < meter.seconds_of(lambda: kept @ kept) < 10


def test_plots_are_drawn_of_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.reporting.plots import draw

    def measured(name, peak):
        ways = TABLES[name].ways
        return {
            "results": [
                {"way": way.name, "peak_bytes": peak * MIB, "seconds": [[0.1, 0.1]]} for way in ways
            ]
        }

    draw({"plain": measured("plain", 5), "asked-1": measured("asked-1", 5)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.png", "plain.svg"]
    tables = {"asked-3": measured("asked-3", 6), "asked-1": measured("asked-1", 5)}
    tables["asked-1"]["results"].append({"way": "of-old"})
    draw({**tables, "of-old": {"results": []}}, tmp_path)
    assert (tmp_path / "asked.png").exists()
