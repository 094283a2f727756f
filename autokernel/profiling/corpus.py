"""The experiment's text as token ids: what the eval metric is measured on, and what language scenarios read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autokernel.config import LoadedExperiment
from autokernel.errors import ConfigError
from autokernel.profiling.functions import call_function, load_function

if TYPE_CHECKING:
    import torch

_NUM_BYTE_VALUES = 256
_READ_FACTOR = 64  # of a folder of files: how much more than needed is read to choose from
_KEY = "validation.eval.data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token ids of a text, int64 of `[num_tokens]` on the CPU, and how many bytes of it a token stands for."""

    tokens: torch.Tensor
    bytes_per_token: float


def read_text(loaded: LoadedExperiment) -> bytes:
    """`max_bytes` of the experiment's eval data, taken evenly from all over it.

    Raises:
        ConfigError: there is no such data, or it is empty.
    """
    section = loaded.experiment.validation.eval
    if section is None or section.data is None:
        raise ConfigError(f"{loaded.path}: {_KEY} is not given; name a text file, a folder of them, or file.py:function")
    if ":" in section.data:
        text = call_function(load_function(loaded, section.data, _KEY), section.data, _KEY)
        if not isinstance(text, bytes):
            raise ConfigError(f"{_KEY}: {section.data} returned {type(text).__name__}; it must return bytes")
    else:
        place = loaded.resolve(section.data)
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        text = _read_files(files, _READ_FACTOR * section.max_bytes)
    if not text:
        raise ConfigError(f"{_KEY}: {section.data} holds no text")
    return _sample(text, section.max_bytes, section.length)


def _sample(text: bytes, max_bytes: int, length: int) -> bytes:
    """Passages of a window's length from all over a text that is longer than needed."""
    if len(text) <= max_bytes:
        return text
    num_passages = max(1, max_bytes // length)
    size, stride = max_bytes // num_passages, len(text) // num_passages
    return b"".join(text[i * stride : i * stride + size] for i in range(num_passages))


def load_corpus(loaded: LoadedExperiment, config: Any) -> Corpus:
    """The experiment's text as the model reads it: its bytes if the vocabulary has 256 entries, else by its tokenizer.

    Args:
        loaded: names the data, and the checkpoint folder that the tokenizer is in.
        config: the transformers config of the model.

    Raises:
        ConfigError: there is no text, or no tokenizer for it.
    """
    import torch

    text = read_text(loaded)
    if config.get_text_config().vocab_size == _NUM_BYTE_VALUES:
        return Corpus(tokens=torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), bytes_per_token=1.0)
    checkpoint = loaded.experiment.model.checkpoint
    if checkpoint is None:
        raise ConfigError(
            f"{_KEY}: a model of random weights with {config.get_text_config().vocab_size} tokens has no tokenizer; "
            "remove validation.eval, or give model.checkpoint"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(loaded.resolve(checkpoint), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.checkpoint: {loaded.resolve(checkpoint)} holds no tokenizer: {error}") from None
    ids = tokenizer(text.decode("utf-8", errors="replace"), return_tensors="pt", verbose=False)["input_ids"][0]
    return Corpus(tokens=ids, bytes_per_token=len(text) / max(1, len(ids)))


def _read_files(files: list[Path], max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    room = max_bytes
    for path in files:
        if room <= 0:
            break
        pieces.append(path.read_bytes()[:room])
        room -= len(pieces[-1])
    return b"".join(pieces)
