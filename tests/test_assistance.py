"""What a call says of drafting, and what its assistant says where the call does not."""

from __future__ import annotations

from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_paged.integrations.assistance import asked


def test_what_the_call_does_not_say_the_assistant_does():
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    draft = LlamaForCausalLM(LlamaConfig(**sizes))
    usual = asked(GenerationConfig(), draft)
    draft.generation_config.num_assistant_tokens = 1
    draft.generation_config.assistant_confidence_threshold = 0.25
    found = asked(GenerationConfig(), draft)
    assert (found.max_draft_tokens, found.confidence_threshold) == (1, 0.25)
    found = asked(GenerationConfig(num_assistant_tokens=3), draft)
    assert (found.max_draft_tokens, found.confidence_threshold) == (3, 0.25)
    assert usual.max_draft_tokens != 1 and not usual.confidence_threshold
