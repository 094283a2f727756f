"""What of a bundle applies where, and how that is heard."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from autokernel.environment import Environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.matching import Gemm, gemm_of, parts_of_merged
from autokernel.export.plan import Plan, mismatch
from autokernel.records import Problem, TensorSpec

HERE = Environment(device="cpu", device_name="A CPU", isa="AVX2", num_units=2, torch="2.13.0+cpu")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="float32", stride=(1, k))


def mm(m: int, n: int, k: int, epilogue: tuple[str, ...] = ()) -> Problem:
    x = TensorSpec.contiguous((m, k), "float32")
    return Problem(op="mm", inputs=(x, weight(k, n)), device="cpu", constants=(1,), epilogue=epilogue)


def merged(m: int, k: int, *ns: int, bias: bool = False) -> Problem:
    x = TensorSpec.contiguous((m, k), "float32")
    biases = tuple(TensorSpec.contiguous((n,), "float32") for n in ns) if bias else ()
    inputs = (x, *(weight(k, n) for n in ns), *biases)
    return Problem(op="merged_mm", inputs=inputs, device="cpu", constants=tuple(range(1, len(inputs))))


def plan_of(*entries: Entry, why_not: str | None = None) -> Plan:
    return Plan(Bundle(name="t", created="", version="", environment=HERE, entries=entries), why_not)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_name": "Another CPU"}, "device name A CPU, this is Another CPU"),
        ({"isa": "AVX512"}, "instruction set AVX2, this is AVX512"),
        ({"num_units": 4}, "threads 2, this is 4"),
        ({"torch": "2.15.0"}, "torch 2.13, this is 2.15"),
        ({"device": "cuda"}, "device cpu, this is cuda"),
    ],
)
def test_entries_hold_only_where_they_were_tuned(change: dict[str, object], reason: str) -> None:
    assert reason in str(mismatch(HERE, replace(HERE, **change)))


def test_a_patch_release_or_another_driver_does_not_matter() -> None:
    assert mismatch(HERE, replace(HERE, torch="2.13.1", driver="600", libraries={"numpy": "3"})) is None


def test_gemms_are_found_without_their_epilogue_and_the_heavier_entry_wins() -> None:
    first = Entry(problem=mm(8, 32, 64, ("silu",)), backend="inductor", config={"template": "cpp_gemm"})
    second = Entry(problem=mm(8, 32, 64), backend="aten", config={"prepack": True})
    plan = plan_of(first, second)
    assert plan.find(Gemm("float32", 1, 8, (32,), 64, False)) is first
    assert plan.find(Gemm("float32", 1, 8, (32,), 64, True)) is None
    assert plan.find(Gemm("bfloat16", 1, 8, (32,), 64, False)) is None
    assert plan.find(Gemm("float32", 1, 9, (32,), 64, False)) is None


def test_a_concatenated_gemm_is_known_by_its_whole_width() -> None:
    entry = Entry(problem=merged(8, 64, 32, 16), backend="inductor", config={"merge": "concat", "template": "cpp_gemm"})
    plan = plan_of(entry)
    assert plan.find(Gemm("float32", 1, 8, (48,), 64, False)) is None
    assert plan.find_or_merged(Gemm("float32", 1, 8, (48,), 64, False)) is entry
    assert [found for found, _ in plan.groups("float32", 8, 64)] == [entry]
    assert plan.groups("float32", 9, 64) == []


def test_parts_of_a_merged_problem_keep_their_biases() -> None:
    assert [part.op for part in parts_of_merged(merged(8, 64, 32, 16))] == ["mm", "mm"]
    parts = parts_of_merged(merged(8, 64, 32, 16, bias=True))
    assert [gemm_of(part) for part in parts] == [Gemm("float32", 1, 8, (n,), 64, True) for n in (32, 16)]


def test_an_entry_that_does_not_apply_is_said_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    entry = Entry(problem=mm(8, 32, 64), backend="aten", config={"prepack": True})
    with caplog.at_level(logging.WARNING):
        plan = plan_of(entry)
        for reason in ("laid out in another way", "laid out in another way", "no room"):
            plan.skip(entry, reason)
    assert [entry.key in record.message for record in caplog.records] == [True, True]
    assert plan.usage[entry.key].reasons == ["laid out in another way", "no room"]


def test_a_key_of_a_whole_program_is_cut_short_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    entry = Entry(problem=merged(8, 64, *[32] * 30), backend="aten", config={})
    with caplog.at_level(logging.WARNING):
        plan_of(entry).skip(entry, "no room")
    assert len(entry.key) > 250
    assert len(caplog.records[0].message) < 220
    assert caplog.records[0].message.endswith("...: no room")


def test_a_bundle_that_does_not_apply_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    entries = [Entry(problem=mm(8, n, 64), backend="aten", config={"prepack": True}) for n in (32, 48)]
    with caplog.at_level(logging.WARNING):
        plan = plan_of(*entries, why_not="it was tuned with threads 4, this is 2")
        plan.skip_all("it was tuned with threads 4, this is 2")
    assert len(caplog.records) == 1
    assert f"bundle {plan.bundle.name} (entries: 2)" in caplog.text
    assert "threads 4" in caplog.text
    assert all(usage.reasons == ["it was tuned with threads 4, this is 2"] for usage in plan.usage.values())
    assert not plan.active
    assert plan.find(Gemm("float32", 1, 8, (32,), 64, False)) is None


def test_a_plan_that_does_not_apply_has_another_digest() -> None:
    entry = Entry(problem=mm(8, 32, 64), backend="aten", config={"prepack": True})
    assert plan_of(entry).digest != plan_of(entry, why_not="x").digest
