"""The sections `model` and `scenarios` of an experiment: which model, and what it does."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from autokernel.errors import shortened

# Kinds of inputs: pydantic puts them into the path of an error, where `config_messages` takes them out again.
TENSOR, LIST, VALUE, DECLARED, FUNCTION = "<tensor>", "<list>", "<value>", "<declared>", "<function>"


class Section(BaseModel):
    """A mapping of an experiment: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and (int in kinds or float in kinds):
                raise PydanticKnownError("int_type" if int in kinds else "float_type")
        return value


def _kinds(annotation: Any) -> list[Any]:
    """The types of a union, or the one type."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


# Stages add small numbers to a seed, and torch and others take 63 bits.
Seed = Annotated[int, Field(ge=0, lt=2**63 - 100)]

NOT_JSON = "not_json"  # pydantic's type of the error, with the keys below the field in its context
_MAX_NESTED = 100


def written_as_json(value: Any) -> Any:
    """Keys and values of any kind, if JSON can hold them: the run's record does, and fresh processes read them from there."""
    if isinstance(value, dict):
        _check_json(value, (), ())
    return value


def _check_json(value: Any, keys: tuple[str, ...], above: tuple[int, ...]) -> None:
    if isinstance(value, (dict, list, tuple)):
        if id(value) in above:
            raise _not_json(value, keys, "holds itself: write it out, without the alias")
        if len(above) >= _MAX_NESTED:
            raise _not_json(value, keys[:1], f"lies in {_MAX_NESTED} lists and sections: write fewer in each other")
        above = (*above, id(value))
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            _check_json(key, keys, above)
            _check_json(below, (*keys, str(key)), above)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _not_json(value, keys, "must be a finite number")
    elif isinstance(value, date):
        raise _not_json(value, keys, f"is no value of JSON: write '{value}' in quotes")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise _not_json(value, keys, "must be text in quotes, a number, true, false, null, a list or a section")


def _not_json(value: Any, keys: tuple[str, ...], problem: str) -> PydanticCustomError:
    return PydanticCustomError(NOT_JSON, "no JSON", {"keys": keys, "problem": f"{shortened(repr(value))} {problem}"})


