"""Puts a race of CuTe DSL kernels among themselves into the landscapes of the same GEMMs, as rows of the backend `cutedsl`.

    python benchmarks/import_cute.py benchmarks/results/cute-streams-nvidia-h200-2026-11-23.json

The race was run on another day than the landscapes were recorded. Kernels that both have say how the two days compare, and
put the new rows on the landscape's scale. Rows that a landscape has already stay as they are.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cute_kernels import BACKEND
from landscape_file import FOLDER, Landscape, Row, load, save, slug

_LATER = {
    "quack": {"stream": False},
    "cluster": {"stream": True},
}  # source -> parameters that older rows lack, with what they were


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A row's config with the parameters that its source has got since."""
    return {**_LATER.get(config["source"], {}), **config}


def imported(landscape: Landscape, race: list[dict[str, Any]]) -> int:
    """Add a race's rows to a landscape; returns how many are new.

    Args:
        landscape: of the same GEMM.
        race: `config`, `us` and, of those that were measured with care, `careful_us`.
    """
    race = [{**given, "config": completed(given["config"])} for given in race]
    own = [row for row in landscape.rows if row.backend == BACKEND]
    for row in own:
        row.config.update(completed(row.config))
    known = {json.dumps(row.config, sort_keys=True): row.us for row in own}
    both = [(known[key], given["us"]) for given in race if known.get(key := json.dumps(given["config"], sort_keys=True))]
    scale = statistics.median(there / here for there, here in both) if both else 1.0
    new = [given for given in race if json.dumps(given["config"], sort_keys=True) not in known]
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


def main() -> None:
    """Command line."""
    data = json.loads(Path(sys.argv[1]).read_text())
    for gemm in data["gemms"]:
        path = FOLDER / slug(data["hardware"]) / f"{gemm['name']}.json.gz"
        landscape = load(path)
        added = imported(landscape, gemm["rows"])
        print(f"{save(landscape, FOLDER).name}: {added} of {len(gemm['rows'])} rows are new")
    for path in sorted((FOLDER / slug(data["hardware"])).glob("*.json.gz")):
        landscape = load(path)
        for row in landscape.rows:
            if row.backend == BACKEND:
                row.config.update(completed(row.config))
        save(landscape, FOLDER)


if __name__ == "__main__":
    main()
