"""The bench: what it checks, what it keeps, what it says. No test looks at a time itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import iha
from iha_lab.bench import ceilings, implementations, measure, run, training_step
from iha_lab.bench.cases import CASES, MHA, QUICK, RECIPE, Layer, Model, case, default_cases
from iha_lab.bench.measure import BOTH, FORWARD, STEP
from iha_lab.report import bench_tables, figures

CPU = torch.device("cpu")
TINY = Layer("window", 16, 2, 2, 4, 4, "float32", only=(MHA, RECIPE, "local", "sdpa"))
DECODE = Layer("decode", 1, 2, 2, 4, None, "float32", S=12)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test below starts one; the others do without."""
    monkeypatch.setattr(measure, "in_a_process", lambda *_: 1000)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a case of given rows."""

    def make(*rows: Layer | Model) -> None:
        monkeypatch.setitem(QUICK, "cpu", rows)

    return make


def measured(tmp_path: Path) -> run.Record:
    return run.bench(("cpu",), CPU, tmp_path, True, lambda text: None)["cases"]["cpu"]


def test_the_file_holds_what_was_measured(only: Any, tmp_path: Path) -> None:
    only(TINY)
    part = measured(tmp_path)
    assert json.loads((tmp_path / "bench-cpu.json").read_text())["cases"]["cpu"] == json.loads(
        json.dumps(part)
    )
    (row,) = part["rows"]
    assert Layer(**row["layer"]) == TINY
    assert list(row["implementations"]) == [MHA, RECIPE, "sdpa", "local"]
    for name, found in row["implementations"].items():
        for label in (FORWARD, BOTH):
            assert len(found[label]["seconds"]) >= 3
        assert found["peak"] == {"bytes": 1000}
        assert (name == MHA) == ("differences" not in found)
    assert part["versions"]["torch"] == torch.__version__
    assert part["bytes_per_second"] > 0
    assert part["flops_per_second"]["float32"] > 0


def test_ratios_are_of_the_medians_of_one_run() -> None:
    row = {
        "implementations": {
            "a": {FORWARD: {"seconds": [1, 9, 3], "median": 3}, "peak": {"bytes": 10}},
            "b": {FORWARD: {"seconds": [2, 2, 2], "median": 2}, "peak": {"bytes": 4}},
            "c": {FORWARD: {"why_not": "it is tired"}},
        }
    }
    assert bench_tables.ratio(row, "a", "b", FORWARD) == 1.5
    assert bench_tables.peak_ratio(row, "a", "b") == 2.5
    assert bench_tables.ratio(row, "a", "c", FORWARD) is None
    assert bench_tables.ratio(row, "a", "absent", FORWARD) is None


def test_a_race_takes_medians_in_turn_and_lets_a_loser_go() -> None:
    order: list[str] = []

    def raising() -> None:
        order.append("raising")
        if order.count("raising") == 4:
            raise RuntimeError("enough\nof this")

    found = measure.race(
        {"raising": raising, "steady": lambda: order.append("steady")}, CPU, rounds=5, budget=9
    )
    assert order[:4] == ["raising", "steady"] * 2
    assert order.count("steady") == 7  # two of them to warm up
    assert len(found["steady"]["seconds"]) == 5
    assert found["raising"] == {"why_not": "it raises RuntimeError: enough"}
    assert measure.race({}, CPU, rounds=5, budget=9) == {}


def test_memory_that_runs_out_is_a_reason() -> None:
    def starve() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found = measure.race({"large": starve}, CPU, rounds=3, budget=1)
    assert found == {"large": {"why_not": "it runs out of memory"}}


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_a_wrong_backend_is_caught_before_it_is_timed(
    wrong: str, only: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iha.BACKENDS["local"].run

    def broken(call: Any) -> torch.Tensor:
        output = right(call)
        if wrong == "output":
            return output * 1.01
        return output * torch.nan if wrong == "nan" else output.detach() + 0 * output

    monkeypatch.setattr(iha.BACKENDS["local"], "run", broken)
    only(TINY)
    found = measured(tmp_path)["rows"][0]["implementations"]
    assert "differs from reference" in found["local"]["why_not"]
    assert FORWARD not in found["local"]
    assert "median" in found["sdpa"][BOTH]


def test_a_raising_backend_keeps_its_row(
    only: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(call: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(iha.BACKENDS["local"], "run", raising)
    only(TINY)
    row = measured(tmp_path)["rows"][0]
    assert row["implementations"]["local"]["why_not"] == "it raises RuntimeError: no such kernel"
    assert bench_tables.reasons(row) == ["local: it raises RuntimeError: no such kernel"]


def test_who_refuses_says_why(only: Any, tmp_path: Path) -> None:
    only(dataclasses.replace(DECODE, only=("local", "flash")))
    found = measured(tmp_path)["rows"][0]["implementations"]
    assert "no window" in found["local"]["why_not"]
    assert "CUDA" in found["flash"]["why_not"]


def test_a_mask_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "MASK_ENTRIES", {"cpu": 100})
    tensors = implementations.inputs(TINY, CPU)
    for name in (RECIPE, "sdpa", "streamed"):
        why_not = implementations.refusal(name, TINY, tensors)
        assert (why_not is None) == (name == "streamed"), why_not  # there `local` runs inside
    assert implementations.refusal(RECIPE, dataclasses.replace(TINY, window=None), tensors) is None


@pytest.mark.parametrize("layer", [TINY, dataclasses.replace(TINY, window=None), DECODE])
def test_the_recipe_is_the_operator(layer: Layer) -> None:
    found = implementations.differences(implementations.recipe(layer, CPU), layer, CPU)
    assert len(found) == (1 if layer.decodes else 8)
    assert max(found.values()) < 1e-5


def test_a_prediction_is_the_ratio_of_counted_flops() -> None:
    layer = Layer("global", 64, 2, 2, 4, None, "float32")
    expected = iha.attention_flops(64, 2, 4, 2) / iha.attention_flops(64, 2, 4)
    assert layer.predicted() == expected
    assert dataclasses.replace(DECODE, P=1).predicted() == 1
    assert DECODE.predicted() > 4


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_checked_at_a_size_that_reference_can_do(name: str) -> None:
    for layer in CASES[name]:
        if not isinstance(layer, Layer):
            continue
        small = implementations.check_layer(layer)
        scores = small.B * small.H * small.N * small.keys * small.P**2
        assert scores <= implementations.CHECK_SCORES
        assert (small.H, small.P, small.d, small.dtype) == (layer.H, layer.P, layer.d, layer.dtype)
        assert (small.window is None) == (layer.window is None)
        assert small.window is None or small.window < small.keys
        assert small.decodes == layer.decodes


def test_the_paper_case_is_the_papers() -> None:
    windows = {layer.P: layer.window for layer in CASES["paper"] if isinstance(layer, Layer)}
    assert windows == {16: 16, 20: 10, 32: 4}
    assert all(layer.N == 8192 and layer.dtype == "bfloat16" for layer in CASES["paper"])


def test_flops_and_bytes() -> None:
    assert TINY.flops() == iha.attention_flops(16, 2, 4, 2, window=4)
    assert TINY.floor_bytes() == 4 * (2 * 16 * 4) * 4  # query, key, value, output
    assert DECODE.cache_bytes() == 2 * (2 * 12 * 4) * 4
    assert DECODE.floor_bytes() == DECODE.cache_bytes() + 2 * (2 * 4) * 4
    assert DECODE.flops() == 4 * 2 * 4 * (2 * 24) + 2 * 2 * 4 * (2 * 2 * 13) * 2


def test_a_case_that_is_none() -> None:
    with pytest.raises(ValueError, match="case must be one of paper, small-p"):
        case("papers", quick=False)
    assert default_cases(CPU) == ("cpu",)
    assert "paper" in default_cases(torch.device("cuda"))


def test_another_run_replaces_its_own_case_only(only: Any, tmp_path: Path) -> None:
    only(dataclasses.replace(TINY, only=("local",)))
    measured(tmp_path)
    file = tmp_path / "bench-cpu.json"
    file.write_text(json.dumps({"cases": {"cpu": "old", "paper": "kept"}}))
    measured(tmp_path)
    cases = json.loads(file.read_text())["cases"]
    assert cases["paper"] == "kept"
    assert len(cases["cpu"]["rows"]) == 1


def test_a_folder_of_something_else_is_refused(only: Any, tmp_path: Path) -> None:
    only(dataclasses.replace(TINY, only=("local",)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        measured(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_stopped_run_leaves_its_rows(
    only: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    only(dataclasses.replace(TINY, only=("local",)), Model("step", 2, 8, 2, 8, 8, 8, 1, "float32"))
    monkeypatch.setattr(training_step, "plain", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    assert len(json.loads((tmp_path / "bench-cpu.json").read_text())["cases"]["cpu"]["rows"]) == 1


def test_a_whole_model_and_all_that_is_shown(only: Any, tmp_path: Path) -> None:
    only(
        dataclasses.replace(TINY, only=(MHA, RECIPE, "local", "sdpa")),
        dataclasses.replace(DECODE, only=(MHA, "local", "sdpa")),
        Model("training step", 2, 16, 2, 16, 16, 16, 2, "float32"),
    )
    part = measured(tmp_path)
    plain, mixed = part["rows"][2]["implementations"].values()
    assert mixed["parameters"] > plain["parameters"]
    for found in (plain, mixed):
        assert found["tokens_per_second"] == 16 / found[STEP]["median"]
    shown = "\n".join(table.title + table.markdown() for table in bench_tables.tables(part))
    for word in ("published recipe", "local", "recipe over it", "tokens/s", "cache"):
        assert word in shown
    assert part["device"] in bench_tables.heading(part)
    figures.save(bench_tables.figure({"cases": {"cpu": part}}), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_ceilings_are_positive() -> None:
    assert ceilings.copy_bytes_per_second(CPU, quick=True) > 0
    assert ceilings.matmul_flops_per_second(CPU, "float32", quick=True) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_memory_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer = Layer("window", 1024, 4, 4, 32, 16, "float32")
    base = layer.floor_bytes() // 4
    described = json.dumps(dataclasses.asdict(layer))
    found = measure.in_a_process("iha_lab.bench.peak_memory", described, "local")
    assert 3 * base < found < 200 * base