class ModelSection(Section):
    """Which model, and from where; nothing is downloaded.

    A model of transformers' auto classes (`checkpoint` or `config`), of any class (`class_path`, and what it is built from),
    or what a function returns (`factory`).
    """

    checkpoint: Path | None = Field(
        None, description="local folder with config.json and safetensors, for transformers or for the class' from_pretrained"
    )
    config: Path | dict[str, Any] | None = Field(
        None,
        description="JSON file, or its keys; weights are random. Of transformers with `model_type`, or that of `class_path`",
    )
    class_path: str | None = Field(
        None,
        description="`package.module:Class` or `file.py:Class`, a torch.nn.Module; built from its `checkpoint` or `config` (as "
        "classes of transformers and diffusers can be), else from `arguments`",
    )
    factory: str | None = Field(
        None,
        description="`package.module:function` or `file.py:function`; called with `arguments`, returns a torch.nn.Module",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of `factory`, or of the constructor of `class_path`"
    )
    config_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of the config to replace, e.g. `num_hidden_layers: 8` for a quick try",
    )
    depth_key: str | None = Field(
        None,
        description="key of `config`, `config_overrides` or `arguments` that counts the model's layers, all of them alike: "
        "where `layers` are asked for (`graph.layers` and others), it is set to so many. Language models: num_hidden_layers",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    seed: Seed = Field(0, description="of random weights")

    _json = field_validator("config", "arguments", "config_overrides")(written_as_json)

    @property
    def by_auto_class(self) -> bool:
        """Whether transformers finds the class by the config, as it does for language models."""
        return self.class_path is None and self.factory is None

    @property
    def depth(self) -> int | None:
        """How many layers it has, where that is written out."""
        depth = self._written_out.get(self._depth_key or "")
        return depth if isinstance(depth, int) else None

    @property
    def _written_out(self) -> dict[str, Any]:
        """What the experiment says of the model's config or arguments."""
        return {**(self.config if isinstance(self.config, dict) else {}), **self.arguments, **self.config_overrides}

    @property
    def _depth_key(self) -> str | None:
        return self.depth_key or ("num_hidden_layers" if self.by_auto_class else None)

    def with_depth(self, num_layers: int) -> ModelSection:
        """The same with so many layers; itself where it has no more, or there is no telling what counts them."""
        if self._depth_key is None or (self.depth is not None and self.depth <= num_layers):
            return self
        name = "arguments" if self._depth_key in self.arguments else "config_overrides"
        return self.model_copy(update={name: {**getattr(self, name), self._depth_key: num_layers}})

    @model_validator(mode="after")
    def _depth_is_counted(self) -> ModelSection:
        if self.depth_key is not None and self.depth is None:
            known = sorted(self._written_out)
            raise ValueError(
                f"depth_key is a key of config, config_overrides or arguments with a whole number; {self.depth_key!r} is not "
                f"among {', '.join(known) or 'them, for they are empty'}: write the number out there"
            )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        given = [name for name in ("checkpoint", "config", "factory") if getattr(self, name) is not None]
        if self.class_path is not None:
            return self._class_source(given)
        if len(given) != 1:
            raise ValueError(f"give exactly one of checkpoint, config and factory, not {given or 'none'}")
        if self.arguments and self.factory is None:
            raise ValueError("`arguments` belong to `factory` or `class_path`, neither of which is given")
        if self.config_overrides and self.factory is not None:
            raise ValueError("`config_overrides` belong to `checkpoint` and `config`; a factory takes `arguments`")
        return self

    def _class_source(self, given: list[str]) -> ModelSection:
        if "factory" in given:
            raise ValueError("give `class_path` or `factory`, not both: a class is built by itself")
        sources = given + (["arguments"] if self.arguments else [])
        if len(sources) > 1:
            raise ValueError(f"a class is built from one of checkpoint, config and arguments, not from {sources}")
        if self.config_overrides and "config" not in given:
            raise ValueError("with `class_path`, `config_overrides` belong to `config`, which is not given")
        return self


# What each distribution takes, besides shape and dtype.
_TAKES = {
    "normal": ("mean", "std"),
    "uniform": ("low", "high"),
    "integers": ("low", "high"),
    "arange": ("low", "step"),
    "zeros": (),
    "ones": (),
}
_FLOATS = ("float64", "float32", "bfloat16", "float16")


class TensorInput(Section):
    """A tensor that a model is called with. Each check draws its numbers anew, with another seed."""

    shape: tuple[Annotated[int, BeforeValidator(_no_boolean)] | str, ...] = Field(
        description="sizes; `batch` stands for the scenario's batch"
    )
    distribution: Literal["normal", "uniform", "integers", "arange", "zeros", "ones"] = Field(
        "normal", description="arange counts along the last dimension; zeros run faster than what a model sees"
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "bool"] | None = Field(
        None, description="default: the model's, and int64 for integers"
    )
    mean: float = Field(0.0, description="of normal")
    std: float = Field(1.0, ge=0, description="of normal")
    low: float = Field(0.0, description="least value; where arange begins")
    high: float = Field(1.0, description="upper end of uniform and integers, itself never drawn")
    step: float = Field(1.0, description="of arange")
    missing: float = Field(
        0.0, ge=0, lt=1, description="part of the elements that is NaN, as missing values of time series are"
    )

    @property
    def dtype_name(self) -> str | None:
        """Its dtype; None: the model's."""
        return self.dtype or ("int64" if self.distribution == "integers" else None)

    @model_validator(mode="after")
    def _consistent(self) -> TensorInput:
        kind = self.distribution
        if any(size < 1 if isinstance(size, int) else size != "batch" for size in self.shape):
            raise ValueError(f"sizes are whole numbers from 1, or the word batch, not {list(self.shape)}")
        own = {"mean", "std", "low", "high", "step"} & self.model_fields_set
        # defaults that were written out by `model_dump` say nothing
        own = {name for name in own if getattr(self, name) != type(self).model_fields[name].default}
        foreign = sorted(own - set(_TAKES[kind]))
        if foreign:
            raise ValueError(
                f"distribution {kind} takes {' and '.join(_TAKES[kind]) or 'no numbers'}, not {', '.join(foreign)}"
            )
        is_float = self.dtype_name is None or self.dtype_name in _FLOATS
        if kind in ("normal", "uniform") and not is_float:
            raise ValueError(f"distribution {kind} makes no {self.dtype}: use `integers` with low and high, zeros or ones")
        if self.missing and not is_float:
            raise ValueError(f"missing values are NaN, which {self.dtype_name} does not have: give a floating-point dtype")
        if kind in ("uniform", "integers") and not self.low < self.high:
            raise ValueError(f"low must be less than high, not {self.low:g} and {self.high:g}")
        if kind == "integers" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"integers lie between whole numbers, not {self.low:g} and {self.high:g}")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, (dict, TensorInput)):
        return TENSOR
    return LIST if isinstance(value, (list, tuple)) else VALUE


_Plain = bool | int | float | str | None
_Item = Annotated[
    Annotated[TensorInput, Tag(TENSOR)] | Annotated[_Plain, Tag(VALUE)],
    Discriminator(_kind, "input", "a list of inputs holds tensors and plain values, but no other list"),
]
Input = Annotated[
    Annotated[TensorInput, Tag(TENSOR)] | Annotated[tuple[_Item, ...], Tag(LIST)] | Annotated[_Plain, Tag(VALUE)],
    Discriminator(_kind),
]
_Inputs = Annotated[
    Annotated[str, Tag(FUNCTION)] | Annotated[dict[str, Input], Tag(DECLARED)],
    Discriminator(lambda value: DECLARED if isinstance(value, dict) else FUNCTION),
]


