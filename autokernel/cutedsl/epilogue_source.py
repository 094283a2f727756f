"""What quack computes between accumulator and result: a function made of a spec's epilogue names, and its operands' kinds.

Everything is fp32. The function is composed, not written out: quack traces it, and fingerprints what it is composed of.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from cutlass import Float32, cute
from cutlass._mlir.dialects import arith
from quack import activation
from quack.compile_utils import make_fake_tensor
from quack.epilogue import gemm_epilogue
from quack.epilogue.math import F2, unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce, EpiOp, RowVecLoad, RowVecReduce, TileLoad

from autokernel.cutedsl.spec import BIAS, MATRICES, SCALE_A, SCALE_B, SQUARES, TENSOR_SCALE_A, TENSOR_SCALE_B, KernelSpec
from autokernel.ops.epilogue import PER_COLUMN, operand_kind, scalar_step

GATED_RESULT = "gated"  # what quack calls the result, which is not the product's D


class OneElement(EpiOp):  # type: ignore[misc]
    """A tensor of one fp32 element as a number, read on the device. quack's own takes an address, which holds no tensor."""

    fn_port = "scalar"

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        dtype, _ = key
        return make_fake_tensor(dtype, (1,), leading_dim=0, divisibility=1)

    def param_fields(self) -> list[tuple[str, object, None]]:
        return [(self.name, object, None)]

    def to_params(self, gemm: Any, args: Any) -> dict[str, Any]:
        return {self.name: getattr(args, self.name)}

    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        return param[0]


class TransposedSums(RowVecReduce):  # type: ignore[misc]
    """Sums over the kernel's rows, [tiles, columns]: those of one column follow each other in memory, for who adds them up."""

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        dtype, _ = key
        return make_fake_tensor(dtype, (cute.sym_int(), fctx.n), leading_dim=0, divisibility=1)


def epilogue_of(spec: KernelSpec, *, swapped: bool = False) -> Any:
    """quack's epilogue for a spec.

    Args:
        spec: whose epilogue is asked for.
        swapped: the kernel is given the transposed problem, so that its rows are the caller's columns.
    """
    if spec.gated:
        return gemm_epilogue(outputs=(GATED_RESULT,), mode="acc_pair")(gated(spec, ACTIVATIONS))
    pins: dict[str, Any] = {}
    for operand, name in spec.operands().items():
        if name in MATRICES:
            pins[operand] = TileLoad(operand)  # which quack would not recognise in a kernel that swaps
        elif name in (TENSOR_SCALE_A, TENSOR_SCALE_B):
            pins[operand] = OneElement(operand)
        else:
            along_n = (name in (BIAS, SCALE_B) or operand_kind(name) == PER_COLUMN) != swapped
            pins[operand] = (RowVecLoad if along_n else ColVecLoad)(operand)
    sums: dict[str, Any] = {}
    if spec.squares:  # of the caller's rows; `scaled` multiplies and adds in one instruction
        sums[SQUARES] = (TransposedSums if swapped else ColVecReduce)(SQUARES, scaled=True)
    return gemm_epilogue(ops=pins, reduces=sums)(composed(spec, {**ACTIVATIONS, **FUNCTIONS}))


def composed(spec: KernelSpec, functions: Mapping[str, Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
    """The function of the accumulator and, by name, the operands that quack traces.

    Args:
        spec: whose epilogue is asked for.
        functions: what the names do that are no plain arithmetic.
    """
    takers = {name: iter([o for o, taker in spec.operands().items() if taker == name]) for name in spec.operands().values()}
    known, steps = {**ARITHMETIC, **functions}, []
    for name in (name for name in spec.epilogue if name != SQUARES):
        step, number = scalar_step(name) or (name, None)
        function_of = known[_PRODUCTS.get(step) or step.removesuffix(operand_kind(name))]
        steps.append((function_of, number if number is not None else next(takers[name]) if name in takers else None))
    squares = spec.squares

    def function(acc: Any, **operands: Any) -> dict[str, Any]:
        value = acc
        for step, other in steps:
            value = step(value) if other is None else step(value, operands[other] if isinstance(other, str) else other)
        return {"D": value, SQUARES: (value, value)} if squares else {"D": value}

    # quack asks the signature for operands
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("acc", *spec.operands())]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = _name_of(spec)
    return function


def gated(spec: KernelSpec, activations: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], dict[str, Any]]:
    """The function of two neighbouring accumulators, whose columns of B are the same of its two halves.

    Args:
        spec: whose epilogue is one of `GATED_EPILOGUES`.
        activations: what the names without an operand do.
    """
    (name,) = spec.epilogue
    activate = activations[name.removeprefix("gated_")]

    def function(acc: Any) -> dict[str, Any]:
        gate, up = unpack(acc)
        return {GATED_RESULT: activate(gate) * up}

    function.__name__ = function.__qualname__ = _name_of(spec)
    return function


