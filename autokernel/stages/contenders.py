"""Plans and graph options that were timed in the model already: beside another stage, or by a process that was killed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autokernel.evaluate.end_to_end import ScenarioTiming, TimeScenario
from autokernel.events import ContendersTimed
from autokernel.records import digest_of
from autokernel.stages.context import RunContext


def known(context: RunContext, job: TimeScenario) -> ScenarioTiming | None:
    """The value that a job had beside an earlier stage or in an earlier process, as long as its scenario keeps its entries."""
    asked = _asked(job)
    if asked in context.timed_ahead:
        return context.timed_ahead[asked]
    earlier = context.state.contenders.get(asked) if context.state is not None else None
    return ScenarioTiming.from_json(earlier.timing) if earlier is not None else None


def tell(context: RunContext, jobs: Sequence[TimeScenario], timing: ScenarioTiming) -> None:
    """Have a process that resumes the run find the value of one of these jobs."""
    for asked in _answered(jobs, timing):
        context.emit(ContendersTimed(scenario=timing.scenario, asked=asked, timing=timing.to_json()))


def keep_ahead(context: RunContext, jobs: Sequence[TimeScenario], timing: ScenarioTiming) -> None:
    """Have a later stage find the value of one of these jobs."""
    context.timed_ahead |= dict.fromkeys(_answered(jobs, timing), timing)


def _answered(jobs: Sequence[TimeScenario], timing: ScenarioTiming) -> Iterator[str]:
    """What was asked by the one that has this value."""
    contenders = {*timing.speedups, *timing.failures}
    for job in jobs:
        if job.scenario == timing.scenario and contenders == {one.name for one in job.contenders[1:]}:
            yield _asked(job)


def _asked(job: TimeScenario) -> str:
    """What a job's answer depends on: the contenders, with their scenario's own entries."""
    contenders = []
    for one in job.contenders:
        entries = one.bundle.entries if one.bundle is not None else ()
        options = dict(one.bundle.graph_options) if one.bundle is not None else {}
        contenders.append([one.name, options, [entry.to_json() for entry in entries if entry.scenario == job.scenario]])
    return digest_of([job.scenario, contenders])
