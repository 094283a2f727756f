"""Entries for ranges of rows: which of several counts, what production builds for each batch, what a fresh process shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autokernel.config import load_experiment
from autokernel.environment import current_environment
from autokernel.errors import BundleError
from autokernel.export import prove
from autokernel.export.bundle import Bundle, Entry, read_bundle, write_bundle
from autokernel.export.matching import Gemm, gemm_of, with_rows
from autokernel.export.passes import MergePass
from autokernel.export.plan import Plan
from autokernel.export.proof import Proof, RowsProof, rows_among
from autokernel.export.prove import Prove
from autokernel.export.substitution import SubstitutionPass, find_entry
from autokernel.records import ConfigValue, Problem, TensorSpec
from autokernel.stages.production import _verdict

N, K = 512, 256
ROOT = Path(__file__).resolve().parents[2]
RUN = subprocess.run
CHILD = Path(__file__).with_name("interpreted_rows.py")
SKINNY: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "split_k": 2,
}  # fmt: skip
WEIGHT = TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def mm(m: int) -> Problem:
    return Problem(op="mm", inputs=(spec(m, K), WEIGHT), device="cuda", constants=(1,))


def merged(m: int, *ns: int) -> Problem:
    weights = tuple(replace(WEIGHT, shape=(K, n)) for n in ns or (N, N))
    return Problem(op="merged_mm", inputs=(spec(m, K), *weights), device="cuda", constants=tuple(range(1, len(weights) + 1)))


def entry(problem: Problem, rows: tuple[int, int] | None = None, backend: str = "triton", **config: ConfigValue) -> Entry:
    span: dict[str, ConfigValue] = {} if rows is None else {"m_min": rows[0], "m_max": rows[1]}
    merge: dict[str, ConfigValue] = {"merge": "concat"} if problem.op == "merged_mm" else {}
    return Entry(problem=problem, backend=backend, config={**SKINNY, **merge, **span, **config})


def bundle_of(*entries: Entry) -> Bundle:
    return Bundle(name="b", created="", version="", environment=current_environment("cpu"), entries=entries)


def gemm(m: int, n: int = N) -> Gemm:
    return Gemm("bfloat16", 1, m, (n,), K, False)


def test_a_range_says_where_it_begins_and_ends() -> None:
    assert entry(mm(16), (9, 16)).rows == (9, 16)
    assert entry(mm(16)).rows is None
    bad: Sequence[dict[str, ConfigValue]] = (
        {"m_min": 9}, {"m_max": 9}, {"m_min": 9, "m_max": 8}, {"m_min": 0, "m_max": 8}, {"m_min": 9, "m_max": "16"},
        {"m_min": True, "m_max": 16},
    )  # fmt: skip
    for config in bad:
        with pytest.raises(ValueError, match="m_min and m_max are whole numbers, 1 <= m_min <= m_max"):
            entry(mm(16), **config)


def test_a_bundle_keeps_its_ranges_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    bundle = bundle_of(entry(mm(16), (9, 16)))
    write_bundle(bundle, tmp_path / "bundle")
    assert read_bundle(tmp_path / "bundle").entries[0].rows == (9, 16)
    assert bundle.applied_digest != bundle_of(entry(mm(16), (8, 16))).applied_digest
    document = tmp_path / "bundle" / "bundle.json"
    document.write_text(document.read_text().replace('"m_min": 9', '"m_min": 17'))
    with pytest.raises(BundleError, match="damaged: config: m_min and m_max are whole numbers"):
        read_bundle(tmp_path / "bundle")


def test_the_very_shape_comes_first_then_the_nearest_range() -> None:
    eight, sixteen = entry(mm(8), (4, 14)), entry(mm(16), (10, 20))
    stock = entry(mm(11), backend="aten", prepack=False)
    for entries in ((eight, sixteen, stock), (stock, sixteen, eight)):
        plan = Plan(bundle_of(*entries))
        found = {m: find_entry(plan, gemm(m)) for m in (3, 4, 8, 10, 11, 12, 13, 14, 15, 16, 20, 21)}
        assert [m for m, one in found.items() if one is eight] == [4, 8, 10]
        larger = [m for m, one in found.items() if one is sixteen]
        assert larger == [12, 13, 14, 15, 16, 20], "12 is as near to both"
        assert found[11] is None, "stock code was chosen for just this shape"
        assert [plan.serves(eight, m) for m in (4, 10, 11, 12)] == [True, True, False, False]
    assert find_entry(Plan(bundle_of(sixteen), "another machine"), gemm(12)) is None


def test_ranges_of_other_kernels_are_none() -> None:
    for other in (entry(mm(16), (9, 16), kernel="other"), entry(mm(16), (9, 16), backend="cutedsl")):
        assert find_entry(Plan(bundle_of(other)), gemm(12)) is None
    cute = entry(merged(16), (9, 16), backend="cutedsl")
    assert groups(Plan(bundle_of(cute)), 16) == [(cute, (N, N), 16)]
    assert groups(Plan(bundle_of(cute)), 12) == [], "nothing would take the place of the merged product"


def groups(plan: Plan, m: int) -> list[tuple[Entry, tuple[int, ...], int]]:
    return [(one, found.ns, found.m) for one, found in plan.groups("bfloat16", m, K)]


def test_gemms_are_merged_within_a_range_unless_one_has_an_entry_of_its_own() -> None:
    both = entry(merged(16), (9, 16))
    plan = Plan(bundle_of(both))
    assert groups(plan, 16) == [(both, (N, N), 16)]
    assert groups(plan, 9) == [(both, (N, N), 9)]
    assert groups(plan, 8) == groups(plan, 17) == []
    assert find_entry(plan, gemm(9, 2 * N)) is both
    assert [plan.serves(both, m) for m in (8, 9, 16, 17)] == [False, True, True, False]
    apart = Plan(bundle_of(both, entry(mm(12), backend="aten", prepack=False)))
    assert groups(apart, 12) == []
    assert not apart.serves(both, 12)
    assert groups(apart, 13) == [(both, (N, N), 13)]


def test_merged_ranges_that_overlap_and_entries_of_the_very_shape() -> None:
    eight, sixteen, three = entry(merged(8), (4, 14)), entry(merged(16), (9, 16)), entry(merged(12, N, N, N), (12, 12))
    plan = Plan(bundle_of(eight, sixteen))
    assert [groups(plan, m)[0][0] is sixteen for m in (8, 11, 12, 13)] == [False, False, True, True]
    assert [len(groups(plan, m)) for m in (4, 12, 14, 17)] == [1, 1, 1, 0]
    assert [one for one, _, _ in groups(Plan(bundle_of(sixteen, three)), 12)] == [three, sixteen], "its own shape first"
    assert [one for one, _, _ in groups(Plan(bundle_of(sixteen, entry(merged(11)))), 11)] != [sixteen]


def two_products(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.mm(x, w.permute(1, 0))) + torch.mm(x, v.permute(1, 0))


@pytest.mark.parametrize(("m", "used"), [(8, False), (9, True), (16, True), (17, False)])
def test_both_passes_agree_on_the_rows_of_merged_products(m: int, used: bool) -> None:
    both = entry(merged(16), (9, 16))
    plan = Plan(bundle_of(both))
    with FakeTensorMode():
        sizes = ((m, K), (N, K), (N, K))
        module = make_fx(two_products)(*(torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes))
    MergePass(plan)(module.graph)
    SubstitutionPass(plan)(module.graph)
    names = [str(getattr(node.target, "__name__", node.target)) for node in module.graph.nodes]
    assert names.count("lower_skinny_mm") == plan.usage[both.key].hits == int(used)
    assert names.count("mm.default") == (0 if used else 2)


def test_problems_with_other_rows() -> None:
    bias = Problem(op="addmm", inputs=(spec(N), spec(16, K), WEIGHT), device="cuda", constants=(0, 2))
    assert with_rows(bias, 9).inputs == (spec(N), spec(9, K), WEIGHT)
    columns = TensorSpec(shape=(16, N), dtype="bfloat16", stride=(3 * N, 1))
    added = replace(mm(16), inputs=(spec(16, K), WEIGHT, columns), epilogue=("add",))
    assert with_rows(added, 9).inputs == (spec(9, K), WEIGHT, replace(columns, shape=(9, N)))
    assert with_rows(added, 16) == added
    one = replace(mm(1), inputs=(TensorSpec(shape=(1, K), dtype="bfloat16", stride=(7 * K, 1)), WEIGHT))
    assert with_rows(one, 9) == mm(9), "the distance between rows of which there was one says nothing"
    square = replace(mm(K), inputs=(spec(K, K), replace(WEIGHT, shape=(K, K))))
    assert with_rows(square, 9).inputs[1] == square.inputs[1], "a weight has no such rows"
    assert with_rows(merged(16), 9) == merged(9)
    for problem in (mm(16), bias, added, merged(16)):
        found, own = gemm_of(with_rows(problem, 9)), gemm_of(problem)
        assert own is not None
        assert found == replace(own, m=9)
    with pytest.raises(ValueError, match="only plain products have rows to change"):
        with_rows(Problem(op="bmm", inputs=(spec(2, 16, K), spec(2, K, N)), device="cuda"), 9)


@pytest.mark.timeout(300)
def test_production_uses_it_for_each_batch_of_the_range_and_for_no_other() -> None:
    """Through torch.compile, the kernel in Triton's interpreter: hits, launches with the batch's rows, and right results."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(CHILD)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        *(["fixed", m, 1, [m], True] for m in (16, 9, 18, 12)),
        *(["fixed", m, 0, [], True] for m in (8, 19)),
        ["for several", 16, 1, [16], True],
        *(["for several", m, 0, [], True] for m in (12, 9)),  # one graph of symbolic sizes
        *(["merged", m, 1, [m], True] for m in (16, 9)),
        ["merged", 19, 0, [], True],
    ]


