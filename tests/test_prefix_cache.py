"""Prefixes shared through the engine core: computed once, never wrong, never leaked."""

import random
from contextlib import suppress

import pytest
import torch
from engine_helpers import (
    GREEDY,
    POISON,
    assert_as_alone,
    assert_finite,
    assert_idle,
    fail,
    prompts,
    run,
    tokens_of,
    toy_core,
)

from hf_paged.memory import Memory, PageCopy
from hf_paged.ordering import depth_first
from hf_paged.params import SamplingParams
from hf_paged.scoring import Scoring
from hf_paged.store import KVStore, LayerShape
from hf_paged.tier_host import HostTier

(HEADER,) = prompts(41, seed=5)


def greedy(max_tokens=4, **rest):
    return SamplingParams(**GREEDY, max_tokens=max_tokens, **rest)


def computed(core, tokens, **rest):
    """Prompt tokens that are computed for one more request."""
    before = core.stats().prompt_tokens
    request = core.submit(tokens, greedy(**rest), seed=0)
    run(core)
    assert_as_alone([request])
    return core.stats().prompt_tokens - before


@pytest.mark.parametrize("length", [2, 3, 4, 10, 33])
@pytest.mark.parametrize("budget", [3, 64])
def test_equal_prompts_cost_one_prefill(length, budget):
    core = toy_core(prefix_caching=True, max_batch_tokens=budget)
    requests = [core.submit(HEADER[:length], greedy(), seed=0) for _ in range(6)]
    run(core)
    assert core.stats().prompt_tokens == length + 5
    assert_as_alone(requests)
    assert_idle(core)


@pytest.mark.parametrize("budget", [5, 16, 64])
def test_a_header_is_computed_once(budget):
    core = toy_core(prefix_caching=True, max_batch_tokens=budget, track_optimum=True)
    texts = [HEADER + tail for tail in prompts(*range(3, 10), seed=1)]
    requests = [core.submit(text, greedy(), seed=0) for text in texts]
    run(core)
    stats = core.stats()
    assert stats.prompt_tokens + stats.cached_tokens == sum(map(len, texts))
    # Rows admitted together may have a token more in common than is worth waiting for.
    assert stats.optimal_tokens - 3 <= stats.cached_tokens <= stats.optimal_tokens >= 6 * len(HEADER)
    assert sum(request.metrics.cached_tokens for request in requests) == stats.cached_tokens
    assert_as_alone(requests)


def test_rows_wait_for_pages_and_not_for_the_request():
    core = toy_core(prefix_caching=True, max_batch_tokens=30, page_size=4)
    first = core.submit(HEADER, greedy(), seed=0)
    second = core.submit([*HEADER[:12], 1, 2], greedy(), seed=0)
    core.step()
    assert second.rows[0].sequence is None and not first.rows[0].output_ids
    core.step()
    assert second.rows[0].output_ids, "it began before the first was done"
    run(core)
    assert second.metrics.cached_tokens >= 12
    assert_as_alone([first, second])


def test_a_request_finds_its_own_output():
    core = toy_core(prefix_caching=True)
    request = core.submit(HEADER, greedy(9), seed=0)
    run(core)
    assert computed(core, [*HEADER, *request.rows[0].output_ids, 3, 4]) == 3  # its last token has no KV


def test_a_match_inside_a_page_copies_one_page():
    core = toy_core(prefix_caching=True, page_size=8)
    computed(core, HEADER)
    copies = []
    original = core.store.copy
    core.store.copy = lambda found: (copies.extend(found), original(found))
    assert computed(core, [*HEADER[:21], 19, 19]) == 2
    assert len(copies) == 1


def test_nothing_is_shared_across_salts():
    core = toy_core(prefix_caching=True)
    assert computed(core, HEADER, cache_salt="a") == len(HEADER)
    assert computed(core, HEADER, cache_salt="b") == computed(core, HEADER) == len(HEADER)
    assert computed(core, HEADER, cache_salt="a") == 1
    both = [core.submit(HEADER[:20] + [1], greedy(cache_salt=salt), seed=0) for salt in "cd"]
    run(core)
    assert [request.metrics.cached_tokens for request in both] == [0, 0]


def test_a_request_may_keep_out_of_it():
    core = toy_core(prefix_caching=True)
    assert computed(core, HEADER, prefix_caching=False) == computed(core, HEADER) == len(HEADER)
    assert computed(core, HEADER, prefix_caching=False) == len(HEADER)
    off = toy_core()
    assert computed(off, HEADER) == computed(off, HEADER, prefix_caching=True) == len(HEADER)


