"""What is judged, copied and compared together is judged as one by one: many small outputs, or parts of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autokernel.backends import Built
from autokernel.evaluate import budget, tensors
from autokernel.evaluate.budget import Expected, errors_of, errors_of_outputs, expected_of_copies, expected_outputs
from autokernel.evaluate.numerics import Checker, expect
from autokernel.evaluate.probes import DRAWS, join, make_constants, make_inputs
from autokernel.evaluate.tensors import Snapshot, each_different, fill, num_different, rows_of, twin
from autokernel.ops import get_op
from autokernel.records import Problem, TensorSpec

COPIES = 32
X, GAIN = TensorSpec.contiguous((1, 3, 64), "bfloat16"), TensorSpec.contiguous((64,), "bfloat16")
NORM = Problem(op="add_rms_norm", inputs=(X, X, GAIN), device="cpu", constants=(2,), scalars=(("eps", 1e-5),))
OP = get_op("add_rms_norm")  # with two outputs


@pytest.fixture(params=[False, True], ids=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Outputs count as small, or every one as large."""
    if request.param:
        monkeypatch.setattr(budget, "TOGETHER_ELEMENTS", 1)
        monkeypatch.setattr(tensors, "_TOGETHER_BYTES", 0)
    return "large" if request.param else "small"


def inputs_of(draws: tuple[str, ...]) -> list[list[torch.Tensor]]:
    return [make_inputs(NORM, seed, draw) for seed, draw in enumerate(draws)]


def plain(expected: Expected) -> tuple[object, ...]:
    return (expected.dtype, expected.shape, expected.stride, expected.shares_with, expected.num_bytes, expected.device)


def test_copies_have_the_references_and_budgets_of_each(size: str) -> None:
    copies = inputs_of(DRAWS)
    together = expected_of_copies(OP, NORM, copies)
    for inputs, found in zip(copies, together, strict=True):
        for one, other in zip(expected_outputs(OP, NORM, inputs), found, strict=True):
            assert plain(one) == plain(other)
            assert (one.limit_max, one.limit_norm) == pytest.approx((other.limit_max, other.limit_norm), rel=1e-12)
            assert torch.equal(one.reference.nan_to_num(7, 8, 9), other.reference.nan_to_num(7, 8, 9))
            assert (one.classes is None) == (other.classes is None)
            assert one.classes is None or torch.equal(one.classes, other.classes)
    assert any(expected.classes is not None for copy in together for expected in copy)


def test_outputs_have_the_errors_of_each(size: str) -> None:
    copies = inputs_of(DRAWS)
    expected = [e for copy in expected_of_copies(OP, NORM, copies) for e in copy]
    outputs = [out for inputs in copies for out in OP.reference(NORM, *inputs)]
    outputs[2] = outputs[2] * 1.5
    outputs[5] = outputs[5].clone()
    outputs[5][0, 1, 3] = math.nan
    outputs[7] = torch.zeros_like(outputs[7])
    found = errors_of_outputs(outputs, expected)
    for out, want, errors in zip(outputs, expected, found, strict=True):
        alone = errors_of(out, want)
        assert (errors.max, errors.norm) == pytest.approx((alone.max, alone.norm), rel=1e-12)
        assert errors.misplaced == alone.misplaced
    assert found[2].norm == pytest.approx(0.5, rel=0.05)
    assert (found[5].max, found[5].misplaced) == (math.inf, 1)
    assert found[0].max <= expected[0].limit_max


def test_a_number_where_only_eager_has_none_is_misplaced(size: str) -> None:
    inputs = inputs_of(("model",))[0]
    outputs = OP.reference(NORM, *inputs)
    expected = [replace(e, classes=torch.ones(e.shape, dtype=torch.uint8)) for e in expected_outputs(OP, NORM, inputs)]
    assert [errors.misplaced for errors in errors_of_outputs(outputs, expected)] == [out.numel() for out in outputs]


def test_every_pair_that_differs_is_told(size: str) -> None:
    first = [torch.randn(5, 7).bfloat16() for _ in range(6)]
    second = [x.clone() for x in first]
    second[1][2, 3] += 1
    first[2][0, 0] = second[2][0, 0] = math.nan
    second[3][0, 0] = math.nan
    found = each_different(first, second)
    assert found == [False, True, False, True, False, False]
    assert found == [num_different(x, y) > 0 for x, y in zip(first, second, strict=True)]
    rows = zip(rows_of(first), rows_of(second), strict=True)
    assert sum(num_different(x, y) for x, y in rows) == 2
    mixed = [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(4)]
    assert each_different(mixed, [torch.zeros(3), torch.ones(2, dtype=torch.int64), torch.zeros(4)]) == [False, True, False]
    assert each_different([], []) == []


def test_a_snapshot_sees_every_byte(size: str) -> None:
    gaps = torch.empty_strided((3, 4), (6, 1)).fill_(2.0)
    held = [torch.zeros(3, dtype=torch.uint8), gaps, torch.ones(4, 4)]
    before = Snapshot(held)
    assert before.num_changed() == 0
    tensors.bytes_of(gaps)[5 * 4] += 1  # between two rows
    held[0][2] = 1
    assert before.num_changed() == 2
    assert Snapshot([]).num_changed() == 0


def test_a_copy_that_is_asked_for_stays_when_the_tensor_changes(size: str) -> None:
    out = torch.zeros(8)
    (kept,) = rows_of([out], copy=True)
    out += 1
    assert float(kept.sum()) == 0


def test_twins_have_the_layout_and_the_gaps() -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    for tensor in (wide[:, 1:3], wide[:1].expand(5, 6), wide.t(), torch.zeros(0, 3)):
        other = twin(tensor)
        assert (other.shape, other.stride(), other.storage_offset()) == (tensor.shape, tensor.stride(), tensor.storage_offset())
        assert other.numel() == 0 or other.data_ptr() != tensor.data_ptr()
        assert torch.equal(tensors.bytes_of(other), tensors.bytes_of(tensor))
    first, second = torch.zeros(4, 6), torch.zeros(3, dtype=torch.int64)
    fill([first[:, 1:3], second], [wide[:, 1:3], torch.ones(3, dtype=torch.int64)])
    assert torch.equal(first, wide)
    assert int(second.sum()) == 3
    fill([], [])


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_many_small_copies_are_checked_in_few_operations() -> None:
    """On a GPU their number is what a check costs: it was 58,000, a second, for a norm of one row."""
    constants = make_constants(NORM, 0, COPIES)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = [list(flat[i : i + 2]) for i in range(0, len(flat), 2)]
        return tuple(
            out for pair, fixed in zip(pairs, constants, strict=True) for out in OP.reference(NORM, *join(NORM, pair, fixed))
        )

    with Operations() as operations:
        expectation = expect(OP, NORM, constants, 0)
        checker = Checker(NORM, Built(run=run, num_copies=COPIES), constants, expectation)
        checker.before_timing()
        buffers = checker.timing_inputs()
        checker.audit(buffers, lambda: run(*(x for copy in buffers for x in copy)))
        checker.after_timing()
    assert checker.verdict().passed
    assert operations.count < 14_000
