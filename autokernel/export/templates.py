"""Inductor's Triton GEMM templates with an entry's own parameters, one choice per site and nothing benchmarked.

`TemplatePass` runs where Inductor's graph is final, on the very nodes that the profiler saw. A node with an entry gets a
lowering of ours: Inductor's own one, which for the length of that call is in max-autotune mode and asks a choices handler
that knows the entry. Every other node keeps Inductor's default, and no setting of the process or the thread outlives the
call (torch 2.11 to 2.15).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.choices import InductorChoices
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import NoValidChoicesError, TritonTemplate
from torch._inductor.virtualized import V

from autokernel.export.bundle import Entry
from autokernel.export.matching import INTEGER, Gemm, is_transposed, scaled_kind
from autokernel.export.pins import dtype_name
from autokernel.export.plan import Plan
from autokernel.ops.scaled_mm import ScaledCall
from autokernel.records import ConfigValue

aten = torch.ops.aten

TRITON_TEMPLATES = ("mm", "mm_persistent_tma", "bmm")
DECOMPOSE_K = "decompose_k"
TEMPLATES = (*TRITON_TEMPLATES, DECOMPOSE_K)
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages", "num_warps", "GROUP_M")
OPS = {aten.mm.default: "mm", aten.addmm.default: "addmm", aten.bmm.default: "bmm", aten.baddbmm.default: "baddbmm"}


class TemplatePass(CustomGraphPass):
    """Gives every GEMM that has an entry with a Triton template a lowering that builds exactly this template."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def uuid(self) -> str:
        return f"autokernel-templates-1-{self.plan.digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        if not self.plan.active:
            return
        for node in list(graph.nodes):
            gemm = gemm_of_node(node)
            entry = self.plan.find_or_merged(gemm) if gemm is not None and not gemm.kind else None
            if entry is None or not has_template(entry):
                continue
            if not _same_layout(entry, node):
                self.plan.skip(entry, f"its matrices are laid out in another way at {node.name}")
                continue
            _pin(graph, node, self.plan, entry)


def has_template(entry: Entry) -> bool:
    """Whether the entry is one of Inductor's templates for GPUs."""
    return entry.backend == "inductor" and entry.config.get("template") in TEMPLATES


def template_of(name: str) -> Any:
    """Inductor's template of this name; None if the installed torch has none."""
    from torch._inductor.kernel import bmm, mm

    module, attribute = {
        "mm": (mm, "mm_template"),
        "mm_persistent_tma": (mm, "persistent_tma_mm_template"),
        "bmm": (bmm, "bmm_template"),
        DECOMPOSE_K: (mm, "decompose_k_subgraph_template"),
    }[name]
    return getattr(module, attribute, None)


def gemm_of_node(node: torch.fx.Node) -> Gemm | None:
    """The GEMM of a node of a post-grad graph on a GPU, None for anything else and for sizes that are not known."""
    if node.op != "call_function" or node.target not in (*OPS, aten._int_mm.default, aten._scaled_mm.default):
        return None
    if node.target is aten._scaled_mm.default:
        return _scaled_gemm(node)
    values: list[Any] = [argument.meta.get("val") if isinstance(argument, torch.fx.Node) else None for argument in node.args]
    if not all(isinstance(value, torch.Tensor) and value.is_cuda for value in values):
        return None
    *added, left, right = values
    if not all(isinstance(size, int) for value in values for size in (*value.shape, *value.stride())):
        return None
    n = right.shape[-1]
    if left.dim() == 2 and any(tuple(value.shape) not in ((n,), (left.shape[0], n)) for value in added):
        return None  # a number, a row or a column for all: kernels read a bias of N elements, or a whole matrix
    # as `gemm_of` has it: a full matrix that is added may as well come behind the product
    bias = node.target is aten.baddbmm.default or any(value.dim() == 1 for value in added)
    batch = left.shape[0] if left.dim() == 3 else 1
    kind = INTEGER if node.target is aten._int_mm.default else ""
    return Gemm(dtype_name(left.dtype), batch, left.shape[-2], (right.shape[-1],), left.shape[-1], bias, kind)


