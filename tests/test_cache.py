"""`PagedCache` in transformers' own loop: the tokens of the default cache, in pages that rows share."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest import BOS, PAD, left_padded, prompts_of, spread, tiny_llama
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, PreTrainedModel

from hf_paged import PagedCache
from hf_paged.integrations.cache import CacheFull, pageable, paged_cache_for

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LIMITS = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, max_position_embeddings=128)
GROUPED = SIZES | LIMITS | dict(num_key_value_heads=2, head_dim=8)
OLD_STYLE = LIMITS | dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=128)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=6)
ROUTED = dict(n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1)

ZOO = {
    "Llama": GROUPED,
    "Mistral": GROUPED | dict(sliding_window=5),
    "Gemma2": GROUPED | dict(sliding_window=5, num_hidden_layers=4),
    "Gemma3-text": GROUPED | dict(sliding_window=5, num_hidden_layers=6),
    "Cohere2": GROUPED | dict(sliding_window=5, num_hidden_layers=4),
    "GptOss": GROUPED | EXPERTS | dict(sliding_window=5),
    "Llama4-text": GROUPED | EXPERTS | dict(attention_chunk_size=6, intermediate_size_mlp=48, num_hidden_layers=4),
    "Gemma3n-text": GROUPED
    | dict(num_hidden_layers=6, num_kv_shared_layers=2, sliding_window=5, vocab_size_per_layer_input=99)
    | dict(hidden_size_per_layer_input=8, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6)
    | dict(layer_types=["sliding_attention", "full_attention"] * 3),
    "DeepseekV3": SIZES | LIMITS | LATENT | ROUTED | dict(num_key_value_heads=4, num_experts_per_tok=2),
    "GPT2": OLD_STYLE,
    "GPTJ": OLD_STYLE | dict(rotary_dim=4),
    "GPTBigCode": OLD_STYLE | dict(multi_query=True),
    "OPT": SIZES | LIMITS | dict(ffn_dim=48, word_embed_proj_dim=32),
    "Falcon": SIZES | LIMITS,
    "GPTNeoX": SIZES | LIMITS,
    "Bloom": SIZES | LIMITS | dict(n_head=4, n_layer=2),
}


def zoo_model(name: str) -> PreTrainedModel:
    """A random model of a few small layers."""
    torch.manual_seed(0)
    base, _, kind = name.partition("-")
    config = getattr(transformers, base + kind.title() + "Config")(**ZOO[name])
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def assert_same(model: PreTrainedModel, cache: PagedCache | None = None, seed: int | None = None, **arguments):
    """`generate` gives the same with and without a `PagedCache`; returns what it gives, and the cache."""
    cache = PagedCache(model.config, page_size=4) if cache is None else cache
    outputs = []
    for extra in ({}, {"past_key_values": cache}):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(model.generate(**arguments, **extra))
    plain, paged = (o if isinstance(o, torch.Tensor) else o.sequences for o in outputs)
    assert plain.tolist() == paged.tolist()
    cache.check()
    assert cache.get_seq_length() > 0
    return outputs[1], cache


def draft_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model that agrees with `model` now and then. (Without a window: 5.17's own cache fails on drafts with one.)"""
    draft = copy.deepcopy(model)
    if hasattr(draft.config, "sliding_window"):
        draft.config.sliding_window = 1000
    for parameter in draft.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return draft


