"""Confirmations on the pool: what is lost gets a second try alone, what max-autotune brings down one without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from typing import TypeVar

from autokernel.errors import JobLost, WorkerError
from autokernel.evaluate.confirm import Confirmation, ConfirmCandidates
from autokernel.stages.context import RunContext
from autokernel.tracking.titles import problem_title

log = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT_S = 900


def confirmations(
    context: RunContext, jobs: Sequence[tuple[T, ConfirmCandidates]], stage: str = "confirm"
) -> Iterator[tuple[T, Confirmation]]:
    """Each as soon as it is there. What was lost, for want of room on the device or of a worker, gets a second try alone.

    What fails while max-autotune takes part gets another without it: compiling and timing its list may crash, or take too long.

    Args:
        context: whose pool runs them.
        jobs: with what their results are told apart by.
        stage: that is told how far they are.
    """
    running = {context.pool.submit(job, _TIMEOUT_S): (tag, job, "") for tag, job in jobs}
    lost: list[tuple[T, ConfirmCandidates, str]] = []
    while running:
        _, oldest, _ = next(iter(running.values()))
        context.progress(stage, len(jobs) - len(running) - len(lost), len(jobs), problem_title(oldest.problem))
        wait(running, return_when=FIRST_COMPLETED)
        for future in [future for future in running if future.done()]:
            tag, job, why = running.pop(future)
            try:
                yield tag, _with_reason(future.result(), why)
            except JobLost as error:
                log.info("%s is confirmed later: %s", job.problem.key, error)
                lost.append((tag, job, why))
            except WorkerError as error:
                if (again := _without_max_autotune(job, error)) is not None:
                    running[context.pool.submit(again, _TIMEOUT_S)] = (tag, again, str(error))
    if lost:
        context.pool.renew()  # idle workers hold memory, too
    for done, (tag, job, why) in enumerate(lost, start=len(jobs) - len(lost)):
        context.progress(stage, done, len(jobs), job.problem.key)
        left = [(replace(job, alone=True), why)]
        while left:
            alone, reason = left.pop()
            try:
                yield tag, _with_reason(context.pool.submit(alone, _TIMEOUT_S).result(), reason)
            except WorkerError as error:
                if (again := _without_max_autotune(alone, error)) is not None:
                    left.append((again, str(error)))


def _without_max_autotune(job: ConfirmCandidates, error: WorkerError) -> ConfirmCandidates | None:
    """The job to try after one that failed; None if it would be the same, or has no finalists then."""
    if not (job.max_autotune and job.finalists):
        log.warning("%s was not confirmed: %s", job.problem.key, error)
        return None
    log.warning("%s is confirmed without a look at max-autotune: %s", job.problem.key, error)
    return replace(job, max_autotune=False)


def _with_reason(confirmation: Confirmation, why: str) -> Confirmation:
    """With what kept max-autotune from taking part, if something did."""
    return replace(confirmation, picked=f"not compared: {why}") if why else confirmation
