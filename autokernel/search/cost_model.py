"""What configs of a GEMM will cost, learned from recorded landscapes of other shapes. Needs numpy alone.

A model is a list of small regression trees over features that mean the same for every shape: how full the last wave of
blocks is, how many bytes a multiprocessor has in flight, how much of a tile is padding. It predicts the logarithm of
time over the time of the shape's best config; what matters is the order, the level is for the search to find out.
`benchmarks/train_cost_model.py` makes the file that the package ships.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autokernel.cutedsl.config import RESERVED_BYTES, SHARED_BYTES, TENSOROP, CuteConfig
from autokernel.records import ConfigValue
from autokernel.search.space import Config, Names

Floats = npt.NDArray[np.float64]

MODEL_FILE = Path(__file__).with_name("cost_model.json.gz")
# a template, a mode, or the kind of a CuTe DSL kernel; new ones are appended, for models know them by their place
KINDS = (
    "mm", "mm_persistent_tma", "bmm", "decompose_k", "rows", "swap", "vector", "operators", "cooperative", "pingpong",
    "cluster", "tensorop",
)  # fmt: skip

_FORMAT = 1
_KIND_MISSING = -1.0
_SMEM_PER_UNIT, _SMEM_PER_BLOCK, _SMEM_RESERVED = SHARED_BYTES, SHARED_BYTES - RESERVED_BYTES, RESERVED_BYTES
_WARPS_PER_UNIT, _REGISTERS_PER_UNIT = 64, 65536
_PERSISTENT = tuple(KINDS.index(kind) for kind in ("mm_persistent_tma", "operators", "cooperative", "pingpong"))
_CUTE_DEPTH_BYTES, _CUTE_EPILOGUE_BYTES = 128, 16384  # of a tile along K; of shared memory that is kept for results
_TENSOROP_DEPTH_BYTES, _TENSOROP_STAGES = 64.0, 4.0
_READ_BYTES_PER_US, _FLOP_PER_US = 4.26e6, 0.79e9  # measured on an H200; they only set the scale of some features
_PRODUCT_US = 3.0  # what one product more costs: a launch, and a first and a last wave

# In this order; new ones are appended, and trees that were trained before do not ask for them.
FEATURES = (
    "log_m", "log_n", "log_k", "log_batch", "log_intensity",
    "kind", "tma", "log_block_m", "log_block_n", "log_block_k", "stages", "log_warps", "log_group", "log_split", "waves",
    "log_blocks", "log_blocks_per_unit", "wave_fill", "wave_fill_resident", "log_resident", "resident_limit",
    "smem_share", "log_accumulators", "log_bytes_in_flight", "log_bytes_in_flight_all", "log_stage_bytes",
    "log_steps", "stages_over_steps", "fill_m", "fill_n", "fill_k",
    "log_tile_intensity", "log_traffic", "log_group_rows", "wgmma", "log_rows_per_warp", "log_split_traffic",
    "log_cluster_m", "log_cluster_n", "swapped", "ordered", "fused",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trees:
    """A sum of regression trees as flat arrays; nodes of all trees lie one behind the other. A leaf's children are itself."""

    feature: npt.NDArray[np.int64]
    threshold: Floats
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    value: Floats
    roots: npt.NDArray[np.int64]
    base: float

    def predict(self, rows: Floats) -> Floats:
        """Predictions [n] for features [n, len(FEATURES)]."""
        columns = np.ascontiguousarray(rows.T)
        total = np.full(len(rows), self.base)
        everyone = np.arange(len(rows), dtype=np.int32)
        left, right, feature = self.left.tolist(), self.right.tolist(), self.feature.tolist()
        threshold, value = self.threshold.tolist(), self.value.tolist()
        for root in self.roots.tolist():
            groups = [(root, everyone)]  # a node, and the rows that come by it
            while groups:
                node, where = groups.pop()
                if left[node] == right[node]:
                    total[where] += value[node]
                    continue
                goes_left = columns[feature[node]].take(where) <= threshold[node]
                for child, there in ((left[node], where[goes_left]), (right[node], where[~goes_left])):
                    if len(there):
                        groups.append((child, there))
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain lists; thresholds and values with five digits."""
        return {
            "feature": self.feature.tolist(), "threshold": [float(f"{t:.6g}") for t in self.threshold],
            "left": self.left.tolist(), "right": self.right.tolist(), "value": [float(f"{v:.4g}") for v in self.value],
            "roots": self.roots.tolist(), "base": self.base,
        }  # fmt: skip

    @classmethod
    def mean_of(cls, parts: Sequence[Trees]) -> Trees:
        """One sum that predicts the mean of several."""
        starts = np.cumsum([0, *(len(part.feature) for part in parts)])[:-1]
        moved = [(part.left + at, part.right + at, part.roots + at) for part, at in zip(parts, starts, strict=True)]
        left, right, roots = (np.concatenate(columns) for columns in zip(*moved, strict=True))
        feature, threshold = (np.concatenate([getattr(part, name) for part in parts]) for name in ("feature", "threshold"))
        value = np.concatenate([part.value for part in parts]) / len(parts)
        base = sum(part.base for part in parts) / len(parts)
        return cls(feature, threshold, left, right, value, roots, base)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trees:
        """Inverse of `to_json`."""
        feature, left, right, roots = (np.asarray(data[name], dtype=np.int64) for name in ("feature", "left", "right", "roots"))
        threshold, value = (np.asarray(data[name], dtype=np.float64) for name in ("threshold", "value"))
        return cls(feature, threshold, left, right, value, roots, float(data["base"]))


# Whose names and configs features are made of. What is measured of other fusions' kernels has to do.
_PREDICTED_OPS = frozenset({"mm", "addmm", "bmm", "baddbmm", "merged_mm", "scaled_mm", "int_mm"})
_RECORDED_BYTES = 2  # of the landscapes' dtype, bf16
_GENERATED_MAX_M = 128


def is_predicted(op: str, names: Names) -> bool:
    """Whether the features mean something for a problem.

    Generated products are taken for the skinny kernel's, as long as the reading of weights is what they do: for 14 to 23
    configs of Llama's regions with one row, predicted and measured times on an H200 have rank correlations of 0.66 to 0.85; in
    fp32, and with 197 rows, often none. Where rows are reduced first there are parameters that the features do not know; one
    row whose scale is taken out of the products is read like any other. Tiles of whole rows were never recorded,
    nor were batches.
    """
    if op != "generated":
        return op in _PREDICTED_OPS
    reads = names["dtype_bytes"] == _RECORDED_BYTES and float(names["m"]) <= _GENERATED_MAX_M
    on_the_way = names["num_reductions"] == 0 or (names["m"] == 1 and bool(names.get("scaled")))
    alone = names.get("batch", 1) == 1 and not names.get("whole_rows")
    return bool(names["has_gemm"]) and on_the_way and reads and alone


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Trees for each backend that was recorded: log(time / best time) of configs that run, and the odds that one fails."""

    cost: Mapping[str, Trees]
    failure: Mapping[str, Trees]
    kinds: Mapping[str, tuple[str, ...]]  # templates or modes that were recorded
    origin: Mapping[str, Any]

    def ranked(self, names: Names) -> frozenset[str]:
        """Backends whose configs it ranks better than rules do.

        CuTe DSL's only in dtypes of the recorded size: in fp8 other tiles are fast.
        """
        return frozenset(b for b in self.cost if b != "cutedsl" or names.get("dtype_bytes") == _RECORDED_BYTES)

    def predict(self, backend: str, names: Names, configs: Sequence[Config]) -> Floats | None:
        """log(time / best time) of configs [n]; None for a backend that the model does not know.

        Of a kind that was never recorded the best is believed, so that it is tried, and judged by what comes of it.
        """
        trees = self.cost.get(backend)
        if trees is None:
            return None
        known = [_KIND_MISSING, *(float(KINDS.index(kind)) for kind in self.kinds.get(backend, ()) if kind in KINDS)]
        rows = features(names, configs)
        cost = np.where(np.isin(rows[:, FEATURES.index("kind")], known), trees.predict(rows), 0.0)
        return np.asarray(cost + _apart(names, configs), dtype=np.float64)

    def fails(self, backend: str, names: Names, configs: Sequence[Config]) -> Floats:
        """Probability that a config does not build or run [n]."""
        trees = self.failure.get(backend)
        if trees is None:
            return np.zeros(len(configs))
        return 1.0 / (1.0 + np.exp(-trees.predict(features(names, configs))))


