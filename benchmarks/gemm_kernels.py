"""Kernel sources as Inductor writes them, made without Inductor, so that thousands of variants compile in seconds each.

The loops are torch's own: the Jinja templates that lie in the installed torch (`torch/_inductor/kernel/templates`) are
rendered with the few functions that they call. What Inductor adds around them (pointer arithmetic of loads, the store
with its mask, constants as `tl.constexpr` of the body) is spelt as its generated code spells it.

Imports no torch and touches no device: workers compile for sm_90 into Triton's cache, the device process finds it there.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

_FILES = {"mm": "triton_mm", "mm_persistent_tma": "triton_persistent_tma_mm", "bmm": "triton_bmm"}
_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")
NUM_SMS = 132
MAX_SHARED = 232448  # bytes that a block may use on sm_90


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """[batch,] m x n x k in bf16; the weight of `mm` and `addmm` is stored [n, k], as nn.Linear has it."""

    name: str
    op: str  # mm, addmm, bmm
    m: int
    n: int
    k: int
    batch: int = 1
    k_major: bool = True  # b[k, n] has stride 1 along k

    @property
    def bytes(self) -> int:
        """Of one call: inputs and output."""
        return 2 * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)

    @property
    def flops(self) -> int:
        """Of one call."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def dims(self) -> dict[str, int]:
        """The names that constraints of search spaces read."""
        dims = {"m": self.m, "n": self.n, "k": self.k, "dtype_bytes": 2, "num_epilogue": 0}
        return {**dims, "batch": self.batch} if self.op == "bmm" else {**dims, "has_constant_weight": 1}

    def stride_a(self) -> tuple[int, ...]:
        """Elements; batch first where there is one."""
        return (self.m * self.k, self.k, 1) if self.op == "bmm" else (self.k, 1)

    def stride_b(self) -> tuple[int, ...]:
        """Elements; batch first where there is one."""
        inner = (1, self.k) if self.k_major else (self.n, 1)
        return (self.k * self.n, *inner) if self.op == "bmm" else inner


class _Renderer:
    """What the templates call while they are rendered for one GEMM."""

    def __init__(self, gemm: Gemm, config: Mapping[str, Any]) -> None:
        self.gemm = gemm
        self.config = config
        lead = (gemm.batch,) if gemm.op == "bmm" else ()
        self.sizes = {"A": (*lead, gemm.m, gemm.k), "B": (*lead, gemm.k, gemm.n)}
        self.strides = {"A": gemm.stride_a(), "B": gemm.stride_b()}

    @property
    def arguments(self) -> tuple[str, ...]:
        return (("in_ptr0",) if self.gemm.op == "addmm" else ()) + ("arg_A", "arg_B", "out_ptr0")

    def def_kernel(self, *_names: str) -> str:
        gemm, config = self.gemm, self.config
        constants: dict[str, Any] = {
            "EVEN_K": gemm.k % config["BLOCK_K"] == 0,
            "USE_FAST_ACCUM": False,
            "ACC_TYPE": "tl.float32",
            "INDEX_DTYPE": "tl.int32"
            if max(gemm.m * gemm.k, gemm.k * gemm.n, gemm.m * gemm.n) * gemm.batch < 2**31
            else "tl.int64",
            "ALLOW_TF32": False,
            **{name: config[name] for name in _TILE},
        }
        if config["template"] == "mm_persistent_tma":
            constants.update(
                A_ROW_MAJOR=True, B_ROW_MAJOR=not gemm.k_major, NUM_SMS=NUM_SMS, TMA_SIZE=128, TMA_EXPERIMENTAL_API=False
            )
        lines = ["@triton.jit", f"def kernel({', '.join(self.arguments)}):"]
        lines += [f"    {name} : tl.constexpr = {value}" for name, value in constants.items()]
        return "\n".join([*lines, "    A = arg_A", "    B = arg_B"])

    def size(self, name: str, axis: int) -> str:
        return str(self.sizes[name][axis])

    def stride(self, name: str, axis: int) -> str:
        return str(self.strides[name][axis])

    def load_input(
        self, name: str, output: str, indices: tuple[str, str], mask: str | None = None, indent_width: int = 4,
        index_shape: tuple[str, str] = ("", ""), **_: Any,
    ) -> str:  # fmt: skip
        row, column = self.strides[name]
        width = self.sizes[name][1]
        lines = [f"xindex = {_index(indices, (width, 1))}"]
        place = "xindex"
        if (row, column) != (width, 1):
            place = (
                f"(tl.broadcast_to({_index(indices, (row, column))}, [{', '.join(index_shape)}])).broadcast_to(xindex.shape)"
            )
        masked = f", mask={mask}, other=0.0" if mask else ""
        lines.append(f"{output} = tl.load({name} + ({place}){masked})")
        return f"\n{' ' * indent_width}".join(lines)

    def store_output(
        self, indices: tuple[str, ...], value: str, mask: str | None = None, indent_width: int = 4,
        val_shape: tuple[str, str] = ("", ""), block_indexing: bool = False, **_: Any,
    ) -> str:  # fmt: skip
        gemm, lines = self.gemm, []
        if block_indexing:
            lines += [
                f"idx_m = {indices[0]} + tl.arange(0, {val_shape[0]})[:, None]",
                f"idx_n = {indices[1]} + tl.arange(0, {val_shape[1]})[None, :]",
                "mask = (idx_m < M) & (idx_n < N)",
            ]
            indices, mask = ("idx_m", "idx_n"), "mask"
        strides = (gemm.m * gemm.n, gemm.n, 1)[-len(indices) :]
        shape = f"[{', '.join(val_shape)}]"
        lines.append(f"xindex = {_index(indices, strides)}")
        if gemm.op == "addmm":
            column = f"tl.broadcast_to({indices[-1]}, {shape})"
            lines.append(f"bias = tl.load(in_ptr0 + ({column}), {mask}, eviction_policy='evict_last').to(tl.float32)")
            lines.append(f"{value} = {value} + bias")
        lines.append(f"tl.store(out_ptr0 + (tl.broadcast_to(xindex, {shape})), {value}, {mask})")
        return f"\n{' ' * indent_width}".join(lines)


