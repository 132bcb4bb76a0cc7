"""Speculation samples from the model's own distribution: continuations counted against their exact probabilities."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from conftest import tiny_llama

from hf_paged import Engine, SamplingParams, SpeculationConfig
from hf_paged.speculation.proposal import Proposal

VOCAB, LENGTH, LEVEL = 8, 3, 0.001
PROMPT = [2, 5, 3, 7, 2, 5, 1, 4, 3, 0, 5, 4, 1]  # no 6: behind it lookup knows nothing
PROPOSERS = {
    "draft": dict(method="draft"),
    "lookup": dict(method="lookup"),
    "suffix": dict(method="suffix"),
    "layer_skip": dict(method="layer_skip", early_exit=1),
    "auto": dict(method="auto"),
}
CASES = [(name, width) for name in PROPOSERS for width in (1, 3) if (name, width) != ("lookup", 3)]  # never branches
ROWS = 500  # completions of one request
SOME = 6 * ROWS


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=VOCAB)


@pytest.fixture(scope="module")
def draft(model):
    """A model that agrees with `model` now and then."""
    torch.manual_seed(1)
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@torch.no_grad()
def exact(model, temperature=1.0):
    """Probabilities of all continuations of the prompt, float64 `[VOCAB ** LENGTH]`, without engine or cache."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    ids = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
    logits = copy.deepcopy(model).double()(ids[:, :-1]).logits[:, len(PROMPT) - 1 :]
    chosen = (logits / temperature).log_softmax(-1).gather(2, texts[..., None])
    return chosen.sum(dim=(1, 2)).exp()


class Counted:
    """Continuations that an engine sampled, int64 `[VOCAB ** LENGTH]`, and what it drafted meanwhile.

    A token more is made than is counted, so that the last that is counted may be a draft behind a draft.

    Attributes:
        beside: verdicts whose path leaves the proposal's likeliest one.
    """

    def __init__(self, model, draft, name, width, count):
        config = SpeculationConfig(**PROPOSERS[name], adaptive=False, tree_width=width)
        made = draft if config.method in ("draft", "auto") else None
        sizes = dict(page_size=8, num_pages=4 * ROWS, max_model_len=24, max_sequences=ROWS, max_batch_tokens=20 * ROWS)
        self.counts, self.beside = torch.zeros(VOCAB**LENGTH, dtype=torch.long), 0
        with Engine(model, draft_model=made, speculation=config, **sizes) as engine:
            self._watch(engine.speculator)
            for batch in range(count // ROWS):
                seed = 1_000_000 * list(PROPOSERS).index(name) + 10_000 * width + batch  # no two cases share noise
                params = SamplingParams(n=ROWS, max_tokens=LENGTH + 1, seed=seed)
                (output,) = engine.generate([PROMPT], params, raise_errors=True)
                tokens = torch.tensor([one.token_ids[:LENGTH] for one in output.outputs])
                cells = (tokens * VOCAB ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
                self.counts += torch.bincount(cells, minlength=VOCAB**LENGTH)
            engine.check()
            self.proposers = engine.speculation_stats().proposers

    def _watch(self, speculator):
        judge = speculator.judge

        def watched(planned, verdict, computed):
            self.beside += verdict.path != tuple(range(len(verdict.path)))
            judge(planned, verdict, computed)

        speculator.judge = watched


def chi_square(counts, probabilities):
    """p-value of Pearson's test; cells of which fewer than 5 are expected count as one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    if 0 < expected[rare].sum() < 5:  # even together: they join the least of the others
        rare |= expected == expected[~rare].min()
    seen, wanted = counts[~rare].double(), expected[~rare]
    if rare.any():
        seen, wanted = torch.cat([seen, counts[rare].sum()[None]]), torch.cat([wanted, expected[rare].sum()[None]])
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(wanted) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def assert_drafted(counted, name, width):
    """Drafts were verified at both depths; some were taken and some were not, and where they branch, branches were."""
    used = {"lookup", "suffix", "draft"} if name == "auto" else {name}
    assert set(counted.proposers) == used
    for stats in counted.proposers.values():
        assert 0 < stats.accepted < stats.proposed
    assert max(len(stats.by_depth) for stats in counted.proposers.values()) == LENGTH - 1
    assert all(0 < share < 1 for stats in counted.proposers.values() for share in stats.by_depth)
    assert (counted.beside > 0) == (width > 1)


def check(model, draft, name, width, count, other):
    """The counts fit the model, and are enough to tell it from the same at temperature `other`."""
    counted = Counted(model, draft, name, width, count)
    assert counted.counts.sum() == count
    assert_drafted(counted, name, width)
    assert chi_square(counted.counts, exact(model)) > LEVEL > chi_square(counted.counts, exact(model, other))


@pytest.mark.parametrize("name, width", CASES)
def test_some_continuations(model, draft, name, width):
    check(model, draft, name, width, SOME, other=1.25)


@pytest.mark.long
@pytest.mark.parametrize("name, width", CASES)
def test_200_000_continuations(model, draft, name, width):
    check(model, draft, name, width, 200_000, other=1.02)


# -- the test can fail


@pytest.mark.parametrize("width", [1, 3])
def test_drafts_taken_without_looking_are_told_apart(model, draft, width, monkeypatch):
    """An engine that goes on behind the likeliest draft, whatever the target's token was."""

    def first_child(proposal, node, token):
        return proposal.parents.index(node) if node in proposal.parents else None

    monkeypatch.setattr(Proposal, "child", first_child)
    assert chi_square(Counted(model, draft, "draft", width, SOME).counts, exact(model)) < LEVEL


def test_the_tail_of_chi_square():
    """Against its closed form for two degrees of freedom, exp(-x / 2)."""
    counts, thirds = torch.tensor([110, 100, 90]), torch.full((3,), 1 / 3, dtype=torch.float64)
    assert chi_square(counts, thirds) == pytest.approx(torch.tensor(-1.0).exp().item())
    rare = torch.tensor([0.5, 0.49, 0.006, 0.004], dtype=torch.float64)  # of 300: the last two are one cell
    assert chi_square(torch.tensor([150, 147, 1, 2]), rare) == pytest.approx(1.0)
