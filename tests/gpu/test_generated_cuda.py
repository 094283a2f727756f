"""Generated kernels on the card: regions of models right by the error budget, timed against stock, captured and replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.generated_problems import PROGRAMS, WHOLE_ROWS, D, problem
from torch.nn import functional

from autokernel.environment import current_environment
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.roofline import Ceilings, measure_ceilings
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.kernels.launch import run as launch
from autokernel.kernels.plans import plan_of
from autokernel.ops.generated import Generated
from autokernel.ops.program import run
from autokernel.records import Candidate, ConfigValue, Problem, Status
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return measure_ceilings("cuda", dtypes=("bfloat16", "float32"), budget_s=1.0)


def default(case: Problem) -> dict[str, ConfigValue]:
    card = torch.cuda.get_device_properties(0)
    facts = DeviceFacts(
        device="cuda", isa=f"sm_{card.major}{card.minor}", device_name=card.name, l2_bytes=card.L2_cache_size,
        smem_bytes=232448, num_units=card.multi_processor_count,
    )  # fmt: skip
    config = load_space("generated")["triton"].default(names_for(Generated().dims(case), facts))
    assert config is not None
    return config


SIZES = [(name, m) for name in PROGRAMS for m in ((1024, 1970) if name in WHOLE_ROWS else (1, 16, 64))]


@pytest.mark.parametrize(("name", "m"), SIZES)
def test_regions_of_models_pass_every_check(name: str, m: int, ceilings: Ceilings, record_property: Any) -> None:
    case, times = problem(name, m), {}
    ours = default(case)
    if ours.get("precision") == "tf32x3":  # whether three products are exact enough is for the budget to say: not for this test
        ours = {**ours, "precision": "ieee"}
    for backend, config in (("aten", {"implementation": "stock"}), ("triton", ours)):
        candidate = Candidate(problem=case, backend=backend, config=config)
        result = EvaluateCandidate(candidate=candidate, ceilings=ceilings, max_copies=4)()
        assert result.status is Status.OK, f"{candidate.label}: {result.message} {result.verdict}"
        assert result.measurement is not None
        times[backend] = result.measurement.median_us
    record_property("us", times)
    if name not in WHOLE_ROWS:  # whether anything is gained by those is for the search to find
        assert times["triton"] < 3 * times["aten"], f"the untuned default is not absurd: {times}"


@pytest.mark.parametrize("mode", ["rows", "swap"])
def test_programs_that_share_a_tile_leave_zero_counters_and_the_same_bits(mode: str) -> None:
    case = problem("norm_qkv", 16)
    config = {**default(case), "mode": mode, "split_k": 4}
    plan = plan_of(case, config)
    torch.manual_seed(0)
    inputs = [torch.randn(s.shape, device="cuda", dtype=torch.bfloat16) * s.shape[-1] ** -0.5 for s in case.inputs]
    first = launch(plan, *inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, launch(plan, *inputs), strict=True))
    for out, expected in zip(first, run(case, *[x.double() for x in inputs]), strict=True):
        assert (out.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("m", [1, 37, 197])
@pytest.mark.parametrize(
    "name", ["projection_sum_layer_norm", "relu_down_sum_norm", "scores_softmax", "scores_mask", "softmax_values"]
)
def test_whole_rows_and_batches_are_right_in_both_modes_and_in_parts_of_k(name: str, m: int) -> None:
    case = problem(name, m)
    base = default(problem(name, 1024) if name in WHOLE_ROWS else case)
    torch.manual_seed(0)
    inputs = [torch.randn(s.shape, device="cuda", dtype=getattr(torch, s.dtype)) * s.shape[-1] ** -0.5 for s in case.inputs]
    exact = run(case, *[x.double() for x in inputs])
    limits = [(own.double() - e).norm() / e.norm() for own, e in zip(run(case, *inputs), exact, strict=True)]
    whole = Generated().dims(case)["whole_rows"]
    columns = base["block_n"] if whole else 64
    for mode, block_m, num_warps, split_k in (("rows", 16, 8, 1), ("swap", 16, 8, 2), ("rows", 32, 16, 2), ("swap", 32, 16, 1)):
        sizes = {"block_m": block_m, "block_n": columns, "num_stages": 2, "num_warps": num_warps if whole else 4}
        depth = {"block_k": min(int(base["block_k"]), 32)}
        plan = plan_of(case, {**base, **sizes, **depth, "mode": mode, "split_k": split_k})
        first = launch(plan, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, launch(plan, *inputs), strict=True)), "the same bits"
        for out, expected, limit in zip(first, exact, limits, strict=True):
            assert (out.double() - expected).norm() / expected.norm() < 2 * limit + 1e-6, (mode, block_m, split_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [197, 8192, 50257])
def test_a_softmax_is_a_region_on_the_card_and_right(columns: int, dtype: torch.dtype) -> None:
    regions = []

    def keep(graph: torch.fx.Graph) -> None:
        regions.extend(Generated().match(graph, frozenset(), "cuda"))

    torch.manual_seed(0)
    x = torch.randn(12, columns, device="cuda", dtype=dtype)
    x[1], x[2, 1:5], x[3, 7], x[4, 7] = -torch.inf, -torch.inf, torch.inf, torch.nan
    torch._dynamo.reset()
    with torch.no_grad():
        options = {"post_grad_custom_post_pass": keep, "fx_graph_cache": False}
        torch.compile(lambda x: x.softmax(-1), options=options)(x)
    (region,) = regions
    assert "prepare_softmax_online" in str(region.problem)
    expected = x.double().softmax(-1)
    chosen, limit = default(region.problem), 1e-5 if dtype is torch.float32 else 1e-2
    for block_k in (0, 1024) if columns <= 8192 else (1024, 4096):
        (out,) = launch(plan_of(region.problem, {**chosen, "block_m": 1, "block_k": block_k, "num_warps": 8}), x)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), expected, rtol=limit, atol=1e-9, equal_nan=True)


class Layer(torch.nn.Module):
    """A norm, gate, up and down with the residual: in bf16, as Llama has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(D))
        self.gate, self.up = (torch.nn.Linear(D, 2048, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(2048, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        out: torch.Tensor = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return out


def test_a_bundle_of_generated_regions_is_what_runs_and_replays() -> None:
    torch.manual_seed(0)
    model = Layer().to("cuda", torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(16, 1, D, device="cuda", dtype=torch.bfloat16)
    entries = []

    def keep(graph: torch.fx.Graph) -> None:
        regions = Generated().match(graph, frozenset(), "cuda")
        whole = next(r for r in regions if "rsqrt" in str(r.problem) and "exp" in str(r.problem))
        rest = next(r for r in regions if not r.inner & whole.inner)
        for region in (whole, rest):
            config = {**default(region.problem), "split_k": 2}
            entries.append(Entry(problem=region.problem, backend="triton", config=config))

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, options={"post_grad_custom_post_pass": keep, "fx_graph_cache": False})(x)
        torch._dynamo.reset()
        bundle = Bundle(name="g", created="", version="", environment=current_environment("cuda"), entries=tuple(entries))
        backend = BundleBackend(bundle)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        out, expected = compiled(x), model(x)
        assert [(usage.hits, usage.reasons) for usage in backend.usage().values()] == [(1, []), (1, [])]
        torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(x)
        for _ in range(10):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(captured, model(x), rtol=3e-2, atol=3e-2)