def load_model(path: Path = MODEL_FILE) -> CostModel | None:
    """The shipped model; None if there is none."""
    if not path.is_file():
        return None
    data = json.loads(gzip.decompress(path.read_bytes()))
    if data["format"] != _FORMAT or tuple(data["features"]) != FEATURES[: len(data["features"])]:
        raise ValueError(f"{path}: made for other features; run benchmarks/train_cost_model.py again")
    trees = {part: {b: Trees.from_json(t) for b, t in data[part].items()} for part in ("cost", "failure")}
    kinds = {backend: tuple(found) for backend, found in data["kinds"].items()}
    return CostModel(cost=trees["cost"], failure=trees["failure"], kinds=kinds, origin=data["origin"])


def save_model(model: CostModel, path: Path = MODEL_FILE) -> None:
    """Write a model as the package ships it."""
    parts = {part: {b: t.to_json() for b, t in getattr(model, part).items()} for part in ("cost", "failure")}
    data = {"format": _FORMAT, "origin": dict(model.origin), "features": list(FEATURES), "kinds": dict(model.kinds), **parts}
    path.write_bytes(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0))


def _column(configs: Sequence[Config], name: str, missing: float) -> Floats:
    def number(value: ConfigValue | None) -> float:
        return missing if value is None or isinstance(value, str) else float(value)

    return np.array([number(config.get(name)) for config in configs])


