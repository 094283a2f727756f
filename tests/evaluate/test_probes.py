"""Inputs have the layout they should, are reproducible, and do what their draw says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autokernel.evaluate import probes
from autokernel.evaluate.budget import errors_of, expected_outputs
from autokernel.evaluate.caches import cache_bytes, cpu_cache_bytes, last_level_bytes
from autokernel.evaluate.probes import (
    DRAWS,
    derived_seed,
    draw_scale,
    is_cold,
    join,
    make_constants,
    make_inputs,
    make_variables,
    num_copies_for,
)
from autokernel.evaluate.tensors import bytes_of
from autokernel.ops import get_op
from autokernel.records import DTYPE_BYTES, Problem, TensorSpec


def problem_of(*specs: TensorSpec, constants: tuple[int, ...] = ()) -> Problem:
    return Problem(op="any", inputs=specs, device="cpu", constants=constants)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    draw=st.sampled_from(DRAWS),
    broadcast=st.booleans(),
    gap=st.integers(0, 3),
)
def test_layout_is_exact(shape: list[int], order: Any, dtype: str, draw: str, broadcast: bool, gap: int) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)
    stride, step = [0] * len(shape), 1
    for d in dims:
        stride[d], step = step, step * shape[d] + gap
    if broadcast and shape:
        stride[dims[0]] = 0
    spec = TensorSpec(shape=tuple(shape), dtype=dtype, stride=tuple(stride))
    (tensor,) = make_inputs(problem_of(spec), 3, draw)
    assert tuple(tensor.shape) == spec.shape
    assert tensor.stride() == spec.stride
    assert tensor.dtype == getattr(torch, dtype)
    (again,) = make_inputs(problem_of(spec), 3, draw)
    assert torch.equal(bytes_of(tensor), bytes_of(again))


def test_gaps_hold_nan_and_elements_do_not() -> None:
    (tensor,) = make_inputs(problem_of(TensorSpec(shape=(3, 4), dtype="float32", stride=(10, 1))), 0)
    assert torch.isfinite(tensor).all()
    assert bytes_of(tensor).view(torch.float32).isnan().sum() == 2 * 6


def test_draws_vary_the_inputs_and_leave_the_constants_alone(linear: Any) -> None:
    problem = linear(m=16, k=64, n=32)
    made = {draw: make_inputs(problem, 5, draw) for draw in DRAWS}
    assert all(torch.equal(made[draw][1], made["model"][1]) for draw in DRAWS)
    x = {draw: tensors[0] for draw, tensors in made.items()}
    assert 0.8 < x["model"].std() < 1.2
    assert x["large"].abs().median() > 1e4
    assert 0 < x["tiny"].abs().median() < 1e-8
    assert (x["zero_rows"] == 0).all(dim=1).sum() == 8
    assert x["nonfinite"].isnan().sum() == 1
    assert x["nonfinite"].isinf().sum() == 2
    assert ((~x["nonfinite"].isfinite()).any(dim=1)).sum() == 3
    assert made["model"][1].std() == pytest.approx(1 / 8, rel=0.2)
    with pytest.raises(ValueError, match="not one of"):
        make_inputs(problem, 5, "tidy")


def test_cancellation_cancels_on_the_first_copy(linear: Any) -> None:
    problem = linear(m=16, k=64, n=32)
    first, second = (c[0] for c in make_constants(problem, 1, 2))
    (x,) = make_variables(problem, 1, "cancellation")
    partial = (x[:, :32] @ first[:, :32].t()).std()
    assert (x @ first.t()).std() < partial / 8
    assert (x @ second.t()).std() > partial / 2  # an unpaired weight does not cancel


def test_seeds_differ_by_copy_draw_and_position(linear: Any) -> None:
    problem = linear()
    constants = make_constants(problem, 1, 4)
    assert len({float(c[0].sum()) for c in constants}) == 4
    assert not torch.equal(make_variables(problem, 1)[0], make_variables(problem, 2)[0])
    assert derived_seed(1, "ab") != derived_seed(1, "a", "b")


def test_join_puts_constants_where_they_belong() -> None:
    spec = TensorSpec.contiguous((1,), "float32")
    problem = problem_of(spec, spec, spec, spec, constants=(0, 2))
    a, b, c, d = (torch.tensor([float(i)]) for i in range(4))
    assert [float(x) for x in join(problem, [b, d], [a, c])] == [0, 1, 2, 3]


def test_integers_stay_in_range() -> None:
    table, index = TensorSpec.contiguous((7, 4), "float32"), TensorSpec.contiguous((1000,), "int64")
    for draw in DRAWS:
        ids = make_inputs(problem_of(table, index, constants=(0,)), 0, draw)[1]
        assert ids.min() >= 0
        assert ids.max() <= 6
    small = problem_of(TensorSpec.contiguous((1000,), "int8"))
    assert set(make_inputs(small, 0, "large")[0].tolist()) == {-128, 127}


def test_narrow_dtypes_are_scaled_less(linear: Any) -> None:
    assert draw_scale(linear("float16"), "large") < draw_scale(linear("bfloat16"), "large")
    assert draw_scale(linear("float16"), "tiny") > draw_scale(linear("bfloat16"), "tiny")


def test_copies_exceed_twice_the_cache_within_bounds(linear: Any) -> None:
    problem = linear(m=1, k=1024, n=1024)  # 4 MiB and a bit
    mib = 1 << 20
    assert num_copies_for(problem, 2 * mib) == 2
    copies = num_copies_for(problem, 10 * mib)
    assert copies == 5
    assert is_cold(problem, copies, 10 * mib)
    assert not is_cold(problem, 2, 10 * mib)
    assert num_copies_for(linear(m=1, k=8, n=8), 10 * mib) == 32
    assert num_copies_for(problem, 1000 * mib, limit=8) == 8
    assert num_copies_for(problem, 1000 * mib, memory_bytes=13 * mib) == 3
    with pytest.raises(ValueError, match="must fit"):
        num_copies_for(problem, memory_bytes=5 * mib)


@pytest.mark.parametrize("siblings", ["0-1 2-3 4-5 6-7", "0,4 1,5 2,6 3,7"])
def test_threads_may_use_any_cores_cache(siblings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores of two hyper-threads each, numbered in either way; the last one has twice the cache."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for number, shared in enumerate(siblings.split()):
        first, last = int(shared[0]), int(shared[-1])
        for core in (first, last):
            folder = tmp_path / f"cpu{core}" / "cache" / "index2"
            folder.mkdir(parents=True)
            size = "2048K" if number == 3 else "1M"
            for name, value in (("level", 2), ("type", "Unified"), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    assert [cpu_cache_bytes(2, n, tmp_path) >> 20 for n in (1, 2, 3, 4, 8, None)] == [2, 3, 4, 5, 5, 5]


def test_caches_are_counted_once(tmp_path: Path) -> None:
    for core in range(4):
        for index, (level, kind, size, shared) in enumerate(
            (
                (1, "Data", "32K", str(core)),
                (1, "Instruction", "32K", str(core)),
                (2, "Unified", "1M", str(core)),
                (3, "Unified", "8192K", "0-3"),
            )
        ):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    assert cpu_cache_bytes(2, 1, tmp_path) == 1 << 20
    assert cpu_cache_bytes(3, 2, tmp_path) == 8 << 20
    assert cpu_cache_bytes(1, 1, tmp_path) == 32 << 10
    assert cpu_cache_bytes(4, 1, tmp_path) == 0
    assert cpu_cache_bytes(2, 1, tmp_path / "none") > 0
    assert cache_bytes("cpu", 1) > 0
    assert last_level_bytes("cpu") >= cache_bytes("cpu", 1)


def test_a_few_copies_do_on_a_gpu_where_all_lie_in_the_cache(linear: Any) -> None:
    mib = 1 << 20
    small = replace(linear(m=1, k=128, n=128), device="cuda")  # 66 KB
    each = sum(spec.num_bytes for spec in small.inputs)
    assert num_copies_for(small, 60 * mib, memory_bytes=mib * 1000) == 12
    assert num_copies_for(small, 60 * mib, limit=8, memory_bytes=mib * 1000) == 8
    assert num_copies_for(small, 2 * 32 * each - 1, memory_bytes=mib * 1000) == 32, "they fill more than half of it"
    assert num_copies_for(replace(small, device="cpu"), 60 * mib, memory_bytes=mib * 1000) == 32


def test_a_large_copy_is_cold_alone_on_a_gpu(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    large = replace(linear(m=1024, k=1024, n=2048), device="cuda")  # 12 MiB
    monkeypatch.setattr(probes, "free_bytes", lambda device: 1600 * mib)
    assert num_copies_for(large, 2 * mib) == 1
    assert num_copies_for(replace(large, device="cpu"), 2 * mib) == 2
    assert num_copies_for(large, 3 * mib) == 2
    # many workers share the device: more than what is needed comes out of a 32nd of what is free
    assert num_copies_for(large, 60 * mib) == 4
    monkeypatch.setattr(probes, "free_bytes", lambda device: 100 * mib)
    assert num_copies_for(large, 60 * mib) == 2
    monkeypatch.setattr(probes, "free_bytes", lambda device: 80 * mib)
    with pytest.raises(ValueError, match="2 copies"):
        num_copies_for(large, 60 * mib)


@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_a_mask_hides_some_keys_and_once_all_of_them_from_some_rows(dtype: str) -> None:
    q, kv = TensorSpec.contiguous((2, 3, 4, 8), "float32"), TensorSpec.contiguous((2, 3, 50, 8), "float32")
    mask = TensorSpec.contiguous((2, 1, 4, 50), dtype)
    problem = Problem(op="attention", inputs=(q, kv, kv, mask), device="cpu", scalars=(("scale", 1.0),))

    def seen(draw: str) -> torch.Tensor:
        drawn = make_inputs(problem, 0, draw)[3]
        assert drawn.dtype is getattr(torch, dtype)
        return drawn if dtype == "bool" else drawn != -torch.inf

    ends = seen("model").int().diff(dim=-1)
    assert (ends <= 0).all(), "a row sees a beginning, as of a cache that is not full"
    assert 0.87 < seen("model").float().mean() < 1
    assert 0.6 < seen("large").float().mean() < 0.9
    assert seen("large")[..., 0].all(), "a row that sees something is the usual case"
    rows = seen("zero_rows").flatten(0, -2)
    assert not rows[::2].any()
    assert rows[1::2, 0].all()


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def split_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Three products of tf32, as the library's attention in fp32 on a GPU: the rest of an infinity is NaN."""
    if x.dtype is torch.float64:
        return x @ y
    (x_large, x_rest), (y_large, y_rest) = (
        (large, number - large) for number in (x, y) for large in [(number.view(torch.int32) & -(1 << 13)).view(torch.float32)]
    )
    return x_large @ y_rest + x_rest @ y_large + x_large @ y_large