def _name_of(spec: KernelSpec) -> str:
    """quack knows a function of an installed package by its name alone, so that the name has to tell epilogues apart, and
    kernels that it does not know to be different."""
    return ("_".join(spec.epilogue) or "plain") + ("_fast" if spec.cute.fast_accum else "")


def gelu_tanh(x: Any, sigmoid: Callable[[Any], Any]) -> Any:
    """x (1 + tanh z) / 2 as x sigmoid(2 z): the hardware's tanh is good to 11 bits only, which 1 + tanh z loses below -2."""
    z = (x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)
    return x * sigmoid(z + z)


def _relu(x: Any) -> Any:
    """Unlike quack's it hands NaN on, as torch does."""
    if isinstance(x, tuple):
        return F2(*(_relu(lane) for lane in x))
    return Float32(arith.maximumf(Float32(x).ir_value(), Float32(0.0).ir_value()))


def _tanh(x: Any) -> Any:
    """Without `fastmath`, which is the hardware's."""
    return F2(*(cute.math.tanh(lane) for lane in x)) if isinstance(x, tuple) else cute.math.tanh(x)


def _sigmoid(x: Any) -> Any:
    return _lanes(activation.sigmoid(x))


def _silu(x: Any) -> Any:
    return _lanes(activation.silu(x))


def _gelu(x: Any) -> Any:
    return _lanes(activation.gelu_erf(x))


def _gelu_tanh(x: Any) -> Any:
    return gelu_tanh(x, _sigmoid)


def _lanes(value: Any) -> Any:
    """On SM100 values are pairs: quack's functions return plain tuples, on which arithmetic is that of tuples."""
    return F2(*value) if isinstance(value, tuple) else value


def _lanewise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of pairs, as values are on SM100, lane by lane."""

    def of_lanes(*values: Any) -> Any:
        if not any(isinstance(value, tuple) for value in values):
            return function(*values)
        return F2(*(function(*(v[lane] if isinstance(v, tuple) else v for v in values)) for lane in range(2)))

    return of_lanes


# quack looks into functions of packages that are in no folder of the interpreter's, and cannot look into those of CuTe DSL:
# they are named by their module
def _abs(x: Any) -> Any:
    return cute.math.absf(x)


def _exp(x: Any) -> Any:
    return cute.math.exp(x)


def _sqrt(x: Any) -> Any:
    return cute.math.sqrt(x)


def _rsqrt(x: Any) -> Any:
    return cute.math.rsqrt(x)


def _larger(x: Any, other: Any) -> Any:
    """As torch's it hands NaN on."""
    return Float32(arith.maximumf(Float32(x).ir_value(), Float32(other).ir_value()))


def _smaller(x: Any, other: Any) -> Any:
    return Float32(arith.minimumf(Float32(x).ir_value(), Float32(other).ir_value()))


def _quotient(x: Any, other: Any) -> Any:
    """Rounded once: neither an approximation nor a product by a reciprocal."""
    return Float32(x) / Float32(other)


# whatever has operators: fp32 values, pairs of them, and tensors in tests
ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": lambda x, other: x + other,
    "sub": lambda x, other: x - other,
    "rsub": lambda x, other: other - x,
    "mul": lambda x, other: x * other,
    "neg": lambda x: -x,
    "square": lambda x: x * x,
    "cube": lambda x: x * x * x,
}
_PRODUCTS = {BIAS: "add", **dict.fromkeys((SCALE_A, SCALE_B, TENSOR_SCALE_A, TENSOR_SCALE_B), "mul")}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": _lanewise(_abs),
    "exp": _lanewise(_exp),
    "sqrt": _lanewise(_sqrt),
    "rsqrt": _lanewise(_rsqrt),
    "reciprocal": _lanewise(lambda x: _quotient(1.0, x)),
    "div": _lanewise(_quotient),
    "rdiv": _lanewise(lambda x, other: _quotient(other, x)),
    "div_by": _lanewise(_quotient),
    "maximum": _lanewise(_larger),
    "minimum": _lanewise(_smaller),
    "clamp_min": _lanewise(_larger),
    "clamp_max": _lanewise(_smaller),
}
ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}