MODEL = """
import torch
from interpreted_rows import K, Net

def make_model():
    return Net()

def make_inputs(batch, seed, device, dtype):
    return (torch.randn(batch, K, generator=torch.Generator().manual_seed(seed)).to(device, dtype),)
"""
EXPERIMENT = """
name: small
model: {factory: "small.py:make_model", dtype: float16}
backends: [aten, triton]
scenarios:
  sixteen: {kind: call, inputs: "small.py:make_inputs", batch: 16, rows: [9, 18]}
"""


def proof_of(folder: Path, monkeypatch: pytest.MonkeyPatch, entries: Sequence[Entry], batches: tuple[int, ...]) -> Proof:
    (folder / "small.py").write_text(MODEL)
    (folder / "small.yaml").write_text(EXPERIMENT)

    def with_interpreter(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "autokernel.export.prove"]
        paths = os.pathsep.join([str(ROOT), str(CHILD.parent), options["env"]["PYTHONPATH"]])
        options["env"] = {**options["env"], "PYTHONPATH": paths}
        return RUN([command[0], str(CHILD), command[3]], **options)

    monkeypatch.setattr(prove.subprocess, "run", with_interpreter)
    return Prove(
        loaded=load_experiment(folder / "small.yaml"),
        scenarios=("sixteen",),
        device="cpu",
        threads=2,
        bundle=replace(bundle_of(*entries), environment=current_environment("cpu", 2)),
        rows={"sixteen": batches},
    )()


