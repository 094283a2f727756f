"""Every set of graph options that is tried reaches Inductor's configuration while production compiles with a bundle."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from export.pretended_h200 import H200, pretended_h200
from torch import nn

from autokernel.environment import current_environment
from autokernel.export.apply import BundleBackend
from autokernel.export.bundle import OWN_OPTIONS, Bundle
from autokernel.export.passes import SitePass
from autokernel.records import ConfigValue
from autokernel.search.graph_options import load_graph_options, merged, spelled

CPU, CUDA = (load_graph_options(device, torch=torch.__version__) for device in ("cpu", "cuda"))


class _Seen(BaseException):
    """The configuration is known: nothing is generated. No `Exception`, which the backend may catch."""


def read_back(options: Mapping[str, ConfigValue], environment: Any) -> Bundle:
    """A bundle with these options, as production reads it."""
    bundle = Bundle(name="b", created="", version="", environment=environment, entries=(), graph_options=options)
    return Bundle.from_json(json.loads(json.dumps(bundle.to_json())))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, ConfigValue]], dict[str, Any]]:
    """Inductor's values of these options, in the middle of a compilation."""
    found: dict[str, Any] = {}

    def watch(wanted: Mapping[str, ConfigValue]) -> dict[str, Any]:
        def look(self: SitePass, graph: torch.fx.Graph) -> None:
            config = torch._inductor.config
            found.update({name: operator.attrgetter(name)(config) for name in wanted if name not in OWN_OPTIONS})
            raise _Seen

        monkeypatch.setattr(SitePass, "__call__", look)
        return found

    return watch


def inductors_own(options: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


@pytest.mark.parametrize("options", [o for o in CPU if inductors_own(o)], ids=spelled)
def test_on_a_cpu(options: dict[str, ConfigValue], seen: Any) -> None:
    values = seen(options)
    environment = current_environment("cpu", torch.get_num_threads())
    torch._dynamo.reset()
    before = {name: operator.attrgetter(name)(torch._inductor.config) for name in inductors_own(options)}
    with torch.no_grad(), pytest.raises(_Seen):
        torch.compile(nn.Linear(8, 8), backend=BundleBackend(read_back(options, environment)))(torch.randn(3, 8))
    assert values == inductors_own(options)
    assert before != values, "each says something else than Inductor's default"
    after = {name: operator.attrgetter(name)(torch._inductor.config) for name in before}
    assert after == before, "nothing is left of it"


@pytest.mark.parametrize("options", [o for o in CUDA if inductors_own(o)], ids=spelled)
def test_on_a_gpu_that_is_not_there(options: dict[str, ConfigValue], seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    values = seen(options)
    monkeypatch.setattr("autokernel.export.apply.current_environment", lambda device: H200)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: H200.device_name)
    monkeypatch.setattr("autokernel.export.apply._device_there", lambda device: True)
    before = {name: operator.attrgetter(name)(torch._inductor.config) for name in inductors_own(options)}
    with pretended_h200(), torch.no_grad():
        backend = BundleBackend(read_back(options, H200))
        with FakeTensorMode():
            x = torch.empty(3, 8, device="cuda")
            module = torch.fx.symbolic_trace(lambda x: (x.sin() + 1,))
        with pytest.raises(_Seen):
            backend(module, [x])
    assert values == inductors_own(options)
    assert before != values, "each says something else than Inductor's default"


def test_what_helps_together_is_one_configuration(seen: Any) -> None:
    together = merged(CPU)
    values = seen(together)
    torch._dynamo.reset()
    environment = current_environment("cpu", torch.get_num_threads())
    with torch.no_grad(), pytest.raises(_Seen):
        torch.compile(nn.Linear(8, 8), backend=BundleBackend(read_back(together, environment)))(torch.randn(3, 8))
    assert values == inductors_own(together)
