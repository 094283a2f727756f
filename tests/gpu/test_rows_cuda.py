"""A winner for a range of rows, on the card: tuned at 16 rows, measured at others, in production at several, and proved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pretended_run import Listener

import autokernel
from autokernel.config import LoadedExperiment, load_experiment
from autokernel.environment import current_environment
from autokernel.evaluate.candidate import EvaluateCandidate
from autokernel.evaluate.roofline import measure_ceilings
from autokernel.events import Profiled, RowsHeld
from autokernel.export.bundle import Bundle, write_bundle
from autokernel.export.prove import Prove
from autokernel.records import Candidate, ConfigValue, Hotspot, Problem
from autokernel.stages.confirm import confirm, entry_of
from autokernel.stages.context import RunContext
from autokernel.stages.production import batches_to_show
from autokernel.stages.rows import hold_rows
from autokernel.workers.pool import LocalPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("own_locks_and_clean_device"),
]

if torch.cuda.is_available():
    from gpu.cuda_problems import spec, weight

K, NS, TUNED = 4096, (4096, 1024, 1024), 16
FIRST, LAST = 12, 17
MODEL = f"""
import torch
from torch import nn

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear({K}, n, bias=False) for n in {NS})
    def forward(self, x):
        return tuple(part(x) for part in self.parts)

def make_model():
    torch.manual_seed(0)
    return Heads()

def make_inputs(batch, seed, device, dtype):
    return (torch.randn(batch, {K}, generator=torch.Generator().manual_seed(seed)).to(device, dtype),)
"""
SKINNY: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "swap", "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "split_k": 1, "waves": 0,
    "tma": False, "num_warps": 4, "num_stages": 4, "merge": "concat",
}  # fmt: skip


class Heads(torch.nn.Module):
    """Three layers on one input, as in the experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(K, n, bias=False) for n in NS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple([part(x) for part in self.parts])


def qkv() -> Problem:
    weights = tuple(weight(K, n) for n in NS)
    return Problem(op="merged_mm", inputs=(spec(TUNED, K), *weights), device="cuda", constants=(1, 2, 3))


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedExperiment:
    (tmp_path / "heads.py").write_text(MODEL)
    scenario = {"kind": "call", "inputs": "heads.py:make_inputs", "batch": TUNED, "rows": [FIRST, LAST]}
    data = {
        "name": "heads", "model": {"factory": "heads.py:make_model"}, "device": "cuda", "backends": ["aten", "triton"],
        "scenarios": {"sixteen": scenario}, "validation": {"confirm_rounds": 15},
    }  # fmt: skip
    (tmp_path / "heads.yaml").write_text(json.dumps(data))
    return load_experiment(tmp_path / "heads.yaml")


@pytest.mark.timeout(1200)
def test_a_winner_is_measured_used_and_proved_for_its_range(loaded: LoadedExperiment, tmp_path: Path) -> None:
    problem, ceilings = qkv(), measure_ceilings("cuda", None)
    hotspot = Hotspot(problem=problem, scenario="sixteen", num_calls=1, time_us=30, share=0.9, weight=0.9, roofline_us=12)
    profiled = Profiled(
        hotspots=(hotspot,), scenario_us={"sixteen": 35.0}, read_gb_per_s=ceilings.read_gb_per_s,
        peak_tflops=dict(ceilings.tflops), ceilings=ceilings.to_json(),
    )  # fmt: skip
    stock = Candidate(problem=problem, backend="aten", config={"prepack": False, "merge": "none"})
    ours = [
        Candidate(problem=problem, backend="triton", config={**SKINNY, **changes})
        for changes in ({}, {"split_k": 2}, {"BLOCK_K": 128})
    ]
    evaluations = [EvaluateCandidate(candidate=candidate, ceilings=ceilings)() for candidate in (stock, *ours)]
    assert [(e.status.value, e.message) for e in evaluations] == [("OK", "")] * 4
    listener = Listener()
    pool = LocalPool(2, env={})
    try:
        context = RunContext(
            loaded=loaded, folder=tmp_path, run_id="r", device="cuda", threads=1, environment=current_environment("cuda"),
            pool=pool, recorders=[listener],
        )  # fmt: skip
        (won,) = confirm(context, profiled, {problem.key: evaluations})
        held = hold_rows(context, profiled, [won])[problem.key]
    finally:
        pool.close()
    assert held in [event for event in listener.events if isinstance(event, RowsHeld)]
    assert [(row.m, row.message) for row in held.measured] == [(m, "") for m in range(FIRST, LAST + 1) if m != TUNED]
    assert held.held[0] == FIRST, "one kernel instead of three, in one tile of 16 rows"
    entry = entry_of(won, held)
    assert entry.rows == held.held
    bundle = Bundle(name="heads", created="", version="", environment=context.environment, entries=(entry,))
    write_bundle(bundle, tmp_path / "bundle")
    _use(tmp_path / "bundle", entry.key, held.held)
    _prove(loaded, bundle, entry.key)


def _use(path: Path, key: str, held: tuple[int, int]) -> None:
    """Inside the range the entry is hit, outside it is not; always the error is at most twice eager's."""
    torch.manual_seed(0)
    model = Heads().to("cuda", torch.bfloat16)
    backend = autokernel.backend(path)
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    for m in (TUNED, held[0], held[1], held[0] + 1, held[0] - 1, held[1] + 1):
        x, before = torch.randn(m, K, device="cuda", dtype=torch.bfloat16), backend.usage()[key].hits
        with torch.no_grad():
            outputs, eager = compiled(x), model(x)
        hits = backend.usage()[key].hits - before
        assert hits == int(held[0] <= m <= held[1]), (m, backend.usage()[key].reasons)
        for part, out, stock in zip(model.parts, outputs, eager, strict=True):
            exact = x.double() @ part.weight.double().t()
            error, allowed = ((value.double() - exact).norm() / exact.norm() for value in (out, stock))
            assert float(error) <= 2 * float(allowed) + 1e-5, m


def _prove(loaded: LoadedExperiment, bundle: Bundle, key: str) -> None:
    inside, beyond = batches_to_show(bundle, "sixteen", loaded.experiment.scenarios["sixteen"])
    proof = Prove(
        loaded=loaded, scenarios=("sixteen",), device="cuda", threads=1, bundle=bundle, rows={"sixteen": (inside, beyond)}
    )()
    assert proof.hits == {key: 1}
    assert [(rows.batch, rows.used, rows.stock, rows.problem) for rows in proof.rows] == [
        (inside, (key,), (), ""),
        (beyond, (), (key,), ""),
    ]
