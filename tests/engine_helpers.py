"""A toy model whose logits are a function of what it reads back from the pages, and engines over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_paged.config import CoreSettings
from hf_paged.engine import EngineCore
from hf_paged.kernels.rows import ALL
from hf_paged.params import SamplingParams
from hf_paged.plan import StepPlan
from hf_paged.request import Request, RowHooks
from hf_paged.sampling import SamplingRow, sample
from hf_paged.scoring import Scoring
from hf_paged.speculation.draft_model import DraftModel
from hf_paged.store import KVStore, LayerShape

VOCAB = 23
EOS = 22
POISON = 21  # a text that holds this token has NaN logits, and NaN keys and values
GREEDY = {"temperature": 0.0}
LENGTHS = (5, 9, 17, 3, 1, 30, 2, 12)


def toy_logits(prefix_hash: int) -> np.ndarray:
    """Logits behind a prefix, float32 `[VOCAB]`; the two special tokens are never the likeliest."""
    mixed = (prefix_hash + np.arange(VOCAB, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) & np.uint64(2**64 - 1)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    logits = ((mixed >> np.uint64(40)) % np.uint64(1009)).astype(np.float32) / 200
    logits[[EOS, POISON]] -= 4
    return logits


def prefix_hashes(tokens: Sequence[int]) -> list[int]:
    """A number for every prefix of `tokens`, the empty one left out."""
    hashes, value = [], 7
    for token in tokens:
        value = (value * 1000003 + token + 1) & (2**64 - 1)
        hashes.append(value)
    return hashes


class ToyForward:
    """Plan → logits. Writes token ids and positions to the pages, then reads each row's history from them.

    What it is told (`token_ids`, `positions`) is held against what it reads. `before` and `after` are called with the
    plan, before anything is written and before the logits are given back. Behind every `odd`-th prefix it has other
    logits, as a draft model has.
    """

    def __init__(self, store: KVStore, odd: int = 0) -> None:
        self.store, self.core, self.odd = store, None, odd
        self.before: Callable[[StepPlan], None] | None = None
        self.after: Callable[[StepPlan], None] | None = None
        self.plans: list[StepPlan] = []

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        self.plans.append(plan)
        if self.before is not None:
            self.before(plan)
        self._check(plan)
        keys, values = self.store.keys[0][:, 0, :, 0].numpy(), self.store.values[0][:, 0, :, 0].numpy()
        size, slots = self.store.page_size, plan.rows.slots.numpy()
        ids = plan.token_ids.numpy()
        keys[slots // size, slots % size] = np.where(ids == POISON, np.nan, ids + 1)
        values[slots // size, slots % size] = plan.positions.numpy() + 1
        logits = self._read(plan, keys, values)
        if self.after is not None:
            self.after(plan)
        return torch.from_numpy(logits)

    def _check(self, plan: StepPlan) -> None:
        rows, slots = plan.rows, plan.rows.slots.numpy()
        assert plan.tokens == int(rows.query_lens.sum()) == len(slots)
        written = set(zip(slots.tolist(), plan.token_ids.tolist(), plan.positions.tolist(), strict=True))
        assert len({slot for slot, *_ in written}) == len(written)
        assert (rows.query_lens[: rows.num_decodes] == 1).all()
        assert rows.tree is not None or (rows.query_lens[rows.num_decodes :] > 1).all()
        if self.core is not None:  # a draft model writes what rows share more than once, each time the same
            assert len(written) == plan.tokens
            pool = self.core.memory.pool
            assert all(pool.count(page) == 1 for page in set((slots // self.store.page_size).tolist()))
            assert plan.tokens <= self.core.settings.max_batch_tokens
            assert len(rows.query_lens) <= self.core.settings.max_sequences

    def _read(self, plan: StepPlan, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        size, hashes, at, tree = self.store.page_size, [], 0, plan.rows.tree
        for row, (count, context) in enumerate(zip(plan.rows.query_lens, plan.rows.context_lens, strict=True)):
            places = np.arange(context)
            pages = plan.rows.page_table[row][places // size]
            assert (pages > 0).all()
            history, order = keys[pages, places % size], values[pages, places % size]
            told = plan.token_ids[at : at + count].numpy()
            assert (np.where(np.isnan(history), POISON + 1, history)[context - count :] == told + 1).all()
            if tree is not None and tree.visible[at] != ALL:
                for query in range(at, at + count):
                    seen = seen_in_tree(int(tree.base[query]), int(tree.visible[query]))
                    hashes += self._behind(history[seen], order[seen], plan.positions[query : query + 1].numpy())
            else:
                hashes += self._behind(history, order, plan.positions[at : at + count].numpy())
            at += count
        nan = np.full(VOCAB, np.nan, np.float32)
        found = [nan if hashes[at] is None else self._logits(hashes[at]) for at in plan.logits_at.tolist()]
        return np.stack(found) if found else np.zeros((0, VOCAB), np.float32)

    def _logits(self, prefix_hash: int) -> np.ndarray:
        return toy_logits(prefix_hash + (self.odd and prefix_hash % self.odd == 0))

    @staticmethod
    def _behind(history: np.ndarray, order: np.ndarray, positions: np.ndarray) -> list[int | None]:
        """Hashes of the prefixes that end at `positions`, the last places of `history`; None where it is poisoned."""
        places = np.arange(len(history))
        assert (order == places + 1).all(), f"positions {order - 1} are read"
        assert (positions == places[len(places) - len(positions) :]).all()
        poisoned = np.isnan(history)
        known = prefix_hashes((np.where(poisoned, POISON + 1, history) - 1).astype(int).tolist())
        behind = zip(known, poisoned.cumsum() > 0, strict=True)
        return [None if bad else value for value, bad in behind][len(places) - len(positions) :]


def seen_in_tree(base: int, visible: int) -> list[int]:
    """Slots that a query sees where drafts branch, see `TreeMask`."""
    return [*range(base), *(base + bit for bit in range(63) if visible >> bit & 1)]


def fail(*_):
    """A forward's `before` or `after`, or a processor, that raises."""
    raise RuntimeError("on purpose")


