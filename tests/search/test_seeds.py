"""Who proposes first: stock defaults, earlier winners, and nvMatmulHeuristics, which needs no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest

from autokernel.cutedsl.config import BLACKWELL_PROBLEMS
from autokernel.ops import get_op
from autokernel.records import DTYPE_BYTES, Candidate, Evaluation, Problem, Status, TensorSpec
from autokernel.search import inductor_lists, nvmatmul, nvmatmul_cute, nvmatmul_library
from autokernel.search.proposals import SEEDED_BY_RULE
from autokernel.search.seeds import SeedContext, history_seeds, seeds_from, stock_seeds
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

Evaluate = Callable[..., Evaluation]
CPU = DeviceFacts(device="cpu", threads=4, isa="AVX512")
H200 = DeviceFacts(device="cuda", isa="sm_90", smem_bytes=232448, num_units=132)


def problem(m: int, n: int, k: int, dtype: str = "bfloat16", device: str = "cpu", op: str = "mm") -> Problem:
    weight = TensorSpec(shape=(k, n), stride=(1, k), dtype=dtype)
    inputs = (TensorSpec.contiguous((m, k), dtype), weight)
    if op == "addmm":
        inputs = (TensorSpec.contiguous((n,), dtype), *inputs)
    if op == "bmm":
        inputs = (TensorSpec.contiguous((8, m, k), dtype), TensorSpec.contiguous((8, k, n), dtype))
    return Problem(op=op, device=device, inputs=inputs, constants=(len(inputs) - 1,) if op != "bmm" else ())


def context(p: Problem, facts: DeviceFacts, history: tuple[Evaluation, ...] = ()) -> SeedContext:
    (m, k), n = p.inputs[-2].shape[-2:], p.inputs[-1].shape[-1]
    dims = {"m": m, "n": n, "k": k, "dtype_bytes": DTYPE_BYTES[p.inputs[-1].dtype], "num_epilogue": int(p.op == "addmm")}
    dims |= {"batch": 8} if p.op == "bmm" else {"has_constant_weight": 1}
    return SeedContext(problem=p, spaces=load_space(p.op), names=names_for(dims, facts), history=history)


def test_stock_is_the_default_of_each_backend() -> None:
    seeds = stock_seeds(context(problem(64, 512, 512), CPU))
    assert [s.candidate.backend for s in seeds] == ["aten", "inductor"]
    assert seeds[0].candidate.config == {"prepack": False}
    assert {v for k, v in seeds[1].candidate.config.items() if k.startswith(("threads", "block"))} == {0}


def gemm(threads: tuple[int, int, int], **blocks: int) -> dict[str, Any]:
    m, n, k = threads
    return {
        "template": "cpp_gemm", "threads_m": m, "threads_n": n, "threads_k": k,
        "block_m": 0, "block_n": 0, "block_k": 0, "k_slices": 1, **blocks,
    }  # fmt: skip


def test_history_prefers_this_problem_then_its_nearest_neighbours(evaluate: Evaluate) -> None:
    here, near, far, other = (
        problem(64, 512, 512),
        problem(1, 512, 512),
        problem(64, 4096, 512),
        problem(64, 512, 512, "float32"),
    )

    def done(p: Problem, config: dict[str, Any], result: float | Status, backend: str = "inductor") -> Evaluation:
        return evaluate(Candidate(problem=p, backend=backend, config=config), result)

    history = (
        done(near, gemm((1, 4, 1)), 5.0),
        done(far, gemm((4, 1, 1)), 1.0),
        done(far, gemm((1, 1, 4)), 2.0),  # slower than the one above: a neighbour hands on its fastest
        done(other, gemm((0, 0, 0)), 0.1),  # another dtype
        done(here, gemm((2, 2, 1)), 9.0),
        done(here, {"prepack": True}, 8.0, "aten"),
        done(here, gemm((0, 0, 0)), Status.WRONG),
    )
    seeds = history_seeds(context(here, CPU, history))
    assert [s.candidate.config.get("prepack", s.candidate.config.get("threads_m")) for s in seeds] == [True, 2, 4, 1]
    assert all(s.candidate.problem == here for s in seeds)


def test_nine_doublings_away_is_no_neighbour(evaluate: Evaluate) -> None:
    big, small = problem(512, 512, 512), problem(1, 512, 512)
    history = (evaluate(Candidate(problem=big, backend="inductor", config=gemm((4, 1, 1))), 3.0),)
    assert history_seeds(context(small, CPU, history)) == []


def test_history_is_moved_to_a_legal_config(evaluate: Evaluate) -> None:
    big, small = problem(16, 512, 512), problem(2, 512, 512)
    config = gemm((4, 1, 1), block_m=4, block_n=4, block_k=64)
    ctx = context(small, CPU, (evaluate(Candidate(problem=big, backend="inductor", config=config), 3.0),))
    (seed,) = history_seeds(ctx)
    assert ctx.spaces["inductor"].violations(seed.candidate.config, ctx.names) == []
    assert seed.candidate.config["block_n"] == 4
    assert seed.candidate.config["block_m"] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize(("op", "template"), [("mm", "mm"), ("addmm", "mm"), ("bmm", "bmm")])
@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096), (16, 6144, 4096), (48, 4096, 14336), (128, 4096, 4096), (4096, 4096, 14336)]
)
def test_nvmatmul_gives_legal_triton_tiles(dtype: str, op: str, template: str, shape: tuple[int, int, int]) -> None:
    if dtype == "float32" and op != "bmm":
        shape = (*shape[:2], 256)  # the templates are too inexact for more
    ctx = context(problem(*shape, dtype=dtype, device="cuda", op=op), H200)
    everything = nvmatmul.nvmatmul_seeds(ctx)
    assert {s.candidate.backend for s in everything} <= {"inductor", "triton", "cutedsl"}
    for seed in everything:
        assert seed.origin == "nvmatmul"
        assert ctx.spaces[seed.candidate.backend].violations(seed.candidate.config, ctx.names) == []
    seeds = [s for s in everything if s.candidate.backend == "inductor"]
    assert 2 <= len(seeds) <= nvmatmul.MAX_SEEDS
    assert len({s.candidate.id for s in seeds}) == len(seeds)
    templates = [s.candidate.config["template"] for s in seeds]
    assert templates[0] == template
    assert set(templates) <= {template, "mm_persistent_tma"}
    if op == "bmm" or shape[0] <= 32:
        assert "mm_persistent_tma" not in templates
    elif shape[0] >= 128:
        assert "mm_persistent_tma" in templates
    assert {s.candidate.config["num_warps"] for s in seeds} >= {4, 8} or shape[0] < 64
    assert [s.candidate for s in nvmatmul.nvmatmul_seeds(ctx)] == [s.candidate for s in everything]


@pytest.mark.parametrize("op", ["mm", "addmm", "merged_mm"])
def test_templates_are_too_inexact_for_long_sums_in_fp32(op: str) -> None:
    def default(k: int, dtype: str) -> Any:
        names = context(problem(37, 768, k, dtype=dtype, device="cuda"), H200).names
        return load_space(op)["inductor"].default(names)

    assert default(768, "float32") is None
    assert default(768, "bfloat16") is not None
    assert default(256, "float32") is not None


def test_nvmatmul_knows_small_and_large_rows() -> None:
    def first(m: int) -> Any:
        p = problem(m, 4096, 4096, device="cuda")
        query = nvmatmul_library.query_for(p, dict(context(p, H200).names))
        assert isinstance(query, nvmatmul_library.Query)
        assert query.layout == "TN_ROW_MAJOR"  # rows times a transposed weight, as in nn.Linear
        rows = nvmatmul.ask_library(query)
        assert all(a.runtime_s <= b.runtime_s for a, b in itertools.pairwise(rows) if a.split_k == b.split_k == 1)
        assert all(row.runtime_s > 0 for row in rows)
        return rows[0]

    assert first(16).block_m == 16
    assert first(48).block_m == 64  # both targets were asked, the larger tile is estimated faster
    assert first(128).runtime_s > 0  # where the library's own order is not that of its estimates
    assert first(4096).block_m * first(4096).block_n >= 128 * 128


@pytest.mark.parametrize(
    ("dtype", "facts", "reason"),
    [("float64", H200, "no letters"), ("bfloat16", DeviceFacts(device="cuda", isa="sm_70"), "no model of a GPU")],
)
def test_nvmatmul_says_why_it_has_none(dtype: str, facts: DeviceFacts, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert nvmatmul.nvmatmul_seeds(context(problem(64, 512, 512, dtype, "cuda"), facts)) == []
    assert reason in caplog.text


def test_nvmatmul_absent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "nvMatmulHeuristics", None)
    with caplog.at_level("INFO"):
        assert nvmatmul.nvmatmul_seeds(context(problem(64, 512, 512, device="cuda"), H200)) == []
    assert "pip install nvidia-matmul-heuristics" in caplog.text


def test_nvmatmul_is_for_gpus(caplog: pytest.LogCaptureFixture) -> None:
    assert nvmatmul.nvmatmul_seeds(context(problem(64, 512, 512), CPU)) == []


@pytest.mark.parametrize("op", ["mm", "addmm", "bmm"])
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (16, 4096, 14336), (256, 4096, 4096), (2048, 28672, 4096)])
def test_nvmatmul_gives_legal_cute_configs_of_both_sources(op: str, shape: tuple[int, int, int]) -> None:
    ctx = context(problem(*shape, device="cuda", op=op), H200)
    configs = [s.candidate.config for s in nvmatmul.nvmatmul_seeds(ctx) if s.candidate.backend == "cutedsl"]
    for config in configs:
        assert ctx.spaces["cutedsl"].violations(config, ctx.names) == []
        assert config.get("fuse", op == "addmm") == (op == "addmm")
    assert len({tuple(sorted(config.items())) for config in configs}) == len(configs)
    of_source = {source: [c for c in configs if c["source"] == source] for source in ("operators", "quack")}
    assert all(1 <= len(found) <= nvmatmul_cute.MAX_SEEDS for found in of_source.values())
    assert {config["source"] for config in configs[:2]} == {"operators", "quack"}  # by turns
    assert {config["family"] for config in of_source["operators"]} == {"persistent"}, "the library knows Hopper's instructions"
    swapped = {config["swap"] for config in configs}
    assert swapped == ({False, True} if shape[0] <= 512 else {False})
    if shape == (2048, 28672, 4096):
        first = of_source["operators"][0]  # what was the fastest on the card
        assert (first["tile_m"], first["tile_n"], first["cluster_m"], first["cluster_n"]) == (128, 256, 2, 1)
        assert {config["pingpong"] for config in of_source["quack"]} == {False, True}
    if shape[1:] == (4096, 14336):
        assert any(int(config.get("split_k", 1)) > 1 for config in of_source["quack"]) == (op != "bmm")


@pytest.mark.parametrize(
    ("op", "dtype", "sources"), [("scaled_mm", "float8_e4m3fn", {"quack"}), ("int_mm", "int8", {"operators"})]
)
@pytest.mark.parametrize("m", [16, 2048])
def test_nvmatmul_gives_legal_cute_configs_for_8_bits(op: str, dtype: str, sources: set[str], m: int) -> None:
    p = problem(m, 4096, 4096, dtype, "cuda", op)
    sizes = {"m": m, "n": 4096, "k": 4096, "dtype_bytes": 1, "out_bytes": 2, "k_major": 1, "fast_sums": 1, "num_epilogue": 0}
    ctx = SeedContext(problem=p, spaces=load_space(op), names=names_for({**sizes, "has_constant_weight": 1, "batch": 1}, H200))
    configs = [s.candidate.config for s in nvmatmul.nvmatmul_seeds(ctx)]
    assert {config["source"] for config in configs} == sources
    assert 1 <= len(configs) <= nvmatmul_cute.MAX_SEEDS
    assert not any(ctx.spaces["cutedsl"].violations(config, ctx.names) for config in configs)
    assert all(config.get("fast_accum", op == "scaled_mm") == (op == "scaled_mm") for config in configs)


@pytest.mark.parametrize("fast", [False, True])
def test_sums_in_fp32_leave_room_for_small_tiles_alone(fast: bool) -> None:
    sizes = {"m": 2048, "n": 4096, "k": 4096, "dtype_bytes": 1, "out_bytes": 2, "k_major": 1, "num_epilogue": 0}
    names = names_for({**sizes, "fast_sums": int(fast), "has_constant_weight": 1, "batch": 1}, H200)
    configs = list(load_space("scaled_mm")["cutedsl"].bind(names).enumerate())
    tiles = {(config["tile_m"], config["tile_n"], config["pingpong"]) for config in configs if not config.get("fast_accum")}
    assert tiles == {(128, 128, False)}
    fast_tiles = {(config["tile_m"], config["tile_n"]) for config in configs if config.get("fast_accum")}
    assert ((128, 256) in fast_tiles) == fast


@pytest.mark.parametrize("m", [16, 2048])
def test_nvmatmul_is_asked_for_the_product_of_a_norm(m: int) -> None:
    """Its x has three dimensions, and the kernel never splits K."""
    product = problem(m, 4096, 14336, device="cuda")
    rows = (
        TensorSpec.contiguous((2, m // 2, 14336), "bfloat16"),
        product.inputs[1],
        TensorSpec.contiguous((4096,), "bfloat16"),
    )
    p = dataclasses.replace(product, op="linear_rms_norm", inputs=rows, scalars=(("residual", False), ("eps", 1e-5)))
    ctx = SeedContext(problem=p, spaces=load_space(p.op), names=names_for(dict(get_op(p.op).dims(p)), H200))
    configs = [s.candidate.config for s in nvmatmul.nvmatmul_seeds(ctx)]
    assert 1 <= len(configs) <= nvmatmul_cute.MAX_SEEDS
    assert not any(ctx.spaces["cutedsl"].violations(config, ctx.names) for config in configs)
    assert not any("split_k" in config for config in configs)


def test_what_a_space_lacks_is_moved_only_where_nothing_fits() -> None:
    """With one row of 300 columns no tile of the best rows is legal everywhere; the answer is then the nearest that is."""
    names = context(problem(1, 304, 64, device="cuda"), H200).names
    space = load_space("mm")["cutedsl"].bind(names)
    row = nvmatmul_cute.CuteRow(
        tile_m=128, tile_n=256, cluster_m=4, cluster_n=1, split_k=3, swizzle=2, raster="columns", swap=False, runtime_s=1e-5
    )
    kept = dataclasses.replace(row, tile_m=64, tile_n=64, swap=True)
    (moved,) = nvmatmul_cute._legal("operators", [row], space)
    assert space.violations(moved) == []
    assert moved["tile_m"] == 64
    (only,) = nvmatmul_cute._legal("operators", [row, kept], space)
    assert (only["tile_m"], only["tile_n"], only["swap"]) == (64, 64, True)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_transpose_is_asked_as_the_library_spells_it(swapped: bool) -> None:
    p = problem(16, 4096, 14336, device="cuda")
    query = nvmatmul_library.query_for(p, dict(context(p, H200).names))
    assert isinstance(query, nvmatmul_library.Query)
    asked = query.transposed if swapped else query
    assert (asked.m, asked.n, asked.layout) == ((4096, 16, "TN_COL_MAJOR") if swapped else (16, 4096, "TN_ROW_MAJOR"))
    assert query.transposed.transposed == query
    rows = nvmatmul_cute.ask_cute(query, [(64, 64), (128, 64), (64, 128), (128, 128)])
    assert all(a.runtime_s <= b.runtime_s for a, b in itertools.pairwise(rows))
    assert {row.swap for row in rows} == {False, True}
    assert any(row.split_k > 1 for row in rows)
    whole = nvmatmul_cute.ask_cute(query, [(64, 64), (128, 64), (64, 128), (128, 128)], split=False)
    assert {row.split_k for row in whole} == {1}


@pytest.mark.parametrize(
    ("name", "isa", "gpu"),
    [
        ("NVIDIA H200", "sm_90", "H200_SXM"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100_SXM"),
        ("NVIDIA H100 PCIe", "sm_90", "H100_PCIE"),
        ("NVIDIA H100 NVL", "sm_90", "H100_NVL"),
        ("NVIDIA H20", "sm_90", "H20_SXM"),
        ("NVIDIA B200", "sm_100", "B200"),
        ("NVIDIA GB200", "sm_100", "GB200_NVL"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100_SXM_80GB"),
        ("NVIDIA A100 80GB PCIe", "sm_80", "A100_PCIE_80GB"),
        ("NVIDIA L40S", "sm_89", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "sm_89", "RTX_6000_ADA"),
        ("", "sm_90", "H200_SXM"),
        ("NVIDIA of the future", "sm_90a", "H200_SXM"),
        ("Tesla V100", "sm_70", None),
    ],
)
def test_a_card_is_asked_about_by_its_own_name(name: str, isa: str, gpu: str | None) -> None:
    assert nvmatmul_library.gpu_for(name, isa) == gpu


def test_every_model_of_a_card_is_the_librarys() -> None:
    library = pytest.importorskip("nvMatmulHeuristics", reason="pip install nvidia-matmul-heuristics")
    known = {gpu.name for gpu in library.NvMatmulHeuristicsNvidiaGpu}
    assert {gpu for _, gpu in nvmatmul_library.CARDS} | set(nvmatmul_library.ARCHITECTURES.values()) <= known


@pytest.mark.parametrize("letters", [nvmatmul_library.PRECISIONS[d] for d in ("bfloat16", "float8_e4m3fn", "float8_e5m2")])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 4096, 4096), (4096, 4096, 14336)])
def test_blackwell_has_seeds_without_a_card(letters: str, m: int, n: int, k: int) -> None:
    rows = nvmatmul_cute.blackwell_rows(m, n, k, letters)
    assert len(rows) >= 4
    assert {row.swap for row in rows} == {False, True}
    assert all((row.tile_m, row.tile_n) in nvmatmul_cute.BLACKWELL_TILES for row in rows)
    assert all(a.runtime_s <= b.runtime_s for a, b in itertools.pairwise(rows))
    if m == 4096:
        assert (rows[0].tile_m, rows[0].tile_n) == (128, 256)
        hopper = nvmatmul_library.Query(m=m, n=n, k=k, precision=letters, gpu="H200_SXM")
        assert rows[0].runtime_s < nvmatmul_cute.ask_cute(hopper, nvmatmul_cute.BLACKWELL_TILES)[0].runtime_s
    else:
        assert rows[0].tile_n < 64  # tiles that Hopper's kernels do not have


@pytest.mark.parametrize(("op", "templates"), [("mm", {"mm", "mm_persistent_tma"}), ("bmm", {"bmm"})])
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (64, 6144, 4096), (2048, 4096, 14336)])
def test_inductors_own_configs_are_seeds_on_a_gpu(op: str, templates: set[str], shape: tuple[int, int, int]) -> None:
    ctx = context(problem(*shape, device="cuda", op=op), H200)
    seeds = [s for s in stock_seeds(ctx) if s.origin == "inductor"]
    assert 1 <= len(seeds) <= inductor_lists.MAX_CONFIGS
    assert len({s.candidate.id for s in seeds}) == len(seeds)
    for seed in seeds:
        config = seed.candidate.config
        assert config["template"] in templates
        assert ctx.spaces["inductor"].violations(config, ctx.names) == []
        assert config["BLOCK_M"] < 2 * max(16, shape[0])


@pytest.mark.parametrize("op", ["mm", "addmm"])
def test_what_max_autotune_makes_of_one_row_comes_right_behind_stock(op: str) -> None:
    one = problem(1, 4096, 14336, device="cuda", op=op)
    stock, second, *rest = stock_seeds(context(one, H200))
    assert (stock.origin, second.origin, dict(second.candidate.config)) == ("stock", "max-autotune", {"template": "reduction"})
    assert second.origin not in SEEDED_BY_RULE, "a cost model that knows the backend would leave it out"
    assert all(seed.candidate.config.get("template") != "reduction" for seed in rest)
    row_major = dataclasses.replace(one, inputs=(*one.inputs[:-1], TensorSpec.contiguous((14336, 4096), "bfloat16")))
    for other in (problem(2, 4096, 14336, device="cuda", op=op), row_major):
        seeds = stock_seeds(context(other, H200))
        assert all(seed.candidate.config.get("template") != "reduction" for seed in seeds)


def test_the_table_is_what_this_torch_has() -> None:
    heuristics = pytest.importorskip("torch._inductor.template_heuristics.triton", reason="needs torch with Triton")
    lists = heuristics.CUDAConfigHeuristic()
    for mine, name in ((inductor_lists.MM, "mm_configs"), (inductor_lists.PERSISTENT, "persistent_mm_configs")):
        theirs = {(c.block_m, c.block_n, c.block_k, c.num_stages, c.num_warps) for c in getattr(lists, name)}
        assert theirs <= {(t.block_m, t.block_n, t.block_k, t.num_stages, t.num_warps) for t in mine}


def test_seeds_come_in_the_order_asked_for_and_once(evaluate: Evaluate) -> None:
    p = problem(64, 4096, 4096, device="cuda")
    default = stock_seeds(context(p, H200))[-1].candidate
    ctx = context(p, H200, (evaluate(default, 20.0),))
    seeds = seeds_from(("history", "stock", "nvmatmul"), ctx)
    assert [s.origin for s in seeds][:2] == ["history", "stock"]
    assert seeds[-1].origin == "nvmatmul"
    assert len({s.candidate.id for s in seeds}) == len(seeds)


@pytest.mark.parametrize("problem", BLACKWELL_PROBLEMS)
@pytest.mark.parametrize("shape", [(64, 4096, 4096), (4096, 4096, 14336)], ids=str)
def test_every_kind_of_problem_for_blackwell_has_seeds(problem: str, shape: tuple[int, int, int]) -> None:
    pytest.importorskip("nvMatmulHeuristics", reason="pip install nvidia-matmul-heuristics")
    found = nvmatmul_cute.blackwell_seeds(problem, shape)
    assert 1 <= len(found) == len(set(found)) <= nvmatmul_cute.MAX_SEEDS
    assert {seed[:2] for seed in found} <= set(nvmatmul_cute._BLACKWELL_ASKED[problem][1])
    assert nvmatmul_cute.blackwell_seeds(problem, shape, limit=1) == found[:1]


def test_precisions_that_blackwell_is_asked_about_are_understood_and_faster() -> None:
    """Letters that the library does not know would all be answered alike."""
    pytest.importorskip("nvMatmulHeuristics", reason="pip install nvidia-matmul-heuristics")
    times = [
        nvmatmul_cute.blackwell_rows(4096, 14336, 4096, nvmatmul_cute._BLACKWELL_ASKED[problem][0])[0].runtime_s
        for problem in ("dense", "mxfp8", "nvfp4")
    ]
    assert times[0] > 1.5 * times[1] > 2 * times[2], times


def test_problems_for_blackwell_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="are dense, mxfp8, nvfp4, grouped, not sparse"):
        nvmatmul_cute.blackwell_seeds("sparse", (64, 64, 64))
    with pytest.raises(ValueError, match="share 66 rows evenly"):
        nvmatmul_cute.blackwell_seeds("grouped", (66, 64, 64))
