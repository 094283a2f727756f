"""The backend of CuTe DSL kernels says what it takes, and refuses the rest in one sentence that names the rule."""

from __future__ import annotations

import itertools
import types
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from autokernel.backends import BuildError, Refused, cutedsl, get_backend
from autokernel.cutedsl.config import (
    CLUSTER_TILES,
    COOPERATIVE_TILES,
    OPERATORS_TILES,
    PINGPONG_TILES,
    SOURCES,
    CuteConfig,
)
from autokernel.errors import CompileError
from autokernel.ops import get_op
from autokernel.records import Candidate, ConfigValue, Problem, TensorSpec
from autokernel.search.space import BoundSpace, DeviceFacts, names_for
from autokernel.search.space_file import load_space

M, K, N = 16, 4096, 6144
H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232_448, l2_bytes=60 << 20)


def spec(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec.contiguous(shape, dtype)


def weight(n: int = N, k: int = K, dtype: str = "bfloat16") -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype=dtype, stride=(1, k))


MM = Problem(op="mm", inputs=(spec(M, K), weight()), device="cuda", constants=(1,))
ADDMM = Problem(op="addmm", inputs=(spec(N), spec(M, K), weight()), device="cuda", constants=(0, 2))
RESIDUAL = Problem(op="mm", inputs=(spec(M, K), weight(), spec(M, N)), device="cuda", constants=(1,), epilogue=("add",))
BMM = Problem(op="bmm", inputs=(spec(8, M, K), spec(8, K, N)), device="cuda")
MERGED = Problem(op="merged_mm", inputs=(spec(M, K), weight(), weight(1024)), device="cuda", constants=(1, 2))
FP8 = replace(MM, inputs=(spec(M, K, dtype="float8_e4m3fn"), weight(dtype="float8_e4m3fn")))
SCALES = (spec(dtype="float32"), spec(dtype="float32"))
SCALED = replace(
    FP8,
    op="scaled_mm",
    inputs=(*FP8.inputs, *SCALES, spec(N)),
    constants=(1, 3, 4),
    scalars=(("out_dtype", "bfloat16"), ("use_fast_accum", True)),
)
MIXED = replace(SCALED, inputs=(spec(M, K, dtype="float8_e5m2"), *SCALED.inputs[1:]))
INTEGER = replace(MM, op="int_mm", inputs=(spec(M, K, dtype="int8"), weight(dtype="int8")))
NORM = Problem(
    op="linear_rms_norm",
    inputs=(spec(2, 8, K), weight(), spec(N), spec(2, 8, N)),
    device="cuda",
    constants=(1, 2),
    scalars=(("residual", True), ("eps", 1e-5)),
)
MANY = replace(BMM, inputs=(spec(65536, M, K), spec(65536, K, N)))
TENSOROP: dict[str, ConfigValue] = {"source": "operators", "family": "tensorop", "tile_m": 128, "tile_n": 128}
PLAIN: dict[str, ConfigValue] = {"source": "quack", "tile_m": 128, "tile_n": 64, "swap": True}


def build(problem: Problem, config: Mapping[str, ConfigValue], constants: list[list[torch.Tensor]] | None = None) -> None:
    get_backend("cutedsl").build(Candidate(problem=problem, backend="cutedsl", config=config), constants or [[]])


