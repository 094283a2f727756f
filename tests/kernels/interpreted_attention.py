"""Runs the attention kernels in Triton's interpreter, on the CPU in fp16 and fp32, against fp64. One line per wrong case."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from autokernel.kernels.launch import KernelPlan, resolve, run
from autokernel.kernels.plans import plan_of
from autokernel.ops import get_op
from autokernel.records import ConfigValue, Problem, TensorSpec

DECODE: dict[str, ConfigValue] = {
    "kernel": "decode_attention", "BLOCK_S": 16, "num_splits": 3, "skip": False, "num_warps": 4, "num_stages": 2,
}  # fmt: skip
SKIP: dict[str, ConfigValue] = {**DECODE, "skip": True}
WHOLE: dict[str, ConfigValue] = {**DECODE, "num_splits": 1, "BLOCK_S": 32}
FLASH: dict[str, ConfigValue] = {"kernel": "flash_attention", "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}

SHORT: dict[str, ConfigValue] = {**FLASH, "BLOCK_N": 64, "precision": "tf32x3"}  # one tile of keys
FLASH_SKIP: dict[str, ConfigValue] = {**FLASH, "skip": True}

# config, dtype, q's [B, H, Q, D], k's [B, G, S, D], mask (shape, dtype) or None, causal
CASES = (
    (DECODE, "float16", (1, 6, 1, 16), (1, 2, 90, 16), None, False),
    (DECODE, "float32", (2, 6, 1, 16), (2, 2, 90, 16), ((2, 1, 1, 90), "bool"), False),
    (DECODE, "float16", (2, 2, 3, 24), (2, 2, 48, 24), ((2, 1, 3, 48), "float16"), False),
    (DECODE, "float32", (1, 6, 4, 16), (1, 2, 70, 16), ((1, 6, 1, 70), "float32"), False),
    (
        {**DECODE, "num_splits": 11, "num_warps": 1},
        "float16",
        (1, 4, 1, 128),
        (1, 1, 176, 128),
        ((1, 1, 1, 176), "bool"),
        False,
    ),
    (SKIP, "float32", (2, 6, 1, 16), (2, 2, 90, 16), ((2, 1, 1, 90), "bool"), False),
    (SKIP, "float32", (1, 2, 3, 16), (1, 2, 90, 16), ((1, 1, 3, 90), "float32"), False),
    (WHOLE, "float16", (2, 4, 5, 16), (2, 1, 45, 16), ((2, 1, 5, 45), "bool"), False),
    ({**FLASH, "BLOCK_M": 32}, "float16", (1, 4, 37, 16), (1, 2, 37, 16), None, True),
    (FLASH, "float32", (2, 2, 18, 24), (2, 2, 50, 24), ((2, 1, 1, 50), "float32"), False),
    (FLASH, "float32", (1, 2, 18, 16), (1, 2, 33, 16), ((1, 2, 18, 33), "bool"), False),
    (FLASH, "float16", (1, 2, 20, 16), (1, 1, 40, 16), None, False),
    (SHORT, "float32", (1, 3, 37, 64), (1, 3, 37, 64), ((1, 1, 1, 37), "float32"), False),
    ({**WHOLE, "BLOCK_S": 64, "precision": "tf32x3"}, "float32", (1, 3, 3, 64), (1, 1, 37, 64), None, False),
    (FLASH_SKIP, "float32", (2, 2, 18, 24), (2, 2, 90, 24), ((2, 1, 1, 90), "bool"), False),
    (FLASH_SKIP, "float16", (2, 4, 18, 16), (2, 2, 90, 16), ((2, 4, 18, 90), "float16"), False),
    (FLASH_SKIP, "float32", (2, 2, 40, 16), (2, 1, 70, 16), ((1, 2, 40, 70), "bool"), True),
)
MASKS = ("causal", "window", "blocks", "late", "empty rows", "empty block", "nothing", "all", "left padding", "a hole")


def tensors(
    dtype: str, q: tuple[int, ...], kv: tuple[int, ...], mask: tuple[tuple[int, ...], str] | None
) -> list[torch.Tensor]:
    """q as a permuted view, k and v as halves of one cache, and a mask whose first row sees nothing and whose ends are shut."""
    kind = getattr(torch, dtype)
    batch, heads, rows, dim = q
    both = torch.randn(batch, kv[1], kv[2], 2 * dim).to(kind)
    found = [torch.randn(batch, rows, heads, dim).to(kind).transpose(1, 2), both[..., :dim], both[..., dim:]]
    if mask is not None:
        seen = torch.rand(mask[0]) > 0.3
        seen[..., -20:] = False
        seen[..., :17] = False
        seen[:1, :, 0] = False if mask[0][2] > 1 else seen[:1, :, 0]
        lowest = torch.where(torch.rand(mask[0]) > 0.5, -torch.inf, torch.finfo(kind).min).to(kind)
        ends = torch.arange(mask[0][-1]) < 17
        lowest = torch.where(ends, -torch.inf, lowest.float()).to(kind)
        added = torch.where(seen, torch.randn(mask[0]).to(kind), lowest)
        found.append(seen if mask[1] == "bool" else added)
    return found


def mask_like(kind: str, rows: int, keys: int) -> torch.Tensor:
    """A mask with structure, [1, 1, rows, keys]."""
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    i = i + keys - rows
    seen = {
        "causal": j <= i,
        "window": (j <= i) & (j > i - 20),
        "blocks": i // 24 == j // 24,
        "late": j >= keys - 5 + 0 * i,
        "empty rows": (j <= i) & (i % 3 > 0),
        "empty block": (j <= i) & (i >= keys - rows + 16),
        "all": j >= 0 * i,
        "nothing": j < 0 * i,
        "left padding": (j <= i) & (j > 19),
        "a hole": (j < 16) | (j > 40 + 0 * i),
    }[kind]
    return seen[None, None]


def wrong_of_structure(kind: str, as_numbers: bool, rows: int, keys: int, dtype: str) -> str | None:
    """What is wrong for a mask with structure, where two heads of q share one of keys: tiles that nobody sees are NaN."""
    config = {**FLASH_SKIP, "BLOCK_M": 32 if as_numbers else 16}
    q, k, v = tensors(dtype, (1, 2, rows, 16), (1, 1, keys, 16), None)
    mask = mask_like(kind, rows, keys)
    at = mask[0, 0].any(0).nonzero()
    first, last = (int(at.min()), int(at.max())) if len(at) else (keys, -1)
    k, spoiled = k.contiguous(), k.contiguous().clone()
    spoiled[:, :, : first // 16 * 16] = torch.nan
    spoiled[:, :, (last // 16 + 1) * 16 :] = torch.nan
    mask = torch.where(mask, 0.0, -torch.inf).to(q.dtype) if as_numbers else mask
    return wrong_of(config, [q, k, v, mask], False, given=[q, spoiled, v, mask])


def wrong_tiles(kind: str) -> str | None:
    """What is wrong with what is found of a mask's tiles, and with which of them are read by rows that see only some."""
    q, k, v = tensors("float32", (1, 2, 40, 16), (1, 1, 90, 16), None)
    mask = mask_like(kind, 40, 90)
    k = k.contiguous()
    k[:, :, 48:64] = torch.nan
    specs = tuple(
        TensorSpec(shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), stride=tuple(x.stride()))
        for x in (q, k, v, mask)
    )  # fmt: skip
    problem = Problem(op="attention", inputs=specs, device="cpu", scalars=(("scale", 0.3),))
    plan = plan_of(problem, FLASH_SKIP)
    tiles, out = torch.full(plan.scratch[0].shape, 9, dtype=torch.int32), torch.empty(1, 40, 2, 16).transpose(1, 2)
    for launch in plan.launches:
        launch.kernel[launch.grid](**resolve(launch, {"in": [q, k, v, mask], "out": [out], "scratch": [tiles]}))
    blocks = [list(rows.split(16, 1)) for rows in mask[0, 0].split(16)]
    expected = torch.tensor([[2 if tile.all() and tile.shape[1] == 16 else int(tile.any()) for tile in row] for row in blocks])
    found = tiles[0, 0].clamp(max=2)
    found[:, -1] = found[:, -1].clamp(max=1)  # the last tile is cut: it is looked at in any case
    if not torch.equal(found, expected.int()):
        return f"tiles {found.tolist()}, not {expected.tolist()}"
    read = [bool((row[:4] > 0).any() and (row[3:] > 0).any()) for row in expected]
    found_read = [not block.isfinite().any() for block in out[0].split(16, 1)]
    return None if found_read == read else f"blocks of rows that read the fourth tile: {found_read}, not {read}"


