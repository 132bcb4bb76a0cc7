"""Loading a model and its tokenizer by folder or hub name, and where the bundled ones lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_paged.integrations.bench.data import BadInput

DTYPES = ("float32", "bfloat16", "float16", "auto")
# integrations/hf/bench/models.py -> the checkout; an installed wheel has no examples beside it.
_EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def bundled(what: str) -> str:
    """Path of something under `examples/` that ships with the checkout, such as `models/target`.

    Raises:
        BadInput: if the package runs without its checkout.
    """
    path = _EXAMPLES / what
    if not path.exists():
        option = "--model" if what.startswith("models") else "a file of your own"
        raise BadInput(f"the bundled {what} comes with the checkout, not with the installed package: give {option}")
    return str(path)


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, with its tokenizer and the name it was loaded by."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def pad_id(self) -> int:
        """An id to pad with; it is always masked."""
        for value in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if value is not None:
                return value
        return 0


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def check_model_name(name: str | None) -> str:
    """The name to load: the bundled target for None.

    Raises:
        BadInput: if it is a path with no model in it.
    """
    if name is None:
        return bundled("models/target")
    if _looks_like_a_path(name):
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            why = "holds no config.json" if path.is_dir() else "is no folder"
            raise BadInput(f"--model {name}: {why}; give a folder with a model in it, or a hub name")
        return str(path)
    return name


def check_dtype(dtype: str) -> str | torch.dtype:
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def check_device(device: str | None) -> torch.device:
    """The device to use; by default CUDA where there is one."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise BadInput(f"--device {device}: cannot be used here: {first}") from error
    return chosen


def load(name: str | None, dtype: str = "float32", device: str | None = None) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: folder or hub name; None for the bundled target.
        dtype: one of `DTYPES`. device: as torch names it.

    Raises:
        BadInput: if one of them cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, kind, place = check_model_name(name), check_dtype(dtype), check_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--model {name}: cannot be loaded: {first}") from error
    return Loaded(name, model.to(place).eval(), tokenizer)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of K and V of one token over all layers, for a model with plain or grouped attention."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize
