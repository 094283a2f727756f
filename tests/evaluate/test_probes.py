"""Inputs have the layout they should, are reproducible, and do what their draw says."""

from __future__ import annotations

from dataclasses import replace
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


def test_nothing_that_a_causal_kernel_need_not_read_is_spoilt() -> None:
    """Kernels read values in tiles, whose rows see some of them: which NaN they make of the others is up to the tiles."""
    q, kv = TensorSpec.contiguous((1, 4, 40, 8), "float32"), TensorSpec.contiguous((1, 2, 40, 8), "float32")
    problem = Problem(op="attention", inputs=(q, kv, kv), device="cpu", scalars=(("causal", True), ("scale", 0.3)))
    attention = get_op("attention")
    for seed in range(4):
        q_in, k, v = inputs = make_inputs(problem, seed, "nonfinite")
        assert (~v.isfinite()).sum() == 2, "in two heads"
        (expected,) = expected_outputs(attention, problem, inputs)
        keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        for tile in (1, 8, 40):
            rows = []
            for first in range(0, 40, tile):
                end = first + tile
                seen = torch.arange(end) <= torch.arange(first, end)[:, None]
                scores = q_in[:, :, first:end] @ keys[:, :, :end].transpose(-1, -2) * 0.3
                weights = torch.ops.aten._safe_softmax(torch.where(seen, scores, -torch.inf), -1)
                rows.append(weights @ values[:, :, :end])
            errors = errors_of(torch.cat(rows, 2), expected)
            assert errors.misplaced == 0, (seed, tile)
            assert errors.max < 1e-5
