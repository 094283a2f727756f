"""Stages 6 and 7: write the bundle, and prove in a fresh process that production code uses it."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import autokernel
from autokernel.config import Scenario
from autokernel.errors import AutokernelError, WorkerError
from autokernel.events import Exported, ModelValidated, Proved
from autokernel.export.bundle import Bundle, Entry, ScenarioOptions, write_bundle
from autokernel.export.matching import gemm_of
from autokernel.export.proof import Proof, together
from autokernel.export.prove import BUNDLE, DEFAULT, Prove
from autokernel.records import ConfigValue
from autokernel.stages.context import RunContext
from autokernel.stages.whole_model import footprint_of, run_on_model, with_layers

_TIMEOUT_S = 900
_MOST_PROCESSES = 4  # that prove a few layers of a model at once
_MAX_COMPILE_RATIO = {"cpu": 1.2, "cuda": 1.3}  # of a compilation with the bundle over Inductor's default


def make_bundle(
    context: RunContext,
    entries: Sequence[Entry],
    graph_options: Mapping[str, ConfigValue],
    scenario_options: Sequence[ScenarioOptions] = (),
    validated: ModelValidated | None = None,
    rows: Mapping[str, Any] | None = None,
) -> Bundle:
    """A bundle of this run; with its evidence once the model was validated: that of the model, and of ranges of `rows`."""
    results: dict[str, Any] = validated.to_json() if validated is not None else {}
    if rows:
        results["rows"] = dict(rows)
    return Bundle(
        name=context.experiment.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=autokernel.__version__,
        environment=context.environment,
        entries=tuple(entries),
        graph_options=dict(graph_options),
        scenario_options=tuple(scenario_options),
        results=results,
        provenance={
            "run_id": context.run_id,
            "experiment": context.loaded.text,
            "seed": context.seed,
            "git_commit": git_commit(context.loaded.path.parent),
        },
    )


def export_bundle(context: RunContext, bundle: Bundle, validated: ModelValidated) -> Exported:
    """Write the folder and the archive into the run's folder, compiled kernels included.

    Raises:
        AutokernelError: the bundle changes something, and the whole model did not pass with it.
    """
    from autokernel.export.cutedsl import with_objects

    if not (bundle.stock or validated.passed):
        failed = [c.name for c in validated.verdict.failures] + [e.metric for e in validated.evals if not e.passed]
        failed += [f"the time of {s.scenario}" for s in validated.scenarios if not s.passed]
        raise AutokernelError(f"a bundle that failed validation is not exported: {', '.join(failed) or 'nothing was checked'}")
    with context.stage("export"):
        bundle, files = with_objects(bundle)
        folder, archive = write_bundle(bundle, context.folder / "bundle", files)
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
    """Fresh processes that compile every scenario with entries; Inductor's default too on the one that gained most.

    On a GPU, where a few layers show it, there are several at once: one for what is compared, the others share the rest.
    """
    if bundle.stock:
        return None
    best = max(validated.scenarios, key=lambda s: s.speedup.ratio).scenario
    concerned = {entry.scenario for entry in bundle.entries} | {best}
    scenarios = tuple(name for name in context.experiment.scenarios if name in concerned)
    # layers are alike, so a few of a large model show what there is to show: compiling 32 takes half a minute a scenario
    layers = context.experiment.validation.ablation_layers if context.device == "cuda" else None
    loaded = with_layers(context.loaded, layers)
    part = f" ({layers} layers)" if loaded is not context.loaded else ""
    jobs: list[tuple[str, str, Prove]] = []
    for own in _shares(scenarios, best) if loaded is not context.loaded else [scenarios]:
        job = Prove(
            loaded=loaded,
            scenarios=own,
            device=context.device,
            threads=context.threads,
            bundle=bundle,
            rows={name: batches_to_show(bundle, name, context.experiment.scenarios[name]) for name in own},
            limits=difference_limits(validated, own),
            compare=best if best in own else None,
            max_compile_ratio=_MAX_COMPILE_RATIO[context.device],
            seed=context.seed + 4,
            timeout_s=_TIMEOUT_S - 30,
        )
        jobs.append((f"proof: {', '.join(own)}", _largest(context, own, layers), job))
    what = f"{', '.join(scenarios)} in {'a fresh process' if len(jobs) == 1 else 'fresh processes'}{part}"
    with context.stage("prove", total=len(jobs), note=f"{what}; {best} against stock"):
        try:
            proof = together(run_on_model(context, "prove", jobs, _TIMEOUT_S, layers=layers, bundle=bundle), scenarios)
        except WorkerError as error:
            proved = Proved(
                passed=False,
                num_hits=0,
                num_entries=len(bundle.entries),
                num_benchmarks=0,
                compile_s=0.0,
                stock_compile_s=0.0,
                message=f"a fresh process failed: {error}",
            )
        else:
            proved = _verdict(proof, [entry.key for entry in bundle.entries])
        context.emit(proved)
    return proved


def batches_to_show(bundle: Bundle, name: str, scenario: Scenario) -> tuple[int, ...]:
    """Other batches of a scenario at which its entries for ranges of rows are to be seen: some inside, one beyond all of them.

    As few as reach each range, where there is one that does: rows of products go with the batch, but one range may end before
    the rows that the next batch makes. None of one row where graph options make something else of those products.
    """
    least = 2 if bundle.graph_options.get("one_row") == "all" else 1
    spans = []
    for entry in bundle.entries:
        gemm = gemm_of(entry.problem)
        if entry.rows is not None and entry.scenario == name and gemm is not None and gemm.m % scenario.batch == 0:
            each = gemm.m // scenario.batch  # rows that one sample makes
            spans.append((max(least, -(-entry.rows[0] // each)), entry.rows[1] // each))
    if not spans:
        return ()
    beyond = max(last for _, last in spans) + 1
    left = {(first, last) for first, last in spans if first <= last and not first == last == scenario.batch}
    chosen: list[int] = []
    while left:
        others = [batch for batch in range(least, beyond) if batch != scenario.batch]
        best = max(others, key=lambda batch: (sum(first <= batch <= last for first, last in left), abs(batch - scenario.batch)))
        chosen.append(best)
        left = {(first, last) for first, last in left if not first <= best <= last}
    return (*chosen, beyond)


def _shares(scenarios: Sequence[str], best: str) -> list[tuple[str, ...]]:
    """What each process proves: the scenario that is compared alone, and the others by turns."""
    others = [name for name in scenarios if name != best]
    count = min(_MOST_PROCESSES - 1, len(others))
    return [(best,), *(tuple(others[i::count]) for i in range(count))]


def _largest(context: RunContext, scenarios: Sequence[str], layers: int | None) -> str:
    """Which of the scenarios of one process takes most memory: they are compiled one after the other."""
    if context.device != "cuda":
        return scenarios[0]
    sizes = footprint_of(context, layers).scenarios
    return max(scenarios, key=lambda name: sizes.get(name, 0))


def difference_limits(validated: ModelValidated, scenarios: Sequence[str]) -> dict[str, float]:
    """How far outputs may be from eager's, relative to their norm, by what validation measured against higher precision; of
    tokens, what their logits may lack to the largest.

    A bundle may be off by the check's limit, and eager by half of that: the sum is the most that two right answers differ by.
    """
    limits = {}
    for scenario in scenarios:
        names = (f"{scenario}: norm of error", f"{scenario}: chosen logits", f"{scenario}[")
        ends = ("norm of error", "chosen logits")
        found = [c.limit for c in validated.verdict.checks if c.name.startswith(names) and c.name.endswith(ends)]
        if found:
            limits[scenario] = 1.5 * max(found)
    return limits


def _verdict(proof: Proof, expected: Sequence[str]) -> Proved:
    missed = [key for key in expected if not proof.hits.get(key)]
    problems = []
    if missed:
        why = proof.reasons.get(missed[0], "the compiled model has nothing like it")
        problems.append(f"{len(missed)} entries were not hit, e.g. {missed[0]}: {why}")
    problems += [f"{scenario.scenario}: {scenario.problem}" for scenario in proof.scenarios if scenario.problem]
    problems += [f"{rows.scenario} at batch {rows.batch}: {rows.problem}" for rows in proof.rows if rows.problem]
    if proof.num_benchmarks:
        problems.append(f"Inductor benchmarked {proof.num_benchmarks} kernels")
    if proof.modules:
        problems.append(f"the search stack was imported: {', '.join(proof.modules)}")
    if proof.speedup is not None and proof.speedup.high < 1:
        problems.append(f"{proof.step_us[BUNDLE]:.0f} us a step, stock {proof.step_us[DEFAULT]:.0f} us")
    return Proved(
        passed=not problems,
        num_hits=len(expected) - len(missed),
        num_entries=len(expected),
        num_benchmarks=proof.num_benchmarks,
        compile_s=round(proof.compile_s.get(BUNDLE, 0.0), 2),
        stock_compile_s=round(proof.compile_s.get(DEFAULT, 0.0), 2),
        message="; ".join(problems),
        scenario_us=dict(proof.step_us),
        scenarios=tuple(scenario.scenario for scenario in proof.scenarios),
        constant_bytes=proof.constant_bytes,
        rows=tuple(
            f"{rows.scenario} at batch {rows.batch}: {len(rows.used)} entries for ranges of rows used, {len(rows.stock)} not"
            for rows in proof.rows
        ),
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