def features(names: Names, configs: Sequence[Config]) -> Floats:
    """Features of configs of one problem [n, len(FEATURES)].

    Args:
        names: of the problem and device: m, n, k, dtype_bytes, num_units, and batch where there is one.
        configs: with Triton's tiles, CuTe's or those of generated products; parameters that one lacks count as 1.
    """
    configs = [_in_tritons_terms(config, names) for config in configs]
    m, n, k = float(names["m"]), float(names["n"]), float(names["k"])
    batch, size = float(names.get("batch", 1)), float(names["dtype_bytes"])
    units = max(float(names["num_units"]), 1.0)
    block_m, block_n, block_k = (_column(configs, f"BLOCK_{axis}", 64.0) for axis in "MNK")
    stages, warps, group = (_column(configs, name, 1.0) for name in ("num_stages", "num_warps", "GROUP_M"))
    split, waves = (
        np.maximum(_column(configs, "split_k", 1.0), _column(configs, "k_split", 1.0)),
        _column(configs, "waves", 0.0),
    )
    kind, tma = np.array([_kind(config) for config in configs]), _column(configs, "tma", 0.0)
    swapped = (kind == KINDS.index("swap")) | (_column(configs, "swap", 0.0) > 0)
    tiles_m, tiles_n = np.ceil(m / block_m), np.ceil(n / block_n)
    tiles = tiles_m * tiles_n * batch
    blocks = np.where(waves > 0, waves * units, tiles * split)  # programs that are launched
    steps = np.ceil(k / block_k) * tiles / np.minimum(blocks, tiles * np.ceil(k / block_k))  # of the loop over K, each
    stage = (block_m + block_n) * block_k * size
    accumulators = block_m * block_n / (warps * 32)  # fp32 registers of a thread
    registers = np.minimum(accumulators + 40, 255) * warps * 32
    limits = np.stack([
        np.floor(_SMEM_PER_UNIT / (stages * stage + _SMEM_RESERVED)), np.floor(_REGISTERS_PER_UNIT / registers),
        _WARPS_PER_UNIT / warps,
    ])  # fmt: skip
    limits[0] = np.where(kind == KINDS.index("vector"), 32, limits[0])  # no shared memory
    resident = np.clip(limits.min(axis=0), 1, 32)  # blocks on a multiprocessor
    resident = np.where(np.isin(kind, _PERSISTENT), 1.0, resident)  # a persistent kernel has one
    there = np.minimum(resident, np.ceil(blocks / units))
    in_flight = there * np.maximum(stages - 1, 0.5) * stage
    least = size * batch * (m * k + k * n + m * n)
    flop = 2 * batch * m * n * k
    traffic = size * tiles * (block_m + block_n) * k
    busy = np.minimum(blocks, units)
    columns = [
        *(np.full(len(configs), math.log2(x)) for x in (m, n, k, batch)),
        np.full(len(configs), math.log2((flop / _FLOP_PER_US) / (least / _READ_BYTES_PER_US))),
        kind, tma, np.log2(block_m), np.log2(block_n), np.log2(block_k), stages, np.log2(warps), np.log2(group),
        np.log2(split), waves, np.log2(blocks), np.log2(blocks / units), _fill(blocks, units), _fill(blocks, units * resident),
        np.log2(resident),
        limits.argmin(axis=0).astype(np.float64),
        stages * stage / _SMEM_PER_BLOCK, np.log2(accumulators), np.log2(in_flight), np.log2(in_flight * busy), np.log2(stage),
        np.log2(steps), stages / steps, m / (tiles_m * block_m), n / (tiles_n * block_n), k / (np.ceil(k / block_k) * block_k),
        np.log2(block_m * block_n / (block_m + block_n)), np.log2(traffic / least), np.log2(np.minimum(group, tiles_m)),
        ((np.where(swapped, block_n, block_m) >= 64) & (warps % 4 == 0)).astype(np.float64), np.log2(block_m / warps),
        np.log2(1 + np.where((split > 1) | (waves > 0), split * 8 * m * n * batch / least, 0.0)),
        *(np.log2(_column(configs, name, 1.0)) for name in ("cluster_m", "cluster_n")),
        swapped, *(_column(configs, name, missing) for name, missing in (("ordered", 1.0), ("fuse", 0.0))),
    ]  # fmt: skip
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


