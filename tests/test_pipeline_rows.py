"""`pipeline("text-generation")` with `cache_implementation="paged"`: one continuous batch, the default's results."""

import gc

import pytest
import torch
from conftest import MODELS, assert_clean, engine_of, tiny_llama
from datasets import Dataset
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, pipeline, set_seed
from transformers.pipelines.pt_utils import KeyDataset, PipelineIterator
from transformers.pipelines.text_generation import TextGenerationPipeline

import hf_paged
from hf_paged.integrations.inspect import PagedForward

TEXTS = ["def main():", "import os, sys\nprint(os)", "class A", "x = 1", "for i in range(10):\n    print", "", "a b c"]
GREEDY = dict(max_new_tokens=6, do_sample=False)
PAGED = dict(cache_implementation="paged")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"

pytestmark = pytest.mark.usefixtures("paged")


@pytest.fixture
def pipe(text_model, tokenizer):
    return pipeline("text-generation", model=text_model, tokenizer=tokenizer)


@pytest.fixture
def talk(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return [[{"role": "user", "content": text}] for text in ("What is a list?", "Sort it.", "Why?")]


def most_running(monkeypatch):
    """Rows of each step from now on."""
    seen, real = [], PagedForward.__call__
    monkeypatch.setattr(
        PagedForward, "__call__", lambda self, plan: (seen.append(len(plan.logits_at)), real(self, plan))[1]
    )
    return seen


OPTIONS = [
    {},
    {"return_full_text": False},
    {"return_tensors": True},
    {"return_full_text": False, "skip_special_tokens": False},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"max_new_tokens": None, "max_length": 24},
    {"stop_sequence": "a"},
    {"num_beams": 2, "num_return_sequences": 2},
    {"prefix": "# "},
    {"handle_long_generation": "hole"},
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_lists_datasets_and_generators_equal_the_default(pipe, size, options):
    texts = TEXTS if size == 1 else [text for text in TEXTS if text]
    arguments = GREEDY | options | {"batch_size": size}
    wanted = pipe(texts, **arguments)
    data = KeyDataset(Dataset.from_dict({"text": texts}), "text")
    assert pipe(texts, **arguments, **PAGED) == wanted
    assert list(pipe(data, **arguments, **PAGED)) == wanted
    assert list(pipe((text for text in texts), **arguments, **PAGED)) == wanted
    if "num_beams" not in options:
        assert_clean(pipe.model)


def test_all_rows_run_together(pipe, monkeypatch):
    wanted = pipe(TEXTS, **GREEDY)
    running = most_running(monkeypatch)
    assert pipe(TEXTS, **GREEDY, batch_size=2, **PAGED) == wanted
    assert max(running) == len(TEXTS)


def test_padding_of_static_batches_is_not_there(pipe):
    """Each row is what it is alone, where batches of the default cache would have padded it."""
    for options in ({"max_length": 24, "max_new_tokens": None}, {"return_tensors": True}):
        alone = [pipe(text, **GREEDY | options) for text in TEXTS]
        assert pipe(TEXTS, **GREEDY | options, **PAGED) == alone


def test_chats(pipe, talk):
    for given in (talk[0], talk, tuple(talk)):
        assert pipe(given, **GREEDY, **PAGED) == pipe(given, **GREEDY)
    wanted = pipe(talk, **GREEDY)
    assert list(pipe((chat for chat in talk), **GREEDY, **PAGED)) == wanted
    data = KeyDataset(Dataset.from_dict({"chat": talk}), "chat")
    assert list(pipe(data, **GREEDY, **PAGED)) == list(pipe(data, **GREEDY))


def test_sampling_depends_on_the_seed_and_not_on_batches(pipe):
    arguments = dict(max_new_tokens=6, do_sample=True, temperature=1.2, num_return_sequences=2, **PAGED)
    results = []
    for size, extra in ((1, {}), (3, {}), (1, {"cache_config": {"max_sequences": 2}})):
        set_seed(7)
        results.append(pipe(TEXTS, **arguments, batch_size=size, **extra))
    set_seed(7)
    stream = []
    for row in pipe((text for text in TEXTS), **arguments):
        torch.rand(3)  # what others draw meanwhile does not matter
        stream.append(row)
    assert results[0] == results[1] == results[2] == stream
    assert len({str(row) for row in results[0][0]}) == 2
    set_seed(7)
    assert pipe(TEXTS[0], **arguments) == results[0][0]
    set_seed(8)
    assert pipe(TEXTS, **arguments) != results[0]


def test_the_door_may_stand_in_a_configuration(text_model, tokenizer, monkeypatch):
    wanted = pipeline("text-generation", model=text_model, tokenizer=tokenizer)(TEXTS, **GREEDY)
    running = most_running(monkeypatch)
    given = pipeline("text-generation", model=text_model, tokenizer=tokenizer, **GREEDY, **PAGED)
    assert given(TEXTS) == wanted and max(running) == len(TEXTS)
    running.clear()
    config = GenerationConfig(**GREEDY, **PAGED, pad_token_id=1)
    plain = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
    assert plain(TEXTS, generation_config=config) == wanted and max(running) == len(TEXTS)
    assert config.cache_implementation == "paged"
    running.clear()
    text_model.generation_config.cache_implementation = "paged"
    plain = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
    assert plain(TEXTS, **GREEDY) == wanted and max(running) == len(TEXTS)
    assert text_model.generation_config.cache_implementation == "paged"


@pytest.mark.parametrize("given", [{"method": "draft", "adaptive": False}, None])
def test_assistant_model(text_model, tokenizer, given):
    draft = tiny_llama(seed=5, vocab_size=4096, num_hidden_layers=1)
    plain = pipeline("text-generation", model=text_model, tokenizer=tokenizer)(TEXTS, **GREEDY)
    pipe = pipeline("text-generation", model=text_model, tokenizer=tokenizer, assistant_model=draft)
    assert pipe(TEXTS, **GREEDY, **PAGED, speculation=given) == plain
    engine = engine_of(text_model)
    assert [drafter.name for drafter in engine.core.drafting.drafters]
    assert (engine.speculation_stats().proposed > 0) or given is None


def test_prompt_lookup(pipe):
    texts = [text * 3 for text in TEXTS]
    wanted = pipe(texts, **GREEDY)
    assert pipe(texts, **GREEDY, batch_size=3, prompt_lookup_num_tokens=3, **PAGED) == wanted
    assert [config.method for config, _ in engine_of(pipe.model).core.drafting.speculators] == ["lookup"]


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([len(row) % 5 == 0 for row in input_ids])


def test_what_sees_a_batch_gets_batches(pipe, ways):
    texts = ["def main():"] * 3
    criteria = StoppingCriteriaList([Stop()])
    wanted = pipe(texts, **GREEDY, batch_size=3, stopping_criteria=criteria)
    ways.caplog.clear()
    assert pipe(texts, **GREEDY, batch_size=3, stopping_criteria=criteria, **PAGED) == wanted
    assert any("batch by batch: stopping_criteria is given" in r.getMessage() for r in ways.caplog.records)


def test_results_come_in_order_while_rows_are_read(pipe):
    """No more than the window is read ahead of what runs, and it is refilled."""
    read = []

    def rows():
        for text in TEXTS:
            read.append(text)
            yield text

    results = pipe(rows(), **GREEDY, **PAGED, cache_config={"max_sequences": 2, "check": True})
    assert isinstance(results, PipelineIterator)
    first = next(iter(results))
    assert first == pipe(TEXTS[0], **GREEDY) and len(read) < len(TEXTS)
    assert list(results) and read == TEXTS


def test_a_dataset_is_read_anew(pipe):
    data = KeyDataset(Dataset.from_dict({"text": TEXTS}), "text")
    results = pipe(data, **GREEDY, **PAGED)
    assert len(results) == len(TEXTS)
    assert list(results) == list(results) == pipe(TEXTS, **GREEDY)


def test_closing_cancels_what_is_in_flight(pipe):
    results = pipe((text for text in TEXTS * 5), **GREEDY, **PAGED)
    next(results)
    assert engine_of(pipe.model).core.busy
    results.close()
    assert_clean(pipe.model)
    assert list(results.iterator) == []
    results = pipe((text for text in TEXTS * 5), **GREEDY, **PAGED)
    next(results)
    del results
    gc.collect()
    assert_clean(pipe.model)


def test_a_row_that_fails_fails_alone(pipe):
    """As with the default: rows before it are given, its error is raised, and the next call goes on behind it."""
    texts = ["x = 1", 17, "y = 2", "class A"]
    data = KeyDataset(Dataset.from_dict({"text": [1, 2, 3, 4]}), "text")
    data.__class__ = type("Texts", (KeyDataset,), {"__getitem__": lambda self, i: texts[i]})

    def collect(**extra):
        found, results = [], iter(pipe(data, **GREEDY, **extra))
        while True:
            try:
                found.append(next(results))
            except StopIteration:
                return found
            except Exception as error:
                found.append((type(error), str(error)))

    wanted = collect()
    assert isinstance(wanted[1], tuple) and len(wanted) == 4
    assert collect(**PAGED) == wanted
    assert_clean(pipe.model)
    with pytest.raises(wanted[1][0]):
        pipe(texts, **GREEDY, **PAGED)
    assert_clean(pipe.model)


def test_a_prompt_too_long_for_the_pool(pipe):
    texts = ["x = 1", "a b c d " * 40, "y = 2"]
    config = dict(num_pages=12, page_size=4, check=True)
    results = iter(pipe((text for text in texts), **GREEDY, **PAGED, cache_config=config))
    assert next(results) == pipe(texts[0], **GREEDY)
    with pytest.raises(ValueError, match="page"):
        next(results)
    assert next(results) == pipe(texts[2], **GREEDY)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_a_step(pipe, monkeypatch, kind):
    pipe(TEXTS, **GREEDY, **PAGED)
    engine_of(pipe.model).core.stepper = None  # see test_few_steps.py
    calls, real = [], PagedForward.__call__

    def forward(self, plan):
        calls.append(plan)
        if len(calls) == 3:
            raise kind("here")
        return real(self, plan)

    monkeypatch.setattr(PagedForward, "__call__", forward)
    with pytest.raises(kind, match="here"):
        pipe(TEXTS, **GREEDY, **PAGED)
    assert_clean(pipe.model)
    monkeypatch.setattr(PagedForward, "__call__", real)
    assert pipe(TEXTS, **GREEDY, **PAGED) == pipe(TEXTS, **GREEDY)


def test_a_model_that_the_engine_cannot_drive(pipe, monkeypatch):
    """Rows run in transformers' loop as they are asked for; none is read that need not be."""
    monkeypatch.setattr("hf_paged.integrations.generate._why_not_on", lambda *given: "it is a test")
    read, wanted = [], pipe(TEXTS, **GREEDY)
    results = iter(pipe((read.append(text) or text for text in TEXTS), **GREEDY, **PAGED))
    assert next(results) == wanted[0] and len(read) <= 2
    assert [next(results) for _ in wanted[1:]] == wanted[1:]


def test_a_bad_setting_is_refused(pipe):
    with pytest.raises(ValueError, match="page_size"):
        pipe(TEXTS, **GREEDY, **PAGED, cache_config={"page_size": 0})


def test_disabled_nothing_is_left(pipe):
    assert "get_iterator" in vars(TextGenerationPipeline)
    hf_paged.disable()
    assert "get_iterator" not in vars(TextGenerationPipeline)
    hf_paged.enable()
    hf_paged.enable()
    hf_paged.disable()
    assert "get_iterator" not in vars(TextGenerationPipeline)


@pytest.mark.slow
def test_real_model_tokens_equal_those_of_static_batches():
    pipe = pipeline("text-generation", model=str(MODELS / "target"), dtype=torch.float32)
    texts = [f"Question: What is {i} + {i * 7 % 11}?\nAnswer:" for i in range(24)]
    arguments = dict(max_new_tokens=24, do_sample=False, batch_size=8)
    assert pipe(texts, **arguments, **PAGED) == pipe(texts, **arguments)
