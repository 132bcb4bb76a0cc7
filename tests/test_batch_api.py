"""transformers' batch API while hf_paged is enabled: same signatures and result types, tokens of `generate`."""

import asyncio
import copy
import gc
import inspect
import pickle
import queue
import threading
import weakref

import pytest
import torch
from conftest import assert_clean, engine_of, prompts_of, tiny_llama
from state_helpers import tiny_neox
from transformers import (
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
    GenerationMixin,
    set_seed,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

import hf_paged
from hf_paged.integrations.batching.doors import WRAPPERS
from hf_paged.integrations.batching.manager import BatchingManager
from hf_paged.integrations.inspect import PagedForward
from hf_paged.integrations.registry import REGISTRY

PROMPTS = [prompt[0].tolist() for prompt in prompts_of(5, 9, 3, 7, 5)]
TOKENS = 8
GREEDY = dict(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)

pytestmark = pytest.mark.usefixtures("paged")


def config(**settings):
    return GenerationConfig(**GREEDY | settings)


def alone(model, prompts=PROMPTS, **settings):
    """New tokens of each prompt, from `generate` without hf_paged."""
    given = config(**settings)
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for row in model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=given).tolist():
            row, ends = row[len(prompt) :], given.eos_token_id
            made.append(row[: row.index(ends) + 1] if ends in row else row)
    return made


def tokens(outputs):
    return [output.generated_tokens for output in outputs.values()]


@pytest.fixture
def manager(model):
    """Started, and stopped at the end."""
    made = model.init_continuous_batching(config())
    made.start()
    yield made
    made.destroy()


def released(model):
    """Nothing runs any more; what the manager made is gone."""
    assert engine_of(model) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_paged batching"]


# -- the same functions


@pytest.mark.parametrize("name", WRAPPERS)
def test_functions_take_what_theirs_take(model, name):
    ours = inspect.signature(getattr(type(model), name))
    written = WRAPPERS[name](lambda: None, {})
    theirs = inspect.signature(getattr(type(model), name)._hf_paged_original)
    assert list(inspect.signature(written).parameters) == list(theirs.parameters) == list(ours.parameters)
    for mine, other in zip(inspect.signature(written).parameters.values(), theirs.parameters.values(), strict=True):
        assert (mine.kind, mine.default) == (other.kind, other.default)


