"""What is made of a run on a GPU: fusions against stock, generated regions, where a step's time goes, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_run
import llama_gemms
import pytest
import run_markdown
import run_results
import run_where
import synthetic_events as synthetic

from autokernel.events import Event, ModelValidated, Profiled, ScenarioTimed, StageFinished
from autokernel.records import Candidate, ConfigValue, Problem, Speedup, Status, TensorSpec

STEP = "decode"
K, N = 64, 96
MM = synthetic.gemm(1, N, K, device="cuda")


def _problem(op: str, *shapes: tuple[int, ...], **scalars: ConfigValue) -> Problem:
    specs = tuple(TensorSpec.contiguous(shape, "bfloat16") for shape in shapes)
    return Problem(op=op, inputs=specs, device="cuda", scalars=tuple(scalars.items()))


RESIDUAL = _problem("generated", (1, K), (N, K), (1, N), program="t0 = t(i1); t1 = mm(i0, t0); o0 = add(i2, t1)")
RELU = _problem("generated", (1, K), (N, K), program="t0 = t(i1); t1 = mm(i0, t0); o0 = relu(t1)")
ATTENTION = _problem("attention", (1, 4, 1, 16), (1, 4, 32, 16), (1, 4, 32, 16), scale=0.25)
NORM = _problem("rms_norm", (1, K), (K,), eps=1e-5)
ADD_NORM = _problem("add_rms_norm", (1, K), (1, K), (K,), eps=1e-5)
ROTARY = _problem("rotary", (1, 4, 1, 16), (1, 1, 1, 16), (1, 1, 1, 16))


def _events(*, whole: bool = True) -> list[Event]:
    """Four products of one shape: one has a generated kernel with its residual, which won; attention won, norms did not."""
    spots = [
        synthetic.hotspot(MM, STEP, 0.4, 40.0, scenarios=1, calls=4),
        synthetic.hotspot(RESIDUAL, STEP, 0.1, 10.0, scenarios=1, calls=1),
        synthetic.hotspot(RELU, STEP, 0.1, 10.0, scenarios=1, calls=1),
        synthetic.hotspot(ATTENTION, STEP, 0.3, 30.0, scenarios=1, calls=2),
        replace(synthetic.hotspot(NORM, STEP, 0.1, 9.0, scenarios=1, calls=3), estimated=True),
        replace(synthetic.hotspot(ROTARY, STEP, 0.1, 5.0, scenarios=1, calls=2), estimated=True),
    ]
    shared = replace(synthetic.hotspot(ADD_NORM, STEP, 0.1, 9.5, scenarios=1, calls=1), estimated=True)
    spots.append(replace(shared, rivals=(RESIDUAL.key, NORM.key)))
    spots[0] = replace(spots[0], rivals=(RESIDUAL.key,))
    spots[1] = replace(spots[1], rivals=(MM.key, RELU.key))
    trials = [
        _trial(1, MM, 11.0, "aten"),
        _trial(2, MM, 10.5, "cutedsl", source="quack"),
        _trial(3, RESIDUAL, 12.0, "aten", implementation="stock"),
        _trial(4, RESIDUAL, 8.0, "triton", kernel="generated_mm"),
        _trial(5, ATTENTION, 25.0, "aten", implementation="stock"),
        _trial(6, ATTENTION, 5.0, "triton", kernel="decode_attention"),
        _trial(7, NORM, 2.0, "aten", implementation="stock"),
        _trial(8, NORM, 2.5, "triton", kernel="row_norm"),
        _trial(9, RELU, 12.0, "aten", implementation="stock"),
        _trial(10, RELU, None, "triton", kernel="generated_mm"),
    ]
    gain = {4: 1.5, 6: 5.0}
    confirmed = [
        synthetic.confirmation(spot, trials[at - 1], trials[at - 2], Speedup(ratio=r, low=r - 0.1, high=r + 0.1, num_rounds=31))
        for (at, r), spot in zip(gain.items(), (spots[1], spots[3]), strict=True)
    ]
    result = synthetic.scenario(STEP, (200.0, 120.0, 130.0, 70.0), synthetic.above(1.6))
    hits = {RESIDUAL.key: 1, ATTENTION.key: 2}
    ending: list[Event] = [
        ScenarioTimed(scenario=STEP, applied_digest="d", result=result, timing={"hits": {"bundle": hits}}),
        ModelValidated(verdict=synthetic.PASSED, evals=(), scenarios=(result,)),
    ]
    profiled = Profiled(hotspots=tuple(spots), scenario_us={STEP: 110.0}, read_gb_per_s=4000.0, peak_tflops={"bfloat16": 700.0})
    finished = StageFinished(stage="confirm", seconds=1.0)
    return [synthetic.start(), profiled, *trials, *confirmed, finished, *(ending if whole else [])]


def _trial(number: int, problem: Problem, us: float | None, backend: str, **config: ConfigValue) -> Any:
    candidate = Candidate(problem=problem, backend=backend, config=config)
    origin = "stock" if backend == "aten" else "tpe"
    return synthetic.evaluated(number, candidate, us, origin, Status.WRONG, "error_max is 2, limit 1; and more")


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    found = run_results.results_of_run(synthetic.write_run(tmp_path, _events()))
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_fusions_are_held_against_stock_and_losers_are_listed(run: dict[str, Any]) -> None:
    rows = {row["problem"]: row for row in run["fusions"]}
    assert MM.key not in rows, "a plain product is no fusion"
    assert ROTARY.key not in rows, "it was not searched"
    assert {key: row["verdict"] for key, row in rows.items()} == {
        ATTENTION.key: "shipped", RESIDUAL.key: "shipped", NORM.key: "lost", RELU.key: "refused",
    }  # fmt: skip
    won, lost, refused = rows[RESIDUAL.key], rows[NORM.key], rows[RELU.key]
    assert (won["stock_us"], won["best_us"], won["speedup"]["ratio"]) == (12.0, 8.0, 1.5)
    assert won["best_of_roofline"] == pytest.approx(10 / 3 / 8)
    assert (lost["best_us"], lost["speedup"], lost["screened"], lost["kernel"]) == (2.5, None, 0.8, "triton row_norm")
    assert refused["best_us"] is None
    assert refused["why"] == "no candidate passed its checks: error_max is 2, limit 1"


def test_an_unfinished_run_ships_nothing(tmp_path: Path) -> None:
    found = run_results.results_of_run(synthetic.write_run(tmp_path, _events(whole=False)))
    assert {row["verdict"] for row in found["fusions"]} == {"won alone", "lost", "refused"}
    assert found["where"] == []


def test_generated_regions_are_counted(run: dict[str, Any]) -> None:
    (row,) = run["generated"]["scenarios"]
    assert (row["gemm_calls_with_region"], row["gemm_calls"], row["without_region"]) == (4, 4, [])
    assert {name: row[name] for name in ("regions", "searched", "proved", "kernels")} == {
        "regions": 2, "searched": 2, "proved": 1, "kernels": 2,
    }  # fmt: skip
    assert row["shipped"] == ["generated product + residual 1×96×64 bf16"]


def test_where_a_step_goes_adds_up(run: dict[str, Any]) -> None:
    (row,) = run["where"]
    kinds = row["kinds"]
    # three of four products stay as profiled, 10 us each; the fourth is the generated kernel's
    assert (kinds["GEMMs"]["stock_us"], kinds["GEMMs"]["bundle_us"], kinds["GEMMs"]["profiled_us"]) == (42.0, 38.0, 40.0)
    assert [(part["calls"], part["how"]) for part in kinds["GEMMs"]["parts"]] == [
        (1, "an entry, alone times calls"),
        (3, "as before, as profiled"),
    ]
    assert (kinds["attention"]["stock_us"], kinds["attention"]["bundle_us"]) == (50.0, 10.0)
    assert (kinds["norms"]["stock_us"], kinds["norms"]["bundle_us"], kinds["norms"]["profiled_us"]) == (6.0, 6.0, None)
    assert kinds["other"]["parts"][0]["how"] == "as before, estimated"
    for name, step_us in (("stock_us", 120.0), ("bundle_us", 70.0)):
        assert sum(kind[name] for kind in kinds.values()) + row["rest"][name] == pytest.approx(step_us)


def test_products_of_a_program() -> None:
    program = "t0 = t(i1); o0 = mm(i0, t0); t1 = t(i2); o1 = mm(i0, t1)"
    problem = _problem("generated", (8, 16), (32, 16), (64, 16), program=program)
    assert run_where.products_of(problem) == {(1, 8, 32, 16): 1, (1, 8, 64, 16): 1}
    assert run_where.products_of(synthetic.merged(8, (32, 32), 16)) == {(1, 8, 32, 16): 2}
    batch = _problem("generated", (2, 3, 8, 16), (6, 16, 32), program="t0 = reshape(i0, [6, 8, 16]); o0 = bmm(t0, i1)")
    assert run_where.products_of(batch) == {(6, 8, 32, 16): 1}


def test_what_has_a_product_in_it_is_a_gemm() -> None:
    """Norms behind a linear layer and such: counted as norms, their products would be there twice."""
    x, w = TensorSpec.contiguous((1, 8, 16), "bfloat16"), TensorSpec.contiguous((16, 32), "bfloat16")
    norm = Problem(op="linear_rms_norm", device="cuda", inputs=(x, w), constants=(1,), scalars=(("residual", False),))
    assert (run_where.kind_of(norm), run_where.products_of(norm)) == ("GEMMs", {(1, 8, 32, 16): 1})
    gain, wide = TensorSpec.contiguous((16,), "bfloat16"), TensorSpec.contiguous((16, 64), "bfloat16")
    several = Problem(op="rms_norm_qkv", device="cuda", inputs=(x, gain, wide, w), scalars=(("bias", "00"), ("eps", 1e-5)))
    assert (run_where.kind_of(several), run_where.products_of(several)) == ("GEMMs", {(1, 8, 64, 16): 1, (1, 8, 32, 16): 1})
    alone = Problem(op="rms_norm", device="cuda", inputs=(x, TensorSpec.contiguous((16,), "bfloat16")))
    assert (run_where.kind_of(alone), run_where.products_of(alone)) == ("norms", {})


def test_tables(run: dict[str, Any]) -> None:
    text = run_markdown.markdown([{"run": run}])
    assert "| decode | generated product + residual 1×96×64 bf16 | 12.0 (0.28) | 8.0 (0.42) | 1.500 [1.400, 1.600] |" in text
    assert "| decode | rms_norm 1×64 bf16 | 2.0" in text
    assert "0.80 screened | triton row_norm | lost |" in text
    assert "| decode | stock | 0.050 (0.030) | 0.042 (0.040) | 0.006 | 0.005 | 0.017 | 0.120 |" in text
    assert "4 fusions were searched: 2 shipped, 1 lost, 1 refused." in text
    assert "| attention | 1 | 1 |  |  | 5.00 [5.00, 5.00] |" in text
    assert "4 of 4 GEMM calls (100.0%) have a region, 2 regions in all; 2 were searched with 2 kernels" in text
    short = run_markdown.fusion_table(run["fusions"] * 3, most=6)
    assert short.count("\n| decode") == 6
    assert short.count("| shipped |") == 4, "losers keep a third of the places"


def test_gemms_by_backend(run: dict[str, Any]) -> None:
    (row,) = run["gemms_by_backend"]
    assert row["by_backend"] == {"cutedsl": [10.5, "cutedsl quack"], "aten": [11.0, "aten"]}
    said = run_markdown.backend_lines(run["gemms_by_backend"])
    assert "as screened, 1 GEMMs: 1.048×" in said
    assert "as shipped, 1 GEMMs of at least 0 rows: 1.000× stock" in said


def test_results_of_earlier_versions_are_still_printed() -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    text = run_markdown.markdown([json.loads((folder / "llama-nvidia-h200-2026-11-21.json").read_text())])
    assert "| decode-b1 | 8.8" in text


def test_files_are_named_after_the_experiment(run: dict[str, Any]) -> None:
    run["environment"]["device_name"] = "NVIDIA H200"
    run["date"] = "2026-11-21T18:13:54+00:00"
    assert gpu_run.file_name({"run": run, "date": "2027-01-01"}, "llama", "cuda") == "invented-nvidia-h200-2026-11-21.json"
    assert gpu_run.file_name({"date": "2027-01-01T00:00:00"}, "llama", "cuda") == "llama-cuda-2027-01-01.json"


@pytest.mark.usefixtures("own_threads")
def test_products_that_share_an_input_are_measured_apart_and_as_one() -> None:
    ways = [llama_gemms.CUBLAS, llama_gemms.PICK, llama_gemms.STOCK, llama_gemms.PICKS]
    case = llama_gemms.GemmCase(name="qkv", m=4, ns=(48, 16), k=32, dtype="float32", device="cpu")
    several = llama_gemms.MeasureGemm(case=case, bundle=None, threads=1, rounds=3)()
    assert list(several["us"]) == ways
    assert set(several["over_max_autotune_apart"]) == {*ways} - {llama_gemms.PICKS}
    one = llama_gemms.MeasureGemm(case=case.one(), bundle=None, threads=1, rounds=3)()
    assert list(one["us"]) == ways[:2]
    assert one["over_max_autotune_apart"] == one["over_max_autotune"]


@pytest.mark.slow
def test_every_measurement_begins_with_empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Inductor would hand out what max-autotune picked the time before."""
    case = llama_gemms.GemmCase(name="o", m=4, ns=(48,), k=32, dtype="float32", device="cpu")
    made: list[Path] = []

    def folder(prefix: str) -> str:
        made.append(tmp_path / f"{prefix}{len(made)}")
        made[-1].mkdir()
        return str(made[-1])

    monkeypatch.setattr(gpu_run.tempfile, "mkdtemp", folder)
    monkeypatch.setattr(gpu_run.shutil, "rmtree", lambda path, ignore_errors: None)
    (found,) = gpu_run.measure([case], None, {}, workers=1, rounds=3)
    assert found["us"].keys() == {llama_gemms.CUBLAS, llama_gemms.PICK}
    assert len(made) == 1
    assert list(made[0].rglob("*.py")), "what Inductor has compiled lies there"


def test_means_over_each_way() -> None:
    speedups = [{"ratio": r, "low": r, "high": r} for r in (1.0, 4.0, 8.0)]
    against = ("over_cublas", "over_max_autotune", "over_max_autotune_apart")
    rows = [{"gemm": "o", "m": 1, "us": {"bundle": 1.0}} | {key: {"bundle": speedups[i]} for key in against} for i in (0, 1)]
    rows[1] |= {"m": 16, "over_max_autotune_apart": {"bundle": speedups[2]}}
    text = run_markdown.mean_lines(rows)
    assert "- M <= 16: 2.000× max-autotune's picks (geometric mean of 2, least 1.000×)" in text
    assert "- all M: 2.828× max-autotune's picks for the model's own products (geometric mean of 2, least 1.000×)" in text