LLAMA = {"qkv": (6144, 4096), "o": (4096, 4096), "gateup": (28672, 4096), "down": (4096, 14336), "lmhead": (128256, 4096)}


def llama_gemm(name: str, m: int) -> Gemm:
    """One of Llama 3.1 8B's, with weights that share an input side by side, under the name of its landscape."""
    n, k = LLAMA[name]
    return Gemm(name=f"llama8b-{name}-m{m}", op="mm", m=m, n=n, k=k)


def _index(indices: tuple[str, ...], strides: tuple[int, ...]) -> str:
    return " + ".join(i if s == 1 else f"{s}*{i}" for i, s in zip(reversed(indices), reversed(strides), strict=True))


def torch_templates() -> Path:
    """Where the installed torch keeps its kernel templates; torch is found, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("torch is not installed; its kernel templates are needed")
    return Path(spec.origin).parent / "_inductor" / "kernel" / "templates"


def source_of(gemm: Gemm, config: Mapping[str, Any], templates: Path | None = None) -> str:
    """A module with one Triton function `kernel`, for one config of one GEMM."""
    folder = torch_templates() if templates is None else templates
    text = (folder / f"{_FILES[config['template']]}.py.jinja").read_text(encoding="utf-8")
    renderer = _Renderer(gemm, config)
    hooks = {name: getattr(renderer, name) for name in ("def_kernel", "size", "stride", "load_input", "store_output")}
    values = {"EVEN_K": gemm.k % config["BLOCK_K"] == 0, "USE_FAST_ACCUM": False, "TMA_EXPERIMENTAL_API": False}
    body = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(**hooks, **values)
    return f"import triton\nimport triton.language as tl\n\n\n{body}\n"


def grid_of(gemm: Gemm, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Blocks of one launch."""
    tiles = math.ceil(gemm.m / config["BLOCK_M"]) * math.ceil(gemm.n / config["BLOCK_N"])
    if config["template"] == "mm_persistent_tma":
        return min(NUM_SMS, tiles), 1, 1
    return tiles, gemm.batch, 1


def compile_kernel(gemm: Gemm, config: Mapping[str, Any], folder: Path, name: str) -> Any:
    """The compiled kernel, from Triton's cache if it is there. Its arguments: [bias,] a, b, out.

    Args:
        gemm: what it computes.
        config: template, tile, num_warps, num_stages.
        folder: where the module is written; the same in all processes.
        name: of the module.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    path = folder / f"{name}.py"
    if not path.exists():
        path.write_text(source_of(gemm, config), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = module.kernel
    arguments = function.arg_names
    source = ASTSource(
        fn=function,
        signature=dict.fromkeys(arguments, "*bf16"),
        constexprs={},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arguments))},
    )
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
