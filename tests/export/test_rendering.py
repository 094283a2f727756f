"""Inductor's C++ templates are rendered once per kernel, and the kernels are the same to the letter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_layers import BATCHES, BOTH, DOWN, GATE, Gated, K, M, bf16, bundle_of, entry
from torch._inductor import lowering  # noqa: F401  before its modules, which import each other
from torch._inductor.codegen.common import KernelTemplate
from torch._inductor.codegen.cpp_bmm_template import CppBmmTemplate
from torch._inductor.codegen.cpp_gemm_template import CppGemmTemplate
from torch._inductor.codegen.cpp_grouped_gemm_template import CppGroupedGemmTemplate

import autokernel
from autokernel.export import pins, rendering
from autokernel.export.bundle import Bundle


def kernels_of(model: Callable[..., Any], bundle: Bundle, inputs: tuple[torch.Tensor, ...]) -> list[str]:
    """The C++ kernels that are generated for it, in their order."""
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=autokernel.backend(bundle))
        code = str(torch._inductor.utils.run_and_get_code(compiled, *inputs)[1][0])
    return re.findall(r"async_compile\.cpp_pybinding\(.*?'''\)", code, re.DOTALL)


def count_rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each C++ GEMM template that is rendered from now on."""
    rendered: list[str] = []
    for kind in (CppGemmTemplate, CppGroupedGemmTemplate, CppBmmTemplate):

        def render(self: Any, *args: Any, original: Any = kind.render, **options: Any) -> Any:
            rendered.append(self.name)
            return original(self, *args, **options)

        monkeypatch.setattr(kind, "render", render)
    return rendered


@pytest.fixture
def as_inductor_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have Inductor's own functions back."""
    pins.install()

    def undo() -> None:
        gemm: Any = CppGemmTemplate
        every: Any = KernelTemplate
        monkeypatch.setattr(rendering, "install", lambda applies: None)
        monkeypatch.setattr(gemm, "generate", gemm.generate.__wrapped__)
        monkeypatch.setattr(every, "_template_from_string", staticmethod(every._template_from_string.__wrapped__))

    return undo


@pytest.mark.parametrize(
    ("model", "bundle", "inputs"),
    [
        (
            Gated(),
            bundle_of(entry(GATE, "inductor", template="cpp_gemm"), entry(DOWN, "inductor", template="cpp_gemm")),
            (torch.randn(M, K),),
        ),
        (
            Gated().bfloat16(),
            bundle_of(entry(bf16(BOTH), "inductor", template="cpp_gemm", merge="grouped")),
            (torch.randn(M, K).bfloat16(),),
        ),
        (
            torch.bmm,
            bundle_of(entry(BATCHES, "inductor", template="cpp_bmm")),
            (torch.randn(4, 32, K), torch.randn(4, K, 48)),
        ),
    ],
    ids=["layers", "grouped", "batches"],
)
def test_kernels_are_the_same_and_only_they_are_rendered(
    model: Callable[..., Any],
    bundle: Bundle,
    inputs: tuple[torch.Tensor, ...],
    as_inductor_does: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts: list[str] = []
    environment = torch._inductor.codegen.common.jinja2_env()
    compile_text = environment.from_string
    monkeypatch.setattr(environment, "from_string", lambda text: texts.append(text) or compile_text(text))
    rendered = count_rendered(monkeypatch)
    saving = kernels_of(model, bundle, inputs)
    num_saving, num_texts = len(rendered), len(texts)
    assert saving
    assert num_texts == len(set(texts))  # each text is compiled once
    as_inductor_does()
    assert kernels_of(model, bundle, inputs) == saving
    assert len(rendered) - num_saving == 2 * num_saving  # Inductor: each as a candidate, and as a kernel
    assert len(texts) - num_texts > num_texts


def test_other_compilations_are_left_alone(as_inductor_does: Callable[[], None]) -> None:
    as_inductor_does()
    remembering = rendering._remembering(KernelTemplate._template_from_string, lambda: False)
    assert remembering("{{a}}") is not remembering("{{a}}")
    remembering = rendering._remembering(KernelTemplate._template_from_string, lambda: True)
    assert remembering("{{a}}") is remembering("{{a}}")
    assert remembering("{{a}}").render(a=1) == "1"


def test_an_inductor_that_wants_more_than_a_signature_gets_the_whole() -> None:
    class Later:
        """As a later version might be: it looks into what was rendered."""

        output_node: tuple[Any, ...] = ()
        input_nodes: tuple[Any, ...] = ()

        def render(self, kernel: Any) -> str:
            return "void f() { body; }"

        def generate(self) -> str:
            code = self.render(self)
            assert "body" in code
            return code

        def def_kernel(self, inputs: Any, outputs: Any) -> str:
            return "void f()"

    template = Later()
    generate = rendering._without_candidates(Later.generate, lambda: True)
    assert generate(template) == "void f() { body; }"
    assert "render" not in vars(template)
