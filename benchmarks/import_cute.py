"""Puts a race of CuTe DSL kernels among themselves into the landscapes of the same GEMMs, as rows of the backend `cutedsl`.

    python benchmarks/import_cute.py benchmarks/results/cute-tile-k-nvidia-h200-2026-11-23.json

The race was run on another day than the landscapes were recorded. Kernels that both have say how the two days compare, and
put the new rows on the landscape's scale. Rows that a landscape has already stay as they are.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cute_kernels import BACKEND
from landscape_file import FOLDER, Landscape, Row, load, save, slug


def completed(config: dict[str, Any]) -> dict[str, Any] | None:
    """A row's config as the spaces have it now; None if its reads had L2 hints.

    Those were timed while weights took turns with few copies: what the hints left in L2 was found there by later calls.
    """
    if config["source"] == "operators":
        return {"family": "persistent", **config}
    if config.get("stream", config["source"] == "cluster" and "tile_k" not in config):
        return None
    return {"tile_k": 0, **{name: value for name, value in config.items() if name != "stream"}}


def imported(landscape: Landscape, race: list[dict[str, Any]]) -> int:
    """Complete a landscape's own rows, drop those with hints, and add a race's; returns how many are new.

    Args:
        landscape: of the same GEMM.
        race: `config`, `us` and, of those that were measured with care, `careful_us`.
    """
    race = [{**given, "config": config} for given in race if (config := completed(given["config"])) is not None]
    rows = []
    for row in landscape.rows:
        if row.backend != BACKEND:
            rows.append(row)
        elif (config := completed(row.config)) is not None:
            rows.append(replace(row, config=config))
    landscape.rows = rows
    own = [row for row in rows if row.backend == BACKEND]
    known = {_key(row.config): row.us for row in own}
    both = [(us, given["us"]) for given in race if (us := known.get(_key(given["config"])))]
    scale = statistics.median(there / here for there, here in both) if both else 1.0
    new = [given for given in race if _key(given["config"]) not in known]
    for given in new:
        careful = given.get("careful_us")
        landscape.rows.append(
            Row(
                backend=BACKEND,
                config=given["config"],
                status="OK",
                us=given["us"] * scale,
                careful_us=careful * scale if careful else None,
            )
        )
    if new:
        note = landscape.header.setdefault(BACKEND, {}).setdefault("imported", [])
        note.append({"rows": len(new), "shared": len(both), "scale": round(scale, 4)})
    return len(new)


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def main() -> None:
    """Command line."""
    data = json.loads(Path(sys.argv[1]).read_text())
    races = {gemm["name"]: gemm["rows"] for gemm in data["gemms"]}
    for path in sorted((FOLDER / slug(data["hardware"])).glob("*.json.gz")):
        landscape = load(path)
        race = races.get(landscape.name, [])
        added = imported(landscape, race)
        print(f"{save(landscape, FOLDER).name}: {added} of {len(race)} rows are new")


if __name__ == "__main__":
    main()