def twice(plan: KernelPlan, inputs: list[torch.Tensor]) -> torch.Tensor | None:
    """The result; with shared memory that of a second run on it. None if counters are not zero."""
    scratch = [
        torch.full(buffer.shape, 0 if buffer.zeroed else 9 if buffer.dtype == "int32" else torch.nan).to(
            getattr(torch, buffer.dtype)
        )
        for buffer in plan.scratch
    ]
    (spec,) = plan.outputs
    for _ in range(2 if any(buffer.zeroed for buffer in plan.scratch) else 1):
        out = torch.empty_strided(spec.shape, spec.stride, dtype=inputs[0].dtype).fill_(torch.nan)
        for launch in plan.launches:
            launch.kernel[launch.grid](**resolve(launch, {"in": inputs, "out": [out], "scratch": scratch}))
        if any(found.any() for found, buffer in zip(scratch, plan.scratch, strict=True) if buffer.zeroed):
            return None
    return out


def wrong_of(
    config: dict[str, ConfigValue], inputs: list[torch.Tensor], causal: bool, given: list[torch.Tensor] | None = None
) -> str | None:
    """What is wrong with launches on the same scratch memory, None if nothing is. `given`: what the kernel gets instead."""
    specs = tuple(
        TensorSpec(shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), stride=tuple(x.stride())) for x in inputs
    )
    scalars: tuple[tuple[str, float | bool], ...] = (("scale", 0.3),)
    problem = Problem(
        op="attention", inputs=specs, device="cpu", scalars=(("causal", True), *scalars) if causal else scalars
    )  # fmt: skip
    plan: KernelPlan = plan_of(problem, config)
    (expected,) = get_op("attention").reference(problem, *(x.double() if x.is_floating_point() else x for x in inputs))
    out = twice(plan, given or inputs)
    if out is None:
        return "counters are not zero"
    if out.stride() != expected.stride():
        return f"strides {out.stride()}, not {expected.stride()}"
    error = float((out.double() - expected).abs().max())
    return None if error < (4e-3 if inputs[0].dtype == torch.float16 else 1e-5) else f"error {error}"


