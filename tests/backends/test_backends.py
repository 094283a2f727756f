"""Every backend keeps the protocol's promises, and refuses in one sentence what it cannot do."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from autokernel.backends import Backend, Built, Refused, all_backends, get_backend
from autokernel.backends.compiled import expanded
from autokernel.export.bundle import Entry
from autokernel.ops import get_op
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec

M, K, N = 8, 32, 48


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "float32")


def weight(n: int = N) -> TensorSpec:
    return TensorSpec(shape=(K, n), dtype="float32", stride=(1, K))


MM = Problem(op="mm", inputs=(spec(M, K), weight()), device="cpu", constants=(1,))
LOOSE = replace(MM, constants=())
MERGED = Problem(op="merged_mm", inputs=(spec(M, K), weight(), weight()), device="cpu", constants=(1, 2))
UNEQUAL = replace(MERGED, inputs=(spec(M, K), weight(), weight(2 * N)))


def candidate(problem: Problem, backend: str, **config: ConfigValue) -> Candidate:
    return Candidate(problem=problem, backend=backend, config=config)


@pytest.fixture(params=all_backends(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param  # type: ignore[no-any-return]


def test_the_name_finds_it(backend: Backend) -> None:
    assert get_backend(backend.name).name == backend.name


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no backend 'cublas'; there are aten, inductor"):
        get_backend("cublas")


def test_a_missing_device_is_said_with_its_cure(backend: Backend) -> None:
    assert (backend.unavailable("cpu") is None) == (backend.name not in ("triton", "cutedsl"))
    if not torch.cuda.is_available():
        assert "install" in (backend.unavailable("cuda") or "")


def test_an_unknown_op_is_refused_by_name(backend: Backend) -> None:
    assert "sort" in (backend.supports(replace(MM, op="sort")) or "")


def test_the_entry_holds_the_whole_config(backend: Backend) -> None:
    assert backend.export(candidate(MM, backend.name, prepack=True)) == {"prepack": True}


@pytest.mark.parametrize(
    "tried",
    [
        candidate(MM, "aten", prepack=False),
        candidate(MM, "aten", prepack=True),
        candidate(MM, "inductor", template="cpp_gemm"),
        candidate(MERGED, "aten", prepack=False, merge="none"),
        candidate(MERGED, "aten", prepack=True, merge="concat"),
    ],
    ids=lambda tried: f"{tried.problem.op} {tried.label}",
)
def test_built_copies_compute_what_the_op_says(tried: Candidate) -> None:
    problem = tried.problem
    constants = [[torch.randn(K, s.shape[1]).t().contiguous().t() for s in problem.inputs[1:]] for _ in range(2)]
    built: Built = get_backend(tried.backend).build(tried, constants)
    inputs = [torch.randn(M, K) for _ in range(2)]
    expected = [
        out for x, fixed in zip(inputs, constants, strict=True) for out in get_op(problem.op).reference(problem, x, *fixed)
    ]
    assert built.num_copies == 2
    assert built.hits > 0
    torch.testing.assert_close(list(built.run(*inputs)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tried", "reason"),
    [
        (candidate(LOOSE, "aten", prepack=True), "no constant input"),
        (candidate(replace(MM, device="cuda"), "aten", prepack=True), "for a CPU"),
        (candidate(LOOSE, "inductor", template="cpp_gemm"), "no constant input"),
        (candidate(MM, "inductor", template="cpp_gemm", threads_m=7, threads_n=7, threads_k=7), "must multiply to"),
        (candidate(UNEQUAL, "inductor", template="cpp_gemm", merge="grouped"), "equal N"),
    ],
    ids=["unpackable", "packed on a GPU", "template without weight", "factors", "grouped"],
)
def test_illegal_configs_are_refused(tried: Candidate, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        get_backend(tried.backend).build(tried, [[]])


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(MM, op="sort", device="cuda"), "no Triton template for sort"),
        (replace(MM, inputs=tuple(replace(s, dtype="float64") for s in MM.inputs), device="cuda"), "Triton .*, not float64"),
        (LOOSE, "constant weight"),
        (replace(MM, op="baddbmm"), "no C\\+\\+ template"),
        (replace(MM, inputs=tuple(replace(s, dtype="float64") for s in MM.inputs)), "not float64"),
    ],
    ids=["op on a GPU", "dtype on a GPU", "no weight", "op", "dtype"],
)
def test_inductor_says_what_it_cannot_serve(problem: Problem, reason: str) -> None:
    assert re.search(reason, get_backend("inductor").supports(problem) or "")


def test_products_that_stay_apart_are_entries_of_their_own() -> None:
    entries = expanded(Entry(problem=UNEQUAL, backend="aten", config={"prepack": True, "merge": "none"}))
    assert [(entry.problem.op, entry.problem.inputs[1].shape[1], dict(entry.config)) for entry in entries] == [
        ("mm", N, {"prepack": True}),
        ("mm", 2 * N, {"prepack": True}),
    ]


TILE: dict[str, ConfigValue] = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_stages": 2, "num_warps": 4, "GROUP_M": 8,
}  # fmt: skip
ON_GPU = replace(MM, device="cuda")
ROW_MAJOR = replace(ON_GPU, inputs=(spec(1, 32), spec(32, N)))
UNALIGNED = replace(ON_GPU, inputs=(spec(M, 33), TensorSpec(shape=(33, N), dtype="float32", stride=(1, 33))))


@pytest.mark.parametrize(
    ("tried", "reason"),
    [
        (candidate(ON_GPU, "inductor", template="cpp_gemm"), "mm, mm_persistent_tma, decompose_k, reduction, which are for mm"),
        (candidate(replace(MERGED, device="cuda"), "inductor", template="decompose_k", k_split=2), "which are for merged_mm"),
        (
            candidate(ON_GPU, "inductor", template="mm", BLOCK_M=16),
            "BLOCK_N, BLOCK_K, num_stages, num_warps, GROUP_M is missing",
        ),
        (candidate(ON_GPU, "inductor", template="decompose_k", k_split=5), "5 does not divide 32"),
        (candidate(ON_GPU, "inductor", template="reduction"), "products of one row; this one has"),
        (candidate(ROW_MAJOR, "inductor", template="reduction"), "K that is contiguous"),
        (candidate(UNALIGNED, "inductor", template="mm_persistent_tma", **TILE), "the left matrix has rows of 33 float32"),
        (
            candidate(replace(MERGED, device="cuda", constants=()), "inductor", template="mm", merge="concat", **TILE),
            "no constant input",
        ),
    ],
    ids=["template", "template of another op", "field", "split", "rows", "layout", "alignment", "merging what changes"],
)
def test_illegal_templates_are_refused(tried: Candidate, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        get_backend(tried.backend).build(tried, [[]])


@pytest.mark.parametrize("op", ["mm", "addmm", "bmm", "baddbmm", "merged_mm"])
def test_every_product_may_have_templates_on_a_gpu(op: str) -> None:
    assert get_backend("inductor").supports(replace(MM, op=op, device="cuda")) is None
