"""Tiny random models of many architectures: what their configs take beside the usual sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from conftest import BOS, PAD, spread
from transformers import PreTrainedModel

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
HEADS = dict(head_dim=8)
UNTIED = dict(tie_word_embeddings=False)
SLIDING = dict(sliding_window=8)  # short enough to tell within 33 tokens
ALTERNATE = dict(layer_types=["sliding_attention", "full_attention"])
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
SOFTCAPS = dict(attn_logit_softcapping=5.0, final_logit_softcapping=9.0, query_pre_attn_scalar=8)

# By the stem of the class's name. These run on the engine.
ENGINE: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Cohere": {},
    "Cohere2": SLIDING | ALTERNATE,
    "Ernie4_5": HEADS,
    "Exaone4": SLIDING | ALTERNATE,
    "GPT2": UNTIED | GPT,
    "GPTBigCode": GPT,
    "GPTNeoX": {},
    "Gemma": HEADS | UNTIED,
    "Gemma2": HEADS | UNTIED | SLIDING | SOFTCAPS,
    "Gemma3": HEADS | UNTIED | SLIDING | ALTERNATE | dict(query_pre_attn_scalar=8),
    "Glm4": HEADS,
    "GptOss": HEADS | SLIDING | ALTERNATE | LOCAL_EXPERTS,
    "Granite": dict(attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0, logits_scaling=0.5),
    "Llama": {},
    "Mistral": SLIDING,
    "Mixtral": SLIDING | LOCAL_EXPERTS,
    "Nemotron": {},
    "OPT": UNTIED | dict(ffn_dim=48, word_embed_proj_dim=32),
    "Olmo2": {},
    "Olmo3": SLIDING | ALTERNATE,
    "Phi": UNTIED,
    "Phi3": SLIDING,
    "Qwen2": dict(use_sliding_window=True, max_window_layers=1) | SLIDING,
    "Qwen2Moe": EXPERTS | dict(moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "Qwen3": HEADS,
    "Qwen3Moe": HEADS | EXPERTS | dict(moe_intermediate_size=24, decoder_sparse_step=1),
    "SmolLM3": dict(no_rope_layers=[1, 0]),
    "StableLm": {},
    "Starcoder2": SLIDING,
}

# The engine cannot drive these: transformers' own loop, over pages.
LOOP: dict[str, dict[str, Any]] = {
    "Bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
    | dict(encoder_attention_heads=4, decoder_attention_heads=4, forced_eos_token_id=None),
    "Bloom": dict(n_layer=2, n_head=4),
    "CodeGen": GPT | dict(rotary_dim=4),
    "DeepseekV3": MLA
    | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    | dict(first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1),
    "Falcon": dict(new_decoder_architecture=False, multi_query=True, alibi=False),
    "GPTJ": GPT | dict(rotary_dim=4),
    "GPTNeo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
    "Llama4": HEADS | dict(num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8),
    "Mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, use_cache=True),
    "T5": dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD),
    "XGLM": UNTIED | dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
}

# These store more than keys and values: transformers' own loop with their own cache, and a warning.
OWN_CACHE: dict[str, dict[str, Any]] = {
    "Bamba": MAMBA | dict(attn_layer_indices=[1], mamba_expand=2),
    "FalconH1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    | dict(mamba_chunk_size=16),
    "GraniteMoeHybrid": MAMBA | LOCAL_EXPERTS | dict(layer_types=["mamba", "attention"], shared_intermediate_size=32),
    "Jamba": EXPERTS
    | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Mamba": dict(state_size=8),
    "MiniMax": HEADS | HYBRID | dict(num_local_experts=2),
    "Qwen3Next": HEADS
    | HYBRID
    | EXPERTS
    | dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    | dict(moe_intermediate_size=24, shared_expert_intermediate_size=24, decoder_sparse_step=1),
    "RecurrentGemma": HEADS | dict(lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]),
    "Rwkv": dict(attention_hidden_size=32),
}


def make(stem: str, extra: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random model of the class `<stem>ForCausalLM`, or what comes next to it."""
    for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        model_class = getattr(transformers, stem + ending, None)
        if model_class is not None:
            break
    torch.manual_seed(seed)
    return spread(model_class(model_class.config_class(**(SIZES | extra))))
