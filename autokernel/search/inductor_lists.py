"""The configs that Inductor itself tries for its Triton GEMM templates, as seeds. Pure: a table, since search knows no torch.

Source: `mm_configs` and `persistent_mm_configs` of `BaseConfigHeuristic` in torch 2.13's
`_inductor/template_heuristics/triton.py` (2.11 has the same but for 128x256x64; 2.15 has the file under `heuristics/template`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autokernel.records import ConfigValue
from autokernel.search.space import BoundSpace, Config

MAX_CONFIGS = 4
REDUCTION: Mapping[str, ConfigValue] = {"template": "reduction"}  # of a product of one row
_MIN_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """One line of Inductor's lists."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int


# fmt: off
MM = tuple(Tile(*line) for line in (
    (32, 32, 16, 1, 2), (32, 32, 128, 2, 4), (32, 64, 32, 5, 8), (64, 32, 32, 5, 8), (64, 32, 128, 5, 4), (64, 64, 16, 2, 4),
    (64, 64, 32, 2, 4), (64, 64, 64, 3, 8), (64, 64, 128, 5, 4), (64, 128, 32, 3, 4), (64, 128, 32, 4, 8), (64, 128, 64, 3, 4),
    (64, 128, 128, 4, 4), (128, 64, 32, 3, 4), (128, 64, 32, 4, 8), (128, 128, 32, 2, 8), (128, 128, 32, 3, 4),
    (128, 128, 64, 3, 4), (128, 128, 64, 5, 8), (128, 128, 128, 4, 8), (128, 256, 64, 4, 8),
))
PERSISTENT = tuple(Tile(*line) for line in (
    (128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (128, 128, 128, 3, 8), (128, 128, 128, 3, 4), (128, 128, 64, 4, 8),
    (128, 128, 64, 5, 8), (256, 128, 64, 4, 8), (128, 128, 64, 5, 4),
))
# fmt: on
LISTS: Mapping[str, tuple[Tile, ...]] = {"mm": MM, "bmm": MM, "mm_persistent_tma": PERSISTENT}


def inductor_configs(space: BoundSpace) -> list[Config]:
    """Up to `MAX_CONFIGS` of Inductor's own configs that are legal in a space, the likeliest first.

    Blocks shrink to the problem as Inductor shrinks them. It measures all of its lists; which to try first is estimated: those
    whose tiles fill whole rounds of multiprocessors best, and among equals those with the most bytes of loads in flight.
    """
    default = space.default()
    names = {domain.name: domain for domain in space.domains}
    if default is None or not {"template", "BLOCK_M", "num_stages"} <= set(names):
        return []
    ranked: list[tuple[float, int, Config]] = []
    for template, tiles in LISTS.items():
        if template not in names["template"].choices:
            continue
        for tile in tiles:
            config = {**default, **_shrunk(tile, space.names), "template": template}
            config = {name: value for name, value in config.items() if name in names}
            if space.violations(config) == [] and config not in [known for *_, known in ranked]:
                ranked.append((*_rank(config, space.names), config))
    ranked.sort(key=lambda item: item[:2])
    return [config for *_, config in ranked[:MAX_CONFIGS]]


def _shrunk(tile: Tile, names: Mapping[str, int | str]) -> dict[str, ConfigValue]:
    def block(size: int, axis: str) -> int:
        return max(_MIN_BLOCK, min(size, 1 << (int(names[axis]) - 1).bit_length()))

    block_m, block_n = block(tile.block_m, "m"), block(tile.block_n, "n")
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block(tile.block_k, "k"),
        "num_stages": tile.num_stages,
        "num_warps": min(tile.num_warps, block_m * block_n // 256),  # as Inductor: a warp has at least 16 x 16 outputs
        "GROUP_M": 8,
    }


def _rank(config: Mapping[str, ConfigValue], names: Mapping[str, int | str]) -> tuple[float, int]:
    m, n, units = int(names["m"]), int(names["n"]), max(1, int(names["num_units"]))
    block_m, block_n, block_k = (int(config[f"BLOCK_{axis}"]) for axis in "MNK")
    tiles = -(-m // block_m) * -(-n // block_n) * int(names.get("batch", 1))
    rounds = -(-tiles // units)
    idle = rounds * units / tiles  # 1: no multiprocessor ever waits
    in_flight = int(config["num_stages"]) * (block_m + block_n) * block_k
    return round(idle, 1), -in_flight
