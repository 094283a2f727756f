"""Where exchanged operands and split K pay for CuTe DSL kernels: from the recorded landscapes, no GPU.

    python benchmarks/cute_choices.py

For each GEMM of Llama 3.1 8B and number of rows, the fastest CuTe DSL kernel with and without either, as a Markdown table, µs.
quack's kernels of these landscapes overlapped their own calls, which was worth about 1 µs to each.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from landscape_file import FOLDER, Config, Landscape, load_all

_NAME = re.compile(r"llama8b-(?P<gemm>\w+)-m(?P<m>\d+)$")
_TITLES = {"qkv": "q, k, v", "o": "o", "gateup": "gate, up", "down": "down", "lmhead": "LM head"}


def best_us(landscape: Landscape, wanted: Callable[[Config], bool]) -> float | None:
    """The least time of a CuTe DSL kernel whose config is wanted, in µs; None if none ran."""
    times = [row.best_us for row in landscape.rows if row.backend == "cutedsl" and wanted(row.config)]
    return min((us for us in times if us is not None), default=None)


def _splits(config: Config) -> bool:
    return int(config.get("split_k", 1)) > 1


def _cell(best: float | None, other: float | None) -> str:
    if best is None:
        return "–"
    return f"**{best:.1f}**" if other is not None and best < other else f"{best:.1f}"


def table(landscapes: list[Landscape]) -> str:
    """A line for each GEMM and number of rows that has CuTe DSL kernels."""
    lines = [
        "| GEMM | rows | as they are | exchanged | K in one part | split K | fastest of all |",
        "|---|---|---|---|---|---|---|",
    ]
    named = [(match, one) for one in landscapes if (match := _NAME.match(one.name)) is not None]
    for match, one in sorted(named, key=lambda item: (list(_TITLES).index(item[0]["gemm"]), int(item[0]["m"]))):
        plain, swapped = best_us(one, lambda c: not c.get("swap")), best_us(one, lambda c: bool(c.get("swap")))
        whole, split = best_us(one, lambda c: not _splits(c)), best_us(one, _splits)
        ran = [row for row in one.rows if row.backend == "cutedsl" and row.best_us is not None]
        if not ran:
            continue
        fastest = min(ran, key=lambda row: row.best_us or 0.0)
        said = ", ".join(
            [
                str(fastest.config["source"]),
                *(["exchanged"] if fastest.config.get("swap") else []),
                *([f"split K {fastest.config['split_k']}"] if _splits(fastest.config) else []),
            ]
        )
        cells = [_cell(plain, swapped), _cell(swapped, plain), _cell(whole, split), _cell(split, whole)]
        lines.append(f"| {_TITLES[match['gemm']]} | {match['m']} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(load_all(FOLDER)))
