"""What the kernel for a norm and the linear layers behind it is launched with: its parameters, and the launch. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autokernel.kernels.config import MAX_ELEMENTS, MODES, Mode
from autokernel.kernels.launch import AHEAD, Buffer, KernelPlan, Launch, Operand
from autokernel.kernels.parameters import Parameters, Precision, is_power_of_two, precision_problem
from autokernel.kernels.row_norm_config import DTYPES, broadcast_strides
from autokernel.ops.rms_norm import LATE
from autokernel.ops.rms_norm_linear import MAX_ROWS, NormedProducts, biases_of, weights_of
from autokernel.ops.rms_norm_qkv import MAX_PARTS
from autokernel.records import ConfigValue, Problem, TensorSpec

_DIMS = 4
_MIN_TILE = 16  # of matrix instructions


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNormLinearConfig(Parameters):
    """Parameters of `rms_norm_linear`.

    Attributes:
        mode: as in `config.SkinnyConfig`: "rows" or "swap", whose rows are those of the matrix instruction (of x or of the
            weight); "vector" for one row.
        block_m, block_n, block_k: the tile. In mode "vector", block_m is 1.
        one_pass: multiply x times the norm's weight, and scale the sums by the norm, which is found on the way. Otherwise rows
            are read twice, and rounded as the model spells it.
        block_s: elements of a row whose squares are summed at once, where rows are read twice.
        split_k: programs that share a tile, each with a part of K; the last one to finish adds the parts in order.
        num_warps, num_stages: of Triton.
        precision: of products in fp32, as in `generated_config.ProductsConfig`. Mode "vector" multiplies in fp32 always.
    """

    mode: Mode
    block_m: int
    block_n: int
    block_k: int
    one_pass: bool
    block_s: int = 512
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    precision: Precision = "ieee"

    def problem(self, m: int, k: int) -> str | None:
        """The rule that the parameters break for m rows of k, None if they are legal."""
        if wrong := precision_problem(self.precision):
            return wrong
        if self.mode not in MODES:
            return f"mode is one of {', '.join(MODES)}; it is {self.mode}"
        for name in ("block_m", "block_n", "block_k", "block_s", "num_warps"):
            value = getattr(self, name)
            if not is_power_of_two(value):
                return f"{name} is a power of two; it is {value}"
        tile = (self.block_m, self.block_n, self.block_k)
        if self.mode == "vector" and (m != 1 or self.block_m != 1):
            return f"mode vector is for one row and block_m of 1; there are {m} rows, block_m is {self.block_m}"
        if self.mode != "vector" and min(tile) < _MIN_TILE:
            return f"tiles of matrix instructions are at least {_MIN_TILE}; block_m, block_n, block_k are {tile}"
        if self.num_stages < 1:
            return f"num_stages is at least 1; it is {self.num_stages}"
        blocks = -(-k // self.block_k)
        return None if 1 <= self.split_k <= blocks else f"K has {blocks} blocks of {self.block_k}; split_k is {self.split_k}"

    def reads_ahead(self, k: int) -> bool:
        """Whether the kernel can begin with its weights, before it needs x."""
        return self.mode == "vector" and self.split_k == 1 and k % self.block_k == 0


def plan_rms_norm_linear(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """One launch of `rms_norm_linear_kernel`.

    Args:
        problem: of `rms_norm_linear` or `rms_norm_qkv`.
        config: the fields of `RmsNormLinearConfig`.

    Raises:
        ValueError: the kernel does not take the problem or the config; says the rule.
    """
    from autokernel.kernels.rms_norm_linear import rms_norm_linear_kernel

    chosen, weights = RmsNormLinearConfig.from_entry(config), weights_of(problem)
    sizes = NormedProducts().dims(problem)
    m, k = sizes["m"], sizes["k"]
    wrong = _problem(problem, weights) or chosen.problem(m, k)
    if wrong:
        raise ValueError(wrong)
    outputs = tuple(TensorSpec.contiguous((m, weight.shape[1]), problem.inputs[0].dtype) for weight in weights)
    tiles = -(-m // chosen.block_m) * sum(-(-weight.shape[1] // chosen.block_n) for weight in weights)
    programs = tiles * chosen.split_k
    elements = programs * (chosen.block_m * chosen.block_n + 2 * chosen.block_m)
    shared = (Buffer((elements,), "float32"), Buffer((tiles,), "int32", zeroed=True))
    for what, reach in (*((str(spec), spec.reach) for spec in (*problem.inputs, *outputs)), ("the parts", elements)):
        if reach > MAX_ELEMENTS:
            raise ValueError(f"{problem.op} has 32-bit offsets; {what} reach {reach} elements, more than {MAX_ELEMENTS}")
    return KernelPlan(
        outputs=outputs,
        scratch=shared if chosen.split_k > 1 else (),
        launches=(
            Launch(
                kernel=rms_norm_linear_kernel,
                grid=(programs, 1, 1),
                arguments={**_operands(problem, weights, chosen), **_numbers(problem, weights, chosen, m, k)},
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                weights=tuple(f"w{i}" for i in range(len(weights))) if chosen.reads_ahead(k) else None,
            ),
        ),
    )


def _operands(problem: Problem, weights: Sequence[TensorSpec], chosen: RmsNormLinearConfig) -> dict[str, Operand]:
    """The kernel's pointers; stand-ins for what is not there."""
    biases, splits = biases_of(problem), chosen.split_k > 1
    there = [i if i < len(weights) else 0 for i in range(MAX_PARTS)]
    return {
        "x": Operand("in", 0),
        "gain": Operand("in", 1),
        **{f"w{i}": Operand("in", 2 + part) for i, part in enumerate(there)},
        **{f"b{i}": Operand("in", 1 if (bias := biases[part]) is None else bias) for i, part in enumerate(there)},
        **{f"y{i}": Operand("out", part) for i, part in enumerate(there)},
        "parts": Operand("scratch", 0) if splits else Operand("out", 0),
        "counters": Operand("scratch", 1) if splits else Operand("out", 0),
    }


