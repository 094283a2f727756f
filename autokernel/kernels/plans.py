"""From an entry of backend "triton" for a fusion to the launches that serve it: the table of planners.

To add a kernel: a module with its config (a frozen dataclass), a planner `(problem, config) -> KernelPlan` that raises
ValueError with the rule that is broken, and a line in the table. Planners' modules need no Triton before they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autokernel.kernels.attention_config import plan_decode, plan_flash
from autokernel.kernels.generated import plan_products, plan_rows
from autokernel.kernels.launch import KernelPlan
from autokernel.kernels.lm_head_argmax_config import plan_lm_head
from autokernel.kernels.lm_head_topk_config import plan_topk
from autokernel.kernels.mlp_config import plan_mlp
from autokernel.kernels.rms_norm_linear_config import plan_rms_norm_linear
from autokernel.kernels.rotary_config import plan_rotary
from autokernel.kernels.row_norm_config import plan_row_norm
from autokernel.records import ConfigValue, Problem

Planner = Callable[[Problem, Mapping[str, ConfigValue]], KernelPlan]

# op -> kernel -> planner; the first kernel of an op is its usual one
PLANNERS: Mapping[str, Mapping[str, Planner]] = {
    "attention": {"decode_attention": plan_decode, "flash_attention": plan_flash},
    "lm_head_argmax": {"lm_head_argmax": plan_lm_head},
    "lm_head_topk": {"lm_head_topk": plan_topk},
    "rms_norm_linear": {"rms_norm_linear": plan_rms_norm_linear},
    "rms_norm_qkv": {"rms_norm_linear": plan_rms_norm_linear},
    "rms_norm": {"row_norm": plan_row_norm},
    "add_rms_norm": {"row_norm": plan_row_norm},
    "adaln_rms_norm": {"row_norm": plan_row_norm},
    "gated_rms_norm": {"row_norm": plan_row_norm},
    "rotary": {"rotary": plan_rotary},
    "rotary_complex": {"rotary": plan_rotary},
    "norm_rotary": {"rotary": plan_rotary},
    "norm_rotary_complex": {"rotary": plan_rotary},
    "rotary_qk": {"rotary": plan_rotary},
    "mlp": {"mlp": plan_mlp},
    "generated": {"generated_mm": plan_products, "generated_rows": plan_rows},
}


def plan_of(problem: Problem, config: Mapping[str, ConfigValue]) -> KernelPlan:
    """The launches of the kernel that a config names.

    Args:
        problem: of a fusion.
        config: `kernel`, and its parameters.

    Raises:
        ValueError: there is no such kernel for the op, or it does not take the problem or the config; says the rule.
    """
    known = PLANNERS.get(problem.op, {})
    name = str(config.get("kernel"))
    if name not in known:
        raise ValueError(f"{problem.op} has no Triton kernel {name!r}; there are {', '.join(known) or 'none'}")
    return known[name](problem, {key: value for key, value in config.items() if key != "kernel"})
