"""Tensors that an experiment declares."""

from __future__ import annotations

import pytest
import torch

from autokernel.config import TensorInput
from autokernel.profiling.inputs import Slot, draw, filled, layout_of


def one(seed: int = 0, batch: int = 3, models: torch.dtype = torch.float32, **spec: object) -> torch.Tensor:
    (tensor,) = draw((TensorInput.model_validate(spec),), batch, seed, "cpu", models)
    return tensor


def test_sizes_and_dtypes_are_as_declared() -> None:
    assert one(shape=["batch", 5], dtype="float32").shape == (3, 5)
    assert one(shape=[2, "batch"], dtype="bfloat16").dtype == torch.bfloat16
    assert one(shape=[2], dtype="float64").dtype == torch.float64
    assert one(shape=[2], distribution="zeros", dtype="bool").dtype == torch.bool
    assert one(shape=[], distribution="arange", low=7) == 7


def test_inputs_have_the_models_dtype_unless_they_say_another() -> None:
    assert one(shape=[2], models=torch.float16).dtype == torch.float16
    assert one(shape=[2], distribution="integers", high=4).dtype == torch.int64


@pytest.mark.parametrize(
    ("spec", "least", "most", "mean", "spread"),
    [
        ({}, -6, 6, 0, 1),
        ({"mean": 5, "std": 0.1}, 4, 6, 5, 0.1),
        ({"distribution": "uniform", "low": -2, "high": 4}, -2, 4, 1, 6 / 12**0.5),
        ({"distribution": "integers", "low": 3, "high": 7}, 3, 6, 4.5, 1.25**0.5),
        ({"distribution": "ones"}, 1, 1, 1, 0),
        ({"distribution": "zeros"}, 0, 0, 0, 0),
    ],
)
def test_distributions(spec: dict[str, object], least: float, most: float, mean: float, spread: float) -> None:
    values = one(shape=[200, 200], **spec).double()
    assert values.min() >= least
    assert values.max() <= most
    assert abs(values.mean() - mean) < 0.05
    assert abs(values.std() - spread) < 0.05


def test_arange_counts_along_the_last_dimension() -> None:
    values = one(shape=["batch", 4], distribution="arange", low=1, step=0.5, dtype="float64")
    assert values.tolist() == [[1, 1.5, 2, 2.5]] * 3
    values[0, 0] = 9  # each row has memory of its own
    assert values[1, 0] == 1
    assert one(shape=[3], distribution="arange", dtype="int64").tolist() == [0, 1, 2]


def test_missing_values_are_nan() -> None:
    values = one(shape=[100, 100], missing=0.25)
    assert abs(values.isnan().float().mean() - 0.25) < 0.03


def test_numbers_follow_the_seed() -> None:
    assert torch.equal(one(seed=1, shape=[8]), one(seed=1, shape=[8]))
    assert not torch.equal(one(seed=1, shape=[8]), one(seed=2, shape=[8]))
    first, second = draw((TensorInput(shape=(8,)),) * 2, 1, 0, "cpu", torch.float32)
    assert not torch.equal(first, second)


def test_tensors_go_where_arguments_have_them() -> None:
    spec = TensorInput(shape=(1,))
    named, specs = layout_of({"x": spec, "many": (spec, 3, spec), "flag": False, "nothing": None})
    assert named == {"x": Slot(0), "many": (Slot(1), 3, Slot(2)), "flag": False, "nothing": None}
    assert len(specs) == 3
    tensors = tuple(torch.tensor(i) for i in range(3))
    assert filled(named["many"], tensors) == [tensors[1], 3, tensors[2]]
    assert filled(named["flag"], tensors) is False
