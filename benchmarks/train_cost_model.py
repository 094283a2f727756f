"""Trains the cost model that the package ships, from recorded landscapes.

    python benchmarks/train_cost_model.py [--out autokernel/search/cost_model.json.gz]

Boosted trees by scikit-learn (which comes with MLflow), written as plain arrays: the package needs numpy alone.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only get into each other's way on data this small

import numpy as np
import replay
from landscape_file import FOLDER, Landscape, load_all
from replay import names_of

from autokernel.search.cost_model import FEATURES, MODEL_FILE, CostModel, Floats, Trees, features, kind_of, save_model

_CLIP = math.log(4.0)  # how much slower than the best is as good as never


@dataclass(frozen=True, slots=True)
class _Settings:
    """Of one of the boosted models whose mean is shipped."""

    leaves: int
    tilt: float  # how much more the configs near the best of a landscape weigh


_MIX = (_Settings(31, 1.5), _Settings(15, 1.5), _Settings(31, 3.0))


def train(landscapes: Sequence[Landscape], seed: int = 0) -> CostModel:
    """A model from these landscapes.

    What is near the best of its landscape weighs more: the search never goes elsewhere.
    """
    cost: dict[str, Trees] = {}
    failure: dict[str, Trees] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    for backend in sorted({row.backend for landscape in landscapes for row in landscape.rows} - {"aten"}):
        inputs, targets, failed_inputs, failed = [], [], [], []
        found_kinds: set[str] = set()
        for landscape in landscapes:
            rows = landscape.of([backend])
            if not rows:
                continue
            found = features(names_of(landscape), [row.config for row in rows])
            times = np.array([row.best_us or math.nan for row in rows])
            ok = ~np.isnan(times)
            inputs.append(found[ok])
            targets.append(np.minimum(np.log(times[ok] / times[ok].min()), _CLIP))
            failed_inputs.append(found)
            failed.append(~ok)
            found_kinds |= {kind for row in rows if (kind := kind_of(row.config)) is not None}
        cost[backend] = Trees.mean_of([_boosted(inputs, targets, settings, seed + 10 * i) for i, settings in enumerate(_MIX)])
        kinds[backend] = tuple(sorted(found_kinds))
        if sum(f.sum() for f in failed) >= 20:
            failure[backend] = _classified(np.concatenate(failed_inputs), np.concatenate(failed), seed)
    origin = {
        "landscapes": [landscape.name for landscape in landscapes],
        "hardware": sorted({str(landscape.header["hardware"]) for landscape in landscapes}),
        "isa": [str(replay.H200.isa)],
        "versions": landscapes[0].header.get("versions", {}),
        "trained": datetime.date.today().isoformat(),
    }
    return CostModel(cost=cost, failure=failure, kinds=kinds, origin=origin)


def _boosted(inputs: Sequence[Floats], targets: Sequence[Floats], settings: _Settings, seed: int) -> Trees:
    from sklearn.ensemble import HistGradientBoostingRegressor

    # all landscapes count the same, whatever the size of their spaces
    weights = np.concatenate([(w := np.exp(-settings.tilt * slower)) / w.sum() for slower in targets])
    model = HistGradientBoostingRegressor(
        max_iter=150, max_leaf_nodes=settings.leaves, learning_rate=0.1, l2_regularization=1e-6, min_samples_leaf=20,
        max_features=0.5, random_state=seed, early_stopping=False, max_depth=8,
    )  # fmt: skip
    rows = np.concatenate(inputs)
    model.fit(rows, np.concatenate(targets), sample_weight=weights * len(weights) / weights.sum())
    exported = export_trees(model)
    sample = rows[:: max(1, len(rows) // 500)]
    assert np.allclose(exported.predict(sample), model.predict(sample), atol=1e-9), (
        "scikit-learn's trees are laid out otherwise"
    )
    return exported


def _classified(inputs: Floats, failed: Any, seed: int) -> Trees:
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=15, learning_rate=0.1, max_depth=6, random_state=seed, early_stopping=False
    )
    return export_trees(model.fit(inputs, failed))


def export_trees(model: Any) -> Trees:
    """scikit-learn's boosted trees as arrays."""
    feature: list[int] = []
    threshold: list[float] = []
    left: list[int] = []
    right: list[int] = []
    value: list[float] = []
    roots: list[int] = []
    for (predictor,) in model._predictors:
        start = len(feature)
        roots.append(start)
        for i, node in enumerate(predictor.nodes):
            leaf = bool(node["is_leaf"])
            feature.append(0 if leaf else int(node["feature_idx"]))
            threshold.append(0.0 if leaf else float(node["num_threshold"]))
            left.append(start + (i if leaf else int(node["left"])))
            right.append(start + (i if leaf else int(node["right"])))
            value.append(float(node["value"]) if leaf else 0.0)
    whole = [np.array(column, dtype=np.int64) for column in (feature, left, right, roots)]
    base = float(np.asarray(model._baseline_prediction).ravel()[0])
    return Trees(whole[0], np.array(threshold), whole[1], whole[2], np.array(value), whole[3], base)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_FILE)
    options = parser.parse_args()
    landscapes = load_all(FOLDER)
    model = train(landscapes)
    save_model(model, options.out)
    size = options.out.stat().st_size
    print(
        f"{options.out}: {len(landscapes)} landscapes, {', '.join(model.cost)}, {len(FEATURES)} features, {size / 1024:.0f} KiB"
    )


if __name__ == "__main__":
    main()