def _scaled_gemm(node: torch.fx.Node) -> Gemm | None:
    call = ScaledCall.of(node)
    if call is None:
        return None
    left, right = (operand.meta["val"] for operand in call.operands[:2])
    if not (left.is_cuda and right.is_cuda):
        return None
    kind = scaled_kind(dtype_name(right.dtype), call.scaling, call.out_dtype, call.use_fast_accum)
    return Gemm(dtype_name(left.dtype), 1, left.shape[0], (right.shape[1],), left.shape[1], call.has_bias, kind)


def _same_layout(entry: Entry, node: torch.fx.Node) -> bool:
    """Whether each matrix is row-major or transposed as it was when the entry was tuned."""
    operands = {"addmm": (1, 2), "baddbmm": (1, 2)}.get(entry.problem.op, (0, 1))
    tuned = [entry.problem.inputs[i] for i in operands]
    here = [argument.meta["val"] for argument in node.args[-2:]]  # type: ignore[union-attr]
    return all(
        is_transposed(spec.shape, spec.stride) == is_transposed(tuple(value.shape), value.stride())
        for spec, value in zip(tuned, here, strict=True)
    )


def _pin(graph: torch.fx.Graph, node: torch.fx.Node, plan: Plan, entry: Entry) -> None:
    handler = functools.wraps(lower_pinned)(functools.partial(lower_pinned, plan, entry, node.target, _orders(node)))
    with graph.inserting_before(node):
        pinned = graph.call_function(handler, node.args, dict(node.kwargs))
    pinned.meta.update(node.meta)
    node.replace_all_uses_with(pinned)
    graph.erase_node(node)


def _orders(node: torch.fx.Node) -> tuple[tuple[int, ...], ...]:
    """Stride order of each operand where Inductor insists on it: of `aten.mm` alone."""
    if node.target is not aten.mm.default:
        return ()
    return tuple(tuple(ir.get_stride_order(argument.meta["val"].stride())) for argument in node.args)  # type: ignore[union-attr]


