"""Part of stage 3: no winner with a matrix product in it is slower than what max-autotune runs for the same problem.

Who is slower is refused here, so that what an experiment exports is no slower than eager, Inductor's default and max-autotune,
kernel by kernel, as far as these races can tell. Where Inductor's pick itself wins, it is the entry.
"""

from __future__ import annotations

from autokernel.backends.max_autotune import is_max_autotune
from autokernel.config import Experiment
from autokernel.evaluate.confirm import Confirmation, Contender
from autokernel.ops import get_op
from autokernel.records import Problem, Speedup

MODE = "max-autotune"


def asks(experiment: Experiment, problem: Problem) -> bool:
    """Whether max-autotune is asked about a problem: it chooses among kernels for matrix products, alone or inside a fusion.

    Attention that is written out is two of them; as a call of the library it is none.
    """
    settings = experiment.validation
    has_products = get_op(problem.op).dims(problem).get("k", 0) > 0 or "written" in dict(problem.scalars)
    return settings.max_autotune_picks and MODE in settings.baselines and has_products


def may_win(experiment: Experiment, problem: Problem) -> bool:
    """Whether a bundle may have Inductor's pick: what is asked of it, and the experiment allows."""
    return "inductor" in experiment.backends and asks(experiment, problem)


def over_max_autotune(confirmation: Confirmation, contender: Contender) -> Speedup | None:
    """How many times as fast as max-autotune a contender is, by the paired rounds; None where that did not take part."""
    rival, comparison = confirmation.max_autotune, confirmation.comparison
    if rival is None or comparison is None or contender.candidate.id not in comparison.rounds_us:
        return None
    return comparison.faster(contender.candidate.id, rival.candidate.id)


def is_slower(over: Speedup | None) -> bool:
    """Whether all of the interval lies below 1."""
    return over is not None and over.high < 1


def picked(confirmation: Confirmation) -> str:
    """What max-autotune runs for the problem; or why nobody was compared with that; empty if it was not asked."""
    failed = next((failure for failure in confirmation.failures if is_max_autotune(failure.candidate)), None)
    return confirmation.picked if failed is None else f"not compared, {failed.status}: {failed.message}"


def why_refused(confirmation: Confirmation, over: Speedup) -> str:
    """What is said of a finalist that is slower."""
    return f"{MODE} is faster, with {confirmation.picked}: over it {over.ratio:.3f} [{over.low:.3f}, {over.high:.3f}]"
