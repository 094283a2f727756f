"""The backend for kernels of our own says what it takes, and refuses the rest in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autokernel.backends import Refused, get_backend
from autokernel.kernels.config import SkinnyConfig
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

K, N = 4096, 6144
H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232_448, l2_bytes=60 << 20)


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(n: int = N) -> TensorSpec:
    return TensorSpec(shape=(K, n), dtype="bfloat16", stride=(1, K))


MM = Problem(op="mm", inputs=(spec(16, K), weight()), device="cuda", constants=(1,))
ADDMM = Problem(op="addmm", inputs=(spec(N), spec(16, K), weight()), device="cuda", constants=(0, 2))
MERGED = Problem(op="merged_mm", inputs=(spec(16, K), weight(), weight(1024)), device="cuda", constants=(1, 2))
CONFIG: dict[str, ConfigValue] = {"kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}


@pytest.mark.parametrize("problem", [MM, ADDMM, MERGED], ids=lambda problem: problem.op)
def test_it_takes_skinny_products_with_a_linear_layers_weight(problem: Problem) -> None:
    assert get_backend("triton").supports(problem) is None


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(MM, device="cpu"), "not for cpu"),
        (replace(MM, op="bmm"), "for bmm"),
        (replace(MM, inputs=(spec(129, K), weight())), "128 rows, not 129"),
        (replace(MM, inputs=(spec(16, K), spec(K, N))), "nn.Linear"),
        (replace(ADDMM, inputs=(spec(N), spec(16, K), spec(K, N))), "nn.Linear"),
        (replace(MERGED, inputs=(spec(16, K), weight(), spec(K, 1024))), "nn.Linear"),
        (replace(MM, inputs=tuple(replace(s, dtype="float32") for s in MM.inputs)), "not float32"),
    ],
)
def test_what_it_does_not_take_is_said(problem: Problem, reason: str) -> None:
    assert reason in (get_backend("triton").supports(problem) or "")


@pytest.mark.parametrize(
    ("problem", "changes", "reason"),
    [
        (MM, {"kernel": "fat_mm"}, "fat_mm is not known"),
        (MM, {"GROUP_M": 8}, "GROUP_M|group_m"),
        (MM, {"BLOCK_K": 96}, "must divide K"),
        (replace(MERGED, constants=()), {"merge": "concat"}, "no constant input"),
        (replace(MM, device="cpu"), {}, "not for cpu"),
    ],
)
def test_illegal_configs_are_refused(problem: Problem, changes: dict[str, ConfigValue], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        get_backend("triton").build(Candidate(problem=problem, backend="triton", config={**CONFIG, **changes}), [[]])


@pytest.mark.parametrize("op", ["mm", "addmm", "merged_mm"])
@pytest.mark.parametrize("m", [1, 17, 128])
def test_every_config_of_the_space_is_one_that_the_kernel_takes(op: str, m: int) -> None:
    dims = {"m": m, "n": N, "k": K, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}
    bound = load_space(op)["triton"].bind(names_for(dims, H200))
    default = bound.default()
    assert default is not None
    assert not bound.violations(default)
    modes = set()
    for config in bound.enumerate(3000):
        modes.add(config["mode"])
        assert SkinnyConfig.from_entry(config).problem(m, N, K) is None
    assert modes


@pytest.mark.parametrize("changed", [{"m": 129}, {"dtype_bytes": 4}, {"n": 2**20}], ids=str)
def test_there_is_nothing_to_search_for_other_problems(changed: dict[str, int]) -> None:
    dims = {"m": 16, "n": N, "k": K, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0, **changed}
    assert not list(load_space("mm")["triton"].bind(names_for(dims, H200)).enumerate(1))
