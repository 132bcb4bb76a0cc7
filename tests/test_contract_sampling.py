"""The generate contract, "Arguments": what draws, from which distribution, by whose generator."""

import pytest
import torch
from conftest import assert_equal, left_padded, prompts_of, tiny_llama
from transformers import set_seed

import hf_paged

pytestmark = pytest.mark.usefixtures("paged")

VOCAB = 12  # small enough to count what is drawn


def p_value(counts, expected):
    """Of Pearson's chi-square test; cells with fewer than five expected are taken together."""
    small = expected < 5
    rest = [torch.stack([v[small].sum()]) for v in (counts, expected)]
    counts, expected = torch.cat((counts[~small], rest[0])), torch.cat((expected[~small], rest[1]))
    kept = expected > 1e-9
    assert counts[~kept].sum() == 0  # nothing that must not be drawn
    counts, expected = counts[kept], expected[kept]
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


CHANCE = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_h": {"top_h": 0.4},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "odd order": {"temperature": 1.3, "top_k": 9, "typical_p": 0.9, "renormalize_logits": True},
}


@pytest.fixture
def small_model():
    return tiny_llama(seed=5, vocab_size=VOCAB, num_hidden_layers=1)


@pytest.mark.parametrize("name", CHANCE)
def test_distribution(small_model, name):
    """Two tokens: the second is drawn from what follows the first."""
    settings = dict(do_sample=True, max_new_tokens=2, top_k=0) | CHANCE[name]
    prompt, n = torch.tensor([[3, 7, 2]]), 3000
    scored = dict(output_scores=True, return_dict_in_generate=True)
    first = small_model.generate(prompt, **settings, **scored).scores[0].softmax(-1)[0].double()
    follow = torch.cat((prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]), -1)
    second = small_model.generate(follow, **settings, **scored).scores[0].softmax(-1).double()
    torch.manual_seed(11)
    config = {"max_sequences": n, "num_pages": 4 * n, "check": False}
    drawn = small_model.generate(
        prompt, num_return_sequences=n, **settings, cache_implementation="paged", cache_config=config
    )[:, 3:]
    counts = torch.bincount(drawn[:, 0] * VOCAB + drawn[:, 1], minlength=VOCAB * VOCAB).double()
    expected = (first[:, None] * second).flatten() * n
    assert p_value(counts, expected) > 0.001
    assert p_value(counts.view(VOCAB, VOCAB).sum(1), first * n) > 0.001


def test_set_seed(model, batch):
    arguments = dict(batch, do_sample=True, max_new_tokens=8, cache_implementation="paged")
    results = []
    for seed in (7, 7, 8):
        set_seed(seed)
        results.append([model.generate(**arguments).tolist() for _ in range(2)])
    assert results[0] == results[1] != results[2]
    assert results[0][0] != results[0][1]


def test_rows_draw_their_own(model):
    prompt = prompts_of(6)[0]
    torch.manual_seed(0)
    out = model.generate(prompt.expand(4, -1), do_sample=True, max_new_tokens=8, cache_implementation="paged")
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_the_callers_generator(model, batch):
    before = torch.manual_seed(3).get_state()
    torch.randint(0, 2**63 - 1, (1,))
    once = torch.get_rng_state()
    assert not torch.equal(before, once)
    torch.manual_seed(3)
    model.generate(**batch, max_new_tokens=8, cache_implementation="paged")  # greedy; makes the engine, too
    assert torch.equal(torch.get_rng_state(), before)
    model.generate(**batch, do_sample=True, max_new_tokens=8, cache_implementation="paged")
    assert torch.equal(torch.get_rng_state(), once)


def test_a_seed_in_the_settings(model, batch):
    arguments = dict(batch, do_sample=True, max_new_tokens=8, cache_implementation="paged", cache_config={"seed": 4})
    before = torch.get_rng_state()
    first = model.generate(**arguments)
    assert torch.equal(torch.get_rng_state(), before)
    hf_paged.enable(check=True, page_size=4, num_pages=512)
    again = tiny_llama().generate(**arguments)
    assert again.tolist() == first.tolist()


def test_a_row_draws_the_same_alone_and_in_a_batch(model):
    """The first row of a batch has the seed of a batch of one."""
    prompts = prompts_of(9, 4, 13)
    results = []
    for size in (1, 3):
        torch.manual_seed(9)
        batch = left_padded([prompts[2], *prompts[:2]][:size])
        results.append(model.generate(**batch, do_sample=True, max_new_tokens=9, cache_implementation="paged"))
    assert results[0][0].tolist() == results[1][0].tolist()


def test_settings_at_their_limits(model, batch):
    """One token is left, by one way or the other; so it is the same token."""
    for settings in (
        {"top_p": 0.0},
        {"top_k": 1000, "top_p": 1e-9},
        {"min_p": 1.0},
        {"temperature": 1e-8},
        {"top_k": 1},
    ):
        assert_equal(model, **batch, max_new_tokens=6, do_sample=True, **settings)
    assert_equal(model, **batch, max_new_tokens=6, temperature=0.5, do_sample=False)  # looked at by nobody