def lower_pinned(plan: Plan, entry: Entry, target: Any, orders: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
    """Inductor's lowering of a GEMM, with the entry's template as its only choice; stock code where that cannot be had."""
    lowering: Callable[..., Any] = lowerings[target]
    operands = list(args)
    for i, order in enumerate(orders):
        operands[i] = ir.ExternKernel.require_stride_order(operands[i], order, allow_padding=True)
    choices = PinnedChoices(entry, OPS[target])
    try:
        with V.set_choices_handler(choices), config.patch(pinned_options(entry)):
            result = lowering(*operands, **kwargs)
    except (CannotPin, NoValidChoicesError) as error:
        reason = str(error) if isinstance(error, CannotPin) else choices.not_offered()
        plan.skip(entry, reason)
        return lowering(*operands, **kwargs)
    if choices.built:
        plan.hit(entry)
    else:
        plan.skip(entry, "Inductor makes no GEMM of this product")
    return result


lower_pinned._inductor_lowering_function = True  # type: ignore[attr-defined]


def pinned_options(entry: Entry) -> dict[str, ConfigValue]:
    """What makes Inductor offer templates at all, for the length of one lowering."""
    return {
        "max_autotune_gemm": True,
        "max_autotune_gemm_backends": "TRITON",
        "triton.enable_persistent_tma_matmul": entry.config["template"] == "mm_persistent_tma",
        # where K is much the longest, Inductor would offer this and no other template
        "triton.num_decompose_k_splits": 0,
    }


class CannotPin(Exception):
    """The entry's template cannot be had here. The message says why."""


class PinnedChoices(InductorChoices):
    """Answers the one question that the lowering of a GEMM asks, which kernels to choose from, with the entry's kernel."""

    def __init__(self, entry: Entry, op: str) -> None:
        super().__init__()
        self.entry = entry
        self.op = op
        self.template = str(entry.config["template"])
        self.built = False

    def get_template_configs(self, kernel_inputs: Any, templates: Any, op_name: str, kwarg_overrides: Any = None) -> list[Any]:
        """Inductor's hook: the kernels (`ChoiceCaller`s) for these inputs. From 2.13 on it is asked up to three times."""
        if op_name != self.op or self.built:
            return super().get_template_configs(kernel_inputs, templates, op_name, kwarg_overrides)  # type: ignore[no-any-return]
        if self.template == DECOMPOSE_K:
            choice = self._decompose_k(kernel_inputs)
        elif any(isinstance(template, TritonTemplate) for template in templates):
            choice = self._triton(kernel_inputs, templates)
        else:
            return []
        if choice is None:
            raise CannotPin(f"Inductor's template {self.template} does not take {dict(self.entry.config)}")
        self.built = True
        return [choice]

    def not_offered(self) -> str:
        """Why nothing was chosen."""
        return f"Inductor does not offer the template {self.template} here: dtype, alignment or device do not allow it"

    def _triton(self, kernel_inputs: Any, templates: Any) -> Any:
        template = next((item for item in templates if item.uid == f"triton::{self.template}"), None)
        # the first of Inductor's own configs, for all the fields that are not ours to choose
        stock = next(iter(self.get_ktc(kernel_inputs, template, self.op)), None) if template is not None else None
        if stock is None:
            raise CannotPin(self.not_offered())
        k = int(kernel_inputs.mnk_symbolic()[2])
        given = stock.params.to_kwargs()
        fields = complete_fields(self.entry.config, k, given | _majors(kernel_inputs, given))
        return _choice(template, fields, stock.extra_kwargs, kernel_inputs, stock.inputs)

    def _decompose_k(self, kernel_inputs: Any) -> Any:
        k, split = int(kernel_inputs.mnk_symbolic()[2]), int(self.entry.config["k_split"])
        if self.op != "mm" or k % split:
            raise CannotPin(
                f"decompose_k needs a plain mm whose K is a multiple of k_split; this is {self.op}, {k} and {split}"
            )
        if V.graph.aot_mode or V.graph.cpp_wrapper:
            raise CannotPin("decompose_k cannot be compiled ahead of time")
        return _choice(template_of(DECOMPOSE_K), {"k_split": split}, {}, kernel_inputs, kernel_inputs)


def _majors(kernel_inputs: Any, given: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each factor is contiguous along its rows, for templates that read through descriptors.

    Inductor (torch 2.11 to 2.13; no more in 2.15) takes a matrix of one row for a transposed one, and its kernel then reads
    something else.
    """
    factors = zip(("A_ROW_MAJOR", "B_ROW_MAJOR"), kernel_inputs.mat1mat2(), strict=True)
    return {name: int(factor.get_stride()[-1]) == 1 for name, factor in factors if name in given}


def complete_fields(chosen: Mapping[str, ConfigValue], k: int, stock: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a Triton template: those of an entry, and what follows from them, over those of a stock config."""
    tile = {name: int(chosen[name]) for name in TILE if name in chosen}
    return {**stock, **tile, "EVEN_K": k % tile["BLOCK_K"] == 0}


def _choice(template: Any, fields: dict[str, Any], extra: dict[str, Any], kernel_inputs: Any, inputs: Any) -> Any:
    # the module that defines the parameters' class moves between versions, this one imports it in all of them
    from torch._inductor import kernel_template_choice

    made_of: Any = kernel_template_choice
    made = made_of.KernelTemplateChoice(
        template=template,
        params=made_of.DictKernelTemplateParams(fields),
        extra_kwargs=extra,
        layout=kernel_inputs.output_layout(flexible=False),
        inputs=inputs,
    )
    return made.choice


__all__ = [
    "DECOMPOSE_K",
    "TEMPLATES",
    "TILE",
    "PinnedChoices",
    "TemplatePass",
    "complete_fields",
    "gemm_of_node",
    "has_template",
    "template_of",
]
