"""Tiny random models of many architectures: what a config needs beside the usual sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from conftest import BOS, PAD, spread

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
HEADS = dict(head_dim=8)
UNTIED = dict(tie_word_embeddings=False)
SLIDING = dict(sliding_window=8)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
ALTERNATE = dict(layer_types=["sliding_attention", "full_attention"])

# Class stem -> what its config takes beside SIZES (None: not these sizes at all).
ENGINE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": HEADS,
    "Qwen3Moe": HEADS | EXPERTS | dict(num_experts=4, decoder_sparse_step=1),
    "Mistral": SLIDING,
    "Mixtral": SLIDING | dict(num_local_experts=4, num_experts_per_tok=2),
    "Gemma": HEADS | UNTIED,
    "Gemma2": HEADS | UNTIED | SLIDING | dict(query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=9.0),
    "Gemma3": HEADS | UNTIED | SLIDING | ALTERNATE | dict(query_pre_attn_scalar=8),
    "Phi3": {},
    "Phi": UNTIED,
    "GPT2": UNTIED | dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "OPT": UNTIED | dict(ffn_dim=48, word_embed_proj_dim=32),
    "GPTNeoX": {},
    "Olmo2": {},
    "Olmo3": SLIDING | ALTERNATE,
    "Cohere": {},
    "Cohere2": SLIDING | ALTERNATE,
    "Granite": dict(attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0, logits_scaling=0.5),
    "Starcoder2": SLIDING,
    "GptOss": HEADS | SLIDING | ALTERNATE | dict(num_local_experts=4, num_experts_per_tok=2),
    "StableLm": {},
    "SmolLM3": dict(no_rope_layers=[1, 0]),
    "DeepseekV3": MLA
    | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, n_group=2)
    | dict(topk_group=1, n_shared_experts=1),
    "Falcon": dict(new_decoder_architecture=False, multi_query=True, alibi=False),
    "Glm4": HEADS,
    "Ernie4_5": HEADS,
    "Nemotron": {},
    "Qwen2Moe": EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=24),
    "GPTBigCode": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
}

EXPERTS4 = dict(num_experts=4, num_experts_per_tok=2)
LOOP: dict[str, dict[str, Any]] = {
    "GPTJ": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "GPTNeo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
    "Mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "CodeGen": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "Rwkv": dict(attention_hidden_size=32),
    "Bloom": dict(n_layer=2, n_head=4),
    "Falcon": dict(new_decoder_architecture=False, multi_query=True, alibi=False),
    "Qwen3Next": HEADS | EXPERTS4
    | dict(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8)
    | dict(linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=24)
    | dict(shared_expert_intermediate_size=24, decoder_sparse_step=1),
    "Jamba": EXPERTS4 | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4)
    | dict(use_mamba_kernels=False),
    "Bamba": dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_expand=2)
    | dict(mamba_n_groups=1, mamba_chunk_size=16),
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "FalconH1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    | dict(mamba_chunk_size=16),
    "Llama4": HEADS | dict(num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8),
    "T5": dict(),
    "Bart": dict(),
    "Mamba": dict(state_size=8),
    "Mamba2": dict(state_size=8, num_heads=8, head_dim=8, expand=2, n_groups=1, chunk_size=16),
    "RecurrentGemma": dict(lru_width=32, attention_window_size=8, head_dim=8, block_types=["recurrent","attention"]),
    "GraniteMoeHybrid": dict(layer_types=["mamba","attention"], mamba_n_heads=4,mamba_d_head=16,mamba_d_state=8,mamba_n_groups=1,mamba_chunk_size=16,num_local_experts=2,num_experts_per_tok=1,shared_intermediate_size=32),
    "XGLM": dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "Gemma3n": HEADS|dict(),
    "MiniMax": HEADS|dict(layer_types=["linear_attention","full_attention"],num_local_experts=2),
    "Exaone4": SLIDING|ALTERNATE,
    "Dbrx": dict(d_model=32,n_heads=4,n_layers=2,max_seq_len=128),
    "JetMoe": dict(kv_channels=8, num_local_experts=2),
    "Zamba2": dict(),
    "Apertus": {}, "HunYuanDenseV1": HEADS, "Glm4Moe": HEADS, "Persimmon": {}, "BioGpt": {}, "Helium": HEADS, "SeedOss": HEADS, "Bitnet": {},"Arcee": {}, "Glm": HEADS, "DeepseekV2": MLA|dict(num_key_value_heads=4,n_routed_experts=4,num_experts_per_tok=2,moe_intermediate_size=24,first_k_dense_replace=1,n_shared_experts=1), "Dots1": dict(n_routed_experts=None, first_k_dense_replace=2,**HEADS,**SLIDING), "Qwen3_5Text": {}, "FlexOlmo": {}, "OlmoE": {}, "Olmoe": {}, "PhiMoE": {}, "Phimoe": {}, "NanoChat": {}, "MiniCPM3": {}, "Xlstm":{}, "XLNetLMHead":{}, "CTRLLMHead":{}, "OpenAIGPTLMHead": {}, "Lfm2Moe": dict(layer_types=["conv", "full_attention"]), "Doge": HEADS, "VaultGemma": HEADS|SLIDING, "Granitemoe": {}, "GraniteMoe": {}, "Ministral": HEADS|SLIDING|ALTERNATE, "Gemma4":{}, "Cwm": HEADS|SLIDING|ALTERNATE, "DiffLlama": {}, "LongcatFlash": {}, "Blt": {}, "Nemotron": {}, "NemotronH": {}, "StarCoder":{}, "Moshi": {}, "AfMoe":{}, "Afmoe": {}, 
}
