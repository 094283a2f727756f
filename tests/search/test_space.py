"""Search spaces: reading them, and that every config they hand out is legal."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest

from autokernel.errors import ConfigError
from autokernel.search.space import DeviceFacts, Space, names_for
from autokernel.search.space_file import default_spaces_folder, load_space

CPU = DeviceFacts(device="cpu", threads=4, isa="AVX512", num_units=4)
GPU = DeviceFacts(device="cuda", isa="sm_90", smem_bytes=232448, num_units=132)

TEXT = """
op: toy
names: [m, k]
backends:
  inductor:
    cpu:
      choices:
        template: [plain, tiled]
        tile: {range: [1, 16], log2: true}
        tm: {divisors: threads, also: [0]}
        tn: [0, 1, 2, {expr: threads}]
        deep: [false, true]
      when:
        tile: template == "tiled"
      constraints:
        - tm * tn == threads or (tm == 0 and tn == 0)
        - tile * 8 <= m
        - not deep or k >= 64
      default: {template: plain, tm: 0, tn: 0, deep: false, tile: 4}
"""


def toy(folder: Path, text: str = TEXT) -> Space:
    (folder / "toy.yaml").write_text(text)
    return load_space("toy", folder)["inductor"]


def dims(m: int = 64, k: int = 64) -> dict[str, int]:
    return {"m": m, "k": k}


def test_enumeration_is_what_brute_force_finds(tmp_path: Path) -> None:
    space = toy(tmp_path)
    for m, k, threads in itertools.product((7, 8, 64, 128), (32, 64), (1, 4, 6)):
        names = names_for(dims(m, k), DeviceFacts(device="cpu", threads=threads))
        expected = []
        for template, tile, tm, tn, deep in itertools.product(
            ("plain", "tiled"), (None, 1, 2, 4, 8, 16), (0, 1, 2, 3, 4, 6), {0, 1, 2, threads}, (False, True)
        ):
            if (tile is None) != (template == "plain") or (tm and threads % tm):
                continue
            if (tm * tn == threads or tm == tn == 0) and (tile is None or tile * 8 <= m) and (not deep or k >= 64):
                config: dict[str, Any] = {"template": template, "tile": tile, "tm": tm, "tn": tn, "deep": deep}
                expected.append({key: value for key, value in config.items() if value is not None})
        found = list(space.enumerate(names))
        assert sorted(map(repr, map(sorted, map(dict.items, found)))) == sorted(
            map(repr, map(sorted, map(dict.items, expected)))
        )
        assert space.count(names) == len(expected)
        assert space.count(names, limit=3) == min(3, len(expected))
        assert len(list(space.enumerate(names, limit=2))) == min(2, len(expected))
        assert all(not space.violations(config, names) for config in found)


def test_random_and_nearest_are_legal_everywhere() -> None:
    rng = random.Random(0)
    for op in ("mm", "addmm", "bmm", "baddbmm", "merged_mm"):
        for space in load_space(op).values():
            for _ in range(12):
                m, n, k = (rng.choice((1, 3, 16, 100, 512, 4096)) for _ in range(3))
                sizes = {
                    "m": m,
                    "n": n,
                    "k": k,
                    "batch": 4,
                    "dtype_bytes": rng.choice((2, 4)),
                    "has_constant_weight": 1,
                    "num_epilogue": 0,
                }
                names = names_for(sizes, rng.choice((CPU, GPU)))
                config = space.random(rng, names)
                assert (config is None) == (space.count(names, limit=1) == 0)
                if config is None:
                    continue
                assert space.violations(config, names) == []
                assert space.nearest(config, names) == config
                elsewhere = names_for({**sizes, "m": 7, "k": 48}, CPU if names["device"] == "cpu" else GPU)
                moved = space.nearest(config, elsewhere)
                assert moved is None or space.violations(moved, elsewhere) == []
                default = space.default(names)
                assert default is not None
                assert space.violations(default, names) == []


def test_nearest_is_the_nearest(tmp_path: Path) -> None:
    space = toy(tmp_path)
    names = names_for(dims(m=64), CPU)
    wanted = {"template": "tiled", "tile": 16, "tm": 4, "tn": 1, "deep": True}
    assert space.nearest(wanted, names) == {**wanted, "tile": 8}  # 16 * 8 > m
    assert space.nearest(wanted, names_for(dims(m=4), CPU)) == {"template": "plain", "tm": 4, "tn": 1, "deep": True}
    assert space.nearest({"unknown": 1}, names) == {"template": "plain", "tm": 0, "tn": 0, "deep": False}


def test_nearest_agrees_with_trying_everything(tmp_path: Path) -> None:
    text = "op: toy\nbackends: {inductor: {cpu: {choices: {a: [1, 2, 4, 8, 16], b: [1, 2, 4, 8, 16], c: [1, 2, 4, 8, 16]},"
    space = toy(tmp_path, text + "constraints: [a * b * c == 64, a != b, b != c + 1], default: {a: 1, b: 4, c: 16}}}}")
    names = names_for({}, CPU)
    legal = list(space.enumerate(names))
    rng = random.Random(0)
    for _ in range(100):
        wanted: dict[str, Any] = {name: rng.randrange(1, 17) for name in "abc"}

        def distance(config: dict[str, Any], wanted: dict[str, Any] = wanted) -> float:
            return sum(abs(math.log2((config[name] + 1) / (wanted[name] + 1))) for name in wanted)

        found = space.nearest(wanted, names)
        assert found is not None
        assert distance(found) == pytest.approx(min(map(distance, legal)))


def test_violations_say_what_is_wrong(tmp_path: Path) -> None:
    space = toy(tmp_path)
    names = names_for(dims(m=64, k=32), CPU)
    good = {"template": "plain", "tm": 2, "tn": 2, "deep": False}
    assert space.violations(good, names) == []
    assert space.violations({**good, "tm": 4}, names) == [
        "`tm * tn == threads or (tm == 0 and tn == 0)` does not hold with threads=4, tm=4, tn=2"
    ]
    assert space.violations({**good, "deep": True}, names) == ["`not deep or k >= 64` does not hold with deep=True, k=32"]
    assert "is not one of" in space.violations({**good, "tm": 3}, names)[0]
    assert "is not one of" in space.violations({**good, "deep": 0}, names)[0]
    assert "is missing" in space.violations({"template": "plain", "tm": 0, "tn": 0}, names)[0]
    assert 'left out unless `template == "tiled"`' in space.violations({**good, "tile": 2}, names)[0]
    assert space.violations({**good, "typo": 2}, names) == ["no such parameter: typo"]
    assert "no space for toy on cuda" in space.violations(good, names_for(dims(), GPU))[0]
    assert space.count(names_for(dims(), GPU)) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("op: toy", "op: tyo", "op: is 'tyo', but the file is named for 'toy'"),
        ("names: [m, k]", "names: [m, threads]", "threads belong to the device"),
        ("- tile * 8 <= m", "- tlie * 8 <= m", r"constraints\[1\]: .*did you mean `tile`"),
        ("- tile * 8 <= m", "- tile.x <= m", r"constraints\[1\]: .*Attribute"),
        ('tile: template == "tiled"', 'tile: deep == "tiled"', r"when.tile: .*`deep` is unknown"),
        ('tile: template == "tiled"', "tiel: deep", "when.tiel: no such parameter; did you mean `tile`"),
        ("template: [plain, tiled]", "template: []", "choices.template: is empty"),
        ("template: [plain, tiled]", "template: plain", "choices.template: must be a list"),
        ("template: [plain, tiled]", "template: [[1]]", r"choices.template\[0\]: must be a number"),
        ("range: [1, 16]", "range: [1]", "choices.tile.range: must be"),
        ("log2: true", "log: true", "choices.tile.log: unknown key; known keys: log2, range, step"),
        ("log2: true", "step: 0", "choices.tile: log2 must be"),
        (
            "range: [1, 16]",
            "range: [0, 16]",
            r"tile.range: \[0, 16\]: low must be at least 1 with log2 and not exceed high; bound",
        ),
        (
            "range: [1, 16], log2: true",
            "range: [-4, 2]",
            r"tile.range: \[-4, 2\]: low must be at least 0 and not exceed high; ",
        ),
        ("range: [1, 16]", "range: [16, 1]", r"choices.tile.range: \[16, 1\]: low must be at least 1"),
        (
            "range: [1, 16], log2: true",
            "range: [1, 5000]",
            r"choices.tile.range: \[1, 5000\] has more than 1024 values; give a larger step",
        ),
        (
            "  inductor:",
            "  inducter:",
            "backends.inducter: is none of aten, inductor, triton, cutedsl; did you mean `inductor`?",
        ),
        ("  inductor:", "  mine:", "toy.yaml: backends.mine: is none of aten, inductor, triton, cutedsl$"),
        ("divisors: threads", "divisors: thread", "choices.tm.divisors: .*did you mean `threads`"),
        ("tm: 0, tn: 0, deep", "tm: 0, deep", "default: lacks tn"),
        ("template: plain, tm", "template: none, tm", "default.template: 'none' is not among"),
        ("tile: 4}", "tiel: 4}", "default.tiel: no such parameter"),
        ("      choices:", "      choice:", "backends.inductor.cpu.choice: unknown key; did you mean `choices`"),
        ("    cpu:", "    gpu:", "backends.inductor.gpu: unknown key"),
        ("        deep: [false, true]", "        m: [1]", "choices.m: is also a name of the problem"),
        ("        deep: [false, true]", "        tm: [1]", "key 'tm' is given twice"),
    ],
)
def test_mistakes_name_file_key_and_cure(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError, match=message) as caught:
        toy(tmp_path, TEXT.replace(old, new, 1))
    assert str(tmp_path / "toy.yaml") in str(caught.value)


@pytest.mark.parametrize("bounds", ["[k, m]", "[0, m]", "[m - 9, m]", "[1, k ** 6]"])
def test_ranges_that_have_no_values_for_a_problem(tmp_path: Path, bounds: str) -> None:
    log2 = "log2: false" if "**" in bounds or "-" in bounds else "log2: true"
    space = toy(tmp_path, TEXT.replace("range: [1, 16], log2: true", f"range: {bounds}, {log2}"))
    with pytest.raises(ConfigError, match=r"choices.tile.range"):
        space.count(names_for(dims(m=8, k=64), CPU))


def test_names_that_an_op_does_not_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uses the names k, which toy does not give; it gives m"):
        toy(tmp_path).count(names_for({"m": 4}, CPU))
    with pytest.raises(ValueError, match="threads"):
        names_for({"threads": 4}, CPU)


def test_missing_space_lists_what_there_is(tmp_path: Path) -> None:
    toy(tmp_path)
    cure = "copy the package's search_spaces/ and change the copy"
    with pytest.raises(ConfigError, match=f"no search space for op conv; the folder has spaces for: toy; {cure}"):
        load_space("conv", tmp_path)
    (tmp_path / "bad.yaml").write_text("op: [")
    with pytest.raises(ConfigError, match=r"bad.yaml:\d+:\d+: not valid YAML"):
        load_space("bad", tmp_path)
    (tmp_path / "empty.yaml").write_text("op: empty\nbackends: {aten: {}}")
    with pytest.raises(ConfigError, match=r"backends.aten: has no section"):
        load_space("empty", tmp_path)


def test_the_packages_own_spaces() -> None:
    for op in ("mm", "addmm", "bmm", "baddbmm", "merged_mm"):
        assert (default_spaces_folder() / f"{op}.yaml").is_file()
        spaces = load_space(op)
        assert "aten" in spaces
        for threads in (1, 2, 96):
            names = names_for(
                {"m": 8, "n": 256, "k": 512, "batch": 2, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0},
                DeviceFacts(device="cpu", threads=threads),
            )
            for config in itertools.islice(spaces.get("inductor", spaces["aten"]).enumerate(names), 500):
                factors = [config.get(f"threads_{axis}", 0) for axis in "mnk"]
                assert factors == [0, 0, 0] or factors[0] * factors[1] * factors[2] == threads  # type: ignore[operator]
    names = names_for({"m": 8, "n": 8, "k": 8, "dtype_bytes": 2, "has_constant_weight": 0, "num_epilogue": 0}, CPU)
    assert list(load_space("mm")["aten"].enumerate(names)) == [{"prepack": False}]
    assert load_space("mm")["inductor"].count(names) == 0  # the C++ template needs a constant weight


@pytest.mark.parametrize("op", ["mm", "addmm", "bmm", "merged_mm"])
@pytest.mark.parametrize(
    "shape", [(1, 6144, 4096), (16, 4096, 14336), (64, 28672, 4096), (128, 4096, 4096), (2048, 6144, 4096)]
)
def test_templates_of_a_gpu_are_hundreds_and_fit(op: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    names = names_for({"m": m, "n": n, "k": k, "batch": 8, "dtype_bytes": 2, "has_constant_weight": 1, "num_epilogue": 0}, GPU)
    configs = list(load_space(op)["inductor"].enumerate(names))
    tiles = [config for config in configs if config["template"] not in ("decompose_k", "reduction")]
    assert 140 <= len(tiles) <= 1500
    assert len(configs) - len(tiles) <= 16
    for c in tiles:
        # Triton 3.6 and 3.7 keep one stage less where the matrix instructions read registers
        buffers = c["num_stages"] if c["BLOCK_M"] >= 64 else c["num_stages"] - 1
        assert buffers * (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * 2 < GPU.smem_bytes
        assert c["BLOCK_M"] >= 64 or m < 64
        assert c["template"] != "mm_persistent_tma" or (c["num_warps"] >= 4 and c["BLOCK_K"] <= 256)
    if m <= 16:
        assert {c["BLOCK_M"] for c in tiles} == {16}
        assert {512, 32} <= {c["BLOCK_K"] for c in tiles}


@pytest.mark.parametrize(
    ("batch", "keys", "expected"),
    [
        (1, 2080, (17, 2, False)),
        (1, 6400, (17, 2, False)),
        (4, 2080, (4, 2, False)),
        (16, 2080, (1, 8, True)),
        (64, 2080, (1, 4, True)),
        (1, 640, (10, 2, False)),
    ],
)
def test_attention_of_one_row_begins_with_one_program_per_multiprocessor(
    batch: int, keys: int, expected: tuple[int, int, bool]
) -> None:
    """Of a decoding step of 32 heads over 8; parts of one size, however many blocks of keys there are."""
    sizes = {"heads": 32, "kv_heads": 8, "q_len": 1, "head_dim": 128, "v_dim": 128, "group": 4, "dtype_bytes": 2}
    names = names_for({**sizes, "batch": batch, "kv_len": keys, "has_mask": 1, "causal": 0}, GPU)
    space = load_space("attention")["triton"]
    config = space.default(names)
    assert config is not None
    assert space.violations(config, names) == []
    assert (config["num_splits"], config["num_warps"], config["skip"]) == expected
