"""Landscapes: written and read whole, packed, replayed through the package's own Tuner; kernels that recorders compile."""

from __future__ import annotations

import math
from pathlib import Path

import cute_choices
import cute_kernels
import gemm_kernels
import import_cute
import landscape_file
import pytest
import replay
import search_efficiency
import train_cost_model
from landscape_file import FOLDER, Landscape, Row, load_all
from synthetic_landscapes import made_up_landscape

from autokernel.search.space_file import load_space
from autokernel.search.tuner import Tuner


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    return made_up_landscape("made-up", 16, 4096, 4096, count=120)


def test_file_round_trip(landscape: Landscape, tmp_path: Path) -> None:
    path = landscape_file.save(landscape, tmp_path)
    assert path == tmp_path / "synthetic" / "made-up.json.gz"
    again = landscape_file.load(path)
    assert [(row.backend, row.config, row.status) for row in again.rows] == [
        (row.backend, row.config, row.status) for row in landscape.rows
    ]
    for one, other in zip(again.rows, landscape.rows, strict=True):
        assert one.us == pytest.approx(other.us, abs=1e-3)
    assert again.header == landscape.header
    assert again.problem == landscape.problem


def test_pack_and_unpack(landscape: Landscape, tmp_path: Path) -> None:
    landscape_file.save(landscape, tmp_path / "one")
    landscape_file.pack(tmp_path / "one", tmp_path / "all.zip")
    landscape_file.unpack(tmp_path / "all.zip", tmp_path / "two")
    assert [found.name for found in landscape_file.load_all(tmp_path / "two")] == ["made-up"]


def test_absent_parameters_stay_absent_and_unknown_formats_are_refused() -> None:
    rows = [
        Row(backend="inductor", config={"template": "mm", "BLOCK_M": 16}, status="OK", us=1.0),
        Row(backend="inductor", config={"template": "decompose_k", "k_split": 4}, status="RUN_ERROR"),
    ]
    data = landscape_file.to_json(Landscape(name="x", header={}, problem={}, rows=rows))
    assert landscape_file.from_json(data).rows == rows
    with pytest.raises(ValueError, match="format 7"):
        landscape_file.from_json({**data, "format": 7})


def test_the_careful_time_counts_and_later_recordings_win() -> None:
    quick = Row(backend="inductor", config={"a": 1}, status="OK", us=5.0)
    careful = Row(backend="inductor", config={"a": 1}, status="OK", us=5.0, careful_us=4.5)
    assert careful.best_us == 4.5
    first, second = (Landscape(name="x", header={}, problem={}, rows=[row]) for row in (quick, careful))
    assert landscape_file.merge(first, second).rows == [careful]


def test_quick_times_are_put_on_the_scale_of_the_careful_ones() -> None:
    def row(name: int, us: float, careful_us: float | None = None) -> Row:
        return Row(backend="inductor", config={"a": name}, status="OK", us=us, careful_us=careful_us)

    hot = [row(1, 100, 115), row(2, 101, 116.2), row(3, 102, 117.3)]
    quick = [row(4, 102.5), row(5, 110), row(6, 99)]
    stock = Row(backend="aten", config={}, status="OK", us=7.0)
    failed = Row(backend="inductor", config={"a": 7}, status="WRONG")
    found = {str(r.config): r.best_us for r in landscape_file.comparable([*hot, *quick, stock, failed])}
    assert found["{'a': 1}"] == 115, "measured is measured"
    assert found["{'a': 4}"] == pytest.approx(117.9, abs=0.1), "not better than what was careful at 115"
    assert found["{'a': 5}"] == pytest.approx(126.5, abs=0.1)
    assert found["{'a': 6}"] == 115, "it was not among the best, so it is no better than they are"
    assert found["{}"] == 7.0, "a backend without careful times keeps its own"
    assert found["{'a': 7}"] is None


@pytest.mark.parametrize("sampler", ["random", "tpe", "model"])
def test_a_replayed_search_visits_recorded_configs_once(landscape: Landscape, sampler: str) -> None:
    one = replay.Replay(landscape)
    search = Tuner(problem=one.problem, spaces=one.spaces, names=one.names, sampler=sampler, seed=1, max_trials=60)  # type: ignore[arg-type]
    asked = []
    for _ in range(60):
        (proposal,) = search.ask(1)
        asked.append(proposal.candidate.id)
        search.tell(proposal.number, one.evaluation(proposal.candidate))
    assert len(set(asked)) == 60


def test_needed_counts_failures() -> None:
    rows = [Row(backend="inductor", config={"template": "mm", "BLOCK_M": b}, status="OK", us=float(b)) for b in (16, 32)]
    problem = {"op": "mm", "batch": 1, "m": 16, "n": 64, "k": 64, "dtype": "bfloat16", "bias": False, "b": "k-major"}
    one = replay.Replay(Landscape(name="x", header={"hardware": "x"}, problem=problem, rows=rows))
    assert one.needed([None, 32.0, 16.0], 0.95) == 3
    assert one.needed([None, 32.0], 0.95) == math.inf
    assert one.reached([None, 32.0, 16.0], 2) == 0.5