def test_logprobs_of_a_prompt_are_computed():
    core = toy_core(prefix_caching=True)
    computed(core, HEADER)
    request = core.submit(HEADER, greedy(prompt_logprobs=1), seed=0)
    run(core)
    assert request.metrics.cached_tokens == 0 and len(request.prompt_logprobs) == len(HEADER)
    assert_as_alone([request])


def test_a_row_that_was_preempted_resumes_on_what_was_kept():
    core = toy_core(num_pages=14, prefix_caching=True)
    requests = [core.submit(text, greedy(20), seed=0) for text in prompts(9, 11, 10)]
    run(core)
    assert core.stats().preemptions > 0
    assert_as_alone(requests)
    assert_idle(core)


def test_two_go_different_ways_in_one_step():
    core = toy_core(prefix_caching=True, page_size=8)
    computed(core, HEADER[:21])
    requests = [core.submit([*HEADER[:20], tail, 5, 6], greedy(), seed=0) for tail in (1, 2)]
    core.step()
    assert all(request.rows[0].output_ids for request in requests)
    run(core)
    assert_as_alone(requests)


def test_a_pool_of_pinned_pages():
    core = toy_core(num_pages=6, prefix_caching=True)
    long = core.submit(HEADER[:12], greedy(12), seed=0)
    while len(long.rows[0].sequence.pages if long.rows[0].sequence else ()) < 5:
        core.step()
    late = core.submit(HEADER[20:34], greedy(), seed=0)
    core.step()
    assert late.rows[0].sequence is None and long.rows[0].sequence is not None
    run(core)
    assert_as_alone([long, late])
    assert_idle(core)


def test_the_first_is_cancelled_while_others_wait_for_its_prefill():
    core = toy_core(prefix_caching=True, max_batch_tokens=8)
    requests = [core.submit(HEADER, greedy(), seed=0, request_id=str(i)) for i in range(3)]
    core.step()
    assert [request.rows[0].sequence is None for request in requests] == [False, True, True]
    core.cancel("0")
    run(core)
    assert core.stats().prompt_tokens == len(HEADER) + 1  # what it had computed is kept
    assert_as_alone(requests[1:])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_that_raises_in_a_shared_prefill(error):
    core = toy_core(prefix_caching=True, max_batch_tokens=8)
    requests = [core.submit(HEADER, greedy(), seed=0) for _ in range(3)]
    core.step()

    def fail(plan):
        raise error

    core.forward.before = fail
    with pytest.raises(error):
        core.step()
    core.forward.before = None
    run(core)
    assert_as_alone(requests)
    assert_idle(core)


def test_numbers_that_are_not_finite_leave_the_tree():
    core = toy_core(prefix_caching=True)
    bad = [*HEADER[:10], POISON, *HEADER[10:20]]
    requests = [core.submit(bad, greedy(), seed=0) for _ in range(3)]
    good = core.submit(HEADER, greedy(), seed=0)
    run(core)
    assert all(request.error is not None for request in requests)
    assert_as_alone([good])
    assert_idle(core)


def test_a_processor_that_raises_ends_its_request_alone():
    def fail(ids, scores):
        raise RuntimeError("on purpose")

    core = toy_core(prefix_caching=True)
    requests = [core.submit(HEADER, greedy(), seed=0) for _ in range(2)]
    broken = core.submit(HEADER, greedy(logits_processors=(fail,)), seed=0)
    run(core)
    assert broken.error is not None
    assert_as_alone(requests)
    assert_idle(core)


def test_forgetting_makes_rows_compute_again():
    core = toy_core(prefix_caching=True)
    request = core.submit(HEADER, greedy(8), seed=0)
    for _ in range(3):
        core.step()
    core.forget()
    run(core)
    assert core.stats().prompt_tokens > 2 * len(HEADER)
    assert_as_alone([request])
    assert computed(core, HEADER) == 1, "what was computed after it is kept"
    core.forget()
    assert computed(core, HEADER) == len(HEADER)


def test_a_small_pool_serves_a_list_depth_first():
    rng = random.Random(0)
    headers = [[rng.randrange(20) for _ in range(24)] for _ in range(5)]
    texts = [header + [rng.randrange(20) for _ in range(6)] for header in headers for _ in range(6)]
    rng.shuffle(texts)
    core = toy_core(num_pages=16, max_sequences=2, prefix_caching=True, track_optimum=True)
    requests = [core.submit(text, greedy(1), seed=0) for text in texts]
    core.arrange(requests)
    run(core)
    stats = core.stats()
    assert stats.evictions > 0 and stats.cached_tokens >= 0.98 * stats.optimal_tokens
    assert_as_alone(requests)


