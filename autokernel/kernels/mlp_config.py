"""What the kernels for MLPs are launched with: parameters, what follows from them for a problem, and the launches. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autokernel.kernels.launch import Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.parameters import Parameters, Precision, is_power_of_two, precision_problem
from autokernel.kernels.row_norm_config import broadcast_strides
from autokernel.ops.mlp import Mlp, MlpInputs, inputs_of
from autokernel.records import ConfigValue, Problem, TensorSpec

DTYPES = ("bfloat16", "float16", "float32")
MAX_ROWS = 128
MAX_ELEMENTS = 2**31 - 1  # offsets are 32-bit
ACTIVATIONS: Mapping[str, int] = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}  # as the kernel numbers them
_MIN_TILE = 16  # of matrix instructions
_DIMS = 4
_SECTOR_BYTES = 32  # that come to the L2 cache together


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpConfig(Parameters):
    """Parameters of `mlp`.

    Attributes:
        block_m: rows of a program; programs with other rows of the same slice read its weights again.
        block_h: hidden columns of a program. All programs together leave `hidden / block_h` parts of the result.
        block_k: of the first product, read at once.
        block_n: columns of the result, computed at once.
        swap_in, swap_out: whether the weight's rows, and not x's, are the rows of the first and of the second product's
            matrix instruction: few rows then waste nothing of an instruction of 64, which needs as many of the weight.
        num_warps, num_stages: of Triton.
        sum_block: elements of the result that a program of the second launch has.
        sum_parts: parts that it reads at once.
        sum_warps: its warps.
        prefetch: whether a program asks for its slice of the second weight before it starts with the first one. For weights
            that are contiguous along the hidden dimension, as those of linear layers are; without effect on others.
        precision: of products in fp32, as in `generated_config.ProductsConfig`.
    """

    block_m: int
    block_h: int
    block_k: int
    block_n: int
    swap_in: bool
    swap_out: bool
    num_warps: int
    num_stages: int
    sum_block: int
    sum_parts: int
    sum_warps: int = 4
    prefetch: bool = False
    precision: Precision = "ieee"

    def problem(self) -> str | None:
        """The rule that the parameters break, None if they are legal."""
        if wrong := precision_problem(self.precision):
            return wrong
        for name in ("block_m", "block_h", "block_k", "block_n", "num_warps", "sum_block", "sum_parts", "sum_warps"):
            value = getattr(self, name)
            if not is_power_of_two(value):
                return f"{name} is a power of two; it is {value}"
        tile = (self.block_m, self.block_h, self.block_k, self.block_n)
        if min(tile) < _MIN_TILE:
            return f"tiles of matrix instructions are at least {_MIN_TILE}; block_m, block_h, block_k, block_n are {tile}"
        return f"num_stages is at least 1; it is {self.num_stages}" if self.num_stages < 1 else None


def plan_mlp(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """Two launches: `mlp_kernel` for the slices' parts, `mlp_sum_kernel` for their sum.

    Args:
        problem: of the op `mlp`.
        config: the fields of `MlpConfig`.

    Raises:
        ValueError: the kernel does not take the problem or the config; says the rule.
    """
    chosen, found = MlpConfig.from_entry(config), inputs_of(problem)
    wrong = _problem(problem, found) or chosen.problem()
    if wrong:
        raise ValueError(wrong)
    (out,) = Mlp().outputs(problem)
    dims = Mlp().dims(problem)
    slices = -(-dims["hidden"] // chosen.block_h)
    num_parts = slices * dims["m"] * dims["n"]
    for what, reach in (*((str(spec), spec.reach) for spec in (*problem.inputs, out)), ("the parts", num_parts)):
        if reach > MAX_ELEMENTS:
            raise ValueError(f"mlp has 32-bit offsets; {what} reach {reach} elements, more than {MAX_ELEMENTS}")
    first = _slices(problem, found, chosen, dims, slices)
    second = _sum(problem, found, chosen, dims, slices, out)
    return KernelPlan(outputs=(out,), scratch=(Buffer((num_parts,), "float32"),), launches=(first, second))


def _slices(problem: Problem, found: MlpInputs, chosen: MlpConfig, dims: Mapping[str, int], slices: int) -> Launch:
    from autokernel.kernels.mlp import mlp_kernel

    x, place, bias = found.x, found.positions, "b_in" in found.positions
    sizes = _sizes(x)
    sector = min(chosen.block_h, _SECTOR_BYTES // dims["dtype_bytes"])
    return Launch(
        kernel=mlp_kernel,
        grid=(slices, -(-dims["m"] // chosen.block_m), 1),
        arguments={
            "x": Operand("in", place["x"]),
            "w_in": Operand("in", place["w_in"]),
            "b_in": Operand("in", place.get("b_in", place["x"])),
            "w_out": Operand("in", place["w_out"]),
            "parts": Operand("scratch", 0),
            "ROWS": dims["m"],
            "K": dims["k"],
            "HIDDEN": dims["hidden"],
            "N": dims["n"],
            "SIZE_1": sizes[1],
            "SIZE_2": sizes[2],
            **_strides("X", x),
            "IN_K": found.w_in.stride[0],
            "IN_H": found.w_in.stride[1],
            "B": problem.inputs[place["b_in"]].stride[0] if bias else 0,
            "OUT_H": found.w_out.stride[0],
            "OUT_N": found.w_out.stride[1],
            "BIAS": bias,
            "ACTIVATION": ACTIVATIONS[str(dict(problem.scalars)["activation"])],
            "BLOCK_M": chosen.block_m,
            "BLOCK_H": chosen.block_h,
            "BLOCK_K": chosen.block_k,
            "BLOCK_N": chosen.block_n,
            "SWAP_IN": chosen.swap_in,
            "SWAP_OUT": chosen.swap_out,
            "PREFETCH": sector if chosen.prefetch and found.w_out.stride[0] == 1 else 0,
            "TF32X3": chosen.precision == "tf32x3",
        },
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def _sum(
    problem: Problem, found: MlpInputs, chosen: MlpConfig, dims: Mapping[str, int], slices: int, out: TensorSpec
) -> Launch:
    from autokernel.kernels.mlp import mlp_sum_kernel

    place = found.positions
    residual = problem.inputs[place["residual"]] if "residual" in place else out
    sizes = _sizes(out)
    return Launch(
        kernel=mlp_sum_kernel,
        grid=(-(-dims["m"] * dims["n"] // chosen.sum_block), 1, 1),
        arguments={
            "parts": Operand("scratch", 0),
            "b_out": Operand("in", place.get("b_out", place["x"])),
            "residual": Operand("in", place.get("residual", place["x"])),
            "out": Operand("out", 0),
            "ROWS": dims["m"],
            "N": dims["n"],
            "SLICES": slices,
            "SIZE_1": sizes[1],
            "SIZE_2": sizes[2],
            "B": problem.inputs[place["b_out"]].stride[0] if "b_out" in place else 0,
            **_strides("R", residual),
            **_strides("Y", out),
            "BIAS": "b_out" in place,
            "RESIDUAL": "residual" in place,
            "SUM_PARTS": chosen.sum_parts,
            "SUM_BLOCK": chosen.sum_block,
        },
        num_warps=chosen.sum_warps,
        num_stages=1,
    )


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    """A shape in four dimensions."""
    return (1,) * (_DIMS - len(spec.shape)) + spec.shape


def _strides(name: str, spec: TensorSpec) -> dict[str, int]:
    return {f"{name}{i}": stride for i, stride in enumerate(broadcast_strides(spec, spec.shape))}


def _problem(problem: Problem, found: MlpInputs) -> str | None:
    """The rule that the inputs break."""
    rows = math.prod(found.x.shape[:-1])
    if not 2 <= len(found.x.shape) <= _DIMS:
        return f"mlp takes x of 2 to {_DIMS} dimensions; its shape is {list(found.x.shape)}"
    if min(rows, *found.w_in.shape, *found.w_out.shape) == 0:
        return "mlp takes no empty tensors"
    if rows > MAX_ROWS:
        return f"mlp is for at most {MAX_ROWS} rows, of which each program has a block; there are {rows}"
    dtypes = {spec.dtype for spec in problem.inputs}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"mlp takes inputs of one dtype, {', '.join(DTYPES)}; these are {', '.join(sorted(dtypes))}"
    return None
