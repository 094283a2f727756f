"""Products of 8 bits on a GPU: references, budgets, ceilings, stock candidates, and a model of quantized layers profiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autokernel.config import load_experiment
from autokernel.evaluate.budget import expected_outputs
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.probes import DRAWS, make_inputs
from autokernel.evaluate.roofline import EIGHT_BIT_DTYPES, Ceilings, measure_ceilings
from autokernel.export.matching import gemm_of
from autokernel.export.templates import gemm_of_node
from autokernel.ops import get_op
from autokernel.profiling.capture import capture
from autokernel.profiling.hotspots import rank
from autokernel.profiling.workload import build_scenario, load_model
from autokernel.records import Candidate, Problem, Status, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("torch._scaled_mm by rows needs compute capability 9.0", allow_module_level=True)

MODEL = Path(__file__).parents[1] / "data" / "quantized.yaml"


def scaled(
    m: int = 64, n: int = 4096, k: int = 4096, *, left: str = "float8_e4m3fn", rows: bool = False, bias: bool = False,
    out: str = "bfloat16", fast: bool = False, epilogue: tuple[str, ...] = (),
) -> Problem:  # fmt: skip
    inputs = [
        TensorSpec.contiguous((m, k), left),
        TensorSpec(shape=(k, n), dtype="float8_e4m3fn", stride=(1, k)),
        *(TensorSpec.contiguous(shape, "float32") for shape in (((m, 1), (1, n)) if rows else ((), ()))),
        *([TensorSpec.contiguous((n,), out)] if bias else []),
        *([TensorSpec.contiguous((m, n), out)] if "add" in epilogue else []),
    ]
    return Problem(
        op="scaled_mm", inputs=tuple(inputs), device="cuda", constants=(1, 3, 4) if bias else (1, 3),
        scalars=(("out_dtype", out), ("use_fast_accum", fast)), epilogue=epilogue,
    )  # fmt: skip


def integer(m: int = 64, n: int = 4096, k: int = 4096) -> Problem:
    inputs = (TensorSpec.contiguous((m, k), "int8"), TensorSpec(shape=(k, n), dtype="int8", stride=(1, k)))
    return Problem(op="int_mm", inputs=inputs, device="cuda", constants=(1,))


CASES = {
    "tensor-wise": scaled(),
    "tensor-wise, fast": scaled(fast=True),
    "tensor-wise, bias": scaled(bias=True),
    "tensor-wise, to fp16": scaled(out="float16"),
    "tensor-wise, to fp32": scaled(out="float32"),
    "e5m2": scaled(left="float8_e5m2"),
    "row-wise": scaled(rows=True),
    "row-wise, fast": scaled(rows=True, fast=True),
    "row-wise, bias": scaled(rows=True, bias=True),
    "row-wise, one row": scaled(1, rows=True),
    "row-wise, what follows": scaled(rows=True, fast=True, epilogue=("silu", "add")),
}


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return measure_ceilings("cuda", dtypes=("bfloat16", *EIGHT_BIT_DTYPES, "float8_e5m2"), budget_s=2.0)


def test_peaks_of_8_bits_are_measured_and_higher(ceilings: Ceilings) -> None:
    assert set(ceilings.tflops) == {"bfloat16", *EIGHT_BIT_DTYPES, "float8_e5m2"}, dict(ceilings.tflops)
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        assert ceilings.tflops[dtype] > 1.2 * ceilings.tflops["bfloat16"], dict(ceilings.tflops)
    assert ceilings.tflops["int8"] > 0.5 * ceilings.tflops["bfloat16"], dict(ceilings.tflops)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_librarys_product_and_near_its_definition(name: str, draw: str) -> None:
    problem = CASES[name]
    inputs = make_inputs(problem, 1, draw, scale=4.0 if draw == "large" else None)
    (expected,) = expected_outputs(get_op("scaled_mm"), problem, inputs)
    assert expected.dtype == getattr(torch, str(dict(problem.scalars)["out_dtype"]))
    # twice the library's own error: sums in few bits are some permille off, more where they cancel
    assert expected.limit_norm < (0.2 if draw == "cancellation" else 0.02), expected.limit_norm
    if draw not in ("nonfinite", "large"):
        assert expected.classes is None


@pytest.mark.parametrize("draw", DRAWS)
def test_integers_are_exact(draw: str) -> None:
    problem = integer(64, 256, 512)
    x, w = make_inputs(problem, 1, draw)
    (out,) = get_op("int_mm").reference(problem, x, w)
    assert out.dtype == torch.int32
    assert torch.equal(out.double(), x.double() @ w.double())


@pytest.mark.parametrize("name", [*CASES, "integer"])
def test_stock_is_a_candidate(name: str, ceilings: Ceilings) -> None:
    problem = integer() if name == "integer" else CASES[name]
    candidate = Candidate(problem=problem, backend="aten", config={"prepack": False})
    result = EvaluateCandidate(candidate=candidate, ceilings=ceilings, max_copies=8)()
    assert result.status is Status.OK, result.message + result.log_tail
    assert result.measurement is not None
    assert result.verdict is not None
    assert any(check.name == "physics" for check in result.verdict.checks)


def test_a_large_prefill_is_within_the_ceilings(ceilings: Ceilings) -> None:
    candidate = Candidate(problem=scaled(8192, 8192, 8192, fast=True), backend="aten", config={"prepack": False})
    result = EvaluateCandidate(candidate=candidate, ceilings=ceilings, max_copies=2)()
    assert result.status is Status.OK, result.message + result.log_tail


def test_a_model_of_quantized_layers_is_profiled(ceilings: Ceilings) -> None:
    loaded = load_experiment(MODEL, ("device=cuda",))
    model = load_model(loaded, "cuda")
    program = build_scenario(model, loaded.experiment.scenarios["rows"], "rows", 0, "cuda", "bfloat16", loaded=loaded)
    captured = capture(program, "cuda", budget_s=0.2)
    products = [site.problem for site in captured.sites if site.problem.op != "generated"]
    assert sorted(problem.op for problem in products) == ["int_mm", "mm", "scaled_mm", "scaled_mm"], captured.graph
    # programs of their own: the largest values of rows, and what makes bf16 of integers in front of the last product
    assert len(captured.sites) == len(products) + 2, [site.problem for site in captured.sites]
    assert all(captured.call_us[problem.key] > 0 for problem in products), dict(captured.call_us)
    assert {hotspot.problem.op for hotspot in rank([captured], ceilings)} == {"int_mm", "mm", "scaled_mm", "generated"}


def test_products_in_the_graph_of_a_gpu_are_those_of_their_problems() -> None:
    from torch._inductor.compile_fx import compile_fx

    seen = []

    def look(graph: torch.fx.Graph) -> None:
        seen.extend(gemm for node in graph.nodes if (gemm := gemm_of_node(node)) is not None)

    problems = [scaled(rows=True, bias=True), scaled(), scaled(fast=True, epilogue=("silu",)), integer()]
    for problem in problems:
        torch._dynamo.reset()

        def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            return compile_fx(gm, inputs, config_patches={"post_grad_custom_post_pass": look, "fx_graph_cache": False})

        op = get_op(problem.op)
        compiled = torch.compile(
            lambda *inputs, op=op, problem=problem: op.reference(problem, *inputs),
            backend=backend,
            fullgraph=True,
            dynamic=False,
        )
        with torch.no_grad():
            compiled(*make_inputs(problem, 0))
    assert seen == [gemm_of(problem) for problem in problems]
