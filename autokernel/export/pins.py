"""Inductor's choice of GEMM kernels, pinned to a plan: no benchmark ever runs, and what has no entry gets stock code.

Inductor hands every list of choices to "preprocessing functions" (torch 2.11 to 2.15, unchanged). Ours asks the graph
pass in the current configuration for its plan, so it works for each compilation in any thread, and does nothing in others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._inductor import config, select_algorithm

from autokernel.export import rendering
from autokernel.export.bundle import Entry
from autokernel.export.matching import Gemm
from autokernel.export.plan import Plan

CPP_TEMPLATES = ("cpp_gemm", "cpp_bmm")  # of one product, and of a batch of them


def current_plan() -> Plan | None:
    """The plan of the compilation that runs in this thread, None for everybody else's compilations."""
    passes = config.post_grad_custom_pre_pass
    for item in passes if isinstance(passes, (list, tuple)) else (passes,):
        plan = getattr(item, "plan", None)
        if isinstance(plan, Plan):
            return plan
    return None


def install() -> None:
    """Make Inductor consult plans. Idempotent, and again effective after `clear_preprocessing_fns`."""
    cache = select_algorithm.get_algorithm_selector_cache()
    if pin not in cache.preprocessing_fns:
        cache.add_preprocessing_fn(pin)
    rendering.install(_applies)


def _applies() -> bool:
    plan = current_plan()
    return plan is not None and plan.active


def pin(choices: list[Any]) -> list[Any]:
    """Reduce the choices of one GEMM to one: the entry's, or the stock one."""
    plan = current_plan()
    if plan is None or not plan.active or not choices:
        return choices
    stock = [c for c in choices if isinstance(c, select_algorithm.ExternKernelCaller)][:1] or choices[:1]
    templates = [c for c in choices if _is_cpp_gemm(c)]
    if not templates:
        return stock
    gemm = _gemm_of_template(templates[0])
    entry = plan.find_or_merged(gemm) if gemm is not None else None
    if entry is None and gemm is not None and not gemm.bias:
        # MKL's packed GEMM adds the bias behind the template
        entry = plan.find_or_merged(replace(gemm, bias=True))
    # batches have a template of their own; a product of one batch (as of einsum) is not what an entry of packed weights is for
    if entry is None or entry.config.get("template") != CPP_TEMPLATES[_is_of_batches(templates[0])]:
        return stock
    try:
        set_blocking(templates[0].template, entry)
    except ValueError as error:
        plan.skip(entry, str(error))
        return stock
    plan.hit(entry)
    return templates[:1]


def _is_cpp_gemm(choice: Any) -> bool:
    """Whether a choice is an instance of Inductor's C++ GEMM template (callers come wrapped: look at what they build); that of
    batches is a kind of it."""
    from torch._inductor.codegen.cpp_gemm_template import CppGemmTemplate

    return isinstance(getattr(choice, "template", None), CppGemmTemplate)


def _is_of_batches(choice: Any) -> bool:
    from torch._inductor.codegen.cpp_bmm_template import CppBmmTemplate

    return isinstance(choice.template, CppBmmTemplate)


def _gemm_of_template(choice: Any) -> Gemm | None:
    """What a C++ GEMM template instance computes; None for dynamic sizes."""
    template = choice.template
    try:
        m, k = int(template.m), int(template.k)
        ns = tuple(int(n) for n in template.n) if isinstance(template.n, (list, tuple)) else (int(template.n),)
        layout = template.layout[0] if isinstance(template.layout, (list, tuple)) else template.layout
        batch = int(layout.size[0]) if len(layout.size) == 3 else 1
    except (TypeError, AttributeError):
        return None
    if hasattr(template, "gemm_grouped_num"):
        ns = ns * template.gemm_grouped_num if len(ns) == 1 else ns
    bias = any(template.has_bias) if isinstance(template.has_bias, (list, tuple)) else bool(template.has_bias)
    return Gemm(str(layout.dtype).removeprefix("torch."), batch, m, ns, k, bias)


def set_blocking(template: Any, entry: Entry) -> None:
    """Give one template instance the entry's thread factors, cache blocking and k-slices.

    Inductor knows these as process-wide options only, but each instance computes and remembers its own blocking the
    first time it is asked: ask under the entry's options, in place of what it remembered from building the choice.

    Raises:
        ValueError: the factors do not multiply to the number of threads.
    """
    options = blocking_options(entry)
    if not options:
        return
    if "cpp.gemm_thread_factors" in options:
        factors = [int(f) for f in str(options["cpp.gemm_thread_factors"]).split(",")]
        if factors[0] * factors[1] * factors[2] != template.num_threads:
            raise ValueError(f"thread factors {factors} do not multiply to this process's {template.num_threads} threads")
    with config.patch(options):
        template.thread_blocking = template.make_thread_blocking_cache()
        template.cache_blocking = template.make_cache_blocking_cache()
        template.thread_blocking(template.num_threads)
        template.cache_blocking(template.num_threads)


def blocking_options(entry: Entry) -> dict[str, int | str]:
    """The entry's config as Inductor's options; zeros leave a choice to Inductor."""
    c = entry.config
    options: dict[str, int | str] = {}
    threads = [int(c.get(f"threads_{axis}", 0)) for axis in "mnk"]
    if all(threads):
        options["cpp.gemm_thread_factors"] = ",".join(map(str, threads))
    blocks = [int(c.get(f"block_{axis}", 0)) for axis in "mnk"]
    if all(blocks):
        options["cpp.gemm_cache_blocking"] = ",".join(map(str, blocks))
    if int(c.get("k_slices", 1)) != 1:
        options["cpp.gemm_max_k_slices"] = int(c["k_slices"])
    return options


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
