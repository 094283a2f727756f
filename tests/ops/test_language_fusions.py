"""An experiment on a language model with norms everywhere, at a small size: each of its fusions is found, in every layer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_experiments import SMALL
from torch.fx import Graph
from torch.utils._python_dispatch import TorchDispatchMode

from autokernel.config import LoadedExperiment, load_experiment
from autokernel.export.plan import region_key
from autokernel.ops import OPS, FusionOp, Site, get_op
from autokernel.ops.matching import op_name
from autokernel.profiling.workload import ScenarioProgram, build_scenario, load_model

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "gemma.yaml"
DECODE = ("decode-b1", "decode-b16")
SCENARIOS = (*DECODE, "prefill-1x2048")
L, NUM_FULL = 6, 2
FROM_ZERO = {"offset": 1.0, "rounded": "late", "eps": 1e-6}
Pair = tuple[Graph, frozenset[str]]


@pytest.fixture(scope="module")
def loaded() -> LoadedExperiment:
    return load_experiment(EXPERIMENT, ("device=cpu", "backends=[aten]", *SMALL["gemma"]))


@pytest.fixture(scope="module")
def programs(loaded: LoadedExperiment) -> dict[str, ScenarioProgram]:
    model, dtype = load_model(loaded, "cpu"), loaded.experiment.model.dtype
    scenarios = loaded.experiment.scenarios
    return {name: build_scenario(model, scenarios[name], name, 0, "cpu", dtype, loaded=loaded) for name in SCENARIOS}


@pytest.fixture(scope="module")
def graphs(programs: dict[str, ScenarioProgram], post_grad: Any) -> dict[str, Pair]:
    return {name: post_grad(program.module, *program.inputs) for name, program in programs.items()}


def found(pair: Pair, op: str) -> list[Site]:
    """As on a GPU: but for the device its graph is the same."""
    return get_op(op).find(*pair, "cuda")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_fusion_is_found_in_every_layer(graphs: dict[str, Pair], scenario: str) -> None:
    pair = graphs[scenario]
    names = [op.name for op in OPS if isinstance(op, FusionOp) and op.name != "generated"]
    head = {"decode-b1": {"lm_head_argmax": 1}, "decode-b16": {"lm_head_topk": 1}}.get(scenario, {})
    head |= {"rms_norm_linear": 1} if head else {}  # the last norm and the head; of a prompt one row is taken in between
    assert {name: len(sites) for name in names if (sites := found(pair, name))} == {
        **head,
        "attention": L,
        "rotary_qk": L,
        "norm_rotary": 2 * L,
        "rotary": 2 * L,
        "linear_rms_norm": 2 * L,  # behind attention, and behind the gated part
        "add_rms_norm": 2 * L,  # both are added to the stream, and the next half layer norms the sum
        "rms_norm": 6 * L + 1,  # these, those of queries and keys, and the first one
        "gated": L,
        "rms_norm_qkv": 2 * L,  # in front of queries, keys and values, and of gate and up
    }  # fmt: skip
    gated = Counter(site.problem.epilogue for site in found(pair, "merged_mm"))
    assert gated == {(): L, ("gated_gelu_tanh",): L}, "Q, K and V; gate and up with what follows them"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_norms_are_those_of_the_weights_in_the_models_dtype(graphs: dict[str, Pair], scenario: str) -> None:
    """Not of `1 + weight` in float32, which stock code would compute in a kernel of its own."""
    pair = graphs[scenario]
    for op in ("rms_norm", "add_rms_norm", "linear_rms_norm", "norm_rotary", "rotary_qk"):
        for site in found(pair, op):
            scalars = dict(site.problem.scalars)
            assert {name: scalars[name] for name in FROM_ZERO} == FROM_ZERO
            assert {spec.dtype for spec in site.problem.inputs} == {"bfloat16"}
            assert site.problem.constants, "the weight"
    ends = Counter(site.problem.inputs[0].shape[-1] for site in found(pair, "linear_rms_norm"))
    assert ends == {128: L, 160: L}
    for linear, alone in zip(found(pair, "linear_rms_norm"), found(pair, "add_rms_norm"), strict=True):
        assert {*linear.nodes}.isdisjoint(alone.nodes), "one behind the other: a plan may have both"


@pytest.mark.parametrize("scenario", DECODE)
def test_windows_and_all_tokens_are_two_problems_of_attention(graphs: dict[str, Pair], scenario: str) -> None:
    lengths = Counter(site.problem.inputs[1].shape[2] for site in found(graphs[scenario], "attention"))
    assert lengths == {32: L - NUM_FULL, 64: NUM_FULL}, "40 tokens, 17 more places, in blocks of 16"


@pytest.mark.parametrize("op", ["rotary_qk", "norm_rotary", "linear_rms_norm", "add_rms_norm", "gated", "lm_head_topk"])
def test_each_is_found_again_in_what_its_reference_becomes(graphs: dict[str, Pair], post_grad: Any, op: str) -> None:
    """A candidate is built so; and in float64 the reference says what is exact."""
    problem, fusion = found(graphs["decode-b16"], op)[0].problem, get_op(op)
    assert isinstance(fusion, FusionOp)

    class Reference(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return fusion.reference(problem, *inputs)

    inputs = [torch.empty_strided(s.shape, s.stride, dtype=getattr(torch, s.dtype)).normal_() for s in problem.inputs]
    graph, _ = post_grad(Reference(), *inputs)
    assert [region_key(region.problem) for region in fusion.match(graph, frozenset(), "cuda")] == [region_key(problem)]


class Reads(TorchDispatchMode):  # type: ignore[misc,unused-ignore]
    """Which calls have the host wait for a tensor's value: none of them can be captured in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket) in ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scenario", DECODE)
def test_a_step_reads_no_value_on_the_host(
    programs: dict[str, ScenarioProgram], graphs: dict[str, Pair], scenario: str
) -> None:  # fmt: skip
    """Neither eager nor in its graph, which writes the caches in place: a replay is the same step."""
    program = programs[scenario]
    with torch.no_grad(), Reads() as reads:
        program.module(*program.inputs)
    assert reads.seen == []
    names = Counter(op_name(node) for node in graphs[scenario][0].nodes)
    assert not {"aten._local_scalar_dense", "aten.nonzero"} & set(names)
    assert names["aten.index_put"] == 2 * L, "keys and values of each layer, at one place"
