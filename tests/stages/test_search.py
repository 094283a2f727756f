"""What the search stage decides by itself."""

from __future__ import annotations

from autokernel.records import Evaluation, Hotspot, Problem, Status, TensorSpec
from autokernel.search.budget import Scheduler
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space
from autokernel.search.tuner import Tuner
from autokernel.stages.search import Hunt, _next, study_name


def test_names_of_studies_fit_into_a_database_and_stay_apart() -> None:
    assert study_name("run", "cpu: mm(a, b)") == "run cpu: mm(a, b)"
    long = [f"cuda: generated({'t1 = add(i0, i1); ' * 100}{end})" for end in ("a", "b")]
    names = [study_name("20261121-142957-f2fcdd28", key) for key in long]
    assert all(len(name) < 480 for name in names), "with the fingerprint that may follow, below 512"
    assert names[0] != names[1]
    assert names == [study_name("20261121-142957-f2fcdd28", key) for key in long]


def hunt(n: int) -> Hunt:
    """For a product of fp32 with n columns, on an H200, by Inductor's templates alone."""
    left, right = TensorSpec.contiguous((37, 768), "bfloat16"), TensorSpec.contiguous((768, n), "bfloat16")
    problem = Problem(op="mm", device="cuda", inputs=(left, right), constants=(1,))
    device = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232448, l2_bytes=60 << 20)
    sizes = {"m": 37, "n": n, "k": 768, "batch": 1, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}
    tuner = Tuner(
        problem=problem, spaces={"inductor": load_space("mm")["inductor"]}, names=names_for(sizes, device), sampler="model",
        max_trials=30,
    )  # fmt: skip
    spot = Hotspot(
        problem=problem, scenario="s", num_calls=1, time_us=10.0, share=0.5, weight=0.5, roofline_us=1.0
    )  # fmt: skip
    return Hunt(hotspot=spot, tuner=tuner)


def test_trials_of_a_problem_whose_candidates_are_all_wrong_go_to_another() -> None:
    wrong, other = hunt(768), hunt(1536)
    hunts = {h.hotspot.problem.key: h for h in (wrong, other)}
    scheduler = Scheduler(dict.fromkeys(hunts, 30), dict.fromkeys(hunts, 0.5))
    spent = dict.fromkeys(hunts, 0)
    while (flight := _next(hunts, scheduler)) is not None:
        candidate = flight.proposal.candidate
        status = Status.WRONG if flight.hunt is wrong else Status.TIMEOUT
        flight.hunt.tuner.tell(flight.proposal.number, Evaluation(candidate=candidate, status=status, message="because"))
        spent[candidate.problem.key] += 1
    assert sum(spent.values()) == 60
    assert spent[wrong.hotspot.problem.key] <= 15, "at most five of each template"