MOST_ROWS = 128  # of a kernel of ours that holds for a range of them (`kernels.config.MAX_M`)
_Row = Annotated[int, BeforeValidator(_no_boolean)]


class _ScenarioSection(Section):
    """A scenario: pydantic reads `kind` before anything else, and takes no validator for all fields there."""

    @field_validator("batch", "length", "context", "top_k", mode="before", check_fields=False)
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        return _no_boolean(value)

    @field_validator("rows", check_fields=False)
    @classmethod
    def _rows_are_a_range(cls, rows: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if rows is not None and (len(rows) != 2 or not 1 <= rows[0] <= rows[1] <= MOST_ROWS):
            said = f"from 1 to {MOST_ROWS}, as many as kernels that hold for a range take"
            raise ValueError(f"{list(rows)} must be the first and the last number of rows, {said}: e.g. [9, 16]")
        return rows


class PrefillScenario(_ScenarioSection):
    """A language model reads a whole prompt."""

    kind: Literal["prefill"]
    batch: PositiveInt = Field(1, description="samples, or sequences, in one call")
    length: PositiveInt = Field(description="tokens per sequence")
    logits: Literal["all", "last"] = Field(
        "all", description="of which positions logits are computed; serving needs the last one of each sequence only"
    )


_TOP_K = 50


class DecodeScenario(_ScenarioSection):
    """A language model produces one token per sequence, with a static KV cache."""

    kind: Literal["decode"]
    batch: PositiveInt = Field(1, description="samples, or sequences, in one call")
    context: PositiveInt = Field(
        description="tokens already in the cache, which has room for a few more; a sliding window holds the last of them"
    )
    sample: Literal["none", "argmax", "top_k"] = Field(
        "none",
        description="what the step ends with instead of logits; argmax: the likeliest token of each sequence; top_k: the "
        "likeliest ones and their logits, which a sampler draws from",
    )
    top_k: PositiveInt | None = Field(None, description="how many tokens `sample: top_k` keeps; 50 if it is not given")
    rows: tuple[_Row, ...] | None = Field(
        None,
        description="batches that its winners are to hold for, besides its own: `[9, 16]`, the first and the last. Those of "
        "backend triton for plain products are measured there, and used as far as they are right and no slower than stock; all "
        "else holds for the scenario's batch alone",
    )

    @property
    def num_sampled(self) -> int:
        """How many tokens of each sequence `sample: top_k` keeps."""
        return self.top_k or _TOP_K

    @model_validator(mode="after")
    def _top_k_is_sampled(self) -> DecodeScenario:
        if self.top_k is not None and self.sample != "top_k":
            raise ValueError(f"top_k: {self.top_k} is for `sample: top_k`, not `sample: {self.sample}`")
        return self

    @model_validator(mode="after")
    def _rows_hold_the_batch(self) -> DecodeScenario:
        if self.rows is not None and not self.rows[0] <= self.batch <= self.rows[1]:
            raise ValueError(f"rows: {list(self.rows)} must hold the batch, {self.batch}: a range lies around what is tuned")
        return self


class CallScenario(_ScenarioSection):
    """Any other model: one call, with inputs that are declared here or made by a function."""

    kind: Literal["call"]
    inputs: _Inputs = Field(
        description="arguments of the model's forward by name: tensors (mappings with `shape`), lists of them, plain values. "
        "Or `module:function` or `file.py:function`; called as f(batch=..., seed=..., device=..., dtype=...), returns the "
        "tuple of the model's positional arguments"
    )
    outputs: tuple[str, ...] = Field(
        (),
        description="what the model returns that counts: paths of attributes, keys and indices, e.g. `logits` or `sample.0`; "
        "default: all of it, a tensor or a tuple of them",
    )
    batch: PositiveInt = Field(1, description="samples, or sequences, in one call")
    rows: tuple[_Row, ...] | None = Field(
        None,
        description="as of decode, in rows of the products themselves: `[9, 16]` is for winners of 9 to 16 rows",
    )

    @property
    def inputs_function(self) -> str | None:
        """The function that makes the inputs, if they are not declared."""
        return self.inputs if isinstance(self.inputs, str) else None

    @model_validator(mode="after")
    def _has_tensors(self) -> CallScenario:
        if isinstance(self.inputs, dict) and not any(isinstance(item, TensorInput) for item in _flat(self.inputs)):
            raise ValueError(
                "`inputs` hold no tensor: a model's inputs are mappings with `shape`, e.g. `x: {shape: [batch, 8]}`"
            )
        for path in self.outputs:
            if not all(path.split(".")):
                raise ValueError(f"an output is a path such as `logits` or `sample.0`, not {path!r}")
        return self


def _flat(inputs: dict[str, Any]) -> list[Any]:
    return [item for value in inputs.values() for item in (value if isinstance(value, tuple) else (value,))]


Scenario = Annotated[PrefillScenario | DecodeScenario | CallScenario, Field(discriminator="kind")]
