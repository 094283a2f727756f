"""The cost model: features that mean what they say, trees that add up, a file that goes both ways."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from autokernel.search.cost_model import FEATURES, KINDS, CostModel, Trees, features, is_predicted, load_model, save_model
from autokernel.search.model_study import ModelStudy
from autokernel.search.space import Config, DeviceFacts, Names, names_for
from autokernel.search.space_file import load_space

H200 = DeviceFacts(device="cuda", isa="sm_90", num_units=132, smem_bytes=232448, l2_bytes=60 << 20)
CONFIG = {"template": "mm", "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 4, "num_warps": 8, "GROUP_M": 8}


def names(m: int, n: int, k: int, batch: int = 1) -> dict[str, int | str]:
    return dict(
        names_for({"m": m, "n": n, "k": k, "batch": batch, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}, H200)
    )


def feature(name: str, m: int = 2048, n: int = 4096, k: int = 4096, **changed: int | str) -> float:
    return float(features(names(m, n, k), [{**CONFIG, **changed}])[0, FEATURES.index(name)])


def test_features_by_hand() -> None:
    assert feature("log_blocks") == math.log2(32 * 32)
    assert feature("wave_fill") == pytest.approx(1024 / (8 * 132))
    assert feature("smem_share") == pytest.approx(4 * (64 + 128) * 64 * 2 / 232448)
    assert feature("log_accumulators") == math.log2(64 * 128 / 256)
    assert feature("log_resident") == 1.0  # two blocks of 96 KiB fit
    assert feature("fill_m", m=100) == pytest.approx(100 / 128)
    assert feature("log_steps") == 6.0
    assert feature("log_group_rows", m=64) == 0.0  # a single row of tiles
    assert feature("wgmma") == 1.0
    assert feature("wgmma", BLOCK_M=32) == 0.0
    assert feature("log_resident", template="mm_persistent_tma") == 0.0


CUTE: dict[str, int | str | bool] = {
    "source": "quack", "tile_m": 128, "tile_n": 64, "pingpong": False, "swap": True, "cluster_m": 2, "cluster_n": 1,
    "split_k": 4, "ordered": False, "swizzle": 8, "fuse": True,
}  # fmt: skip


def test_features_of_cute_kernels_are_in_the_callers_rows_and_columns() -> None:
    def of(name: str, m: int = 16, **changed: int | str | bool) -> float:
        return float(features(names(m, 4096, 4096), [{**CUTE, **changed}])[0, FEATURES.index(name)])

    assert (of("log_block_m"), of("log_block_n"), of("log_block_k")) == (6.0, 7.0, 6.0)
    assert (of("log_block_m", swap=False), of("log_block_n", swap=False)) == (7.0, 6.0)
    assert (of("log_cluster_m"), of("log_cluster_n")) == (0.0, 1.0)
    assert of("fill_m") == 16 / 64
    assert of("log_blocks") == math.log2(32 * 4)
    assert of("log_resident") == 0.0
    assert (of("swapped"), of("ordered"), of("fused"), of("tma"), of("wgmma")) == (1.0, 0.0, 1.0, 1.0, 1.0)
    assert of("stages") == (232448 - 16384) // ((128 + 64) * 128)
    kinds = [of("kind"), of("kind", pingpong=True, tile_m=64), of("kind", source="operators")]
    assert [KINDS[int(kind)] for kind in kinds] == ["cooperative", "pingpong", "operators"]
    assert (of("log_block_k"), of("log_block_k", tile_k=128)) == (6.0, 7.0)
    kept = {"source": "operators", "family": "tensorop", "tile_n": 128, "cluster_m": 1}
    ampere = [of(name, **kept) for name in ("kind", "tma", "log_block_k", "stages", "log_accumulators")]
    assert ampere == [KINDS.index("tensorop"), 0.0, 5.0, 4.0, 7.0]
    assert of("log_resident", m=2048, **kept) > 0.0, "no persistent kernel: a multiprocessor has several blocks"
    # a tile by two warpgroups, or by one
    assert of("log_accumulators") == math.log2(128 * 64 / 256)
    assert of("log_accumulators", pingpong=True) == math.log2(128 * 64 / 128)
    plain = features(names(16, 4096, 4096), [{"template": "mm", "BLOCK_M": 64}])[0]
    assert [plain[FEATURES.index(name)] for name in FEATURES[-5:]] == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_features_of_our_own_cute_kernel() -> None:
    def of(name: str, **changed: int | str | bool) -> float:
        cluster = {"source": "cluster", "tile_m": 128, "tile_n": 16, "swap": True, "cluster_m": 2, "split_k": 2, "resident": 2}
        return float(features(names(16, 4096, 4096), [{**cluster, **changed}])[0, FEATURES.index(name)])

    assert KINDS[int(of("kind"))] == "cluster"
    assert (of("log_block_m"), of("log_block_n"), of("swapped"), of("log_cluster_n")) == (4.0, 7.0, 1.0, 1.0)
    assert of("log_accumulators") == math.log2(128 * 16 / 256)
    assert of("stages") == (233472 // 2 - 1024 - 128 * 16 * 4) // ((128 + 16) * 128)
    assert (of("log_resident"), of("log_resident", resident=1)) == (1.0, 0.0)
    assert (of("resident_limit"), of("log_blocks")) == (0.0, math.log2(64))
    assert (of("log_block_k"), of("log_block_k", tile_k=256, resident=1)) == (6.0, 8.0)
    assert of("stages", tile_k=256, resident=1) == (233472 - 2048 - 128 * 16 * 4) // ((128 + 16) * 512)


def test_every_cute_config_has_finite_features() -> None:
    for m in (1, 512, 8192):
        at = names(m, 4096, 4096)
        configs = list(load_space("mm")["cutedsl"].enumerate(at))
        assert np.isfinite(features(at, configs)).all()


def test_features_are_finite_everywhere() -> None:
    configs = [
        {**CONFIG, "BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "num_stages": stages, "num_warps": warps}
        for bm, bn, bk, stages, warps in itertools.product((16, 256), (16, 256), (16, 256), (1, 6), (1, 16))
    ]
    configs.append({"template": "decompose_k", "k_split": 32})
    for m, n, k in ((1, 16, 16), (8192, 128256, 4096), (256, 256, 65536)):
        found = features(names(m, n, k, batch=3), configs)
        assert found.shape == (len(configs), len(FEATURES))
        assert np.isfinite(found).all()


def stump(name: str, threshold: float, low: float, high: float, base: float = 0.0) -> Trees:
    """One tree with one split."""
    return Trees(
        feature=np.array([FEATURES.index(name), 0, 0]), threshold=np.array([threshold, 0.0, 0.0]), left=np.array([1, 1, 2]),
        right=np.array([2, 1, 2]), value=np.array([0.0, low, high]), roots=np.array([0]), base=base,
    )  # fmt: skip


def test_trees_add_up() -> None:
    trees = stump("log_block_m", 5.5, low=-1.0, high=2.0, base=10.0)
    both = Trees(
        feature=np.tile(trees.feature, 2), threshold=np.tile(trees.threshold, 2), left=np.array([1, 1, 2, 4, 4, 5]),
        right=np.array([2, 1, 2, 5, 4, 5]), value=np.tile(trees.value, 2), roots=np.array([0, 3]), base=10.0,
    )  # fmt: skip
    rows = features(names(64, 64, 64), [{**CONFIG, "BLOCK_M": 32}, {**CONFIG, "BLOCK_M": 64}])
    assert trees.predict(rows).tolist() == [9.0, 12.0]
    assert both.predict(rows).tolist() == [8.0, 14.0]


def test_file_round_trip(tmp_path: Path) -> None:
    model = CostModel(
        cost={"inductor": stump("log_block_n", 6.5, 0.1, 0.2)},
        failure={"inductor": stump("smem_share", 0.9, -3.0, 3.0)},
        kinds={"inductor": ("mm",)},
        origin={"landscapes": ["a"]},
    )
    save_model(model, tmp_path / "model.json.gz")
    again = load_model(tmp_path / "model.json.gz")
    assert again is not None
    configs = [CONFIG, {**CONFIG, "BLOCK_N": 64}]
    predicted = again.predict("inductor", names(16, 64, 64), configs)
    assert predicted is not None
    assert predicted.tolist() == [0.2, 0.1]
    fails = again.fails("inductor", names(16, 64, 64), [CONFIG, {**CONFIG, "BLOCK_K": 256}])
    assert fails[0] < 0.1 < 0.9 < fails[1]
    assert again.predict("triton", names(16, 64, 64), configs) is None
    assert again.origin == {"landscapes": ["a"]}


def test_a_model_of_other_features_is_refused(tmp_path: Path) -> None:
    save_model(CostModel(cost={}, failure={}, kinds={}, origin={}), tmp_path / "model.json.gz")
    import gzip
    import json

    data = json.loads(gzip.decompress((tmp_path / "model.json.gz").read_bytes()))
    data["features"] = data["features"][1:]
    (tmp_path / "model.json.gz").write_bytes(gzip.compress(json.dumps(data).encode()))
    with pytest.raises(ValueError, match="train_cost_model"):
        load_model(tmp_path / "model.json.gz")


def test_no_file_is_no_model(tmp_path: Path) -> None:
    assert load_model(tmp_path / "none.json.gz") is None


QKV = {"m": 16, "n": 6144, "k": 4096, "batch": 1, "dtype_bytes": 2, "has_constant_weight": 1, "num_parts": 3, "min_n": 1024,
       "num_epilogue": 0}  # fmt: skip


def test_products_apart_cost_more_than_side_by_side() -> None:
    model = CostModel(
        cost={"inductor": stump("log_block_n", 6.5, 0.1, 0.2)}, failure={}, kinds={"inductor": ("mm",)}, origin={}
    )

    def extra(**changed: int) -> float:
        merged = dict(names_for({**QKV, **changed}, H200))
        predicted = model.predict("inductor", merged, [{**CONFIG, "merge": "none"}, {**CONFIG, "merge": "concat"}])
        assert predicted is not None
        return math.exp(float(predicted[0] - predicted[1])) - 1

    assert extra() == pytest.approx(2 * 3.0 / (50.5e6 / 4.26e6), rel=0.02), "two products more, 3 us each, over 11.9 us"
    assert extra(n=28672, num_parts=2) == pytest.approx(3.0 / 55.4, rel=0.02)
    assert extra(m=2048) < 0.06, "they are long themselves"
    assert extra(num_parts=1) == 0.0


@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_side_by_side_is_proposed_first_for_few_rows(backend: str) -> None:
    space = load_space("merged_mm")[backend].bind(names_for(QKV, H200))
    model = load_model()
    assert model is not None
    _, _, config = ModelStudy({backend: space}, model, seed=0).ask()
    assert config["merge"] == "concat"


def generated_names(
    m: int, *, products: int = 1, outputs: int = 1, reductions: int = 0, scaled: int = 0, size: int = 2
) -> Names:
    dims = {
        "has_gemm": 1, "m": m, "n": 4096 * products, "k": 4096, "num_products": products, "num_reductions": reductions,
        "num_outputs": outputs, "dtype_bytes": size, "out_bytes": size, "scaled": scaled,
        "whole_rows": 0, "batch": 1,
    }  # fmt: skip
    return names_for(dims, H200)


def test_generated_products_are_taken_for_the_skinny_kernels() -> None:
    rest: Config = {"mode": "vector", "num_warps": 4, "num_stages": 2}
    config: Config = {"kernel": "generated_mm", "block_m": 1, "block_n": 4, "block_k": 1024, **rest}
    skinny: Config = {"kernel": "skinny_mm", "BLOCK_M": 1, "BLOCK_K": 1024, **rest}
    for products, outputs, columns in ((1, 1, 4), (2, 1, 8), (3, 3, 4)):
        names = generated_names(1, products=products, outputs=outputs)
        assert np.array_equal(features(names, [config]), features(names, [{**skinny, "BLOCK_N": columns}]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (generated_names(1), True),
        (generated_names(128), True),
        (generated_names(197), False),
        (generated_names(16, size=4), False),
        (generated_names(1, reductions=1), False),
        (generated_names(1, reductions=1, scaled=1), True),
        (generated_names(2, reductions=1, scaled=1), False),
        ({**generated_names(1), "has_gemm": 0}, False),
        ({**generated_names(16), "whole_rows": 1}, False),
        ({**generated_names(16), "batch": 8}, False),
    ],
)
def test_which_generated_kernels_are_predicted(names: Names, expected: bool) -> None:
    assert is_predicted("generated", names) is expected
    assert is_predicted("mm", names)
    assert not is_predicted("attention", names)


def test_what_is_quick_for_a_product_comes_first_with_a_residual_behind_it() -> None:
    """On an H200: one row of 2,048 elements at a time takes 9.2 us for 4096x4096, four rows of 1,024 10.4."""
    model = load_model()
    assert model is not None
    space = load_space("generated")["triton"].bind(generated_names(1))
    _, _, config = ModelStudy({"triton": space}, model, 0).ask()
    assert (config["mode"], config["block_n"], config["block_k"]) == ("vector", 1, 2048)
