"""The graph option `pdl`: what becomes of the text of our kernels, and of others' with `all`. No GPU."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from export.pretended_h200 import H200, generated_code

from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.dependent_launch import dependent, dependent_launches
from autokernel.export.plan import Plan
from autokernel.records import ConfigValue, Problem, TensorSpec

N, K = 512, 1024
CONFIG: dict[str, ConfigValue] = {
    "kernel": "skinny_mm", "mode": "vector", "BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 256, "split_k": 1, "waves": 0, "tma": False,
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip
X, W, GAIN = (
    TensorSpec.contiguous((1, K), "bfloat16"),
    TensorSpec.contiguous((N, K), "bfloat16"),
    TensorSpec.contiguous((K,), "bfloat16"),
)
PROBLEM = Problem(op="mm", inputs=(X, TensorSpec(shape=(K, N), dtype="bfloat16", stride=(1, K))), device="cuda", constants=(1,))


def layer(x: torch.Tensor, gain: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A kernel of Inductor's, and a product."""
    return torch.tanh(x * gain) @ w.t()


def code_with(pdl: bool | str) -> str:
    """What Inductor writes with the option."""
    pytest.importorskip("triton", reason="Triton is not installed")
    entry = Entry(problem=PROBLEM, backend="triton", config=CONFIG)
    plan = Plan(Bundle(name="b", created="", version="", environment=H200, entries=(entry,)))
    options = inductor_options(plan, {"pdl": pdl}, frozen=False)
    assert "pdl" not in options, "Inductor does not know it"
    with dependent_launches(pdl):
        return generated_code(layer, [X, GAIN, W], options)


@pytest.fixture
def code() -> str:
    return code_with(True)


def kernels(code: str) -> dict[str, str]:
    """Texts of kernels by their names in Inductor's module."""
    return {
        name: text.replace("\\'", "'")
        for name, text in re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.S)
    }


def meta_of(text: str) -> dict[str, Any]:
    """What Inductor's decorator is told of a kernel."""
    from torch._inductor.runtime.hints import DeviceProperties

    (call,) = [
        decorator
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
    ]
    (value,) = [keyword.value for keyword in call.keywords if keyword.arg == "triton_meta"]
    found: dict[str, Any] = eval(ast.unparse(value), {"DeviceProperties": DeviceProperties})
    return found


def test_a_kernel_of_ours_waits_and_is_launched_while_another_runs(code: str) -> None:
    (ours,) = [text for name, text in kernels(code).items() if name.startswith("skinny_mm_kernel")]
    assert meta_of(ours)["launch_pdl"] is True
    entry = next(n for n in ast.parse(ours).body if isinstance(n, ast.FunctionDef) and n.name.startswith("skinny_mm_kernel"))
    first = [
        ast.unparse(node) for node in entry.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    assert first[:2] == ["tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"], "before it reads or writes"
    assert ours.count("gdc_wait") == 1, "not in the functions that it calls"


def test_kernels_of_others_are_as_they_were(code: str) -> None:
    others = [text for name, text in kernels(code).items() if not name.startswith("skinny_mm_kernel")]
    assert others
    assert not any("gdc_" in text or "'launch_pdl': True" in text for text in others)


def entry_of(text: str) -> list[str]:
    """The statements of the function that is launched."""
    (function,) = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and "triton_heuristics" in ast.dump(node)
    ]
    return [
        ast.unparse(node) for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]


def test_with_all_no_kernel_of_tritons_is_launched_otherwise() -> None:
    found = kernels(code_with("all"))
    assert len(found) == 2, "one of Inductor's own"
    for text in found.values():
        assert meta_of(text)["launch_pdl"] is True
        assert text.count("'launch_pdl'") == 1
        assert entry_of(text)[:2] == ["tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"]
        assert text.count("gdc_wait") == 1


def test_a_kernel_whose_blocks_run_all_at_once_is_launched_as_usual() -> None:
    text = next(iter(kernels(code_with(False)).values()))
    body = "async_compile.triton('k', '''" + text + "''')"
    assert dependent(body) != body
    cooperative = body.replace("triton_meta={", "triton_meta={'launch_cooperative_grid': True, ")
    assert dependent(cooperative) == cooperative


def test_without_the_option_nothing_changes() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    plan = Plan(
        Bundle(
            name="b",
            created="",
            version="",
            environment=H200,
            entries=(Entry(problem=PROBLEM, backend="triton", config=CONFIG),),
        )
    )
    with dependent_launches():
        pass
    code = generated_code(layer, [X, GAIN, W], inductor_options(plan, {}, frozen=False))
    assert "skinny_mm_kernel" in code
    assert "gdc_" not in code


def test_hoppers_instructions_are_there(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (ours,) = [text for name, text in kernels(code).items() if name.startswith("skinny_mm_kernel")]
    meta = meta_of(ours)
    plain = re.sub(r"@triton_heuristics\.user_autotune\(.*?\n\)\n", "", ours, flags=re.S)
    (tmp_path / "dependent_kernel.py").write_text(plain)
    monkeypatch.syspath_prepend(str(tmp_path))
    kernel = next(value for name, value in vars(__import__("dependent_kernel")).items() if name.startswith("skinny_mm_kernel"))
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in meta["constants"].items()}
    source = ASTSource(fn=kernel, signature=meta["signature"], constexprs=constants)
    options = {"num_warps": 4, "num_stages": 2, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.launch_pdl
    ptx = str(made.asm["ptx"])
    wait, launch = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    assert launch < wait < ptx.index("ld.global")


@pytest.mark.parametrize(
    "text", ["", "async_compile.triton('k', '''\nnothing\n''')", "async_compile.triton('k', '''\ntriton_meta={\n''')"]
)
def test_a_text_that_is_not_as_expected_stays(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert dependent(text) == text
    assert "launched as usual" in caplog.text
