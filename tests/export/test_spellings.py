"""A product by a weight can be written in many ways: entries that need constant weights take it, or it is said why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gated_layers import BOTH, BOTH_BIASED, DOWN, GATE, HIDDEN, K, M, bf16, bundle_of, entry
from torch import nn
from torch.nn import functional

import autokernel
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import Bundle, Entry
from autokernel.export.plan import Usage

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

PACKED = entry(GATE, "aten", prepack=True)
TEMPLATE = entry(GATE, "inductor", template="cpp_gemm")
MERGED = entry(BOTH, "aten", prepack=True, merge="concat")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Pair(nn.Module):
    """Two products of one input by weights of [HIDDEN, K], spelled in one way."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(HIDDEN, K) / 8)
        self.up = nn.Parameter(torch.randn(HIDDEN, K) / 8)
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.gate) * self.product(x, self.up)


def usage_of(model: nn.Module, bundle: Bundle, *inputs: torch.Tensor, tolerance: float = 1e-4) -> tuple[Usage, Any]:
    """How the one entry of a bundle is used in a model, which must stay right; and the compiled model."""
    backend = autokernel.backend(bundle)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=tolerance, atol=tolerance)
    (usage,) = backend.usage().values()
    return usage, compiled


def torchs_own(switch: str) -> Any:
    return (
        torch._dynamo.config.patch(prepare_freezing=True)
        if switch == "prepare_freezing"
        else torch._inductor.config.patch(freezing=True)
    )


TAKEN: dict[str, Product] = {
    "linear": functional.linear,
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x @ w.H": lambda x, w: x @ w.H,
    "adjoint": lambda x, w: torch.matmul(x, w.adjoint()),
    "x.matmul": lambda x, w: x.matmul(w.t()),
    "x.mm": lambda x, w: x.mm(w.t()),
    "x.__matmul__": lambda x, w: x.__matmul__(w.t()),
    "w.__rmatmul__": lambda x, w: w.t().__rmatmul__(x),
    "torch.matmul": lambda x, w: torch.matmul(x, w.t()),
    "torch.matmul by name": lambda x, w: torch.matmul(other=w.t(), input=x),
    "torch.mm by name": lambda x, w: torch.mm(mat2=w.t(), input=x),
    "torch.linalg.matmul": lambda x, w: torch.linalg.matmul(x, w.t()),
    "torch.inner": torch.inner,
    "aten.mm": lambda x, w: torch.ops.aten.mm.default(x, w.t()),
    "transpose by name": lambda x, w: torch.matmul(x, w.transpose(dim0=0, dim1=1)),
    "swapaxes": lambda x, w: x @ w.swapaxes(0, 1),
    "movedim": lambda x, w: x @ w.movedim(0, 1),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "permute by name": lambda x, w: x @ w.permute(dims=(1, 0)),
    "transposed three times": lambda x, w: x @ w.t().T.mT,
    "view": lambda x, w: functional.linear(x, w.view(HIDDEN, K)),
    "detach": lambda x, w: functional.linear(x, w.detach()),
    "a batch of rows": lambda x, w: (x.view(4, M // 4, K) @ w.T).view(M, HIDDEN),
}


@pytest.mark.parametrize("spelling", TAKEN)
def test_a_weight_is_packed_and_merged_however_the_product_is_written(spelling: str) -> None:
    x = torch.randn(M, K)
    for tuned, hits in ((PACKED, 2), (MERGED, 1)):
        torch.compiler.reset()
        usage, _ = usage_of(Pair(TAKEN[spelling]), bundle_of(tuned), x)
        assert (usage.hits, usage.reasons) == (hits, [])


class Fused(nn.Module):
    """Both weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(2 * HIDDEN, K) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both.chunk(2)
        return functional.linear(x, gate) * (x @ up.T)


@pytest.mark.parametrize("tuned", [PACKED, TEMPLATE], ids=["packed", "template"])
def test_parts_of_one_parameter_are_weights(tuned: Entry) -> None:
    """Inductor's C++ template packs the first part in place of the second, if it is let."""
    usage, _ = usage_of(Fused(), bundle_of(tuned), torch.randn(M, K))
    assert (usage.hits, usage.reasons) == (2, [])


SAID: dict[str, tuple[Product, str]] = {
    "einsum": (lambda x, w: torch.einsum("mk,nk->mn", x, w), "product of batches"),
    "bmm": (lambda x, w: torch.bmm(x[None], w.T[None])[0], "product of batches"),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([1], [1])), "an input of the graph"),
    "multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w.t()]), "an input of the graph"),
    "computed": (lambda x, w: functional.linear(x, w * 2), "mul computes it in each call"),
    "written to": (lambda x, w: functional.linear(x, w.mul_(1)), "mul computes it in each call"),
}


@pytest.mark.parametrize("tuned", [PACKED, TEMPLATE, MERGED], ids=["packed", "template", "merged"])
@pytest.mark.parametrize("spelling", SAID)
def test_what_is_not_taken_is_said_once(spelling: str, tuned: Entry, caplog: pytest.LogCaptureFixture) -> None:
    product, why = SAID[spelling]
    with caplog.at_level(logging.WARNING):
        usage, _ = usage_of(Pair(product), bundle_of(tuned), torch.randn(M, K))
    assert usage.hits == 0
    (reason,) = usage.reasons
    assert why in reason
    assert [reason in record.getMessage() for record in caplog.records if "stock code" in record.getMessage()] == [True]


def test_a_product_that_is_not_taken_is_said_where_others_are_hit() -> None:
    class Mixed(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.gate) * torch.einsum("mk,nk->mn", x, self.up)

    usage, _ = usage_of(Mixed(TAKEN["linear"]), bundle_of(PACKED), torch.randn(M, K))
    assert usage.hits == 1
    assert ["product of batches" in reason for reason in usage.reasons] == [True]


def test_a_weight_that_is_no_parameter_is_said() -> None:
    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gate", torch.randn(HIDDEN, K))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.gate)  # type: ignore[arg-type]

    usage, _ = usage_of(Buffer(), bundle_of(PACKED), torch.randn(M, K))
    assert usage.hits == 0
    assert ["an input of the graph" in reason for reason in usage.reasons] == [True]


def test_a_graph_from_the_cache_is_said_as_well() -> None:
    """In every process anew: what Inductor finds compiled on disk runs no passes."""
    model, x = Pair(SAID["einsum"][0]), torch.randn(M, K)
    for _ in range(2):
        torch.compiler.reset()
        usage, _ = usage_of(model, bundle_of(PACKED), x)
        assert usage.reasons


def test_constants_that_inductor_builds_nothing_from_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template is not offered everywhere."""
    monkeypatch.setattr("torch._inductor.mkldnn_lowerings.use_cpp_gemm_template", lambda *_, **__: False)
    usage, _ = usage_of(Pair(TAKEN["linear"]), bundle_of(TEMPLATE), torch.randn(M, K))
    assert usage.hits == 0
    assert ["built no product" in reason for reason in usage.reasons] == [True]


class Rows(nn.Module):
    """Weights that have a row for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(K, HIDDEN) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.gate) * (x @ self.up)


@pytest.mark.parametrize("model", [Rows, Fused, lambda: Pair(lambda x, w: x @ w.t().contiguous())])
def test_weights_that_cannot_lie_side_by_side_are_said(model: Callable[[], nn.Module]) -> None:
    usage, _ = usage_of(model(), bundle_of(MERGED), torch.randn(M, K))
    assert usage.hits == 0
    assert ["were not put side by side" in reason for reason in usage.reasons] == [True]


def test_the_options_form_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    """Without `prepare_freezing` weights are inputs there; with it, all but what is written in another way is taken."""
    bundle, x = bundle_of(PACKED), torch.randn(M, K)
    with caplog.at_level(logging.WARNING):
        torch.compile(Pair(TAKEN["linear"]), options=dict(autokernel.options(bundle)))(x)
        assert "options() has constant weights only with torch._dynamo.config.prepare_freezing" in caplog.text
        caplog.clear()
        with torchs_own("prepare_freezing"):
            torch.compiler.reset()
            torch.compile(Pair(TAKEN["linear"]), options=dict(autokernel.options(bundle)))(x)
            assert not caplog.records
            torch.compiler.reset()
            torch.compile(Pair(SAID["einsum"][0]), options=dict(autokernel.options(bundle)))(x)
    assert "product of batches" in caplog.text


# ---- biases


class Biased(nn.Module):
    """A layer with a bias, spelled in one way."""

    def __init__(self, product: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.down = nn.Linear(HIDDEN, K)
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self.down.bias, x, self.down.weight)


@pytest.mark.parametrize(
    "product",
    [
        lambda b, x, w: torch.addmm(b, x, w.T),
        lambda b, x, w: b.addmm(x, w.t()),
        lambda b, x, w: torch.addmm(mat1=x, mat2=w.T, input=b),
        lambda b, x, w: torch.addmm(b, x, w.T, beta=1, alpha=1),
        lambda b, x, w: functional.linear(weight=w, input=x, bias=b),
    ],
    ids=["addmm", "method", "by name", "scaled by 1", "linear by name"],
)
def test_a_bias_may_be_written_in_several_ways(product: Callable[..., torch.Tensor]) -> None:
    usage, _ = usage_of(Biased(product), bundle_of(entry(DOWN, "aten", prepack=True)), torch.randn(M, HIDDEN))
    assert (usage.hits, usage.reasons) == (1, [])