def toy_decode(ids: Sequence[int]) -> str:
    return "".join(chr(97 + token) for token in ids)


def toy_encode(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


def toy_core(
    num_pages: int = 64,
    page_size: int = 4,
    max_batch_tokens: int = 64,
    max_sequences: int = 8,
    max_model_len: int = 200,
    eos: bool = False,
    prefix_caching: bool = False,
    track_optimum: bool = False,
    tiers: Callable[[KVStore], list] = lambda store: [],
    **rest: Any,
) -> EngineCore:
    """An engine core over the toy model; it checks itself after every step. `core.forward` is the `ToyForward`."""
    store = KVStore([LayerShape(1, 1, 1)], num_pages, page_size)
    limits = (max_batch_tokens, max_sequences, max_model_len, VOCAB, (EOS,) if eos else ())
    settings = CoreSettings(*limits, check=True, prefix_caching=prefix_caching, track_optimum=track_optimum)
    arguments = {"decode": toy_decode, "encode": toy_encode, "tiers": tiers(store)} | rest
    forward = ToyForward(store)
    forward.core = core = EngineCore(forward, store, settings, **arguments)
    return core


def toy_drafter(core: EngineCore, odd: int = 3) -> DraftModel:
    """A draft model for a toy core, with other logits than the target's behind every `odd`-th prefix."""
    store = KVStore([LayerShape(1, 1, 1)], core.store.num_pages, core.store.page_size)
    return DraftModel(ToyForward(store, odd), store, store.num_pages, store.page_size)


def run(core: EngineCore, limit: int = 20_000) -> list[Request]:
    """Step until nothing is left; the requests that ended, in order."""
    ended = []
    for _ in range(limit):
        if not core.has_work:
            break
        ended += core.step().finished
        assert_finite(core)
    assert not core.has_work, f"not done after {limit} steps"
    return ended


def assert_finite(core: EngineCore) -> None:
    """Pages that no sequence holds have no number that is not finite, and the core keeps its laws."""
    core.check()
    held = {page for sequence in core.memory.sequences for page in sequence.pages}
    free = [page for page in range(core.store.num_pages + 1) if page not in held]
    assert all(bool(torch.isfinite(t[free]).all()) for t in (*core.store.keys, *core.store.values))


def assert_idle(core: EngineCore) -> None:
    """Nothing runs or waits, no page is held, and no number in the store is not finite."""
    assert_finite(core)
    assert not core.busy and not core.requests
    assert core.memory.available == core.memory.pool.num_pages and not core.memory.sequences


def tokens_of(request: Request) -> list[list[int]]:
    """Generated ids of all rows."""
    return [row.output_ids for row in request.rows]


def alone(
    prompt: Sequence[int], params: SamplingParams, seed: int = 0, eos: bool = False, hooks: Sequence[RowHooks] = ()
) -> Request:
    """The request on an engine of its own with room for everything."""
    core = toy_core(256, 16, 512, 64, eos=eos)
    request = core.submit(prompt, params, seed=seed, hooks=hooks or None)
    run(core)
    return request


def by_hand(prompt: Sequence[int], params: SamplingParams, seed: int = 0) -> list[int]:
    """Tokens of one row from a loop without engine, pages or batches; only `max_tokens` ends it."""
    output: list[int] = []
    for _ in range(params.max_tokens):
        logits = torch.from_numpy(toy_logits(prefix_hashes([*prompt, *output])[-1]))[None]
        row = SamplingRow(params, seed, len(prompt) + len(output), list(prompt), output)
        output.append(sample(logits, [row]).tokens[0])
    return output


def toy_scores(text: Sequence[int], scoring: Scoring) -> list[float]:
    """Log-probabilities of what `scoring` asks of a text."""
    lines = [torch.from_numpy(toy_logits(h)).log_softmax(0) for h in prefix_hashes(text)]
    inner = [lines[i - 1][text[i]].item() for i in range(scoring.start, len(text))]
    return inner + [lines[-1][end].item() for end in scoring.ends]


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, POISON, n).tolist() for n in lengths]


def submit_all(core: EngineCore, lengths: Sequence[int] = LENGTHS, **params) -> list[Request]:
    """A request for a random prompt of each length, with seeds 0, 1, ..."""
    return [core.submit(p, SamplingParams(**params), seed=i) for i, p in enumerate(prompts(*lengths))]


def assert_as_alone(requests: Sequence[Request], eos: bool = False) -> None:
    """Each has the tokens and finish reasons that it gets alone."""
    for request in requests:
        expected = alone(request.prompt_ids, request.params, request.rows[0].sampling.seed, eos)
        assert tokens_of(request) == tokens_of(expected)
        assert [row.finish_reason for row in request.rows] == [row.finish_reason for row in expected.rows]


def submitted(request: Request) -> tuple[list[int], SamplingParams, int]:
    """What `alone` takes to run it again."""
    return request.prompt_ids, request.params, request.rows[0].sampling.seed
