"""A tiny model in a folder, as the command line wants it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BUNDLED = Path(__file__).parent.parent / "examples"


def save_tiny(folder: Path) -> str:
    """A random Llama with the bundled tokenizer; greedy tokens vary, and no end-of-sequence token is set."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED / "models" / "target").save_pretrained(folder)
    return str(folder)
