"""What makes two machines different for a run."""

from __future__ import annotations

import dataclasses

from autokernel.environment import Environment

HERE = Environment(
    device="cuda", device_name="NVIDIA H200", isa="sm_90", num_units=132, torch="2.11.0", platform="Linux-6.1",
    driver="580.1", libraries={"triton": "3.6.0"},
)  # fmt: skip


def test_another_kernel_release_is_the_same_machine() -> None:
    assert HERE.differences(dataclasses.replace(HERE, platform="Linux-6.2")) == []


def test_differences_are_named_with_both_values() -> None:
    there = dataclasses.replace(HERE, torch="2.13.0", libraries={"triton": "3.7.0", "numpy": "2.0"})
    assert HERE.differences(there) == ["triton 3.6.0, not 3.7.0", "torch 2.11.0, not 2.13.0", "numpy none, not 2.0"]