def test_a_scaled_product_is_not_taken_and_said() -> None:
    model = Biased(lambda b, x, w: torch.addmm(b, x, w.T, alpha=2))
    usage, _ = usage_of(model, bundle_of(entry(DOWN, "aten", prepack=True)), torch.randn(M, HIDDEN))
    assert usage.hits == 0
    assert usage.reasons


def test_what_is_added_is_no_weight() -> None:
    """A residual that a call brings is looked at by nobody, and packs nothing anew."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(K, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.addmm(residual, x, self.gate.weight.T)

    model, x = Residual(), torch.randn(M, K)
    backend = autokernel.backend(bundle_of(PACKED))
    compiled: Any = torch.compile(model, backend=backend)
    for _ in range(3):
        residual = torch.randn(M, HIDDEN)
        torch.testing.assert_close(compiled(x, residual), model(x, residual), rtol=1e-4, atol=1e-4)
    (usage,) = backend.usage().values()
    assert usage.constant_bytes == K * HIDDEN * 4


# ---- autocast


@pytest.mark.parametrize("around", [False, True], ids=["within the model", "around it"])
@pytest.mark.parametrize(
    ("tuned", "hits"),
    [(entry(bf16(GATE), "aten", prepack=True), 2), (entry(bf16(BOTH), "aten", prepack=False, merge="concat"), 1)],
    ids=["packed", "merged"],
)
def test_weights_that_autocast_converts_are_constants(tuned: Entry, hits: int, around: bool) -> None:
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.linear(x, w)

    # eager would keep converted weights for as long as it lasts
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if around else nullcontext():
        model = Pair(TAKEN["linear"] if around else product)
        usage, compiled = usage_of(model, bundle_of(tuned), x := torch.randn(M, K), tolerance=3e-2)
        assert (usage.hits, usage.reasons) == (hits, [])
        assert usage.constant_bytes == 2 * HIDDEN * K * 2, "in 16 bits"
        model.gate.mul_(-2)
        torch.testing.assert_close(compiled(x), model(x), rtol=3e-2, atol=3e-2)


def test_biases_that_autocast_converts_merge() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(K, HIDDEN), nn.Linear(K, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(x) * self.up(x)

    tuned = entry(bf16(BOTH_BIASED), "aten", prepack=True, merge="concat")
    with torch.autocast("cpu", torch.bfloat16):
        usage, _ = usage_of(Layers(), bundle_of(tuned), torch.randn(M, K), tolerance=3e-2)
    assert (usage.hits, usage.reasons) == (1, [])


def test_weights_in_another_dtype_are_constants() -> None:
    model = Pair(lambda x, w: x @ w.to(x.dtype).T)
    tuned = entry(bf16(GATE), "aten", prepack=True)
    usage, _ = usage_of(model, bundle_of(tuned), torch.randn(M, K).bfloat16(), tolerance=3e-2)
    assert (usage.hits, usage.reasons) == (2, [])


# ---- torch's own freezing


@pytest.mark.parametrize("switch", ["prepare_freezing", "freezing"])
@pytest.mark.parametrize(("tuned", "hits"), [(PACKED, 2), (TEMPLATE, 2), (MERGED, 1)], ids=["packed", "template", "merged"])
def test_what_torch_freezes_is_taken_and_still_looked_at(switch: str, tuned: Entry, hits: int) -> None:
    with torchs_own(switch):
        model, x = Pair(TAKEN["linear"]), torch.randn(M, K)
        usage, compiled = usage_of(model, bundle_of(tuned), x)
        assert (usage.hits, usage.reasons) == (hits, [])
        model.gate.mul_(-2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert usage.hits == 2 * hits


def test_all_that_torch_freezes_may_be_a_constant() -> None:
    with torchs_own("prepare_freezing"):
        model, x = Pair(functional.linear), torch.randn(M, K)
        backend = BundleBackend(bundle_of(entry(DOWN, "aten", prepack=True), freezing="all"))
        compiled: Any = torch.compile(model, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            model.up.mul_(3)


# ---- what may lie side by side


def test_inputs_beside_constants_are_not_put_side_by_side() -> None:
    """Of four products two have weights that are none: they would be copied in each call."""

    class Both(Pair):
        def __init__(self) -> None:
            super().__init__(TAKEN["linear"])
            self.register_buffer("third", torch.randn(HIDDEN, K) / 8)
            self.register_buffer("fourth", torch.randn(HIDDEN, K) / 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            others = functional.linear(x, self.third) * functional.linear(x, self.fourth)  # type: ignore[arg-type]
            return super().forward(x) * others

    usage, _ = usage_of(Both(), bundle_of(MERGED), torch.randn(M, K))
    assert usage.hits == 1
    assert ["an input of the graph" in reason for reason in usage.reasons] == [True]
