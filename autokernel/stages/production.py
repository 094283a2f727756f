"""Stages 6 and 7: write the bundle, and prove in fresh processes that production code uses it."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import autokernel
from autokernel.errors import WorkerError
from autokernel.events import Exported, ModelValidated, Proved
from autokernel.export.bundle import Bundle, Entry, write_bundle
from autokernel.export.prove import Proof, Prove
from autokernel.records import ConfigValue
from autokernel.stages.context import RunContext

_TIMEOUT_S = 900


def make_bundle(
    context: RunContext,
    entries: Sequence[Entry],
    graph_options: Mapping[str, ConfigValue],
    validated: ModelValidated | None = None,
) -> Bundle:
    """A bundle of this run; with its evidence once the model was validated."""
    results: dict[str, Any] = validated.to_json() if validated is not None else {}
    return Bundle(
        name=context.experiment.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=autokernel.__version__,
        environment=context.environment,
        entries=tuple(entries),
        graph_options=dict(graph_options),
        results=results,
        provenance={
            "run_id": context.run_id,
            "experiment": context.loaded.text,
            "seed": context.seed,
            "git_commit": git_commit(context.loaded.path.parent),
        },
    )


def export_bundle(context: RunContext, bundle: Bundle) -> Exported:
    """Write the folder and the archive into the run's folder."""
    with context.stage("export"):
        folder, archive = write_bundle(bundle, context.folder / "bundle")
        exported = Exported(
            folder=str(folder),
            archive=str(archive),
            digest=bundle.sealed().digest,
            num_entries=len(bundle.entries),
            stock=bundle.stock,
        )
        context.emit(exported)
    return exported


def prove(context: RunContext, bundle: Bundle, validated: ModelValidated) -> Proved | None:
    """Two fresh processes with empty caches, on the scenario that gained most: stock, and the bundle."""
    if bundle.stock:
        return None
    best = max(validated.scenarios, key=lambda s: s.speedup.ratio).scenario
    expected = [entry.key for entry in bundle.entries if entry.scenario == best]
    with context.stage("prove", total=2, note=f"scenario {best}, empty caches"):
        jobs = [
            (
                label,
                Prove(
                    loaded=context.loaded,
                    scenario=best,
                    device=context.device,
                    threads=context.threads,
                    bundle=which,
                    seed=context.seed + 4,
                ),
            )
            for label, which in (("stock", None), ("bundle", bundle))
        ]
        try:
            stock, tuned = context.run_all("prove", jobs, _TIMEOUT_S)
        except WorkerError as error:
            proved = Proved(
                passed=False,
                num_hits=0,
                num_entries=len(expected),
                num_benchmarks=0,
                compile_s=0.0,
                stock_compile_s=0.0,
                message=f"a fresh process failed: {error}",
            )
        else:
            proved = _verdict(stock, tuned, expected)
        context.emit(proved)
    return proved


def _verdict(stock: Proof, tuned: Proof, expected: Sequence[str]) -> Proved:
    missed = [key for key in expected if not tuned.hits.get(key)]
    problems = []
    if missed:
        problems.append(f"{len(missed)} entries were not hit, e.g. {missed[0]}: {tuned.reasons.get(missed[0], 'no such GEMM')}")
    if tuned.num_benchmarks:
        problems.append(f"Inductor benchmarked {tuned.num_benchmarks} kernels")
    if tuned.modules:
        problems.append(f"the search stack was imported: {', '.join(tuned.modules)}")
    if tuned.step_us >= stock.step_us:
        problems.append(f"{tuned.step_us:.0f} us a step, stock {stock.step_us:.0f} us")
    return Proved(
        passed=not problems,
        num_hits=len(expected) - len(missed),
        num_entries=len(expected),
        num_benchmarks=tuned.num_benchmarks,
        compile_s=round(tuned.compile_s, 2),
        stock_compile_s=round(stock.compile_s, 2),
        message="; ".join(problems),
        scenario_us={"default": stock.step_us, "bundle": tuned.step_us},
    )


def git_commit(folder: Path) -> str:
    """The commit of the repository around a folder, with "+" if it has changes; empty outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip()
