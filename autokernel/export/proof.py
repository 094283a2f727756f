"""What a fresh process says of a bundle (`export/prove.py`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autokernel.export.bundle import Entry
from autokernel.export.matching import Gemm, gemm_of
from autokernel.records import Record, Speedup


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioProof(Record):
    """One scenario, compiled. `difference` is of its outputs from eager, relative to their norm, over all draws together; of
    tokens it is what eager's logits of them lack to the largest.
    """

    scenario: str
    compile_s: float
    difference: float
    problem: str = ""  # what is wrong with its outputs; empty if nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsProof(Record):
    """A scenario at another batch: by key, which of its entries for ranges of rows were used there, and for which there was
    stock code.
    """

    scenario: str
    batch: int
    used: tuple[str, ...]
    stock: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof(Record):
    """What the fresh process saw.

    `compile_s` holds seconds with empty caches of the scenario that was compared, by mode ("default", "bundle"), each with what
    the first compilation of a process takes besides; `step_us` the medians of its step, and `speedup` the bundle's over the
    default.
    """

    scenarios: tuple[ScenarioProof, ...]
    num_benchmarks: int
    rows: tuple[RowsProof, ...] = ()
    hits: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    constant_bytes: int = 0
    modules: tuple[str, ...] = ()  # parts of the search stack that were imported: must be none
    compile_s: Mapping[str, float] = field(default_factory=dict)
    step_us: Mapping[str, float] = field(default_factory=dict)
    speedup: Speedup | None = None


def together(proofs: Sequence[Proof], order: Sequence[str]) -> Proof:
    """What several processes saw, each of scenarios of its own, as if it were one; scenarios in the order given."""
    found = {scenario.scenario: scenario for proof in proofs for scenario in proof.scenarios}
    keys = dict.fromkeys(key for proof in proofs for key in proof.hits)
    compared = next((proof for proof in proofs if proof.compile_s), proofs[0])
    return replace(
        compared,
        scenarios=tuple(found[name] for name in order),
        num_benchmarks=sum(proof.num_benchmarks for proof in proofs),
        rows=tuple(rows for proof in proofs for rows in proof.rows),
        hits={key: sum(proof.hits.get(key, 0) for proof in proofs) for key in keys},
        reasons={key: why for proof in proofs for key, why in proof.reasons.items()},
        constant_bytes=sum(proof.constant_bytes for proof in proofs),
        modules=tuple(dict.fromkeys(module for proof in proofs for module in proof.modules)),
    )


def own_rows(entry: Entry) -> int | None:
    """The number of rows that an entry was tuned for; None if it is for no product."""
    gemm = gemm_of(entry.problem)
    return None if gemm is None else gemm.m


def rows_among(gemms: Collection[Gemm], entry: Entry) -> tuple[int, ...]:
    """With which numbers of rows all products that an entry is for are among these."""
    own = gemm_of(entry.problem)
    if own is None:
        return ()
    parts = [replace(own, ns=(n,)) for n in own.ns]
    return tuple(sorted(m for m in {gemm.m for gemm in gemms} if all(replace(part, m=m) in gemms for part in parts)))
