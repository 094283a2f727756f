"""A norm and the linear layers behind it in one kernel on the card: within the error budget, at extremes, and in a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from autokernel.environment import current_environment
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.kernels.launch import run
from autokernel.kernels.plans import plan_of
from autokernel.ops import FusionOp, get_op
from autokernel.records import Candidate, ConfigValue, Problem, Status, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

Config = Mapping[str, ConfigValue]
SWAP: Config = {
    "kernel": "rms_norm_linear", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "one_pass": True, "split_k": 1,
    "num_warps": 4, "num_stages": 4,
}  # fmt: skip
ROWS: Config = {**SWAP, "mode": "rows", "BLOCK_M": 64}
VECTOR: Config = {**SWAP, "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 4, "BLOCK_K": 1024, "num_stages": 2}
TWICE: Config = {"one_pass": False, "block_s": 256}
FP32: Config = {"BLOCK_K": 32, "num_stages": 3, "precision": "tf32x3"}
QKV, GATE_UP, HEAD = (4096, 1024, 1024), (14336, 14336), (128256,)


def problem(
    rows: tuple[int, ...],
    columns: tuple[int, ...] = QKV,
    k: int = 4096,
    *,
    dtype: str = "bfloat16",
    bias: str = "000",
    late: bool = False,
    along_k: bool = True,
) -> Problem:
    inputs = [TensorSpec.contiguous((*rows, k), dtype), TensorSpec.contiguous((k,), dtype)]
    inputs += [TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k) if along_k else (n, 1)) for n in columns]
    inputs += [TensorSpec.contiguous((n,), dtype) for n, there in zip(columns, bias, strict=False) if there == "1"]
    several = len(columns) > 1
    said: ConfigValue = bias[: len(columns)] if several else bias[0] == "1"
    return Problem(
        op="rms_norm_qkv" if several else "rms_norm_linear",
        inputs=tuple(inputs),
        device="cuda",
        constants=tuple(range(1, len(inputs))),
        scalars=(("bias", said), *((("rounded", "late"),) if late else ()), ("eps", 1e-5)),
    )


CASES: Mapping[str, tuple[Problem, Config]] = {
    "one row": (problem((1, 1)), VECTOR),
    "one row, read twice": (problem((1, 1)), {**VECTOR, **TWICE}),
    "one row, parts of K": (problem((1,), GATE_UP), {**VECTOR, "split_k": 2}),
    "one row, the head": (problem((1, 1), HEAD), VECTOR),
    "one row, fp16, biases": (problem((1,), dtype="float16", bias="011"), VECTOR),
    "16 rows": (problem((16, 1)), {**SWAP, "split_k": 2}),
    "16 rows, read twice": (problem((16, 1), GATE_UP), {**SWAP, **TWICE}),
    "16 rows, rounded late, columns next to each other": (problem((16,), (4096, 4096), late=True, along_k=False), SWAP),
    "16 rows, rounded late, read twice": (problem((16,), late=True), {**SWAP, **TWICE}),
    "5 rows, the head, fp16": (problem((5, 1), HEAD, dtype="float16"), SWAP),
    "64 rows": (problem((64, 1)), {**ROWS, "split_k": 4}),
    "64 rows, read twice": (problem((64, 1), bias="111"), {**ROWS, **TWICE, "num_warps": 8}),
    "128 rows": (problem((2, 64), GATE_UP), {**ROWS, "BLOCK_M": 128, "num_warps": 8, "num_stages": 3}),
    "ragged": (problem((3, 7), (136, 72), 200, dtype="float16", bias="01"), {**ROWS, "BLOCK_M": 32, "num_stages": 3}),
    "chronos-2": (problem((1, 37), (768, 768, 768), 768, dtype="float32"), {**ROWS, **FP32, "split_k": 6}),
    "chronos-2, read twice": (problem((1, 37), (768, 768, 768), 768, dtype="float32"), {**ROWS, **FP32, **TWICE}),
    "fp32, vector units": (problem((5,), (768,), 768, dtype="float32"), {**SWAP, **FP32, "precision": "ieee", "mode": "rows"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_within_the_budget(name: str) -> None:
    """Of six draws: large rows, tiny ones and rows of zeros are among them."""
    found, config = CASES[name]
    evaluation = EvaluateCandidate(candidate=Candidate(problem=found, backend="triton", config=config), max_copies=4)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"
    assert evaluation.deterministic


@pytest.mark.parametrize("columns", [QKV, HEAD])
def test_stock_code_is_within_the_budget(columns: tuple[int, ...]) -> None:
    candidate = Candidate(problem=problem((16, 1), columns), backend="aten", config={"implementation": "stock"})
    evaluation = EvaluateCandidate(candidate=candidate, max_copies=4)()
    assert evaluation.status is Status.OK, f"{evaluation.status}: {evaluation.message}"


def drawn(found: Problem) -> list[torch.Tensor]:
    torch.manual_seed(0)
    draws = [torch.randn(spec.shape, device="cuda") for spec in found.inputs]
    draws[1] = draws[1].abs() * 2  # products of x and the norm's weight are larger than either
    return [
        torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device="cuda").copy_(
            draw / spec.shape[0] ** 0.5 if len(spec.shape) == 2 and i > 1 else draw
        )
        for i, (spec, draw) in enumerate(zip(found.inputs, draws, strict=True))
    ]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float16", 6e4), ("float16", 3e-6), ("bfloat16", 3e38), ("bfloat16", 1e18), ("bfloat16", 1e-30), ("float32", 1e25)],
)
@pytest.mark.parametrize(
    ("rows", "config"), [((1,), VECTOR), ((5,), SWAP), ((5,), {**SWAP, "split_k": 3}), ((40,), ROWS), ((5,), {**SWAP, **TWICE})]
)
def test_rows_of_any_size_beside_others(rows: tuple[int, ...], config: Config, dtype: str, size: float) -> None:
    """A row whose products do not fit is multiplied as spelled; the other rows have the bits that they have without it."""
    found = problem(rows, (256, 64), 1024, dtype=dtype)
    plan = plan_of(found, {**config, **(FP32 if dtype == "float32" and config is not VECTOR else {})})
    inputs, op = drawn(found), get_op(found.op)
    before = run(plan, *inputs)
    inputs[0][0] = inputs[0][0].sign() * size
    behind, again = run(plan, *inputs), run(plan, *inputs)
    own, exact = op.reference(found, *inputs), op.reference(found, *(x.double() for x in inputs))
    for at, (was, out, same, mine, want) in enumerate(zip(before, behind, again, own, exact, strict=True)):
        assert torch.equal(out, same), at
        assert torch.equal(out[1:], was[1:]), at
        assert torch.equal(out.isnan(), mine.isnan()), at
        limit = 2 * (mine[0].double() - want[0]).norm() + torch.finfo(mine.dtype).eps * want[0].norm()
        assert float((out[0].double() - want[0]).norm()) <= float(limit), at


def test_inputs_in_other_strides() -> None:
    """x with its dimensions in another order, the norm's weight and a bias with holes."""
    found = problem((4, 3), (256, 64), 512, bias="10")
    x = TensorSpec(shape=(4, 3, 512), dtype="bfloat16", stride=(1024, 4096, 1))
    holes = [TensorSpec(shape=spec.shape, dtype="bfloat16", stride=(2,)) for spec in (found.inputs[1], found.inputs[4])]
    found = Problem(
        op=found.op, inputs=(x, holes[0], *found.inputs[2:4], holes[1]), device="cuda", scalars=found.scalars
    )  # fmt: skip
    inputs = drawn(found)
    for config in (SWAP, {**ROWS, "BLOCK_M": 16, "split_k": 2}, {**SWAP, **TWICE}):
        for out, want in zip(run(plan_of(found, config), *inputs), get_op(found.op).reference(found, *inputs), strict=True):
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


