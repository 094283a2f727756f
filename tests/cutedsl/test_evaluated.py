"""What is evaluated on a card is all that the backend proposes there; and its kernels compile without one."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu.cute_cases import EVALUATED, NEVER, NEW_IN_CUBLAS, Kind, N, kind_of, product

from autokernel.backends import Refused, cutedsl, get_backend
from autokernel.cutedsl.config import DTYPES
from autokernel.ops import get_op, int_mm, scaled_mm
from autokernel.ops.epilogue import GATED_EPILOGUES
from autokernel.records import Candidate, Problem
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232_448, l2_bytes=60 << 20)
SIZES = ((1, N), (16, N), (64, N), (256, 3 * N), (512, N), (2048, N))  # M and N


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def problems() -> Iterator[Problem]:
    """Of every op and every pair of dtypes that the op's own finder takes, for few and for many rows."""
    pairs = {
        "scaled_mm": tuple(itertools.product(scaled_mm.DTYPES, repeat=2)),
        "int_mm": ((int_mm.DTYPE, int_mm.DTYPE),),
    }
    for op, (m, n) in itertools.product(cutedsl._OPS, SIZES):
        for left, right in pairs.get(op, tuple((dtype, dtype) for dtype in DTYPES)):
            for follows in ((), (GATED_EPILOGUES[0],) if op == "merged_mm" else ("relu",)):
                for rows in (False, True) if op == "scaled_mm" else (False,):
                    yield product(op, left, right, m=m, n=n, follows=follows, rows=rows)


def proposed() -> set[Kind]:
    """What a search may evaluate: of each source, and with what follows in the kernel and behind it."""
    found: set[Kind] = set()
    for problem in problems():
        if get_backend("cutedsl").supports(problem) is not None:
            continue
        bound = load_space(problem.op)["cutedsl"].bind(names_for(dict(get_op(problem.op).dims(problem)), H200))
        for config in bound.enumerate():
            kind = kind_of(problem, {"source": "quack", **config})
            if kind not in found and _taken(Candidate(problem=problem, backend="cutedsl", config=config)):
                found.add(kind)
    return found


def _taken(candidate: Candidate) -> bool:
    try:
        cutedsl._refuse_illegal(candidate)
        cutedsl.kernels_of(candidate)
    except Refused:
        return False
    return True


def test_all_that_is_proposed_is_evaluated() -> None:
    wanted = proposed()
    evaluated = {kind_of(*case) for case in EVALUATED.values()}
    never = {kind for kind in wanted if (kind.op, kind.left, kind.right) in NEVER}
    assert sorted(wanted - never - evaluated) == []
    assert sorted(evaluated - wanted) == [], "what no search proposes needs no card"
    assert {(kind.op, kind.left, kind.right) for kind in never} == set(NEVER), "nothing is left out that is not proposed"
    assert {kind.op for kind in evaluated} == set(cutedsl._OPS)


def test_results_of_every_dtype_are_evaluated() -> None:
    outs = {dict(problem.scalars)["out_dtype"] for problem, _ in EVALUATED.values() if problem.op == "scaled_mm"}
    assert outs == set(scaled_mm.OUT_DTYPES)
    assert len(NEW_IN_CUBLAS) == 3


@pytest.mark.parametrize("name", EVALUATED)
def test_every_case_is_legal(name: str) -> None:
    problem, config = EVALUATED[name]
    candidate = Candidate(problem=problem, backend="cutedsl", config=config)
    cutedsl._refuse_illegal(candidate)
    assert cutedsl.kernels_of(candidate)


@pytest.mark.slow
def test_every_cases_kernels_compile(compile_all: Any) -> None:
    specs = []
    for problem, config in EVALUATED.values():
        kernels = cutedsl.kernels_of(Candidate(problem=problem, backend="cutedsl", config=config))
        specs += [kernel for kernel in kernels if kernel not in specs]
    assert [answer for answer in compile_all(specs) if isinstance(answer, str)] == []
    assert len(specs) > 40