def test_nothing_is_learned_from_the_weight_that_is_judged() -> None:
    def shape(name: str, m: int, n: int) -> Landscape:
        return Landscape(name=name, header={}, problem={"op": "mm", "m": m, "n": n, "k": 64})

    landscapes = [shape("a", 1, 64), shape("b", 16, 64), shape("c", 16, 128)]
    assert [one.name for one in search_efficiency.others(landscapes[0], landscapes)] == ["c"]


_TILE = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize(
    ("template", "gemm"),
    [
        ("mm", gemm_kernels.Gemm(name="x", op="mm", m=16, n=256, k=200)),
        ("mm_persistent_tma", gemm_kernels.Gemm(name="x", op="addmm", m=16, n=256, k=256)),
        ("bmm", gemm_kernels.Gemm(name="x", op="bmm", m=16, n=256, k=256, batch=4, k_major=False)),
    ],
)
def test_kernels_compile_for_hopper_without_a_gpu(
    template: str, gemm: gemm_kernels.Gemm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = {"template": template, **_TILE}
    kernel = gemm_kernels.compile_kernel(gemm, config, tmp_path, f"kernel_{template}")
    assert kernel.metadata.target.arch == 90
    assert 0 < kernel.metadata.shared <= gemm_kernels.MAX_SHARED
    mma = "mma.sync" in kernel.asm["ptx"]
    assert mma


def test_grids() -> None:
    gemm = gemm_kernels.Gemm(name="x", op="mm", m=17, n=200, k=64)
    assert gemm_kernels.grid_of(gemm, {"template": "mm", **_TILE}) == (8, 1, 1)
    wide = gemm_kernels.Gemm(name="x", op="mm", m=2048, n=4096, k=64)
    assert gemm_kernels.grid_of(wide, {"template": "mm_persistent_tma", **_TILE}) == (132, 1, 1)
    batched = gemm_kernels.Gemm(name="x", op="bmm", m=17, n=64, k=64, batch=3)
    assert gemm_kernels.grid_of(batched, {"template": "bmm", **_TILE}) == (2, 3, 1)


def test_an_archive_adds_its_backend_to_what_is_recorded(tmp_path: Path) -> None:
    problem = {"op": "mm", "batch": 1, "m": 64, "n": 4096, "k": 4096, "dtype": "bfloat16", "bias": False, "b": "k-major"}

    def recorded(backend: str, us: float, header: dict[str, object]) -> Landscape:
        rows = [
            Row(backend="aten", config={"prepack": False}, status="OK", us=us, careful_us=us),
            Row(backend=backend, config={"tile": us}, status="OK", us=us),
        ]
        return Landscape(name="x", header={"hardware": "synthetic", **header}, problem=problem, rows=rows)

    def unpacked(landscape: Landscape) -> Landscape:
        landscape_file.save(landscape, tmp_path / "one")
        landscape_file.pack(tmp_path / "one", tmp_path / "all.zip")
        (path,) = landscape_file.unpack(tmp_path / "all.zip", tmp_path / "two")
        return landscape_file.load(path)

    unpacked(recorded("inductor", 10.0, {"legal": 1}))
    both = unpacked(recorded("cutedsl", 12.0, {"cutedsl": {"legal": 5}}))
    assert {row.backend: row.us for row in both.rows} == {"aten": 10.0, "inductor": 10.0, "cutedsl": 12.0}
    assert both.header["legal"] == 1
    assert both.header["cutedsl"] == {"legal": 5}
    again = unpacked(recorded("inductor", 9.0, {"legal": 2}))
    assert {row.backend: row.us for row in again.rows} == {"aten": 9.0, "inductor": 9.0, "cutedsl": 12.0}


def test_a_recording_of_cute_kernels_begins_with_one_config_of_each() -> None:
    gemms = [gemm_kernels.Gemm(name=f"x{m}", op="mm", m=m, n=4096, k=4096) for m in (2048, 8192)]
    found = {gemm.name: cute_kernels.legal_configs(gemm) for gemm in gemms}
    keys = {gemm.name: [cute_kernels.kernel_key(gemm, config) for config in found[gemm.name]] for gemm in gemms}
    for name, each in keys.items():
        count = len(set(each))
        assert count < len(found[name]), "swizzles share a kernel"
        assert len(set(each[:count])) == count
    assert keys["x2048"][:100] == keys["x8192"][:100], "in the same order everywhere"


def test_a_race_of_another_day_is_put_on_the_scale_of_what_both_have() -> None:
    def cluster(parts: int, **more: int) -> dict[str, str | int]:
        return {"source": "cluster", "tile_m": 64, "tile_n": 16, "split_k": parts, **more}

    quack = {"source": "quack", "tile_m": 64, "tile_n": 64}
    configs = [dict(quack), {**quack, "stream": True}, cluster(1)]  # the last two read with hints
    rows = [Row(backend="cutedsl", config=config, status="OK", us=20.0) for config in configs]
    rows.append(Row(backend="aten", config={"prepack": False}, status="OK", us=14.0))
    both = Landscape(name="x", header={}, problem={}, rows=rows)
    race = [
        {"config": {**quack, "stream": False}, "us": 10.0},
        {"config": {**quack, "stream": False, "tile_k": 128}, "us": 9.0, "careful_us": 9.5},
        {"config": {**quack, "stream": True, "tile_k": 128}, "us": 8.5},
        {"config": cluster(2, stream=0), "us": 8.0},
    ]
    assert import_cute.completed({"source": "operators"}) == {"source": "operators", "family": "persistent"}
    assert import_cute.imported(both, race) == 2
    found = {(str(row.config["source"]), row.config.get("tile_k")): (row.us, row.careful_us) for row in both.of(["cutedsl"])}
    assert found == {("quack", 0): (20.0, None), ("quack", 128): (18.0, 19.0), ("cluster", 0): (16.0, None)}
    assert not [row for row in both.rows if "stream" in row.config], "what was timed with hints is gone"
    assert len(both.of(["aten"])) == 1
    assert both.header["cutedsl"]["imported"] == [{"rows": 2, "shared": 1, "scale": 2.0}]
    assert import_cute.imported(both, race) == 0, "nothing twice"
    assert import_cute.imported(both, [{"config": cluster(4, stream=0), "us": 8.0}]) == 1
    assert both.rows[-1].us == 8.0, "with nothing in common it stays as it was measured"


def test_every_kind_of_kernel_is_known_to_a_model_that_was_trained_on_it() -> None:
    config = {"tile_m": 128, "tile_n": 128, "cluster_m": 1, "cluster_n": 1, "swap": False, "swizzle": 8}
    kinds = ({"source": "quack", "pingpong": True}, {"source": "quack", "pingpong": False}, {"source": "operators"})
    rows = [
        Row(backend="cutedsl", config={**config, **kind}, status="OK", us=10.0 + i + 3 * j)
        for i, kind in enumerate(kinds)
        for j in range(20)
    ]
    problem = {"op": "mm", "batch": 1, "m": 64, "n": 4096, "k": 4096, "dtype": "bfloat16", "bias": False, "b": "k-major"}
    model = train_cost_model.train([Landscape(name="x", header={"hardware": "x"}, problem=problem, rows=rows)])
    assert set(model.kinds["cutedsl"]) == {"pingpong", "cooperative", "operators"}
    found = model.predict(
        "cutedsl", replay.names_of(Landscape(name="x", header={}, problem=problem, rows=[])), [row.config for row in rows]
    )
    assert found is not None
    assert found[0] < found[-1], "the slowest kind is told from the fastest"


@pytest.mark.parametrize("path", sorted(landscape_file.FOLDER.rglob("*.json.gz")), ids=lambda path: path.name)
def test_rules_of_speed_leave_the_fastest_config_that_was_recorded_in_its_space(path: Path) -> None:
    recorded = landscape_file.load(path)
    spaces = load_space(replay.problem_of(recorded).op, replay.ROOT / "search_spaces")
    for backend in {row.backend for row in recorded.rows} & spaces.keys():
        space = spaces[backend].bind(replay.names_of(recorded))
        timed = [(row.best_us, bool(space.violations(row.config)), row) for row in recorded.rows if row.backend == backend]
        of_all = min(us for us, _, _ in timed if us is not None)
        in_space = min(us for us, outside, _ in timed if us is not None and not outside)
        best = min((row for us, _, row in timed if us == of_all), key=lambda row: str(row.config))
        assert in_space <= 1.005 * of_all, f"{backend}: {best.config} is outside: {space.violations(best.config)}"


def test_where_choices_of_cute_kernels_pay_is_read_from_the_landscapes() -> None:
    landscapes = load_all(FOLDER)
    down = next(one for one in landscapes if one.name == "llama8b-down-m16")
    of_either = [cute_choices.best_us(down, lambda c, s=s: bool(c.get("swap")) is s) for s in (False, True)]
    assert None not in of_either
    assert min(of_either) == cute_choices.best_us(down, lambda _: True)
    (line,) = [line for line in cute_choices.table(landscapes).splitlines() if line.startswith("| down | 16 |")]
    assert f"| {of_either[0]:.1f} | **{of_either[1]:.1f}** |" in line, "the faster one is marked"
