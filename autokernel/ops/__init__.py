"""What can be replaced. One file per op or fusion; its plain torch function is pattern and reference at once.

To add an op: write its file, append it to `OPS`, and give it a search space `search_spaces/<name>.yaml`.
"""

from __future__ import annotations

from autokernel.ops.adaln_rms_norm import AdalnRmsNorm
from autokernel.ops.add_rms_norm import AddRmsNorm
from autokernel.ops.addmm import Addmm
from autokernel.ops.attention import Attention
from autokernel.ops.baddbmm import Baddbmm
from autokernel.ops.base import ChoosingOp, FusionOp, Op, Region, Site
from autokernel.ops.bmm import Bmm
from autokernel.ops.epilogue import BINARY_EPILOGUES, UNARY_EPILOGUES, apply_epilogue
from autokernel.ops.gated import Gated
from autokernel.ops.gated_rms_norm import GatedRmsNorm
from autokernel.ops.generated import Generated
from autokernel.ops.int_mm import IntMm
from autokernel.ops.linear_rms_norm import LinearRmsNorm
from autokernel.ops.lm_head_argmax import LmHeadArgmax
from autokernel.ops.lm_head_topk import LmHeadTopk
from autokernel.ops.merged_mm import MergedMm
from autokernel.ops.mlp import Mlp
from autokernel.ops.mm import Mm
from autokernel.ops.norm_rotary import NormRotary
from autokernel.ops.norm_rotary_complex import NormRotaryComplex
from autokernel.ops.rms_norm import RmsNorm
from autokernel.ops.rms_norm_linear import RmsNormLinear
from autokernel.ops.rms_norm_qkv import RmsNormQkv
from autokernel.ops.rotary import Rotary
from autokernel.ops.rotary_complex import RotaryComplex
from autokernel.ops.rotary_qk import RotaryQk
from autokernel.ops.scaled_mm import ScaledMm

# In order of precedence: an opportunity that spans several GEMMs comes before the GEMMs themselves.
OPS: tuple[Op, ...] = (
    MergedMm(),
    Mm(),
    Addmm(),
    Bmm(),
    Baddbmm(),
    ScaledMm(),
    IntMm(),
    LmHeadArgmax(),
    LmHeadTopk(),
    Attention(),
    RotaryQk(),
    NormRotaryComplex(),
    NormRotary(),
    RotaryComplex(),
    Rotary(),
    GatedRmsNorm(),
    AdalnRmsNorm(),
    LinearRmsNorm(),
    RmsNormQkv(),
    RmsNormLinear(),
    AddRmsNorm(),
    RmsNorm(),
    Gated(),
    Mlp(),
    Generated(),
)


# Those that stand for regions of a graph.
FUSIONS: frozenset[str] = frozenset(op.name for op in OPS if isinstance(op, FusionOp))


def get_op(name: str) -> Op:
    """The op of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    for op in OPS:
        if op.name == name:
            return op
    raise ValueError(f"no op is called {name!r}; there are {', '.join(op.name for op in OPS)}")


__all__ = [
    "BINARY_EPILOGUES",
    "FUSIONS",
    "OPS",
    "UNARY_EPILOGUES",
    "ChoosingOp",
    "FusionOp",
    "Op",
    "Region",
    "Site",
    "apply_epilogue",
    "get_op",
]
