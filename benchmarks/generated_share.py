"""The share of matrix products and reductions for which kernels are generated, and why the others have none.

    python benchmarks/generated_share.py llama vit chronos2 zimage

Tiny models of each architecture are compiled on the CPU as far as the final graph; a model whose package is not installed is
left out. `--json` writes the table as data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autokernel.kernels.plans import plan_of
from autokernel.ops.generated import Explained, Generated, count_rules, explain
from autokernel.records import ConfigValue, Problem
from autokernel.search.space import DeviceFacts, names_for
from autokernel.search.space_file import load_space

H200 = DeviceFacts(device="cuda", isa="sm_90", device_name="NVIDIA H200", smem_bytes=232448, num_units=132, l2_bytes=50 << 20)


class _Seen(Exception):
    """The graph is known; nothing is compiled."""


class Called(nn.Module):
    """A model called with given keyword arguments, so that one tensor comes out."""

    def __init__(self, model: nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._call(self.model, *inputs)


def llama(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return Called(model, lambda m, ids: m(input_ids=ids, use_cache=False).logits), (torch.randint(0, 256, (2, 8)),)


def vit(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )  # fmt: skip
    model = ViTForImageClassification(config).to(dtype).eval()
    return Called(model, lambda m, x: m(pixel_values=x).logits), (torch.randn(2, 3, 32, 32, dtype=dtype),)


def chronos2(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from chronos.chronos2.config import Chronos2CoreConfig  # type: ignore[import-untyped]
    from chronos.chronos2.model import Chronos2Model  # type: ignore[import-untyped]

    options = {
        "context_length": 8192, "input_patch_size": 16, "input_patch_stride": 16, "output_patch_size": 16,
        "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True, "use_arcsinh": True, "max_output_patches": 64,
        "time_encoding_scale": 8192,
    }  # fmt: skip
    config = Chronos2CoreConfig(d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, chronos_config=options)
    model = Chronos2Model(config).to(dtype).eval()
    return Called(model, lambda m, x: m(context=x, num_output_patches=4).quantile_preds), (torch.randn(1, 512),)


def zimage(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    import diffusers

    transformer: Any = diffusers.ZImageTransformer2DModel
    model = transformer(
        dim=128, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=64, axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    ).to(dtype).eval()  # fmt: skip
    inputs = (torch.randn(16, 1, 16, 16, dtype=dtype), torch.tensor([0.5], dtype=dtype), torch.randn(20, 64, dtype=dtype))
    called = Called(model, lambda m, x, t, caption: m([x], t, [caption], return_dict=False)[0][0])
    with torch.no_grad():
        called(*inputs)  # its tables are made in the first call
    return called, inputs


MODELS = {"llama": (llama, "transformers"), "vit": (vit, "transformers"), "chronos2": (chronos2, "chronos"),
          "zimage": (zimage, "diffusers")}  # fmt: skip


def graph_of(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.fx.Graph:
    """The graph as Inductor's last pass sees it."""
    from torch._inductor.compile_fx import compile_fx

    found: list[torch.fx.Graph] = []

    def keep(graph: torch.fx.Graph) -> None:
        copy = torch.fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        found.append(copy)
        raise _Seen

    def backend(gm: Any, examples: list[torch.Tensor]) -> Any:
        return compile_fx(gm, examples, config_patches={"post_grad_custom_post_pass": keep, "fx_graph_cache": False})

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    except torch._dynamo.exc.TorchDynamoException:
        if not found:
            raise
    return found[0]


def why_no_kernel(problem: Problem) -> str | None:
    """What keeps the default kernel of a region from being generated, None if it is."""
    config: dict[str, ConfigValue] | None = load_space("generated")["triton"].default(
        names_for(Generated().dims(problem), H200)
    )
    if config is None:
        return "no legal config"
    try:
        plan_of(problem, config)
    except ValueError as error:
        return str(error)
    return None


def row_of(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """One line of the table."""
    make, _ = MODELS[name]
    torch.manual_seed(0)
    graph = graph_of(*make(dtype))
    explained = explain(graph)
    regions = {region.problem.key: region.problem for region in Generated().match(graph, frozenset(), "cuda")}
    failed = {key: wrong for key, problem in regions.items() if (wrong := why_no_kernel(problem)) is not None}
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "products": _share([item for item in explained if "mm" in item.op]),
        "reductions": _share([item for item in explained if "mm" not in item.op]),
        "problems": len(regions),
        "without_kernel": failed,
        "rules": dict(count_rules(explained)),
        "left_out": {item.node: str(item.whole) for item in explained if item.whole is not None},
    }


def _share(items: list[Explained]) -> list[int]:
    """With a region, of all."""
    return [sum(item.num_regions > 0 for item in items), len(items)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the table as data")
    arguments = parser.parse_args()
    table = []
    print(f"{'model':10} {'products':>10} {'reductions':>11} {'problems':>9} {'generated':>10}  why not")
    for name in arguments.models:
        package = MODELS[name][1]
        if importlib.util.find_spec(package) is None:
            print(f"{name:10} {package} is not installed")
            continue
        row = row_of(name, getattr(torch, arguments.dtype))
        table.append(row)
        products, reductions = (f"{row[key][0]} of {row[key][1]}" for key in ("products", "reductions"))
        generated = row["problems"] - len(row["without_kernel"])
        why = ", ".join(f"{rule} ({count})" for rule, count in row["rules"].items())
        print(f"{name:10} {products:>10} {reductions:>11} {row['problems']:>9} {generated:>10}  {why}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
