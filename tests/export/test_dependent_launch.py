"""The graph option `pdl`: what becomes of the text of our kernels, and of others' with `all`. No GPU."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from export.pretended_h200 import Generated, generated_code, plan_with, pretended_h200
from kernels.for_hopper import read_before_and_after

from autokernel.errors import BundleError
from autokernel.export.apply import inductor_options
from autokernel.export.bundle import Entry
from autokernel.export.dependent_launch import dependent, dependent_launches, may_read_ahead
from autokernel.export.freezing import freeze_inputs
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


def code_with(pdl: bool | str, **changed: ConfigValue) -> str:
    """What Inductor writes with the option."""
    pytest.importorskip("triton", reason="Triton is not installed")
    entry = Entry(problem=PROBLEM, backend="triton", config={**CONFIG, **changed})
    plan = plan_with((entry,))
    options = inductor_options(plan, {"pdl": pdl}, frozen=False)
    assert "pdl" not in options, "Inductor does not know it"
    with dependent_launches(pdl, []):
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
    assert meta_of(ours)["constants"]["AHEAD"] == 0, "weights are an input like others here"


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
        assert meta_of(text)["constants"].get("AHEAD", 0) == 0


def test_a_kernel_whose_blocks_run_all_at_once_is_launched_as_usual() -> None:
    text = next(iter(kernels(code_with(False)).values()))
    body = "async_compile.triton('k', '''" + text + "''')"
    assert dependent(body) != body
    cooperative = body.replace("triton_meta={", "triton_meta={'launch_cooperative_grid': True, ")
    assert dependent(cooperative) == cooperative


def test_without_the_option_nothing_changes() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    plan = plan_with((Entry(problem=PROBLEM, backend="triton", config=CONFIG),))
    with dependent_launches(True, []):
        pass
    code = generated_code(layer, [X, GAIN, W], inductor_options(plan, {}, frozen=False))
    assert "skinny_mm_kernel" in code
    assert "gdc_launch" not in code
    assert "'AHEAD': 0" in code
    assert "launch_pdl': True" not in code


def ptx_of(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What Triton makes of a kernel of ours in Inductor's module, for Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta = meta_of(text)
    module = f"dependent_kernel_{abs(hash(text))}"
    (tmp_path / f"{module}.py").write_text(re.sub(r"@triton_heuristics\.user_autotune\(.*?\n\)\n", "", text, flags=re.S))
    monkeypatch.syspath_prepend(str(tmp_path))
    kernel = next(v for name, v in vars(__import__(module)).items() if name.startswith(("skinny_mm_kernel", "generated_")))
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in meta["constants"].items()}
    source = ASTSource(fn=kernel, signature=meta["signature"], constexprs=constants)
    options = {"num_warps": 4, "num_stages": 2, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.launch_pdl
    return str(made.asm["ptx"])


def test_hoppers_instructions_are_there(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,) = [text for name, text in kernels(code).items() if name.startswith("skinny_mm_kernel")]
    ptx = ptx_of(ours, tmp_path, monkeypatch)
    wait, launch = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    assert launch < wait < ptx.index("ld.global")


@pytest.mark.parametrize("split_k", [1, 2])
def test_weights_are_read_before_the_wait_and_nothing_else(
    split_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autokernel.export.substitution.may_read_ahead", lambda *_: True)
    (ours,) = [t for n, t in kernels(code_with(True, split_k=split_k)).items() if n.startswith("skinny_mm_kernel")]
    assert meta_of(ours)["constants"]["AHEAD"] == 1
    assert entry_of(ours)[0] == "tl.extra.cuda.gdc_launch_dependents()"
    assert "gdc_wait" not in entry_of(ours)[1]
    ptx = ptx_of(ours, tmp_path, monkeypatch)
    assert ptx.count("griddepcontrol.wait") == 1
    before, after = read_before_and_after(ptx, meta_of(ours)["signature"] and list(meta_of(ours)["signature"]).index("w"))
    assert before == {True}
    assert after == {True, False}


def test_kernels_that_cannot_begin_with_weights_wait_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autokernel.export.substitution.may_read_ahead", lambda *_: True)
    for changed in ({"split_k": 3}, {"waves": 1}):
        (ours,) = [t for n, t in kernels(code_with(True, **changed)).items() if n.startswith("skinny_mm_kernel")]
        assert meta_of(ours)["constants"]["AHEAD"] == 0, changed
        assert entry_of(ours)[1] == "tl.extra.cuda.gdc_wait()"


class Model(torch.nn.Module):
    """Two parameters, a buffer that is only read, one that is written, and an input: each with a first size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.ones(16, 4), requires_grad=False)
        self.second = torch.nn.Parameter(torch.ones(4, 16), requires_grad=False)
        self.register_buffer("table", torch.ones(8, 16))
        self.register_buffer("cache", torch.ones(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.add_(1)  # type: ignore[operator]
        product = torch.tanh(x @ self.first) @ self.second
        return product @ (self.table.t() @ self.table) + self.cache.sum()  # type: ignore[operator]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_what_may_be_read_ahead(active: bool, frozen: bool) -> None:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    seen: dict[int, bool] = {}
    constants: list[bool] = []
    computed: list[bool] = []

    def look(self: Any) -> Any:
        seen.update(
            {
                buffer.data.data.layout.size[0]: may_read_ahead([buffer], (1, 1, 1), 4, 1)
                for buffer in self.graph_inputs.values()
            }
        )
        constants.extend(
            may_read_ahead([mock.Mock(get_name=lambda name=name: name)], (1, 1, 1), 4, 1) for name in self.constants
        )
        computed.extend(may_read_ahead([buffer], (1, 1, 1), 4, 1) for buffer in self.buffers)
        raise Generated

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        rest = list(inputs)
        if frozen:  # as where weights are put side by side: the others lose Dynamo's marks
            (position,) = [i for i, value in enumerate(inputs) if tuple(value.shape) == (4, 16)]
            gm = freeze_inputs(gm, inputs, [position])
            del rest[position]
        with dependent_launches(active, rest):
            compile_fx(gm, rest, config_patches={"fx_graph_cache": False, "freezing": frozen})

    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "codegen", look), torch.no_grad(), pytest.raises(Exception, match="Generated"):
        torch.compile(Model().eval(), backend=backend)(torch.ones(2, 16))
    assert seen.pop(16) is active, "a parameter"
    assert seen.pop(4, active) is active, "another, if it is no constant"
    assert bool(constants) is frozen
    assert all(value is active for value in constants)
    assert not any(seen.values()), "a buffer that is only read (here), one that is written, and the input"
    assert len(seen) == 3
    assert computed
    assert not any(computed)


def test_inputs_that_were_taken_apart_are_not_read_ahead() -> None:
    """As a tensor of several tensors is: which of the graph's inputs are parameters is not known then."""
    import torch.fx
    from torch._inductor.virtualized import V

    graph = torch.fx.Graph()
    graph.output(tuple(graph.placeholder(name) for name in ("a", "b")))
    lowered = mock.Mock(constants={"kept": None}, module=torch.fx.GraphModule({}, graph))
    named = {name: mock.Mock(get_name=lambda name=name: name) for name in ("a", "b", "kept")}
    parameter = torch.nn.Parameter(torch.ones(1))
    with V.set_graph_handler(lowered):
        with dependent_launches(True, [parameter, parameter]):
            assert [may_read_ahead([named[name]], (1, 1, 1), 4, 1) for name in ("a", "b", "kept")] == [True, True, True]
        with dependent_launches(True, [parameter]):
            assert [may_read_ahead([named[name]], (1, 1, 1), 4, 1) for name in ("a", "b", "kept")] == [False, False, True]


@pytest.mark.parametrize(
    ("option", "grid", "num_warps", "num_stages", "ahead"),
    [
        ("ahead", (132 * 16 * 8, 1, 1), 4, 1, True),
        ("ahead", (132, 16, 8), 4, 1, True),
        ("ahead", (132, 16 * 8 + 1, 1), 4, 1, False),
        ("ahead", (132 * 32 * 8, 1, 1), 1, 1, True),
        ("ahead", (132 * 32 * 8 + 1, 1, 1), 1, 1, False),
        ("ahead", (132, 1, 1), 4, 2, False),
        ("one_wave", (132 * 16 * 8, 1, 1), 4, 1, True),
        ("one_wave", (132, 1, 1), 4, 2, False),
        ("all", (132, 16 * 8 + 1, 1), 4, 2, True),
    ],
)
def test_weights_are_read_ahead_by_a_few_waves_of_programs_without_a_pipeline(
    option: str, grid: tuple[int, int, int], num_warps: int, num_stages: int, ahead: bool
) -> None:
    """A multiprocessor takes 64 warps, of 32 programs at most."""
    from torch._inductor.virtualized import V

    graph = torch.fx.Graph()
    graph.output(())
    lowered = mock.Mock(constants={"kept": None}, module=torch.fx.GraphModule({}, graph))
    with pretended_h200(), V.set_graph_handler(lowered), dependent_launches(option, []):
        assert may_read_ahead([mock.Mock(get_name=lambda: "kept")], grid, num_warps, num_stages) is ahead
        asks = option != "one_wave" and ((num_stages == 1 and ahead) or num_stages == 2)
        assert may_read_ahead([], grid, num_warps, num_stages) is asks, "who only asks has no weights"


def test_with_ahead_a_kernel_is_launched_as_usual_that_does_nothing_before_its_wait() -> None:
    for text in kernels(code_with("ahead")).values():
        assert not meta_of(text).get("launch_pdl"), "the weight is an input like others here"
        assert entry_of(text)[0] == "tl.extra.cuda.gdc_launch_dependents()"
        assert "gdc_wait" not in entry_of(text)[1]
        assert meta_of(text)["constants"].get("AHEAD", 0) == 0


def test_with_ahead_a_kernel_that_begins_with_weights_waits_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autokernel.export.substitution.may_read_ahead", lambda *_: True)
    found = kernels(code_with("ahead"))
    (ours,) = [text for name, text in found.items() if name.startswith("skinny_mm_kernel")]
    (other,) = [text for name, text in found.items() if not name.startswith("skinny_mm_kernel")]
    assert meta_of(ours)["launch_pdl"] is True
    assert meta_of(ours)["constants"]["AHEAD"] == 1
    assert not meta_of(other).get("launch_pdl")
    assert ptx_of(ours, tmp_path, monkeypatch).count("griddepcontrol.wait") == 1
    assert ptx_of(ours, tmp_path, monkeypatch).count("griddepcontrol.launch_dependents") == 1


def test_with_one_wave_kernels_that_find_room_at_once_wait_first() -> None:
    """64 programs of four warps; and, as if the device took no more than 63, more than that."""
    for text in kernels(code_with("one_wave")).values():
        assert meta_of(text)["launch_pdl"] is True
        assert entry_of(text)[:2] == ["tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"]
    with mock.patch("autokernel.export.dependent_launch._waves", lambda grid, num_warps: grid[0] * num_warps / 252):
        found = kernels(code_with("one_wave"))
    (ours,) = [text for name, text in found.items() if name.startswith("skinny_mm_kernel")]
    (other,) = [text for name, text in found.items() if not name.startswith("skinny_mm_kernel")]
    assert not meta_of(ours).get("launch_pdl")
    assert entry_of(ours)[0] == "tl.extra.cuda.gdc_launch_dependents()"
    assert "gdc_wait" not in entry_of(ours)[1]
    assert meta_of(other)["launch_pdl"] is True


def test_an_unknown_value_is_refused() -> None:
    with (
        pytest.raises(BundleError, match='pdl: \'some\' is unknown; write one of true, "all", "ahead", "one_wave", false'),
        dependent_launches("some", []),
    ):
        pass


@pytest.mark.parametrize(
    "text", ["", "async_compile.triton('k', '''\nnothing\n''')", "async_compile.triton('k', '''\ntriton_meta={\n''')"]
)
def test_a_text_that_is_not_as_expected_stays(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert dependent(text) == text
    assert "launched as usual" in caplog.text
