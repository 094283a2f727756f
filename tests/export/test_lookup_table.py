"""Bundles in the form of Inductor's own lookup table: its keys, and complete entries."""

from __future__ import annotations

import json

import pytest
import torch

from autokernel.environment import Environment
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.lookup_table import lookup_keys, lookup_table
from autokernel.export.plan import minor
from autokernel.export.templates import template_of
from autokernel.records import ConfigValue, Problem, TensorSpec

H200 = Environment(device="cuda", device_name="NVIDIA H200", isa="sm_90", num_units=132, torch="2.11.0+cu130")
TILE: dict[str, ConfigValue] = {
    "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "num_stages": 2, "num_warps": 4, "GROUP_M": 8,
}  # fmt: skip


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.contiguous(shape, "bfloat16")


def weight(k: int, n: int) -> TensorSpec:
    return TensorSpec(shape=(k, n), dtype="bfloat16", stride=(1, k))


MM = Problem(op="mm", inputs=(spec(16, 4096), weight(4096, 6144)), device="cuda", constants=(1,))
ADDMM = Problem(op="addmm", inputs=(spec(6144), *MM.inputs), device="cuda", constants=(0, 2))
MERGED = Problem(op="merged_mm", inputs=(*MM.inputs, weight(4096, 1024)), device="cuda", constants=(1, 2))


def table_of(problem: Problem, backend: str = "inductor", torch_version: str = "1.0", **config: ConfigValue) -> dict:
    entry = Entry(problem=problem, backend=backend, config=config)
    environment = Environment(**{**H200.to_json(), "torch": torch_version, "libraries": {}})
    return lookup_table(Bundle(name="t", created="", version="", environment=environment, entries=(entry,)))


def test_a_key_and_an_entry_as_recorded_on_an_h200() -> None:
    """By a feedback saver of torch 2.11, for a choice of max-autotune."""
    table = table_of(MM, template="mm", **TILE)
    assert table == {
        "NVIDIA H200+((torch.bfloat16, [16, 4096], [4096, 1]), (torch.bfloat16, [4096, 6144], [1, 4096]))+mm": [
            {
                "template_id": "triton::mm", "EVEN_K": True, "USE_FAST_ACCUM": False, "ACC_TYPE": "tl.float32",
                "num_stages": 2, "num_warps": 4, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "hint_override": None,
                "GROUP_M": 8,
            }
        ]
    }  # fmt: skip
    assert json.loads(json.dumps(table)) == table


def test_a_bias_is_looked_up_expanded_and_as_it_is() -> None:
    x, w = "(torch.bfloat16, [16, 4096], [4096, 1])", "(torch.bfloat16, [4096, 6144], [1, 4096])"
    assert lookup_keys(ADDMM, "NVIDIA H200") == (
        f"NVIDIA H200+((torch.bfloat16, [16, 6144], [0, 1]), {x}, {w})+alpha=1&beta=1+addmm",
        f"NVIDIA H200+((torch.bfloat16, [6144], [1]), {x}, {w})+alpha=1&beta=1+addmm",
    )
    residual = Problem(op="addmm", inputs=(spec(16, 6144), *MM.inputs), device="cuda", scalars=(("beta", 2),))
    (key,) = lookup_keys(residual, "NVIDIA H200")
    assert key == f"NVIDIA H200+((torch.bfloat16, [16, 6144], [6144, 1]), {x}, {w})+alpha=1&beta=2+addmm"
    assert len(table_of(ADDMM, template="mm", **TILE)) == 2


def test_keys_are_those_that_inductor_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.kernel_inputs import MMKernelInputs
    from torch._inductor.lookup_table.choices import LookupTableChoices

    class Node:
        def __init__(self, given: TensorSpec) -> None:
            self.given = given

        def get_dtype(self) -> torch.dtype:
            return getattr(torch, self.given.dtype)  # type: ignore[no-any-return]

        def get_device(self) -> torch.device:
            return torch.device("cuda", 0)

    monkeypatch.setattr(MMKernelInputs, "shapes_hinted", lambda self: [n.given.shape for n in self.nodes()])
    monkeypatch.setattr(MMKernelInputs, "strides_hinted", lambda self: [n.given.stride for n in self.nodes()])
    monkeypatch.setattr(LookupTableChoices, "_get_device_key", staticmethod(lambda _: "NVIDIA H200"))
    expanded = TensorSpec(shape=(16, 6144), dtype="bfloat16", stride=(0, 1))
    for problem, added in ((MM, []), (ADDMM, [expanded]), (ADDMM, [spec(6144)])):
        scalars = {"alpha": 1, "beta": 1} if problem.op == "addmm" else None
        inputs = MMKernelInputs([Node(s) for s in (*added, *MM.inputs)], scalars=scalars)
        key = LookupTableChoices().make_lookup_key(inputs, problem.op, include_device=True)
        assert key in lookup_keys(problem, "NVIDIA H200")


def test_tma_takes_fields_of_its_own() -> None:
    (((entry,)),) = table_of(MM, template="mm_persistent_tma", **{**TILE, "BLOCK_K": 60}).values()
    assert entry["template_id"] == "triton::mm_persistent_tma"
    assert (entry["A_ROW_MAJOR"], entry["B_ROW_MAJOR"], entry["NUM_SMS"], entry["TMA_SIZE"]) == (True, False, 132, 128)
    assert (entry["TMA_EXPERIMENTAL_API"], entry["tma_store"], entry["EVEN_K"]) == (False, False, False)


def test_entries_have_every_field_that_inductors_own_configs_have() -> None:
    heuristics = pytest.importorskip("torch._inductor.template_heuristics.triton", reason="needs torch with Triton")
    own = heuristics.CUDAConfigHeuristic()
    triton_config = next(iter(own._finalize_mm_configs(own.mm_configs)))
    from unittest import mock

    with mock.patch.object(heuristics, "V"):
        made = heuristics.CUDAMMTemplateConfigHeuristic()._convert_config_to_template_kwargs(
            triton_config, 16, 6144, 4096, torch.bfloat16
        )
    (((entry,)),) = table_of(MM, template="mm", **TILE).values()
    assert set(entry) - {"template_id"} == set(made)


def test_hashes_are_those_of_the_torch_that_tuned() -> None:
    def hash_with(version: str) -> str | None:
        (((entry,)),) = table_of(MM, torch_version=version, template="mm", **TILE).values()
        return entry.get("template_hash")

    assert hash_with(torch.__version__) == template_of("mm").src_hash is not None
    assert hash_with(f"{minor(torch.__version__)}9") is None


def test_what_the_stock_mechanism_cannot_do_is_left_out() -> None:
    assert table_of(MERGED, template="mm", merge="concat", **TILE) == {}
    assert len(table_of(MERGED, template="mm", merge="none", **TILE)) == 2
    assert table_of(MM, backend="triton", kernel="skinny_mm") == {}
    assert table_of(MM, backend="aten", prepack=False) == {}
    assert table_of(MM, template="decompose_k", k_split=4) == {}
    long = Problem(op="mm", inputs=(spec(16, 65536), weight(65536, 64)), device="cuda", constants=(1,))
    assert list(table_of(long, template="decompose_k", k_split=4).values()) == [[{"template_id": "decompose_k", "k_split": 4}]]
