"""Inductor's C++ GEMM templates, rendered once per kernel while a bundle is applied.

Inductor renders each template of a GEMM as a candidate, for that is what it compiles to benchmark it, and again as the kernel
that it took, with what is fused into it. With a plan nothing is benchmarked: of the candidate only the signature is wanted.
And Jinja compiles a template's text anew for each piece of each kernel, although these texts are a dozen.

No kernel changes by this: its own rendering is Inductor's, of the same texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Applies = Callable[[], bool]  # whether a plan applies to the compilation in this thread

_MAX_TEXTS = 64


def install(applies: Applies) -> None:
    """Make Inductor save these renderings where a plan applies. Idempotent."""
    from torch._inductor import lowering  # noqa: F401  its modules import each other: this one comes first
    from torch._inductor.codegen import common, cpp_gemm_template

    gemm: Any = cpp_gemm_template.CppGemmTemplate
    every: Any = common.KernelTemplate
    if not hasattr(gemm.generate, "autokernel"):
        gemm.generate = _without_candidates(gemm.generate, applies)
    if not hasattr(every._template_from_string, "autokernel"):
        every._template_from_string = staticmethod(_remembering(every._template_from_string, applies))


def _without_candidates(original: Callable[..., Any], applies: Applies) -> Callable[..., Any]:
    """`CppGemmTemplate.generate`, which renders a candidate and wraps it as a choice."""

    @functools.wraps(original)
    def generate(template: Any, **kwargs: Any) -> Any:
        if not applies():
            return original(template, **kwargs)
        template.render = functools.partial(_signature, template)  # of this instance, until it is a choice
        try:
            return original(template, **kwargs)
        except (AttributeError, TypeError, AssertionError):
            pass  # another version of Inductor asks for more than a signature
        finally:
            vars(template).pop("render", None)
        return original(template, **kwargs)

    generate.autokernel = True  # type: ignore[attr-defined]
    return generate


def _signature(template: Any, kernel: Any, **_: Any) -> str:
    """In place of a template's `render`: the kernel's arguments, which Inductor checks, and no code."""
    out = template.output_node
    outputs = out if isinstance(out, (list, tuple)) else [out]
    return str(
        kernel.def_kernel(
            inputs={f"in{i}": node for i, node in enumerate(template.input_nodes)},
            outputs={f"out{i}": node for i, node in enumerate(outputs)},
        )
    )


def _remembering(original: Callable[[str], Any], applies: Applies) -> Callable[[str], Any]:
    """`KernelTemplate._template_from_string`, which compiles a text. What it returns has no state."""
    remembered = functools.lru_cache(_MAX_TEXTS)(original)

    @functools.wraps(original)
    def template_from_string(source: str) -> Any:
        return remembered(source) if applies() else original(source)

    template_from_string.autokernel = True  # type: ignore[attr-defined]
    return template_from_string