def _in_tritons_terms(config: Config, names: Names) -> Config:
    """A config under the names that features are made of."""
    if "source" in config:
        return _of_cute(config, float(names["dtype_bytes"]))
    if config.get("kernel") == "generated_mm":
        # products that end in one output are one tile
        together = int(names["num_products"]) if names["num_outputs"] == 1 else 1
        sizes = {f"BLOCK_{axis.upper()}": config[f"block_{axis}"] for axis in "mk"}
        return {**config, **sizes, "BLOCK_N": int(config["block_n"]) * together}
    return config


def _of_cute(config: Config, size: float) -> Config:
    """A CuTe DSL kernel's config in Triton's terms: rows and columns are the caller's."""
    tile_m, tile_n = float(config["tile_m"]), float(config["tile_n"])
    kind = _cute_kind(config)
    depth = max(float(config.get("tile_k", 0)) * size, _CUTE_DEPTH_BYTES)  # bytes
    stage = (tile_m + tile_n) * depth
    if kind == TENSOROP:
        depth, stages, warps = _TENSOROP_DEPTH_BYTES, _TENSOROP_STAGES, 4.0
    elif kind == "cluster":
        stages, warps = float(CuteConfig.from_entry(config).cluster_stages), tile_m / 16
    else:
        # two warpgroups share a tile, unless each has its own, or it is small
        shared = kind != "pingpong" and tile_m > 64 and (kind == "cooperative" or tile_n > 128)
        stages, warps = (_SMEM_PER_BLOCK - _CUTE_EPILOGUE_BYTES) // stage, 8.0 if shared else 4.0
    rows, columns = ("n", "m") if config.get("swap") else ("m", "n")
    return {
        **{name: value for name, value in config.items() if name in ("swap", "split_k", "ordered", "fuse")},
        "template": kind,
        f"BLOCK_{rows.upper()}": tile_m,
        f"BLOCK_{columns.upper()}": tile_n,
        f"cluster_{rows}": config["cluster_m"],
        f"cluster_{columns}": config.get("cluster_n", 1),
        "BLOCK_K": depth / size,
        "num_stages": max(2.0, stages),  # as many as there is room for
        "num_warps": warps,
        "GROUP_M": config.get("swizzle", 1),
        "tma": kind != TENSOROP,
    }


def _apart(names: Names, configs: Sequence[Config]) -> Floats:
    """log(time) that computing products of one input one after another adds to computing them side by side [n].

    Features are those of one product with all the columns. Seen on an H200, bf16, K = 4,096, for each product more: 1.7 us with
    one row, about 3 with 16 to 128.
    """
    least_us = 1e-9
    if "num_parts" in names:
        m, n, k = (float(names[axis]) for axis in "mnk")
        moved = float(names["dtype_bytes"]) * (m * k + k * n + m * n)
        least_us = max(moved / _READ_BYTES_PER_US, 2 * m * n * k / _FLOP_PER_US)
    extra = math.log1p((float(names.get("num_parts", 1)) - 1) * _PRODUCT_US / least_us)
    return np.array([extra if config.get("merge") == "none" else 0.0 for config in configs])


def kind_of(config: Config) -> str | None:
    """The template, the mode, or the kind of CuTe DSL kernel that a config is of."""
    if "source" in config:
        return _cute_kind(config)
    said = config.get("template", config.get("mode"))
    return said if isinstance(said, str) and said in KINDS else None


def _cute_kind(config: Config) -> str:
    if config.get("family") == TENSOROP:
        return TENSOROP
    if config["source"] != "quack":
        return str(config["source"])
    return "pingpong" if config.get("pingpong") else "cooperative"


def _kind(config: Config) -> float:
    kind = kind_of(config)
    return _KIND_MISSING if kind is None else float(KINDS.index(kind))


def _fill(tiles: Floats, slots: Floats | float) -> Floats:
    """Share of the last wave's slots that have work, over all waves."""
    return np.asarray(tiles / (np.ceil(tiles / slots) * slots), dtype=np.float64)