def test_a_manager_has_the_methods_of_theirs():
    internal = {"switch_to_cb_friendly_attn"}  # no attention is switched
    for name, theirs in vars(ContinuousBatchingManager).items():
        if not inspect.isfunction(theirs) or (name.startswith("_") and name != "__iter__") or name in internal:
            continue
        mine = inspect.signature(getattr(BatchingManager, name)).parameters
        assert [(p.name, p.kind, p.default) for p in mine.values()] == [
            (p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()
        ], name


def test_disabled_theirs_are_back(model):
    hf_paged.disable()
    assert not any(name in vars(GenerationMixin) for name in WRAPPERS)
    assert isinstance(model.init_continuous_batching(config()), ContinuousBatchingManager)


# -- generate_batch


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": 5},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": 5},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_tokens_are_those_of_generate(model, settings):
    wanted = alone(model, **settings)
    outputs = model.generate_batch(PROMPTS, generation_config=config(**settings))
    assert tokens(outputs) == wanted
    assert all(isinstance(output, GenerationOutput) for output in outputs.values())
    assert {output.status for output in outputs.values()} == {RequestStatus.FINISHED}
    assert [o.prompt_ids for o in outputs.values()] == [p for p in PROMPTS for _ in range(len(wanted) // len(PROMPTS))]
    released(model)


def test_sampling_is_that_of_generate(model):
    settings = dict(do_sample=True, temperature=1.3, top_k=20, num_return_sequences=3)
    set_seed(3)
    ids = torch.tensor([PROMPTS[0], PROMPTS[4]])
    wanted = model.generate(ids, generation_config=config(**settings), cache_implementation="paged")[:, 5:].tolist()
    set_seed(3)
    outputs = model.generate_batch([PROMPTS[0], PROMPTS[4]], generation_config=config(**settings))
    assert tokens(outputs) == wanted
    assert list(outputs)[:3] == ["req_0__child#0", "req_0__child#1", "req_0"]
    given = ContinuousBatchingConfig(seed=11, max_requests_per_batch=1)
    first = model.generate_batch(PROMPTS, config(**settings), given)
    again = model.generate_batch(PROMPTS, config(**settings), ContinuousBatchingConfig(seed=11))
    assert tokens(first) == tokens(again)


def test_arguments_are_honoured_or_refused(model):
    assert model.generate_batch([]) == {}
    model.generation_config.max_new_tokens = 3
    assert [len(row) for row in tokens(model.generate_batch(PROMPTS))] == [3] * 5
    assert tokens(model.generate_batch(PROMPTS, config(), max_new_tokens=4)) == alone(model, max_new_tokens=4)
    penalised = model.generate_batch(PROMPTS, config(), repetition_penalty=1.5)
    assert tokens(penalised) == alone(model, repetition_penalty=1.5)
    with pytest.raises(ValueError, match="colour"):
        model.generate_batch(PROMPTS, config(), colour="red")
    with pytest.raises(ValueError, match="input_ids='text'"):
        model.generate_batch(["text"], config())
    released(model)


def test_configuration_of_batching(model, caplog):
    size = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
    limits = {size: 8, "num_blocks": 20, "max_batch_tokens": 6, "max_requests_per_batch": 2}
    given = ContinuousBatchingConfig(**limits, return_logprobs=True)
    with model.continuous_batching_context_manager(config(), continuous_batching_config=given) as manager:
        manager.add_requests(PROMPTS)
        results = [manager.get_result() for _ in PROMPTS]
        engine = engine_of(model)
        chosen = engine.config
        assert (chosen.page_size, chosen.num_pages, chosen.max_batch_tokens, chosen.max_sequences) == (8, 20, 6, 2)
    assert sorted(r.generated_tokens for r in results) == sorted(alone(model))
    wanted = model.generate(
        torch.tensor([PROMPTS[0]]), generation_config=config(), output_scores=True, return_dict_in_generate=True
    )
    scores = [score[0].log_softmax(-1)[t].item() for score, t in zip(wanted.scores, alone(model)[0], strict=True)]
    first = next(r for r in results if r.request_id == "req_0")
    assert first.logprobs == pytest.approx(scores, abs=1e-4)
    caplog.clear()
    model.generate_batch(
        PROMPTS[:1], config(), ContinuousBatchingConfig(use_cuda_graph=True, scheduler_type="prefill_first")
    )
    assert any("no effect here: scheduler_type, use_cuda_graph" in r.getMessage() for r in caplog.records)
    with pytest.raises(ValueError, match="cpu_offload_space"):
        model.init_continuous_batching(config(), ContinuousBatchingConfig(cpu_offload_space=None))
    with pytest.raises(ValueError, match="max_batch_tokens"):
        model.init_continuous_batching(config(), ContinuousBatchingConfig(max_batch_tokens=-1))


def test_a_request_that_fails_fails_alone(model):
    prompts = [PROMPTS[0], [5, 1000], [], PROMPTS[1], [7] * 5000]
    outputs = model.generate_batch(prompts, config(num_return_sequences=2, do_sample=True))
    assert len(outputs) == 10
    good = [o for o in outputs.values() if o.prompt_ids in (PROMPTS[0], PROMPTS[1])]
    assert all(o.error is None and len(o.generated_tokens) == TOKENS for o in good) and len(good) == 4
    bad = [o for o in outputs.values() if o not in good]
    assert all(o.status is RequestStatus.FAILED and o.error for o in bad)
    released(model)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_loop_reaches_the_caller(model, monkeypatch, kind):
    def forward(self, plan):
        raise kind("here")

    model.generate_batch(PROMPTS, config())
    engine = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, cache_implementation="paged")
    engine, real = engine_of(model), PagedForward.__call__
    monkeypatch.setattr(PagedForward, "__call__", forward)
    with pytest.raises(kind, match="here"):
        model.generate_batch(PROMPTS, config())
    with model.continuous_batching_context_manager(config()) as manager:
        name = manager.add_request(PROMPTS[0])
        result = manager.get_result(name)
        assert result.status is RequestStatus.FAILED and "here" in result.error
        assert manager.get_result() is None and not manager.is_running()
        assert isinstance(manager.background_thread_status.fatal_error, kind)
        with pytest.raises(RuntimeError, match="here"):
            manager.add_request(PROMPTS[0])
        monkeypatch.setattr(PagedForward, "__call__", real)
        manager.start()
        assert manager.get_result(manager.add_request(PROMPTS[0])).generated_tokens == alone(model)[0]
    assert engine_of(model) is engine  # it was there before
    assert_clean(model)


def test_an_interrupt_of_the_caller_ends_all(model, monkeypatch):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchingManager, "get_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate_batch(PROMPTS, config(max_new_tokens=200))
    released(model)


# -- managers


def test_requests_with_settings_of_their_own(manager, model):
    wanted = alone(model)
    names = [
        manager.add_request(PROMPTS[0], max_new_tokens=3),
        manager.add_request(PROMPTS[1], request_id="mine", eos_token_id=[wanted[1][2], 98]),
        manager.add_request(PROMPTS[2]),
    ]
    assert names == ["req_0", "mine", "req_1"]
    found = {name: manager.get_result(name) for name in reversed(names)}  # in any order
    assert found["req_0"].generated_tokens == wanted[0][:3]
    assert found["mine"].generated_tokens == wanted[1][: wanted[1].index(wanted[1][2]) + 1]
    assert found["req_1"].generated_tokens == wanted[2]
    with pytest.raises(ValueError, match="per_request_processors"):
        manager.add_request(PROMPTS[0], temperature=0.5)
    with pytest.raises(ValueError, match="colour"):
        manager.add_request(PROMPTS[0], colour="red")


def test_sampling_of_a_request(model):
    given = ContinuousBatchingConfig(per_request_processors=True, seed=1)
    with model.continuous_batching_context_manager(config(do_sample=True), continuous_batching_config=given) as manager:
        one = manager.add_request(PROMPTS[0], top_k=1)
        other = manager.add_request(PROMPTS[0], temperature=5.0)
        assert manager.get_result(one).generated_tokens == alone(model)[0]
        assert manager.get_result(other).generated_tokens != alone(model)[0]
        for bad in ({"top_k": 1.5}, {"temperature": "hot"}, {"top_p": True}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                manager.add_request(PROMPTS[0], **bad)


def test_streaming(manager, model):
    wanted = alone(model)
    name = manager.add_request(PROMPTS[0], streaming=True, record_timestamps=True)
    other = manager.add_request(PROMPTS[1])
    seen = list(manager.request_id_iter(name))
    assert [o.generated_tokens for o in seen] == [wanted[0][: i + 1] for i in range(TOKENS)]
    assert [o.is_finished() for o in seen] == [False] * (TOKENS - 1) + [True]
    last = seen[-1]
    assert len(last.timestamps) == TOKENS and last.timestamps == sorted(last.timestamps)
    assert last.created_time <= last.lifespan[0] <= last.timestamps[0] <= last.timestamps[-1] <= last.lifespan[1]
    assert manager.get_result(other).generated_tokens == wanted[1]


def test_iteration_ends_with_the_loop(manager, model):
    manager.add_requests(PROMPTS)
    manager.stop(block=False)
    assert sorted(o.generated_tokens for o in manager) == sorted(alone(model))
    assert manager.get_result(timeout=0.01) is None


def test_handlers(manager, model):
    async def answers():
        loop, done, seen = asyncio.get_running_loop(), asyncio.Event(), []

        def handle(output):
            assert asyncio.get_running_loop() is loop
            seen.append(output)
            if output.is_finished():
                done.set()

        manager.register_result_handler("a", handle)
        manager.add_request(PROMPTS[0], request_id="a", streaming=True)
        await asyncio.wait_for(done.wait(), 60)
        return seen

    seen = asyncio.run(answers())
    assert seen[-1].generated_tokens == alone(model)[0] and len(seen) == TOKENS
    assert manager.get_result(timeout=0.01) is None


def test_a_handler_that_comes_late(manager, model):
    async def answer():
        manager.add_request(PROMPTS[0], request_id="a")
        manager.get_result(manager.add_request(PROMPTS[1]))  # the other has ended too, or will
        seen = asyncio.get_running_loop().create_future()
        manager.register_result_handler("a", seen.set_result)
        return await asyncio.wait_for(seen, 60)

    assert asyncio.run(answer()).generated_tokens == alone(model)[0]


def test_the_server_of_transformers(text_model, tokenizer):
    """What `transformers serve --continuous-batching` does with a model, without the server."""
    serving = pytest.importorskip("transformers.cli.serving.utils")
    ids = tokenizer("def main():")["input_ids"]
    given = config(eos_token_id=0, pad_token_id=1)
    (wanted,) = alone(text_model, [ids], eos_token_id=0, pad_token_id=1)
    service = serving.CBGenerateManager()
    service.init_cb(text_model, given)
    inputs = {"input_ids": ids}

    async def answers():
        text, length, found = await service.generate_non_streaming(text_model, tokenizer, inputs, given, "one")
        assert (text, length, found) == (tokenizer.decode(wanted), len(ids), wanted)
        pieces, streamer = service.generate_streaming(text_model, tokenizer, inputs, given, "two")
        parts = []
        while (part := await asyncio.wait_for(pieces.get(), 60)) is not None:
            parts.append(part)
        return "".join(parts), streamer.total_tokens

    text, count = asyncio.run(answers())
    assert count == len(wanted) and tokenizer.decode(wanted).startswith(text) and text
    assert service.is_alive() and isinstance(service._cb, BatchingManager)
    service.stop()
    released(text_model)


def test_a_handler_whose_event_loop_is_closed_harms_nobody(manager, model):
    async def register():
        manager.register_result_handler("a", lambda output: None)

    asyncio.run(register())
    manager.add_request(PROMPTS[0], request_id="a")
    assert manager.get_result(manager.add_request(PROMPTS[1])).generated_tokens == alone(model)[1]


def test_cancelling(manager, model):
    with manager.pause():
        name = manager.add_request(PROMPTS[0])
        manager.cancel_request(name)
        manager.cancel_request("nobody")
    assert "cancelled" in manager.get_result(name).error
    long = manager.add_request(PROMPTS[0], max_new_tokens=200, streaming=True)
    first = manager.get_result(long)
    manager.cancel_request(long)
    last = list(manager.request_id_iter(long))[-1]
    assert last.status is RequestStatus.FAILED and "cancelled" in last.error
    assert last.generated_tokens[: len(first.generated_tokens)] == first.generated_tokens
    assert manager.get_result(manager.add_request(PROMPTS[1])).generated_tokens == alone(model)[1]
    assert_clean(model)


def test_pause(manager, model):
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, cache_implementation="paged")
    with manager.pause():
        name = manager.add_request(PROMPTS[0])
        assert manager.get_result(name, timeout=0.05) is None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        with pytest.raises(RuntimeError, match="inside a pause"):
            manager.stop()
    assert manager.get_result(name).generated_tokens == alone(model)[0]
    manager.stop()
    with pytest.raises(RuntimeError, match="Cannot pause"):
        manager.pause()


def test_stopping(model):
    manager = model.init_continuous_batching(config(max_new_tokens=100))
    manager.stop()  # was not started: nothing happens
    early = manager.add_request(PROMPTS[0])
    assert manager.get_result(timeout=0.01) is None
    manager.start()
    manager.start()
    assert len(manager.get_result(early).generated_tokens) == 100
    names = manager.add_requests(PROMPTS, max_new_tokens=200)
    manager.stop(hard_stop=True)
    results = [manager.get_result(name) for name in names]
    assert all(r.status is RequestStatus.FAILED and "stopped" in r.error for r in results)
    with pytest.raises(RuntimeError, match="stopped"):
        manager.add_request(PROMPTS[0])
    manager.join(0.0)
    manager.destroy()
    manager.destroy()
    released(model)


def test_a_full_queue(model, monkeypatch):
    monkeypatch.setattr("hf_paged.integrations.batching.manager.QUEUE_SECONDS", 0.05)
    manager = model.init_continuous_batching(config(), ContinuousBatchingConfig(max_queue_size=2))
    manager.add_requests(PROMPTS[:2])
    with pytest.raises(queue.Full):
        manager.add_request(PROMPTS[2])
    with pytest.raises(ValueError, match="req_0"):
        manager.add_request(PROMPTS[2], request_id="req_0")


def test_a_kept_manager(model):
    wanted = alone(model)
    assert tokens(model.generate_batch(PROMPTS, config(), persistent_manager=True)) == wanted
    kept = model._cached_continuous_batching_manager
    assert isinstance(kept, BatchingManager) and engine_of(model) is not None
    assert model.init_continuous_batching() is kept
    again = model.generate_batch(PROMPTS, config(max_new_tokens=4), persistent_manager=True)
    assert tokens(again) == [row[:4] for row in wanted]
    assert engine_of(model).stats().cached_tokens > 0
    with pytest.raises(ValueError, match="destroy_cached"):
        model.init_continuous_batching(config(), ContinuousBatchingConfig(seed=3))
    assert getattr(copy.deepcopy(model), "_cached_continuous_batching_manager", None) is None
    assert getattr(pickle.loads(pickle.dumps(model)), "_cached_continuous_batching_manager", None) is None
    assert_clean(model)
    model.destroy_cached_continuous_batching_manager()
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_a_kept_manager_goes_with_its_model():
    model = tiny_llama()
    model.generate_batch(PROMPTS, config(), persistent_manager=True)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


def test_kv_memory_is_free_when_the_manager_stops(model, monkeypatch):
    made, real = [], REGISTRY.engine_for
    monkeypatch.setattr(
        REGISTRY, "engine_for", lambda *given: (engine := real(*given), made.append(weakref.ref(engine.store)))[0]
    )
    gc.disable()
    try:
        model.generate_batch(PROMPTS, config())
        assert made and all(store() is None for store in made)
    finally:
        gc.enable()


def test_beside_generate(manager, model):
    """Both use one engine, and its batches."""
    names = manager.add_requests(PROMPTS)
    ids = torch.tensor([PROMPTS[0]])
    rows = model.generate(ids, generation_config=config(), cache_implementation="paged")[:, 5:].tolist()
    assert rows == alone(model)[:1]
    assert [manager.get_result(name).generated_tokens for name in names] == alone(model)


def test_nobody_holds_the_manager():
    model = tiny_llama()
    manager = model.init_continuous_batching(config())
    manager.start()
    assert manager.get_result(manager.add_request(PROMPTS[0])) is not None
    thread, ref = manager._loop.thread, weakref.ref(model)
    del model  # the manager keeps it
    gc.collect()
    assert manager.get_result(manager.add_request(PROMPTS[1])).error is None
    del manager
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    gc.collect()
    assert ref() is None


def test_a_model_with_modules_forward():
    model = tiny_neox()
    assert tokens(model.generate_batch(PROMPTS, config())) == alone(model)
    assert not model.training


def test_a_model_in_training_is_as_found(model):
    model.train()
    wanted = tokens(model.generate_batch(PROMPTS, config()))
    assert model.training
    assert wanted == alone(model.eval())


def test_weights_that_change_between_calls(model):
    """The engine outlives the calls here, and its tree holds the very prompts."""
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, cache_implementation="paged")
    engine, seen = engine_of(model), []
    for _ in range(3):
        seen.append(tokens(model.generate_batch(PROMPTS, config())))
        assert seen[-1] == alone(model) and engine_of(model) is engine
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2)
    assert seen[0] != seen[1] != seen[2]