K = 512


class Layers(torch.nn.Module):
    """Twice a norm with three layers behind it, and at the end one with one layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gains = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(K) + 0.5) for _ in range(3)])
        parts = [torch.nn.ModuleList([torch.nn.Linear(K, n, bias=bias) for n in (K, 128, 128)]) for _ in range(2)]
        self.parts, self.head = torch.nn.ModuleList(parts), torch.nn.Linear(K, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gain, part in zip(self.gains, self.parts, strict=False):
            normed = self.norm(x, gain)
            q, k, v = (layer(normed) for layer in part)
            x = x + q * torch.tanh(k).mean(-1, keepdim=True) * torch.sigmoid(v).mean(-1, keepdim=True)
        result: torch.Tensor = self.head(self.norm(x, self.gains[2]))
        return result

    @staticmethod
    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def entries_of(model: torch.nn.Module, x: torch.Tensor, config: Config) -> tuple[Entry, ...]:
    """Entries for what both ops find in the graph that Inductor makes on this device."""
    found: dict[str, Problem] = {}

    def keep(graph: torch.fx.Graph) -> None:
        for name in ("rms_norm_qkv", "rms_norm_linear"):
            op = get_op(name)
            assert isinstance(op, FusionOp)
            found.update({region.problem.key: region.problem for region in op.match(graph, frozenset(), "cuda")})

    torch._dynamo.reset()
    torch.compile(model, options={"post_grad_custom_post_pass": keep, "fx_graph_cache": False})(x)
    return tuple(Entry(problem=problem, backend="triton", config=config) for problem in found.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "config", "options"),
    [
        ((1, 1), {**VECTOR, "BLOCK_K": 512, "num_stages": 1}, {}),
        ((1, 1), {**VECTOR, "BLOCK_K": 512, "num_stages": 1}, {"pdl": True}),
        ((16, 1), {**SWAP, "split_k": 2}, {}),
        ((16, 1), {**SWAP, "split_k": 2}, {"pdl": "all"}),
        ((2, 32), ROWS, {}),
    ],
)
def test_a_model_with_a_bundle_runs_the_kernel(
    rows: tuple[int, ...], config: Config, options: dict[str, ConfigValue], bias: bool
) -> None:
    torch.manual_seed(0)
    model = Layers(bias).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(*rows, K, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        entries = entries_of(model, x, config)
        assert sorted(entry.problem.op for entry in entries) == ["rms_norm_linear", "rms_norm_qkv"]
        bundle = Bundle(
            name="n", created="", version="", environment=current_environment("cuda"), entries=entries, graph_options=options
        )  # fmt: skip
        backend = BundleBackend(bundle)
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        found = [compiled(x) for _ in range(3)]
        exact = Layers(bias).to("cuda").eval()
        exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
        own, want = model(x), exact(x.float())
    usage = {key: (used.hits, used.reasons) for key, used in backend.usage().items()}
    assert sorted(usage.values()) == [(1, []), (2, [])]
    assert all(torch.equal(out, found[0]) for out in found)
    assert float((found[0].float() - want).norm()) <= 2 * float((own.float() - want).norm())