def nonfinite_wrong(config: dict[str, ConfigValue]) -> str | None:
    """NaN and infinities have to be where the library has them, those behind a mask as well."""
    inputs = tensors("float32", (1, 4, 3, 16), (1, 2, 64, 16), ((1, 1, 3, 64), "bool"))
    q, k, v, _ = inputs
    q[0, 0, 1, 3], k[0, 1, 20, 2], k[0, 1, 60, 2], v[0, 0, 30, 5], v[0, 0, 2, 6] = (
        torch.inf, torch.nan, -torch.inf, torch.inf, torch.nan,
    )  # fmt: skip
    scalars = (("scale", 0.3),)
    specs = tuple(
        TensorSpec(shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), stride=tuple(x.stride())) for x in inputs
    )
    problem = Problem(op="attention", inputs=specs, device="cpu", scalars=scalars)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = scores + torch.where(inputs[3], 0.0, -torch.inf).double()
    expected = torch.ops.aten._safe_softmax(scores, -1) @ v.double().repeat_interleave(2, 1)
    (out,) = run(plan_of(problem, config), *inputs)
    same = torch.isfinite(out) == torch.isfinite(expected)
    return None if bool(same.all()) and torch.isnan(expected).any() else f"{int((~same).sum())} elements misplaced"


def wrong_unguarded(config: dict[str, ConfigValue]) -> str | None:
    """Rows that see nothing are NaN where a model writes its softmax without a guard, and zero where it has one."""
    q, k, v = tensors("float32", (1, 2, 20, 16), (1, 1, 45, 16), None)
    mask = torch.where(mask_like("empty rows", 20, 45), 0.0, -torch.inf)
    inputs = [q, k, v, mask]
    specs = tuple(TensorSpec(shape=tuple(x.shape), dtype="float32", stride=tuple(x.stride())) for x in inputs)
    for style, empty in (("eager", torch.isnan), ("math", lambda x: x == 0)):
        problem = Problem(op="attention", inputs=specs, device="cpu", scalars=(("scale", 0.3), ("written", style)))
        out = twice(plan_of(problem, config), inputs)
        (expected,) = get_op("attention").reference(problem, *(x.double() for x in inputs))
        if out is None or not torch.allclose(out.double(), expected, rtol=0, atol=1e-5, equal_nan=True):
            return f"{style}: not as the model has it"
        seen_by_none = (mask == -torch.inf).all(-1)[0, 0]
        if not seen_by_none.any() or not bool(empty(expected[:, :, seen_by_none]).all()):
            return f"{style}: the case does not tell"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    for config, dtype, q, kv, mask, causal in CASES:
        wrong = wrong_of(config, tensors(dtype, q, kv, mask), causal)
        if wrong:
            print(config, dtype, q, kv, mask, wrong)
    for name in ("causal", "window", "blocks", "empty block"):
        wrong = wrong_tiles(name)
        if wrong:
            print(name, wrong)
    for position, name in enumerate(MASKS):
        rows, keys, kind = ((48, 80, "float32"), (37, 70, "float16"))[position % 2]
        wrong = wrong_of_structure(name, position % 3 == 0, rows, keys, kind)
        if wrong:
            print(name, wrong)
    for config in ({**DECODE, "num_splits": 2}, WHOLE, FLASH, FLASH_SKIP):
        wrong = wrong_unguarded(config)
        if wrong:
            print("unguarded", config, wrong)
    for config in ({**DECODE, "num_splits": 2}, WHOLE, FLASH):
        wrong = nonfinite_wrong(config)
        if wrong:
            print("nonfinite", config, wrong)
    for config, causal in ((FLASH, False), (FLASH, True), (FLASH_SKIP, False)):
        q, k, v = tensors("float32", (1, 2, 40, 16), (1, 1, 70, 16), None)
        masks = [torch.ones(1, 1, 40, 70, dtype=torch.bool)] if config.get("skip") else []
        wrong = wrong_of(config, [q * 2**16, k * 2**16, v, *masks], causal)
        if wrong:
            print("large scores", config, causal, wrong)
    print("done")
