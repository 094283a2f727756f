"""Recorded landscapes: every measured config of one GEMM with its time and status; how they are written and read.

A file is one JSON object, compressed with gzip: `benchmarks/landscapes/<hardware>/<name>.json.gz`.

    format    1
    name      "llama8b-o-m16"
    header    hardware, versions, date, protocol, legal (how many configs the space has), measured, complete, notes
    problem   op, batch, m, n, k, dtype, bias
    tables    one for each backend: {"backend", "columns", "rows"}

A row holds the values of `columns` (null: the config has no such parameter), then status, microseconds of the quick
measurement, and microseconds of the careful one (null where there is none).
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Config = dict[str, Any]

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "landscapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One config; `us` is the quick median, `careful_us` that of the interleaved second measurement.

    `estimate_us` is what the second measurement would have said of a row without one (see `comparable`).
    """

    backend: str
    config: Config
    status: str
    us: float | None = None
    careful_us: float | None = None
    estimate_us: float | None = None

    @property
    def best_us(self) -> float | None:
        """The careful time, or what comes closest to it."""
        return next((us for us in (self.careful_us, self.estimate_us) if us is not None), self.us)


@dataclass(slots=True, kw_only=True)
class Landscape:
    """One GEMM on one device, with everything that was measured."""

    name: str
    header: dict[str, Any]
    problem: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def of(self, backends: Iterable[str]) -> list[Row]:
        """Rows of these backends, in the order of the file."""
        wanted = set(backends)
        return [row for row in self.rows if row.backend in wanted]


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The same rows, with estimates for those that were measured quickly only.

    By the time of the careful measurement the card is hot and large GEMMs run up to 16 % slower: a quick time next to a careful
    one would seem better than it is. Quick times are put on the careful scale by the median ratio of the rows that have both,
    and none of them is taken for better than the best careful one: it was not good enough to be among those.
    """
    found: list[Row] = []
    scales: dict[str, tuple[float, float]] = {}
    for backend in {row.backend for row in rows}:
        both = [(row.us, row.careful_us) for row in rows if row.backend == backend and row.us and row.careful_us]
        if both:
            scales[backend] = (statistics.median(careful / us for us, careful in both), min(careful for _, careful in both))
    for row in rows:
        if row.us is not None and row.careful_us is None and row.backend in scales:
            drift, least = scales[row.backend]
            found.append(replace(row, estimate_us=max(row.us * drift, least)))
        else:
            found.append(row)
    return found


def to_json(landscape: Landscape) -> dict[str, Any]:
    """Plain JSON of a landscape, a table for each backend."""
    tables = []
    for backend in dict.fromkeys(row.backend for row in landscape.rows):
        rows = landscape.of([backend])
        columns = list(dict.fromkeys(name for row in rows for name in row.config))
        cells = [
            [*(row.config.get(c) for c in columns), row.status, _rounded(row.us), _rounded(row.careful_us)] for row in rows
        ]
        tables.append({"backend": backend, "columns": columns, "rows": cells})
    return {
        "format": FORMAT, "name": landscape.name, "header": landscape.header, "problem": landscape.problem, "tables": tables,
    }  # fmt: skip


def from_json(data: Mapping[str, Any]) -> Landscape:
    """Inverse of `to_json`.

    Raises:
        ValueError: the format is not known here.
    """
    if data.get("format") != FORMAT:
        raise ValueError(
            f"landscape format {data.get('format')!r}: only {FORMAT} is known; update benchmarks/landscape_file.py"
        )
    rows = []
    for table in data["tables"]:
        columns = table["columns"]
        for cells in table["rows"]:
            config = {name: value for name, value in zip(columns, cells, strict=False) if value is not None}
            status, us, careful_us = cells[len(columns) :]
            rows.append(Row(backend=table["backend"], config=config, status=status, us=us, careful_us=careful_us))
    return Landscape(name=data["name"], header=dict(data["header"]), problem=dict(data["problem"]), rows=comparable(rows))


def save(landscape: Landscape, folder: Path) -> Path:
    """Write `<folder>/<hardware>/<name>.json.gz`; the file is whole or not there."""
    path = folder / slug(str(landscape.header["hardware"])) / f"{landscape.name}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(landscape), separators=(",", ":"), allow_nan=False)
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(part, path)
    return path


def load(path: Path) -> Landscape:
    """Read one file."""
    return from_json(json.loads(gzip.decompress(path.read_bytes())))


def load_all(folder: Path = FOLDER) -> list[Landscape]:
    """All landscapes under a folder, by name."""
    return sorted((load(path) for path in folder.rglob("*.json.gz")), key=lambda landscape: landscape.name)


def merge(first: Landscape, second: Landscape) -> Landscape:
    """Rows of both; where both have a config, that of the second."""
    found = {(row.backend, json.dumps(row.config, sort_keys=True)): row for row in (*first.rows, *second.rows)}
    return Landscape(
        name=first.name, header={**first.header, **second.header}, problem=first.problem, rows=list(found.values())
    )


def pack(folder: Path, archive: Path) -> None:
    """All landscapes of a folder as one zip file; replaces the archive in one step."""
    part = archive.with_name(archive.name + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as bundle:
        for path in sorted(folder.rglob("*.json.gz")):
            bundle.write(path, path.relative_to(folder))
    os.replace(part, archive)


def unpack(archive: Path, folder: Path) -> list[Path]:
    """The landscapes of an archive as files below `folder`. Rows of other backends that a file has stay there."""
    with zipfile.ZipFile(archive) as bundle:
        names = [name for name in bundle.namelist() if name.endswith(".json.gz")]
        for name in names:
            found = from_json(json.loads(gzip.decompress(bundle.read(name))))
            if (folder / name).exists():
                known = load(folder / name)
                again = {row.backend for row in found.rows}
                if "inductor" not in again:  # the cuBLAS that is there was measured with Inductor's templates
                    again, found.rows = again - {"aten"}, [row for row in found.rows if row.backend != "aten"]
                known.rows = [row for row in known.rows if row.backend not in again]
                found = merge(known, found)
            save(found, folder)
    return [folder / name for name in names]


def slug(text: str) -> str:
    """A name for a folder: letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _rounded(us: float | None) -> float | None:
    return None if us is None else round(us, 3)