@dataclass(frozen=True)
class Written:
    """Attention written out. `tile`: so many rows of q read the keys that any of them sees, and no others."""

    product: Product = torch.matmul
    tile: int | None = None
    selects: bool = False  # a score that is not seen is replaced, not added to

    def reference(self, problem: Problem, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *mask = inputs
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        added = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
        if mask:
            added = added + (torch.where(mask[0], 0.0, -torch.inf) if mask[0].dtype is torch.bool else mask[0])
        if dict(problem.scalars).get("causal"):
            added = added.masked_fill(~torch.ones(added.shape[2:], dtype=torch.bool).tril(), -torch.inf)
        parts = []
        step = self.tile or q.shape[2]
        for rows in (slice(first, first + step) for first in range(0, q.shape[2], step)):
            read = (added[:, :, rows] != -torch.inf).flatten(0, 2).any(0) if self.tile else slice(None)
            bias = added[:, :, rows][..., read]
            scores = self.product(q[:, :, rows], k[:, :, read].transpose(-1, -2)) * float(dict(problem.scalars)["scale"])
            scores = torch.where(bias == -torch.inf, -torch.inf, scores + bias) if self.selects else scores + bias
            parts.append(self.product(torch.ops.aten._safe_softmax(scores, -1), v[:, :, read]))
        return (torch.cat(parts, 2),)


ALGORITHMS = {
    "whole": Written(), "split": Written(product=split_product), "selects": Written(selects=True), "row": Written(tile=1),
    "tiles": Written(tile=8), "split tiles": Written(product=split_product, tile=8), "all": Written(tile=8, selects=True),
}  # fmt: skip
# shape of q, heads and length of keys, mask, scale and whether it is causal
ATTENTIONS = {
    "plain": ((1, 4, 37, 16), (4, 37), None, 1.0, False),
    "causal": ((1, 4, 40, 16), (2, 40), None, 0.3, True),
    "one row of numbers": ((1, 12, 37, 64), (12, 37), ((1, 1, 1, 37), "float32"), 1.0, False),
    "numbers": ((1, 4, 37, 16), (2, 37), ((1, 1, 37, 37), "float32"), 0.25, False),
    "decoding": ((3, 4, 1, 16), (2, 90), ((3, 1, 1, 90), "bool"), 0.25, False),
    "prefill": ((1, 4, 33, 16), (1, 33), ((1, 1, 33, 33), "bool"), 0.25, False),
}


def attention_problem(name: str) -> Problem:
    q, (heads, length), mask, scale, causal = ATTENTIONS[name]
    kv = (q[0], heads, length, q[3])
    specs = [TensorSpec.contiguous(shape, "float32") for shape in (q, kv, kv)]
    specs += [] if mask is None else [TensorSpec.contiguous(*mask)]
    scalars: tuple[tuple[str, float | bool], ...] = (("scale", scale),)
    return Problem(
        op="attention", inputs=tuple(specs), device="cpu", scalars=(("causal", True), *scalars) if causal else scalars
    )


@pytest.mark.parametrize("name", ATTENTIONS)
def test_nan_and_infinities_of_attention_come_out_the_same_of_every_algorithm(name: str) -> None:
    """Which NaN a kernel makes of keys that a row does not see, and of scores of -Inf, is up to its tiles and its products."""
    problem = attention_problem(name)
    for seed in range(6):
        inputs = make_inputs(problem, seed, "nonfinite")
        for eager in (get_op("attention"), ALGORITHMS["whole"], ALGORITHMS["split"]):
            (expected,) = expected_outputs(eager, problem, inputs)  # type: ignore[arg-type]  # of an op, the reference alone
            assert expected.classes is not None
            assert (expected.reference.isfinite()).float().mean() > 0.3, "there is something left to be wrong about"
            assert expected.reference.isinf().any()
            for algorithm, written in ALGORITHMS.items():
                if written.product is split_product and eager is not ALGORITHMS["split"]:
                    continue  # an infinite value stays one where the library multiplies without splitting
                errors = errors_of(written.reference(problem, *inputs)[0], expected)
                assert errors.misplaced == 0, (seed, algorithm, eager)
                assert errors.max < 1e-4, (seed, algorithm, eager)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(("position", "kind"), [(0, math.nan), (1, math.nan), (2, math.nan), (2, math.inf), (3, math.nan)])
def test_whoever_drops_a_nan_or_an_infinity_of_attention_is_caught(name: str, position: int, kind: float) -> None:
    problem = attention_problem(name)
    if position == 3 and name != "numbers":
        pytest.skip("there is no mask, or one of booleans, or one whose single row would spoil everything")
    if position == 1 and problem.inputs[1].shape[:2] == (1, 1):
        pytest.skip("a single head of keys, which would spoil everything")
    for seed in range(6):
        inputs = make_inputs(problem, seed, "nonfinite")
        (expected,) = expected_outputs(ALGORITHMS["split" if kind != math.inf else "whole"], problem, inputs)  # type: ignore[arg-type]
        x = inputs[position]
        inputs[position] = torch.where(x.isnan() if math.isnan(kind) else x.isinf(), 0.0, x)
        assert position == 3 or not torch.equal(inputs[position], x)
        assert errors_of(ALGORITHMS["whole"].reference(problem, *inputs)[0], expected).misplaced > 0, seed
