"""What the search stage decides by itself."""

from __future__ import annotations

from autokernel.stages.search import study_name


def test_names_of_studies_fit_into_a_database_and_stay_apart() -> None:
    assert study_name("run", "cpu: mm(a, b)") == "run cpu: mm(a, b)"
    long = [f"cuda: generated({'t1 = add(i0, i1); ' * 100}{end})" for end in ("a", "b")]
    names = [study_name("20261121-142957-f2fcdd28", key) for key in long]
    assert all(len(name) < 480 for name in names), "with the fingerprint that may follow, below 512"
    assert names[0] != names[1]
    assert names == [study_name("20261121-142957-f2fcdd28", key) for key in long]