def test_depth_first_is_an_order_in_which_no_prefix_comes_back():
    rng = random.Random(1)
    for _ in range(50):
        stems = [[rng.randrange(3) for _ in range(8)] for _ in range(3)]
        texts = [rng.choice(stems) + [rng.randrange(3) for _ in range(rng.randrange(1, 9))] for _ in range(12)]
        order = depth_first(texts, [rng.randrange(9) for _ in texts], [0] * len(texts), 4)
        assert sorted(order) == list(range(len(texts)))
        for page in {tuple(text[:8]) for text in texts}:
            places = [at for at, i in enumerate(order) if tuple(texts[i][:8]) == page]
            assert places[-1] - places[0] == len(places) - 1


def test_the_longest_prefix_goes_first_but_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr("hf_paged.supply.OVERTAKEN", 40)
    core = toy_core(prefix_caching=True, max_sequences=1)
    computed(core, HEADER)
    cold = core.submit(HEADER[::-1], greedy(1), seed=0)
    warm = [core.submit([*HEADER, i % 20], greedy(1), seed=0) for i in range(80)]
    run(core)
    ends = sorted([cold, *warm], key=lambda request: request.metrics.finished_time)
    assert 0 < ends.index(cold) <= 42


def test_pages_come_back_from_a_second_tier():
    core = toy_core(num_pages=16, prefix_caching=True)
    tiered = toy_core(num_pages=16, prefix_caching=True, tiers=lambda store: [HostTier(store, 1 << 16)])
    texts = [text for text in prompts(40, 40, 40, seed=3) for _ in range(1)]
    for each in (core, tiered):
        for _ in range(2):
            requests = [each.submit(text, greedy(), seed=0) for text in texts]
            run(each)
            assert_as_alone(requests)
    assert core.stats().restored_tokens == 0 < tiered.stats().restored_tokens
    assert tiered.stats().prompt_tokens < core.stats().prompt_tokens
    tiered.forget()
    before = tiered.stats().restored_tokens
    run_again = tiered.submit(texts[0], greedy(), seed=0)
    run(tiered)
    assert tiered.stats().restored_tokens == before and tokens_of(run_again)


def test_who_stands_behind_pages_that_went_wrong_goes_on_above_them():
    """What it computed before them can be evicted once nobody holds it, and goes when it turns out bad as well."""
    for keep in (True, False):
        memory = Memory(16, 1, prefix_caching=True)
        first = memory.open([0, 2, 21, 5], shared=True)
        memory.reserve(first, 3)
        memory.commit(first, 3)
        text = [0, 2, 21, 7]
        second = memory.open(text, shared=True, found=memory.find(text[:3]))
        memory.reserve(second, 1)
        memory.commit(second, 1)
        memory.close(second, keep=False)  # its third page is the first one's too
        memory.check()
        assert first.node.depth == 2
        memory.close(first, keep=keep)
        memory.check()
        assert memory.available == 16 and memory.find(text).length == (3 if keep else 0)


def test_what_lies_behind_a_copied_part_of_a_page_is_not_taken_along():
    """It may be another text's that went wrong, and whose end was broken off."""
    store = KVStore([LayerShape(1, 1, 1)], 4, 4)
    store.keys[0][1, 0, :, 0] = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    store.copy([PageCopy(1, 2, 2), PageCopy(1, 3, 4)])
    assert store.keys[0][2, 0, :, 0].tolist() == [1.0, 2.0, 0.0, 0.0] and store.finite([2])
    assert store.keys[0][3].isnan().any()
    memory = Memory(8, 4, prefix_caching=True)
    first = memory.open([0, 1, 2, 3], shared=True)
    memory.reserve(first, 3)
    memory.commit(first, 3)
    second = memory.open([0, 1, 5], shared=True, found=memory.find([0, 1, 5]))
    assert [copy.valid for copy in memory.reserve(second, 1)] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_short_lives_of_engines(part):
    """Texts to score, many of which begin alike and some of which go wrong, over few pages, with a model that fails."""
    for seed in range(part, 2000, 4):
        random_life(random.Random(seed))


def random_life(rng):
    core = toy_core(
        rng.randint(4, 15), rng.randint(1, 4), rng.choice([2, 5, 16]), rng.randint(2, 5), prefix_caching=True
    )
    most = core.store.num_pages * core.store.page_size
    for _ in range(30):
        chance = rng.random()
        if chance < 0.6:
            letters = [0, 1] if rng.random() < 0.6 else [0, 1, 2, POISON]
            text = [rng.choice(letters) for _ in range(rng.randint(1, min(12, most)))]
            scoring = Scoring(min(rng.randint(1, 12), len(text)), (0,))
            core.submit_scoring(text, scoring, SamplingParams(max_tokens=1))
        elif chance < 0.8:
            core.step()
        else:
            setattr(core.forward, rng.choice(["before", "after"]), fail)
            with suppress(RuntimeError):
                core.step()
            core.forward.before = core.forward.after = None
        assert_finite(core)
    run(core)
    assert_idle(core)