def _numbers(
    problem: Problem, weights: Sequence[TensorSpec], chosen: RmsNormLinearConfig, m: int, k: int
) -> dict[str, int | float | bool]:
    x, gain, biases, scalars = problem.inputs[0], problem.inputs[1], biases_of(problem), dict(problem.scalars)
    shape = (1,) * (_DIMS - len(x.shape)) + x.shape
    numbers: dict[str, int | float | bool] = {
        "ROWS": m, "K": k, "SIZE_1": shape[1], "SIZE_2": shape[2], "EPS": float(scalars["eps"]),
        **{f"X{i}": stride for i, stride in enumerate(broadcast_strides(x, x.shape))},
        "G": gain.stride[0], "OFFSET": float(scalars.get("offset", 0.0)), "W_K": weights[0].stride[0],
        "LATE": (("rounded", scalars.get("rounded")),) == LATE,
        "MODE": MODES.index(chosen.mode), "ONE_PASS": chosen.one_pass,
        "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "BLOCK_S": chosen.block_s,
        "SPLIT_K": chosen.split_k, "TF32X3": chosen.precision == "tf32x3", "STAGES": chosen.num_stages, AHEAD: 0,
    }  # fmt: skip
    for i in range(MAX_PARTS):
        part = i if i < len(weights) else None
        bias = biases[part] if part is not None else None
        numbers[f"N{i}"] = weights[part].shape[1] if part is not None else 0
        numbers[f"W{i}_N"] = weights[part].stride[1] if part is not None else 0
        numbers[f"B{i}"] = problem.inputs[bias].stride[0] if bias is not None else 0
        numbers[f"BIAS{i}"] = bias is not None
    return numbers


def _problem(problem: Problem, weights: Sequence[TensorSpec]) -> str | None:
    """The rule that the inputs break."""
    x, op, dtypes = problem.inputs[0], problem.op, {spec.dtype for spec in problem.inputs}
    if not 2 <= len(x.shape) <= _DIMS:
        return f"{op} takes x of 2 to {_DIMS} dimensions; its shape is {list(x.shape)}"
    sizes = NormedProducts().dims(problem)
    if min(sizes["m"], sizes["k"], sizes["min_n"]) == 0:
        return f"{op} takes no empty tensors"
    if sizes["m"] > MAX_ROWS:
        return f"{op} is for at most {MAX_ROWS} rows, of which each program has a block; there are {sizes['m']}"
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"{op} takes inputs of one dtype, {', '.join(DTYPES)}; these are {', '.join(sorted(dtypes))}"
    steps = {weight.stride[0] for weight in weights}
    return f"{op} takes weights whose K has one stride; these have {sorted(steps)}" if len(steps) > 1 else None
