"""Puts what benchmarks/skinny_mm.py measured into the landscapes of the same GEMMs, as rows of the backend `triton`.

    python benchmarks/import_skinny.py skinny.json

Those rows are a part of the kernel's space (tens of thousands of configs): random ones that look promising, then
neighbours of the best. The header's `triton` says how many there are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from landscape_file import FOLDER, Landscape, Row, load, merge, save, slug

_NAMES = {"gate-up": "gateup", "lm-head": "lmhead"}


def landscape_of(table: dict[str, Any], hardware: str, date: str) -> Landscape:
    """One table of skinny_mm.py as a landscape."""
    gemm, _, rows = str(table["name"]).rpartition("-")
    found = [Row(backend="aten", config={"prepack": False}, status="OK", us=table["cublas_us"], careful_us=table["cublas_us"])]
    columns = table["columns"]
    for cells in table["rows"]:
        values = dict(zip(columns, cells, strict=True))
        status, us, careful_us = values.pop("status"), values.pop("us"), values.pop("careful_us")
        config = {name: value for name, value in values.items() if value is not None}
        found.append(Row(backend="triton", config=config, status=status, us=us, careful_us=careful_us))
    return Landscape(
        name=f"llama8b-{_NAMES.get(gemm, gemm)}-{rows}",
        header={"hardware": hardware, "triton": {"date": date, "measured": len(found) - 1, "complete": False}},
        problem={"op": "mm", "batch": 1, "m": table["m"], "n": table["n"], "k": table["k"], "dtype": "bfloat16",
                 "bias": False, "b": "k-major"},
        rows=found,
    )  # fmt: skip


def main() -> None:
    """Command line."""
    data = json.loads(Path(sys.argv[1]).read_text())
    hardware = data.get("hardware", "NVIDIA H200")
    for table in data["tables"]:
        found = landscape_of(table, hardware, data["date"][:10])
        path = FOLDER / slug(hardware) / f"{found.name}.json.gz"
        if path.exists():
            known = load(path)
            found.rows = [row for row in found.rows if row.backend != "aten"]  # the older cuBLAS time belongs to its rows
            found = merge(known, found)
            found.header["hardware"] = known.header["hardware"]
        print(f"{save(found, FOLDER)}: {len(found.rows)} rows")


if __name__ == "__main__":
    main()
