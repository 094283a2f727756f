"""Whole-model checks: the same model passes, a slightly broken one does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autokernel.config import LoadedExperiment, PrefillScenario, load_experiment
from autokernel.environment import current_environment
from autokernel.errors import WorkerError, WorkloadError
from autokernel.evaluate.quality import Trio, check_metric, check_model, compare_metric, compare_outputs
from autokernel.evaluate.whole_model import JobTurns
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle
from autokernel.profiling.language import Prefill
from autokernel.profiling.metric import Metric
from autokernel.profiling.workload import build_scenario, load_model

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def loaded() -> LoadedExperiment:
    return load_experiment(QUICKSTART)


@pytest.fixture(scope="module")
def model(loaded: LoadedExperiment) -> nn.Module:
    return load_model(loaded, "cpu")


@pytest.fixture(scope="module")
def trio(loaded: LoadedExperiment, model: nn.Module) -> Callable[[Run], Trio]:
    """trio(contender) -> the quickstart model reading a few passages."""
    reference = Prefill(copy.deepcopy(model).float())
    program = build_scenario(model, PrefillScenario(kind="prefill", length=128), "p", 0, "cpu", "bfloat16", loaded=loaded)

    def make(contender: Run) -> Trio:
        return Trio(
            name="p",
            contender=contender,
            stock=Prefill(model),
            reference=reference,
            draws=[program.fresh_inputs(seed) for seed in range(3)],
            is_language=True,
        )

    return make


def failed(trio: Trio) -> set[str]:
    return {check.name for check in compare_outputs([trio], 0.99).failures}


def test_the_same_model_passes(trio: Callable[[Run], Trio], model: nn.Module) -> None:
    verdict = compare_outputs([trio(Prefill(copy.deepcopy(model)))], 0.99)
    assert verdict.passed
    names = [check.name for check in verdict.checks]
    assert names == ["p: misplaced", "p: max error", "p: norm of error", "p: KL divergence", "top-1 disagreement"]


def test_masked_logits_hide_no_divergence() -> None:
    """A vocabulary padded with -inf, one position without any distribution, and one that stock's dtype makes zero."""
    exact = torch.randn(4, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact[..., -3:] = -math.inf
    exact[0, 0], exact[0, 1, 0] = -math.inf, -1e5
    stock = exact.half()
    assert stock[0, 1, 0] == -math.inf

    def of(contender: torch.Tensor) -> Any:
        runs = {"contender": lambda _: contender, "stock": lambda _: stock, "reference": lambda _: exact}
        trio = Trio(name="p", **runs, draws=[(torch.zeros(1),)], is_language=True)
        return next(check for check in compare_outputs([trio], 0.0).checks if check.name == "p: KL divergence")

    same = of(stock.clone())
    assert same.passed
    assert 0 < same.value < same.limit < 1e-4
    sharper = stock.clone()
    sharper[2] *= 1.1
    assert not of(sharper).passed
    for lost in (math.nan, math.inf):
        without = stock.clone()
        without[3, 5, 7] = lost
        assert of(without).value == math.inf
        assert not of(without).passed


def test_a_more_accurate_model_passes(trio: Callable[[Run], Trio], model: nn.Module) -> None:
    accurate = Prefill(copy.deepcopy(model).float())
    assert not failed(trio(lambda ids: accurate(ids).bfloat16()))


def perturbed(model: nn.Module, change: Callable[[nn.Module], None]) -> Prefill:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return Prefill(other)


def _one_weight(other: Any) -> None:
    other.model.layers[1].mlp.down_proj.weight[7, 11] += 4


def _two_swapped_rows(other: Any) -> None:
    weight = other.model.layers[0].self_attn.v_proj.weight
    weight[[3, 4]] = weight[[4, 3]].clone()


def _eight_bits(other: Any) -> None:
    for layer in other.model.layers:
        weight = layer.mlp.gate_proj.weight
        weight.copy_((weight.float() * 64).round() / 64)


@pytest.mark.parametrize("change", [_one_weight, _two_swapped_rows, _eight_bits])
def test_a_slightly_broken_model_fails(trio: Callable[[Run], Trio], model: nn.Module, change: Any) -> None:
    assert "p: norm of error" in failed(trio(perturbed(model, change)))


def test_accumulating_in_bf16_fails(trio: Callable[[Run], Trio], model: nn.Module) -> None:
    class Lossy(nn.Module):
        """A linear layer that rounds its running sum every few columns."""

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(*x.shape[:-1], self.weight.shape[0], dtype=x.dtype)
            for start in range(0, x.shape[-1], 2):
                total = total + x[..., start : start + 2] @ self.weight[:, start : start + 2].t()
            return total

    def change(other: Any) -> None:
        for layer in other.model.layers:
            layer.mlp.down_proj = Lossy(layer.mlp.down_proj.weight)
            layer.self_attn.o_proj = Lossy(layer.self_attn.o_proj.weight)
        other.lm_head = Lossy(other.lm_head.weight)

    assert "p: norm of error" in failed(trio(perturbed(model, change)))


def test_dishonest_outputs_fail(trio: Callable[[Run], Trio], model: nn.Module) -> None:
    honest = Prefill(model)

    def nan(ids: torch.Tensor) -> torch.Tensor:
        out = honest(ids).clone()
        out[0, 5, 9] = math.nan
        return out

    def writes_its_input(ids: torch.Tensor) -> torch.Tensor:
        out = honest(ids)
        ids.zero_()
        return out

    assert failed(trio(nan)) >= {"p: misplaced"}
    assert failed(trio(writes_its_input)) == {"p: outputs"}
    assert failed(trio(lambda ids: honest(ids).float())) == {"p: outputs"}
    assert failed(trio(lambda ids: honest(ids)[:, :-1])) == {"p: outputs"}
    assert failed(trio(lambda ids: (honest(ids), ids))) == {"p: outputs"}
    assert "top-1 disagreement" in failed(trio(lambda ids: -honest(ids)))


def test_models_with_several_outputs_are_checked_one_by_one() -> None:
    layer = nn.Linear(16, 16).bfloat16().requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    inputs = [(torch.randn(8, 16).bfloat16(),)]

    def make(contender: Run) -> Trio:
        return Trio(
            name="m",
            contender=contender,
            stock=lambda x: (layer(x), x.argmax(-1)),
            reference=lambda x: (exact(x), x.argmax(-1)),
            draws=inputs,
            raised=torch.float64,
        )

    assert not failed(make(lambda x: (layer(x), x.argmax(-1))))
    assert failed(make(lambda x: (layer(x), x.argmax(-1) + 1))) == {"m[1]: misplaced"}
    assert failed(make(lambda x: (layer(x) * 1.1, x.argmax(-1)))) == {"m[0]: max error", "m[0]: norm of error"}


@pytest.mark.parametrize(("limit", "fails"), [(None, False), (1e-3, False), (1e-5, True)])
def test_the_distance_from_eager_may_have_a_limit_of_its_own(limit: float | None, fails: bool) -> None:
    layer = nn.Linear(16, 16).bfloat16().requires_grad_(False)
    exact = copy.deepcopy(layer).double()

    def nudged(x: torch.Tensor) -> torch.Tensor:
        out = layer(x)
        out[0, 0] += 2**-12  # within the budget of bf16: the element is small
        return out

    x = torch.zeros(8, 16).bfloat16()
    layer.bias[0] = exact.bias[0] = 2**-6
    trio = Trio(
        name="m", contender=nudged, stock=layer, reference=exact, draws=[(x,)], raised=torch.float64, max_abs_error=limit
    )
    verdict = compare_outputs([trio], 0.99)
    assert {check.name for check in verdict.failures} == ({"m: from eager"} if fails else set())
    distances = [check.value for check in verdict.checks if check.name == "m: from eager"]
    assert distances == ([2**-12] if limit is not None else [])


def test_missing_values_among_the_inputs_are_not_changes() -> None:
    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.nanmean(dim=1)

    def fills(x: torch.Tensor) -> torch.Tensor:
        out = mean(x)
        x.nan_to_num_(0.5)
        return out

    def trio(contender: Run) -> Trio:
        x = torch.tensor([[1.0, math.nan, 3.0]])
        return Trio(name="m", contender=contender, stock=mean, reference=mean, draws=[(x,)], raised=torch.float64)

    assert not failed(trio(mean))
    assert failed(trio(fills)) == {"m: outputs"}


def metric_of(samples: dict[str, list[float]], **options: Any) -> Metric:
    return Metric(name="m", samples=lambda forward: samples[forward()], limit=0.01, **options)


def test_the_metric_is_compared_in_pairs() -> None:
    stock = [1.0 + i / 10 for i in range(40)]
    samples = {"stock": stock, "same": stock, "better": [0.9 * x for x in stock], "worse": [1.05 * x for x in stock]}
    metric = metric_of(samples)
    same = compare_metric(metric, lambda: "stock", lambda: "same")
    assert (same.worse_by, same.worse_by_high, same.passed, same.num_samples) == (0, 0, True, 40)
    assert compare_metric(metric, lambda: "stock", lambda: "better").passed
    worse = compare_metric(metric, lambda: "stock", lambda: "worse")
    assert not worse.passed
    assert worse.worse_by == pytest.approx(0.05)
    assert compare_metric(metric, lambda: "stock", lambda: "worse", limit=0.1).passed


def test_a_metric_whose_interval_reaches_beyond_the_limit_fails() -> None:
    stock = [1.0] * 8
    noisy = [1.2, 0.8, 1.15, 0.85, 1.1, 0.9, 1.05, 0.95]
    result = compare_metric(metric_of({"stock": stock, "noisy": noisy}), lambda: "stock", lambda: "noisy")
    assert abs(result.worse_by) < 1e-9
    assert not result.passed


def test_higher_may_be_better_and_losses_may_be_logarithms() -> None:
    samples = {"stock": [2.0] * 8, "more": [2.1] * 8, "lost": [math.nan] * 8}
    higher = metric_of(samples, higher_is_better=True)
    assert compare_metric(higher, lambda: "stock", lambda: "more").worse_by == pytest.approx(-0.05)
    assert not compare_metric(higher, lambda: "more", lambda: "stock").passed
    logarithmic = compare_metric(metric_of(samples, logarithmic=True), lambda: "stock", lambda: "more")
    assert logarithmic.stock == pytest.approx(math.exp(2.0))
    assert logarithmic.worse_by == pytest.approx(math.expm1(0.1))
    assert not compare_metric(higher, lambda: "stock", lambda: "lost").passed


@pytest.mark.parametrize(
    ("other", "higher_is_better", "worse", "end"),
    [
        ([0.0] * 8, False, 0, 0),
        ([0.0] * 8, True, 0, 0),
        ([0.0] * 7 + [1e-30], False, math.inf, math.inf),
        ([0.0] * 7 + [1.0], True, -math.inf, 0),
        ([1.0] * 8, True, -math.inf, -math.inf),
        ([-1.0] * 8, True, math.inf, math.inf),
        ([-1.0] * 8, False, -math.inf, -math.inf),
        ([1.0, -1.0] * 4, False, 0, math.inf),
    ],
)
def test_a_metric_that_is_zero_with_stock_code_is_kept_or_infinitely_worse(
    other: list[float], higher_is_better: bool, worse: float, end: float
) -> None:
    metric = metric_of({"stock": [0.0] * 8, "other": other}, higher_is_better=higher_is_better)
    result = compare_metric(metric, lambda: "stock", lambda: "other")
    assert result.stock == 0
    assert result.bundle == pytest.approx(sum(other) / 8)
    assert (result.worse_by, result.worse_by_high, result.passed) == (worse, end, end <= 0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_metric_that_is_seldom_other_than_zero_has_no_interval_of_nan() -> None:
    """A third of the resamples hold none of stock's one error."""
    samples = {"stock": [1.0] + [0.0] * 39, "same": [1.0] + [0.0] * 39, "two": [1.0, 1.0] + [0.0] * 38, "none": [0.0] * 40}
    ends = {name: compare_metric(metric_of(samples), lambda: "stock", lambda own=name: own) for name in samples}
    assert {name: (result.worse_by, result.worse_by_high, result.passed) for name, result in ends.items()} == {
        "stock": (0, 0, True), "same": (0, 0, True), "two": (1, math.inf, False), "none": (-1, 0, True),
    }  # fmt: skip


GATED = Path(__file__).parents[1] / "data" / "gated.yaml"


def bundle(**options: bool) -> Bundle:
    environment = current_environment("cpu", torch.get_num_threads())
    return Bundle(name="x", created="", version="", environment=environment, entries=(), graph_options=options)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """broken(when, num): inputs of so many rows do not compile with a bundle, or do not run."""

    def compiled(when: str, rows: int) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise AssertionError("expected size 8==8, stride 1==8 at dim=0")

        def backend(self: BundleBackend, gm: Any, inputs: Any, **_: Any) -> Any:
            if not any(isinstance(x, torch.Tensor) and x.shape[:-1] == (rows,) for x in inputs):
                return gm.forward
            return fail() if when == "compile" else fail

        return backend

    return lambda when, rows: monkeypatch.setattr(BundleBackend, "__call__", compiled(when, rows))


@pytest.mark.parametrize("when", ["compile", "run"])
def test_what_does_not_run_with_the_bundle_is_the_bundles_fault(broken: Callable[[str, int], None], when: str) -> None:
    """Of whatever class: the stage that asked takes a WorkerError for a failed check, anything else ends the run."""
    torch.compiler.reset()
    loaded = load_experiment(GATED)
    broken(when, 1)
    with pytest.raises(WorkerError, match=r"^scenario one does not run with the bundle: .*expected size 8==8, stride 1==8"):
        check_model(loaded, bundle(), "cpu", 0)
    assert check_metric(loaded, bundle(), JobTurns("cpu"), 0).passed, "which has four rows"
    torch.compiler.reset()
    broken(when, 4)
    for check in (lambda: check_metric(loaded, bundle(), JobTurns("cpu"), 0), lambda: _eval_alone(loaded)):
        with pytest.raises(WorkerError, match=r"^the metric does not run with the bundle: .*expected size 8==8"):
            check()


def _eval_alone(loaded: LoadedExperiment) -> object:
    """The whole job on a CPU, of a scenario that runs."""
    scenarios = {"one": loaded.experiment.scenarios["one"]}
    one = loaded.model_copy(update={"experiment": loaded.experiment.model_copy(update={"scenarios": scenarios})})
    return check_model(one, bundle(), "cpu", 0)


def test_options_that_this_torch_has_not_are_the_bundles_fault() -> None:
    loaded = load_experiment(GATED)
    with pytest.raises(WorkerError, match=r"^scenario one does not run with the bundle: NotImplementedError: torch .* no_such"):
        check_model(loaded, bundle(no_such_option=True), "cpu", 0)
    with pytest.raises(WorkerError, match=r"^the metric does not run with the bundle: "):
        check_metric(loaded, bundle(no_such_option=True), JobTurns("cpu"), 0)


def test_a_metric_that_fails_with_stock_code_is_its_own_fault(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(
        GATED.with_suffix(".py").read_text() + "\n\ndef fails(forward):\n    return forward(1)\n"
    )
    (tmp_path / "x.yaml").write_text(GATED.read_text().replace("gated.py:mean_square", "gated.py:fails"))
    with pytest.raises(WorkloadError, match=r"gated.py:fails failed at "):
        check_metric(load_experiment(tmp_path / "x.yaml"), bundle(), JobTurns("cpu"), 0)


def test_an_experiment_whose_metric_counts_no_errors_is_validated(tmp_path: Path) -> None:
    counts = "\n\ndef errors(forward):\n    return [float((~forward(torch.ones(4, 256).bfloat16()).isfinite()).sum())]\n"
    (tmp_path / "gated.py").write_text(GATED.with_suffix(".py").read_text() + counts)
    (tmp_path / "x.yaml").write_text(GATED.read_text().replace("gated.py:mean_square", "gated.py:errors"))
    result = check_metric(load_experiment(tmp_path / "x.yaml"), bundle(), JobTurns("cpu"), 0)
    assert (result.stock, result.bundle, result.worse_by_high, result.passed) == (0, 0, 0, True)


@pytest.mark.slow
def test_a_bundle_that_changes_nothing_passes(tmp_path: Path) -> None:
    overrides = ("scenarios.prefill.length=64", "scenarios.decode-b1.context=16", "validation.eval.length=64",
                 "validation.eval.max_bytes=8192")  # fmt: skip
    loaded = load_experiment(QUICKSTART, overrides)
    scenarios = {name: loaded.experiment.scenarios[name] for name in ("prefill", "decode-b1")}
    loaded = loaded.model_copy(update={"experiment": loaded.experiment.model_copy(update={"scenarios": scenarios})})
    verdict, (result,) = check_model(loaded, bundle(), "cpu", seed=0)
    assert verdict.passed, verdict.failures
    assert {check.name.split(":")[0] for check in verdict.checks} == {"prefill", "decode-b1", "top-1 disagreement"}
    assert result.num_samples == 128
    assert abs(result.worse_by) < 0.01