@pytest.mark.timeout(300)
def test_a_fresh_process_shows_batches_inside_and_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    x = TensorSpec.contiguous((16, 64), "float16")  # as in interpreted_rows.py
    w = TensorSpec(shape=(64, 96), dtype="float16", stride=(1, 64))
    problem = Problem(op="mm", inputs=(x, w), device="cpu", constants=(1,))
    ranged = replace(entry(problem, (9, 18), BLOCK_N=32, BLOCK_K=32), scenario="sixteen")
    # its range is said to hold 12 rows, and the kernel takes none of the products there: nothing divides K
    broken = replace(ranged, config={**ranged.config, "BLOCK_K": 48})
    proof = proof_of(tmp_path, monkeypatch, (ranged,), (9, 19))
    assert proof.hits == {ranged.key: 1}, "other batches do not count there"
    assert proof.rows == (
        RowsProof(scenario="sixteen", batch=9, used=(ranged.key,), stock=()),
        RowsProof(scenario="sixteen", batch=19, used=(), stock=(ranged.key,)),
    )
    proved = _verdict(proof, [ranged.key])
    assert (proved.passed, proved.message) == (True, "")
    assert proved.rows == (
        "sixteen at batch 9: 1 entries for ranges of rows used, 0 not",
        "sixteen at batch 19: 0 entries for ranges of rows used, 1 not",
    )
    proof = proof_of(tmp_path, monkeypatch, (broken,), (12,))
    assert proof.rows[0].stock == (broken.key,)
    assert "is for (9, 18) rows, and where there are (12,) stock code was used: block_k must divide K" in proof.rows[0].problem
    assert "sixteen at batch 12: " in _verdict(proof, []).message


def test_the_rows_of_an_entry_are_found_where_all_its_products_are() -> None:
    both = entry(merged(16, N, 2 * N))
    assert rows_among({gemm(9), gemm(9, 2 * N), gemm(12), gemm(16, 2 * N)}, both) == (9,)
    assert rows_among({replace(gemm(9), bias=True), replace(gemm(9, 2 * N), bias=True)}, both) == ()
    assert rows_among({gemm(9), gemm(12)}, entry(mm(16))) == (9, 12)