@pytest.mark.parametrize("problem", [MM, ADDMM, RESIDUAL, BMM, MERGED, FP8, SCALED, MIXED, INTEGER, NORM], ids=str)
def test_it_takes_products_that_tma_can_read(problem: Problem) -> None:
    assert get_backend("cutedsl").supports(problem) is None


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (replace(MM, device="cpu"), "not for cpu"),
        (replace(MM, op="baddbmm"), "for baddbmm"),
        (replace(ADDMM, scalars=(("alpha", 2),)), "alpha is 2"),
        (replace(MM, inputs=(spec(M, K, dtype="float32"), weight(dtype="float32"))), "not float32"),
        (replace(MM, inputs=(spec(M, K, dtype="float16"), weight())), "not bfloat16 and float16"),
        (replace(FP8, inputs=(spec(M, K, dtype="float8_e5m2"), FP8.inputs[1])), "not float8_e4m3fn and float8_e5m2"),
        (replace(SCALED, inputs=(spec(M, K, dtype="int8"), *SCALED.inputs[1:])), "not float8_e4m3fn and int8"),
        (replace(MM, inputs=(spec(M, 4100), weight(k=4100))), "left matrix has 4100 contiguous .* 16 bytes"),
        (replace(MM, inputs=(spec(M, K), spec(K, 100))), "right matrix has 100 contiguous .* 16 bytes"),
        (replace(MM, inputs=(TensorSpec(shape=(M, K), dtype="bfloat16", stride=(4100, 1)), weight())), r"strides \(4100, 1\)"),
        (replace(MM, inputs=(TensorSpec(shape=(M, K), dtype="bfloat16", stride=(2 * K, 2)), weight())), "must be contiguous"),
        (replace(BMM, inputs=(TensorSpec(shape=(8, M, K), dtype="bfloat16", stride=(M * K + 4, K, 1)), spec(8, K, N))), "left"),
        (replace(MERGED, inputs=(spec(M, K), weight(), spec(K, 1020))), "right matrix has 1020"),
        (replace(FP8, inputs=(FP8.inputs[0], spec(K, N, dtype="float8_e4m3fn"))), "contiguous along K"),
        (replace(NORM, inputs=(*(spec(*s.shape, dtype="float32") for s in NORM.inputs),)), "not float32"),
        (replace(NORM, inputs=(spec(2, 8, 100), *NORM.inputs[1:])), "left matrix has 100 contiguous"),
    ],
)
def test_what_it_does_not_take_is_said(problem: Problem, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        build(problem, PLAIN)
    assert get_backend("cutedsl").supports(problem) is not None


def test_strides_of_one_row_say_nothing() -> None:
    row = TensorSpec(shape=(1, K), dtype="bfloat16", stride=(3, 1))
    assert get_backend("cutedsl").supports(replace(MM, inputs=(row, weight()))) is None


@pytest.mark.parametrize(
    ("problem", "config", "reason"),
    [
        (MM, {"tile_m": 128}, "missing: source, tile_n"),
        (MM, {**PLAIN, "BLOCK_M": 64}, "unknown: BLOCK_M"),
        (MM, {**PLAIN, "tile_m": 100}, "quack has cooperative tiles .* not 100x64"),
        (MM, {**PLAIN, "source": "operators", "split_k": 2}, "neither pingpong nor split_k nor fuse"),
        (MM, {**PLAIN, "family": "tensorop"}, "families are operators'"),
        (MM, {**TENSOROP, "family": "simt"}, "families persistent and tensorop, not simt"),
        (MM, {**TENSOROP, "tile_n": 64}, "tensorop has tiles 128x128, not 128x64"),
        (MM, {**TENSOROP, "cluster_n": 2}, "tensorop has no clusters"),
        (MM, {**TENSOROP, "swizzle": 1}, "orders its tiles itself"),
        (MM, {**TENSOROP, "raster": "columns"}, "orders its tiles itself"),
        (MANY, TENSOROP, "up to 65535 products at once, not 65536"),
        (MM, {**PLAIN, "fuse": True}, "nothing follows this one"),
        (
            replace(SCALED, scalars=(("out_dtype", "bfloat16"), ("use_fast_accum", False))),
            {**PLAIN, "fast_accum": True},
            "fewer bits than the model asks for",
        ),
        (MM, {**PLAIN, "separate": True}, "separate leaves parts of K to what follows"),
        (ADDMM, {**PLAIN, "split_k": 2, "separate": True, "fuse": True}, "separate leaves parts of K to what follows"),
        (replace(MERGED, constants=()), {**PLAIN, "merge": "concat"}, "no constant input"),
        (replace(MM, inputs=(spec(M, K), weight(100))), PLAIN, "rows of 100 .* 16 bytes"),
        (
            replace(FP8, inputs=(*FP8.inputs, spec(M, N, dtype="float8_e4m3fn")), epilogue=("add",)),
            {**PLAIN, "fuse": True},
            "wider results",
        ),
        (replace(SCALED, inputs=(*SCALED.inputs[:4], spec(M, 1))), {**PLAIN, "fuse": True}, "fuse reads vectors"),
        (replace(INTEGER, inputs=(INTEGER.inputs[0], weight(101, dtype="int8"))), PLAIN, "rows of 101 int32"),
        (NORM, {**PLAIN, "fuse": True}, "nothing follows this one"),
        (
            replace(NORM, inputs=(*NORM.inputs[:3], TensorSpec(shape=(2, 8, N), dtype="bfloat16", stride=(16 * N, 2 * N, 2)))),
            PLAIN,
            "the kernel reads vectors",
        ),
        (
            replace(
                NORM, inputs=(*NORM.inputs[:3], TensorSpec(shape=(2, 8, N), dtype="bfloat16", stride=(8 * N + 32, N + 4, 1)))
            ),
            PLAIN,
            "rows that begin at multiples of 16",
        ),
        (replace(ADDMM, inputs=(spec(M, 1), *ADDMM.inputs[1:])), {**PLAIN, "fuse": True}, "fuse reads vectors"),
        (
            replace(
                RESIDUAL,
                inputs=(*MM.inputs, TensorSpec(shape=(M, 1), dtype="bfloat16", stride=(N, 1))),
                epilogue=("mul_per_row",),
            ),
            {**PLAIN, "fuse": True},
            "numbers of rows, .16, 1., that follow each other",
        ),
        (
            replace(RESIDUAL, inputs=(*MM.inputs, TensorSpec(shape=(M, N), dtype="bfloat16", stride=(0, 1)))),
            {**PLAIN, "fuse": True},
            "none twice",
        ),
    ],
)
def test_illegal_configs_are_refused(problem: Problem, config: dict[str, ConfigValue], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        build(problem, config)


def test_gate_and_up_are_fused_where_they_are_one_product() -> None:
    gated = replace(MERGED, inputs=(spec(M, K), weight(), weight()), epilogue=("gated_silu",))
    quack: dict[str, ConfigValue] = {"source": "quack", "tile_m": 128, "tile_n": 128, "fuse": True}
    cutedsl._refuse_illegal(Candidate(problem=gated, backend="cutedsl", config={**quack, "merge": "concat"}))
    with pytest.raises(Refused, match="nothing follows this one"):
        build(gated, {**quack, "merge": "none"})
    names = names_for(dict(get_op("merged_mm").dims(gated)), H200)
    bound = load_space("merged_mm")["cutedsl"].bind(names)
    fused = [config for config in bound.enumerate() if config.get("fuse")]
    assert fused
    assert all(config["merge"] == "concat" and config["tile_n"] % 32 == 0 and not config["swap"] for config in fused)  # type: ignore[operator]


def test_one_of_the_parts_that_stay_apart_may_be_refused_where_the_whole_is_not() -> None:
    parts = (spec(M, K), weight(1020), weight(1028))
    with pytest.raises(Refused, match="rows of 1020"):
        build(replace(MERGED, inputs=parts), {**PLAIN, "merge": "none"})
    candidate = Candidate(problem=replace(MERGED, inputs=parts), backend="cutedsl", config={**PLAIN, "merge": "concat"})
    cutedsl._refuse_illegal(candidate)


def test_a_constant_that_begins_in_between_is_refused() -> None:
    storage = torch.zeros(1 + K * N, dtype=torch.bfloat16)
    with pytest.raises(Refused, match="begins 2 bytes behind"):
        build(MM, PLAIN, [[storage[1:].view(N, K).t()]])


def test_kernels_are_compiled_before_the_graph_and_their_failure_is_the_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is told of: which kernels a candidate needs, once each, and what becomes of one that does not compile."""
    cache = pytest.importorskip("autokernel.cutedsl.cache", reason="the cache of objects is part of the package")
    asked: list[tuple[tuple[str, ...], str, int]] = []

    def fails(self: object, wanted: object) -> None:
        asked.append((wanted.epilogue, wanted.arch, wanted.num_units))  # type: ignore[attr-defined]
        if len(asked) == 2:
            raise CompileError("quack did not compile it: no reason")

    card = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(cache.ObjectCache, "get_or_compile", fails)
    with pytest.raises(BuildError, match="quack did not compile it: no reason"):
        build(RESIDUAL, {**PLAIN, "fuse": True})
    assert asked == [(("add",), "sm_90a", 132), ((), "sm_90a", 132)]
    apart = Candidate(problem=replace(MERGED, inputs=(spec(M, K), weight(), weight())), backend="cutedsl", config=PLAIN)
    assert len(cutedsl.kernels_of(apart)) == 1  # sizes decide nothing
    i8 = replace(MM, inputs=(spec(M, K, dtype="int8"), weight(dtype="int8")))
    scaled = Candidate(problem=SCALED, backend="cutedsl", config={**PLAIN, "fuse": True})
    cutedsl._refuse_illegal(scaled)
    assert [len(kernel.epilogue) for kernel in cutedsl.kernels_of(scaled)] == [3, 2]
    with pytest.raises(Refused, match="operators computes no epilogue"):
        cutedsl.kernels_of(replace(scaled, config={"source": "operators", "tile_m": 128, "tile_n": 64}))
    with pytest.raises(Refused, match="tensorop multiplies matrices of 16 bits, not int8"):
        cutedsl.kernels_of(Candidate(problem=i8, backend="cutedsl", config=TENSOROP))
    with pytest.raises(Refused, match="int8"):
        cutedsl.kernels_of(Candidate(problem=i8, backend="cutedsl", config=PLAIN))


def test_a_norm_is_one_kernel_with_sums_of_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    card = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    alone = replace(NORM, inputs=NORM.inputs[:3], scalars=(("residual", False), ("eps", 1e-5)))
    for problem, epilogue in ((NORM, ("add", "squares")), (alone, ("squares",))):
        candidate = Candidate(problem=problem, backend="cutedsl", config=PLAIN)
        cutedsl._refuse_illegal(candidate)
        (kernel,) = cutedsl.kernels_of(candidate)
        assert (kernel.epilogue, kernel.batched, kernel.num_columns(N)) == (epilogue, False, N)
    for config, reason in (
        ({**PLAIN, "split_k": 2}, "without split_k"),
        ({"source": "operators", "tile_m": 128, "tile_n": 64}, "by quack alone"),
    ):
        with pytest.raises(Refused, match=reason):
            cutedsl.kernels_of(replace(candidate, config=config))


@pytest.mark.parametrize(("m", "n"), [(1, 4096), (64, 4096), (600, 640), (2048, 4096), (8192, 8192)])
def test_the_space_of_norms_is_that_of_products_without_parts(m: int, n: int) -> None:
    """As the two files are apart, they are held together here."""
    parts = {"source": "quack", "split_k": 1, "tile_k": 0}
    plain = [c for c in space("mm", m, n, num_epilogue=0).enumerate() if {**c, **parts} == c]
    norms = list(space("linear_rms_norm", m, n).enumerate())
    assert [{name: c[name] for name in norms[0]} for c in plain] == norms
    assert len(norms) >= 8


@pytest.mark.parametrize("changed", [{"dtype_bytes": 4}, {"k": 4100}, {"n": 6145}], ids=str)
def test_where_no_kernel_serves_a_norm_stock_code_is_alone(changed: dict[str, int]) -> None:
    assert space("linear_rms_norm", **changed).count(1) == 0


def space(op: str, m: int = M, n: int = N, k: int = K, **changed: int) -> BoundSpace:
    sizes = {"batch": 8, "m": m, "n": n, "k": k, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 1, **changed}
    return load_space(op)["cutedsl"].bind(names_for(sizes, H200))


@pytest.mark.parametrize("op", ["mm", "addmm", "bmm", "merged_mm"])
@pytest.mark.parametrize(("m", "n"), [(1, 6144), (64, 4096), (200, 28672), (600, 600), (2048, 4096), (8192, 6144)])
def test_every_config_of_the_space_is_one_that_a_source_has(op: str, m: int, n: int) -> None:
    bound = space(op, m, n)
    configs = list(bound.enumerate())
    assert 20 <= len(configs) <= 2500
    few_rows = op in ("mm", "merged_mm") and 2 <= m <= 64
    assert {config["source"] for config in configs} == {*SOURCES} - (set() if few_rows else {"cluster"})
    longer = op != "bmm" and 2 <= m <= 64
    said = {config["tile_k"] for config in configs if "tile_k" in config}
    assert said == ({0, 128, 256} if longer else set() if op == "bmm" else {0})
    for config in configs:
        CuteConfig.from_entry(config)
    default = bound.default()
    assert default is not None
    assert not bound.violations(default)


def test_what_a_source_has_and_the_space_has_not_is_left_out_for_speed() -> None:
    """Of all kernels there are the space lacks only those that break a rule behind those on what can be built at all."""
    legality = (" in [", "% 16", "isa", "not fuse", "is not one of", "missing", "must be left out", "no such parameter")
    for m in (16, 256, 2048):
        bound = space("mm", m, N, num_epilogue=0)
        names, kept = {domain.name for domain in bound.domains if domain.name != "fuse"}, 0
        for config in _kernels():
            reasons = bound.violations({name: v for name, v in config.items() if name in names and _said(config, name)})
            kept += not reasons
            assert not [reason for reason in reasons if any(word in reason for word in legality)]
        assert kept == bound.count()


def _kernels() -> list[dict[str, ConfigValue]]:
    """Every legal config of `CuteConfig` with the numbers that the space knows."""
    flags = (False, True)
    found = []
    tiles = {
        ("quack", "", False): COOPERATIVE_TILES,
        ("quack", "", True): PINGPONG_TILES,
        ("cluster", "", False): CLUSTER_TILES,
        ("operators", "persistent", False): OPERATORS_TILES,
        ("operators", "tensorop", False): OPERATORS_TILES,
    }
    for (source, family, pingpong), known in tiles.items():
        depths = (0,) if source == "operators" else (0, 128, 256)
        residents = (1, 2, 3) if source == "cluster" else (1,)
        for (tile_m, tile_n), swap, cluster_m, cluster_n, split_k, ordered, separate, swizzle, raster, tile_k, resident in (
            itertools.product(
                known, flags, (1, 2), (1, 2), (1, 2, 3, 4, 6, 8, 12, 16), flags, flags, (1, 2, 4, 8), ("rows", "columns"),
                depths, residents,
            )
        ):  # fmt: skip
            config: dict[str, ConfigValue] = {
                "source": source, "tile_m": tile_m, "tile_n": tile_n, "pingpong": pingpong, "swap": swap,
                "cluster_m": cluster_m, "cluster_n": cluster_n, "split_k": split_k, "ordered": ordered,
                "separate": separate, "swizzle": swizzle, "raster": raster, "tile_k": tile_k, "resident": resident,
            }  # fmt: skip
            if family:
                config["family"] = family
            if CuteConfig(**config).problem() is None:  # type: ignore[arg-type]
                found.append(config)
    return found


def _said(config: Mapping[str, ConfigValue], name: str) -> bool:
    """Whether the space names the parameter for this config: where there is a choice."""
    quack, cluster = config["source"] == "quack", config["source"] == "cluster"
    split, ordered = quack and config["split_k"] != 1, bool(config["ordered"])
    said = {
        "pingpong": quack, "split_k": quack or cluster, "ordered": split, "separate": split and ordered,
        "family": not quack and not cluster, "raster": config.get("family") == "persistent",
        "cluster_n": not cluster, "swizzle": not cluster,
        "tile_k": quack or cluster, "resident": cluster,
    }  # fmt: skip
    return said.get(name, True)


@pytest.mark.parametrize(
    "changed", [{"dtype_bytes": 4}, {"k": 4100}, {"n": 6145}], ids=lambda changed: "".join(map(str, changed))
)
def test_there_is_nothing_to_search_for_other_problems(changed: dict[str, int]) -> None:
    assert space("mm", **changed).count(1) == 0


def test_what_follows_is_fused_where_something_follows() -> None:
    for problem, expected in ((MM, set()), (RESIDUAL, {False, True}), (ADDMM, {False, True}), (MERGED, set())):
        names = names_for(get_op(problem.op).dims(problem), H200)
        bound = load_space(problem.op)["cutedsl"].bind(names)
        assert {config["fuse"] for config in bound.enumerate() if "fuse" in config} == expected
    assert all("fuse" not in config or config["source"] == "quack" for config in space("addmm").enumerate())