def dense(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.fixture
def batch():
    return left_padded(prompts_of(9, 4, 13))


# -- strategies


def test_greedy(model, batch):
    assert_same(model, **batch, max_new_tokens=12)


def test_sampling(model, batch):
    assert_same(model, seed=3, **batch, max_new_tokens=12, do_sample=True, temperature=1.3, top_k=20, top_p=0.95)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_beams=4),
        dict(num_beams=4, num_return_sequences=3),
        dict(num_beams=4, num_return_sequences=4, early_stopping=True, length_penalty=0.5),
        dict(num_beams=3, do_sample=True, top_k=10),
    ],
    ids=["plain", "return 3", "early", "sample"],
)
@pytest.mark.parametrize("ends", [False, True])
def test_beams(model, batch, arguments, ends):
    eos = list(range(40, 60)) if ends else None
    output, cache = assert_same(model, seed=1, **batch, max_new_tokens=14, eos_token_id=eos, **arguments)
    assert not ends or torch.isin(output[:, 13:], torch.tensor(eos)).any()
    assert len(cache.tables.rows) == 3 * arguments["num_beams"]


def test_several_sequences(model, batch):
    assert_same(model, seed=2, **batch, max_new_tokens=8, do_sample=True, num_return_sequences=3)


def test_embeddings(model, batch):
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    arguments = dict(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
    assert_same(model, **arguments, max_new_tokens=8)
    assert_same(model, **arguments, max_new_tokens=8, num_beams=3)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_chunked_prefill(name, batch):
    assert_same(zoo_model(name), **batch, max_new_tokens=8, prefill_chunk_size=5)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("kind", ["draft", "lookup", "sample"])
def test_assisted(name, kind):
    model = zoo_model(name)
    prompt = prompts_of(5)[0].repeat(1, 3)
    if kind == "lookup":
        assert_same(model, input_ids=prompt, max_new_tokens=16, prompt_lookup_num_tokens=3)
        return
    sampling = dict(do_sample=True, top_k=5) if kind == "sample" else {}
    draft = draft_of(model)
    assert_same(model, seed=5, input_ids=prompt, max_new_tokens=16, assistant_model=draft, **sampling)


def test_output_attentions():
    model = tiny_llama(attn_implementation="eager")
    batch = left_padded(prompts_of(9, 4))
    wanted = dict(output_attentions=True, output_scores=True, return_dict_in_generate=True)
    plain = model.generate(**batch, max_new_tokens=6, **wanted)
    paged = model.generate(**batch, max_new_tokens=6, past_key_values=PagedCache(model.config, 4), **wanted)
    assert isinstance(paged.past_key_values, PagedCache)
    for a, b in zip(plain.attentions, paged.attentions, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(plain.scores, paged.scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("page_size", [1, 7, 256])
def test_attention_and_page_size(batch, attention, page_size):
    model = tiny_llama(attn_implementation=attention)
    assert_same(model, PagedCache(model.config, page_size), **batch, max_new_tokens=8)
    assert_same(model, PagedCache(model.config, page_size), **batch, max_new_tokens=8, num_beams=3)


@pytest.mark.parametrize("name", ZOO)
def test_architectures(name, batch):
    model = zoo_model(name)
    assert pageable(model.config) is None
    assert_same(model, **batch, max_new_tokens=9)
    assert_same(model, **batch, max_new_tokens=7, num_beams=3)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoder(name):
    torch.manual_seed(0)
    ends = dict(vocab_size=99, pad_token_id=PAD, eos_token_id=98, decoder_start_token_id=BOS)
    if name == "T5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ends)
        model = spread(transformers.T5ForConditionalGeneration(config))
    else:
        sides = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in dict(layers=2, attention_heads=4).items()}
        config = transformers.BartConfig(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **sides, **ends)
        model = spread(transformers.BartForConditionalGeneration(config))
    batch = left_padded(prompts_of(9, 4))
    for strategy in ({}, dict(num_beams=3)):
        cache = paged_cache_for(model, page_size=4)
        assert isinstance(cache, EncoderDecoderCache)
        plain = model.generate(**batch, max_new_tokens=9, **strategy)
        assert plain.tolist() == model.generate(**batch, max_new_tokens=9, past_key_values=cache, **strategy).tolist()
        cache.self_attention_cache.check()
        assert cache.self_attention_cache.get_seq_length() > 0
        cache.crop(-2)  # refuses what is no `DynamicCache`
        cache.reset()
        assert cache.self_attention_cache.memory.pool.used == 0


# -- one cache over several calls


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_continue_from_a_returned_cache(name):
    model, prompt = zoo_model(name), prompts_of(9)[0]
    whole = model.generate(prompt, max_new_tokens=20)
    cache = PagedCache(model.config, page_size=4)
    first = model.generate(prompt, max_new_tokens=8, past_key_values=cache, return_dict_in_generate=True)
    assert first.past_key_values is cache
    for again in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        length = again.get_seq_length()
        rest = model.generate(first.sequences, max_new_tokens=12, past_key_values=again)
        assert rest.tolist() == whole.tolist()
        again.check()
        again.crop(length - again.get_seq_length())
        again.check()
        assert again.get_seq_length() == length
    cache.close()
    cache.check()
    assert (cache.memory.pool.used, cache.kv_bytes, cache.waste(), cache.get_seq_length()) == (0, 0, 0, 0)
    assert_same(model, cache, **left_padded(prompts_of(3, 6)), max_new_tokens=5)


def test_rows_that_share_a_prompt(model):
    """A prefix computed once serves many rows: the README's way to share one."""
    prefix, tails = prompts_of(13)[0], prompts_of(3, 3, 3, seed=1)
    cache = PagedCache(model.config, page_size=4)
    with torch.inference_mode():
        model(prefix, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    used = cache.memory.pool.used
    assert used == 4
    ids = torch.cat([torch.cat([prefix, tail], 1) for tail in tails])
    assert_same(model, cache, input_ids=ids, max_new_tokens=7)
    assert cache.memory.pool.used == 3 + 3 * 3


def test_outside_of_inference_mode():
    cache, states = PagedCache(LlamaConfig(**GROUPED), page_size=4), torch.randn(1, 2, 3, 8)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode:
            for layer in range(2):
                keys, _ = cache.update(states, states, layer)
    assert keys.tolist() == states.repeat(1, 1, 4, 1).tolist()


def test_gradients_flow_to_new_states(model, batch):
    def gradient(cache):
        model.zero_grad()
        model(**batch, past_key_values=cache).logits.logsumexp(-1).sum().backward()
        return model.lm_head.weight.grad.clone(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    torch.testing.assert_close(gradient(PagedCache(model.config)), gradient(DynamicCache(config=model.config)))
    cache = PagedCache(model.config, page_size=4)
    with torch.no_grad():
        model(batch["input_ids"][:, :6], past_key_values=cache)
    gradient(cache)
    assert cache.layers[0].keys.requires_grad is False


# -- the cache beside DynamicCache


def states_for(layer: int, rows: int, tokens: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    heads, key_dim, value_dim = ((2, 4, 3), (1, 2, 5))[layer]
    return torch.randn(rows, heads, tokens, key_dim).to(dtype), torch.randn(rows, heads, tokens, value_dim).to(dtype)


class BesideDynamic(RuleBasedStateMachine):
    """Random calls to both. Layers differ in shape, and may differ in length."""

    @initialize(page_size=st.integers(1, 5), num_pages=st.sampled_from([None, 12, 30]))
    def start(self, page_size, num_pages):
        torch.manual_seed(0)
        config = LlamaConfig(**GROUPED)
        self.paged, self.plain = PagedCache(config, page_size, num_pages), DynamicCache(config=config)

    @property
    def lengths(self):
        return [self.paged.get_seq_length(i) for i in range(2)]

    @property
    def rows(self):
        return self.plain.layers[0].keys.shape[0]

    def update(self, layers, rows, tokens):
        for layer in layers:
            keys, values = states_for(layer, rows, tokens)
            before = self.paged.memory.pool.used
            assert self.paged.get_mask_sizes(tokens, layer) == self.plain.get_mask_sizes(tokens, layer)
            try:
                got = self.paged.update(keys, values, layer)
            except CacheFull as error:
                assert self.paged.memory.pool.used == before
                assert f"num_pages={self.paged.memory.pool.num_pages}" in str(error)
                return
            expected = self.plain.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @precondition(lambda self: not max(self.lengths))
    @rule(rows=st.integers(1, 3), tokens=st.integers(1, 7))
    def prefill(self, rows, tokens):
        self.update((0, 1), rows, tokens)
        if 0 in self.lengths:
            self.reset()

    @precondition(lambda self: min(self.lengths))
    @rule(tokens=st.sampled_from([1, 1, 1, 3, 6]), layers=st.sampled_from([(0, 1), (0, 1), (1, 0), (0,), (1,)]))
    def forward(self, tokens, layers):
        if max(self.lengths) < 30:
            self.update(layers, self.rows, tokens)

    @precondition(lambda self: min(self.lengths))
    @rule(data=st.data(), name=st.sampled_from(["reorder_cache", "batch_select_indices"]))
    def select(self, data, name):
        size = self.rows if name == "reorder_cache" else data.draw(st.integers(1, 4))
        indices = torch.tensor(data.draw(st.lists(st.integers(0, self.rows - 1), min_size=size, max_size=size)))
        for cache in (self.paged, self.plain):
            getattr(cache, name)(indices)

    @precondition(lambda self: min(self.lengths) and self.rows <= 4)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        used = self.paged.memory.pool.used
        for cache in (self.paged, self.plain):
            cache.batch_repeat_interleave(repeats)
        assert self.paged.memory.pool.used == used

    @precondition(lambda self: min(self.lengths))
    @rule(data=st.data())
    def crop(self, data):
        removed = data.draw(st.integers(0, min(self.lengths) - 1))
        for cache in (self.paged, self.plain):
            cache.crop(-removed)

    @rule(how=st.sampled_from([copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]))
    def copied(self, how):
        old, self.paged = self.paged, how(self.paged)
        old.close()
        assert old.memory.pool.used == 0

    @rule()
    def reset(self):
        self.paged.reset()
        self.plain = DynamicCache(config=LlamaConfig(**GROUPED))

    @invariant()
    def same(self):
        if not hasattr(self, "paged"):
            return
        self.paged.check()
        assert self.lengths == [self.plain.get_seq_length(i) for i in range(2)]
        if not max(self.lengths):
            assert self.paged.memory.pool.used == 0 or self.paged.tables.length
            return
        for ours, theirs in zip(dense(self.paged), dense(self.plain), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


BesideDynamic.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_beside_dynamic_cache = BesideDynamic.TestCase


def test_a_layer_that_lags_behind_rows_that_share_pages():
    """Its slots lie on pages that are shared and that the other layer has filled: they are copied all the same."""
    config = LlamaConfig(**GROUPED)
    paged, plain = PagedCache(config, page_size=4), DynamicCache(config=config)
    for layer, tokens in ((0, 11), (1, 2), (None, 0), (1, 7), (0, 2), (1, 6)):
        if layer is None:
            for cache in (paged, plain):
                cache.batch_repeat_interleave(2)
            continue
        states = states_for(layer, 2 if paged.batch_size < 3 else 4, tokens)
        for cache in (paged, plain):
            cache.update(*states, layer)
        paged.check()
        for ours, theirs in zip(dense(paged)[: layer + 1], dense(plain), strict=False):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_windows_beside_dynamic_cache():
    """A windowed layer gives back what the default one does, and can still be cropped anywhere."""
    config = transformers.MistralConfig(**GROUPED | dict(sliding_window=5))
    paged, plain = PagedCache(config, page_size=2), DynamicCache(config=config)
    assert paged.is_sliding == plain.is_sliding == [True, True]
    for tokens in (3, 1, 1, 1, 1, 4, 7, 1):
        assert paged.get_mask_sizes(tokens, 0) == plain.get_mask_sizes(tokens, 0)
        states = torch.randn(2, 2, tokens, 8)
        for layer in range(2):
            ours, theirs = paged.update(states, states, layer), plain.update(states, states, layer)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    stored = paged.layers[0].keys
    assert stored.shape[2] == 19
    paged.crop(-12)
    assert torch.equal(paged.layers[0].keys, stored[:, :, :7])
    paged.check()


def test_crop_takes_counts_and_lengths():
    cache = PagedCache(LlamaConfig(**GROUPED), page_size=4)
    cache.crop(-3)  # nothing stored: nothing to do
    cache.update(*states_for(0, 2, 10), 0)
    for count, length in ((0, 10), (-1, 9), (20, 9), (6, 6), (-2, 4), (-9, 0)):
        cache.crop(count)
        cache.check()
        assert (cache.get_seq_length(), cache.memory.pool.used) == (length, 2 * -(-length // 4))
    cache.update(*states_for(0, 3, 2), 0)  # an emptied cache takes another batch size
    assert cache.batch_size == 3


def test_dtypes_are_promoted_like_joined_tensors():
    config = LlamaConfig(**GROUPED)
    paged, plain = PagedCache(config, page_size=4), DynamicCache(config=config)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16):
        states = states_for(0, 2, 3, dtype)
        for ours, theirs in zip(paged.update(*states, 0), plain.update(*states, 0), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_states_without_heads():
    paged, plain = (make(config=LlamaConfig(**GROUPED)) for make in (PagedCache, DynamicCache))
    for tokens in (5, 1):
        states = torch.randn(2, tokens, 8)
        for ours, theirs in zip(paged.update(states, states, 0), plain.update(states, states, 0), strict=True):
            assert torch.equal(ours, theirs)


def test_facts_transformers_asks_for():
    config = LlamaConfig(**GROUPED)
    cache = PagedCache(config, page_size=4)
    assert isinstance(cache, transformers.Cache) and len(cache) == 2 and not cache.is_initialized
    assert not cache.is_compileable and cache.is_croppable
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert (cache.get_seq_length(), cache.get_mask_sizes(3, 0), cache.batch_size) == (0, (3, 0), -1)
    assert [keys for keys, _, _ in cache] == [None, None]
    cache.activate_past_recording()
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    for layer in range(2):
        cache.update(*(torch.randn(2, 2, 5, 8) for _ in "kv"), layer)
    cache.check()
    rebuilt = DynamicCache(list(cache))
    assert torch.equal(rebuilt.layers[1].values, cache.layers[1].values)
    assert "pages=4" in repr(cache)
    assert cache.kv_bytes == 4 * 2 * (2 * 2 * 4 * 8) * 4 and cache.waste() == pytest.approx(1 - 5 / 8)
    with pytest.raises(NotImplementedError, match="the cache"):
        cache.layers[0].reorder_cache(torch.tensor([0, 0]))


# -- pages


def test_reordering_copies_tail_pages_only(monkeypatch):
    cache = PagedCache(LlamaConfig(**GROUPED), page_size=4)
    copied = []
    for layer in cache.layers:
        plain = layer.copy_pages
        monkeypatch.setattr(layer, "copy_pages", lambda c, plain=plain: (copied.extend(c), plain(c)))

    def step(tokens=1):
        copied.clear()
        for layer in range(2):
            cache.update(*(torch.randn(4, 2, tokens, 8) for _ in "kv"), layer)
        return len(copied) // 2

    step(10)
    pool = cache.memory.pool
    assert pool.used == 4 * 3
    cache.reorder_cache(torch.tensor([0, 0, 0, 2]))
    assert pool.used == 2 * 3  # rows 1 and 3 are gone, row 0 is shared by three
    assert step() == 2  # two of the three copy the tail page, the third keeps it
    assert pool.used == 2 * 2 + 4
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))  # a permutation
    assert step() == 0 and pool.used == 2 * 2 + 4
    cache.reorder_cache(torch.tensor([1, 1, 1, 1]))  # at a page's end: nothing to copy
    assert pool.used == 3 and step() == 0 and pool.used == 3 + 4
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert pool.used == 3 + 2
    cache.check()
    cache.reset()
    assert pool.used == 0


def test_beams_share_pages(model):
    prompt = prompts_of(64)[0]
    _, cache = assert_same(model, input_ids=prompt, max_new_tokens=4, num_beams=4)
    assert cache.memory.pool.used <= 64 // 4 + 4
    assert cache.waste() < 0.1


def test_full_pool(model):
    prompt = prompts_of(9, 9)
    batch = {"input_ids": torch.cat(prompt)}
    cache = PagedCache(model.config, page_size=4, num_pages=8)
    with pytest.raises(CacheFull, match=r"2 rows of 17 tokens need 2 more pages of 4 tokens, 0 of num_pages=8"):
        model.generate(**batch, max_new_tokens=12, past_key_values=cache)
    cache.check()
    assert (cache.memory.pool.free, cache.get_seq_length()) == (0, 16)
    cache.crop(9 - 16)
    cache.crop(-1)
    ids = model.generate(**batch, max_new_tokens=6, past_key_values=cache)
    assert ids.tolist() == model.generate(**batch, max_new_tokens=6).tolist()
    small = PagedCache(model.config, page_size=4, num_pages=2)
    with pytest.raises(CacheFull):
        model.generate(**batch, max_new_tokens=2, past_key_values=small)
    small.check()
    assert small.memory.pool.free == 2 and small.get_seq_length() == 0


def test_a_forward_that_fails_loses_no_page(model, batch, monkeypatch):
    cache = PagedCache(model.config, page_size=4)
    expected = model.generate(**batch, max_new_tokens=6)
    with monkeypatch.context() as broken:
        broken.setattr(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(**batch, max_new_tokens=6, past_key_values=cache)
    cache.check()
    cache.reset()
    assert cache.memory.pool.used == 0
    assert model.generate(**batch, max_new_tokens=6, past_key_values=cache).tolist() == expected.tolist()


# -- what is refused


@pytest.mark.parametrize(
    "kind, settings, reason",
    [
        ("Qwen3Next", {}, "linear_attention"),
        ("Jamba", {}, "linear_attention"),
        ("Bamba", {}, "linear_attention"),
        ("Lfm2", dict(full_attn_idxs=[1], num_hidden_layers=4), "conv"),
        ("FalconH1", {}, "hybrid"),
        ("Mamba", {}, "linear_attention"),
        ("Rwkv", {}, "state of its own"),
        ("RecurrentGemma", {}, ""),
        ("OpenAIGPT", {}, "past_key_values"),
    ],
)
def test_models_that_cannot_page(kind, settings, reason):
    config = getattr(transformers, kind + "Config")(**settings)
    assert reason in pageable(config) and config.model_type in pageable(config)
    with pytest.raises(ValueError, match=config.model_type):
        PagedCache(config)


@pytest.mark.parametrize(
    "settings",
    [dict(page_size=0), dict(page_size=257), dict(page_size=4.0), dict(page_size=True), dict(num_pages=0)]
    + [dict(num_pages="many")],
)
def test_bad_arguments(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}={settings[name]!r} is not allowed"):
        PagedCache(LlamaConfig(**GROUPED), **settings)


def test_not_a_config(model):
    with pytest.raises(ValueError, match="config"):
        PagedCache(object())
    assert isinstance(paged_cache_for(model), PagedCache)


def test_another_batch_size_is_refused():
    cache = PagedCache(LlamaConfig(**GROUPED))
    cache.update(*states_for(0, 2, 3), 0)
    with pytest.raises(ValueError, match="3 rows cannot follow 2 rows of 3 tokens"):
        cache.update(*states_for(0, 3, 1), 0)
    cache.check()
