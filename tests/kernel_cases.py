"""Steps to hold paged attention against the reference: random shapes, poison in every slot that no query may see."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from hf_paged.kernels import PagedRows
from hf_paged.kernels.reference import paged_attention as reference
from hf_paged.kernels.rows import ALL, TreeMask
from hf_paged.speculation.proposal import tree_places


@dataclass(frozen=True)
class Case:
    """One step. A row is `(tokens before, what)`: None is a decode, a number a chunk, a tuple a tree's parents."""

    rows: tuple = ((9, None), (0, 5))
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    value_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = field(default="cpu")

    @property
    def options(self) -> dict:
        return {"scale": self.dim**-0.5 * 1.3, "window": self.window, "softcap": self.softcap}


@dataclass(frozen=True, eq=False)
class Step:
    """The tensors of a case; `expected` is what the reference makes of them (float32)."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rows: PagedRows
    options: dict

    def expected(self) -> torch.Tensor:
        """By the reference, on a CPU, in float32 and up."""
        options = {**self.options, "sinks": None if self.sinks is None else self.sinks.cpu().float()}
        tensors = (t.cpu().float() for t in (self.query, self.keys, self.values))
        return reference(*tensors, self.rows, **options)

    @property
    def sinks(self) -> torch.Tensor | None:
        return self.options["sinks"]


def make(case: Case) -> Step:
    """Random queries and pages. Slots that no row holds are NaN; a row's pages are followed by -1."""
    rng, gen = np.random.default_rng(case.seed), torch.Generator().manual_seed(case.seed)
    size, rows = case.page_size, sorted(case.rows, key=lambda row: row[1] is not None)
    lens = [1 if what is None else what if isinstance(what, int) else 1 + len(what) for _, what in rows]
    contexts = [before + count for (before, _), count in zip(rows, lens, strict=True)]
    counts = [-(-context // size) for context in contexts]
    pool = 2 * sum(counts) + 2
    ids = rng.permutation(np.arange(1, pool))
    table = np.full((len(rows), max(counts) + 1), -1, np.int64)  # not read behind a row's last page
    keys = torch.full((pool, case.kv_heads, size, case.dim), torch.nan)
    values = torch.full((pool, case.kv_heads, size, case.value_dim), torch.nan)
    taken, mask, slots = 0, TreeMask(*(np.zeros(sum(lens), np.int64) for _ in range(3))), []
    at = 0
    for row, ((before, what), count, context) in enumerate(zip(rows, lens, contexts, strict=True)):
        pages = ids[taken : taken + counts[row]]
        table[row, : counts[row]], taken = pages, taken + counts[row]
        place = np.arange(context)
        page, offset = torch.from_numpy(pages[place // size]), torch.from_numpy(place % size)
        keys[page, :, offset] = torch.randn(context, case.kv_heads, case.dim, generator=gen)
        values[page, :, offset] = torch.randn(context, case.kv_heads, case.value_dim, generator=gen)
        slots.extend((page * size + offset)[before:].tolist())
        own = slice(at, at + count)
        mask.visible[own], mask.base[own], mask.positions[own] = ALL, before, np.arange(before, context)
        if isinstance(what, tuple):
            mask.positions[own], mask.visible[own] = tree_places(what, before)
        at += count
    query = torch.randn(sum(lens), case.kv_heads * case.group, case.dim, generator=gen)
    sinks = torch.randn(case.kv_heads * case.group, generator=gen) if case.sinks else None
    made = [None if t is None else t.to(case.device, case.dtype) for t in (query, keys, values, sinks)]
    step = PagedRows(
        page_size=size,
        num_decodes=sum(what is None for _, what in rows),
        query_lens=np.array(lens, np.int64),
        context_lens=np.array(contexts, np.int64),
        page_table=table,
        slots=torch.tensor(slots, dtype=torch.long, device=case.device),
        backend="triton",
        tree=mask if any(isinstance(what, tuple) for _, what in rows) else None,
    )
    return Step(*made[:3], step, {**case.options, "sinks": made[3]})


def random_case(rng: np.random.Generator, kind: str = "any", longest: int = 90, dims=(8, 16, 20, 64, 80, 96)) -> Case:
    """`kind`: `decode`, `extend`, `tree` or `any` of them in one step."""
    rows = []
    for _ in range(int(rng.integers(1, 5))):
        before = int(rng.integers(0, longest))
        what = kind if kind != "any" else rng.choice(["decode", "extend", "tree"])
        if what == "decode":
            rows.append((before, None))
        elif what == "extend":
            rows.append((before, int(rng.integers(0 if before and rows else 1, 40))))
        else:
            nodes = int(rng.integers(1, 20))
            rows.append((before, tuple(int(p) for p in rng.integers(-1, np.arange(nodes)))))
    window = rng.choice([0, 0, 1, 3, 17, 40])
    return Case(
        rows=tuple(rows),
        page_size=int(rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 256])),
        kv_heads=int(rng.choice([1, 2, 3])),
        group=int(rng.choice([1, 2, 3, 4, 7])),
        dim=int(rng.choice(dims)),
        value_dim=int(rng.choice(dims)),
        window=int(window) or None,
        softcap=float(rng.choice([2.0, 30.0])) if rng.random() < 0.3 else None,
        sinks=bool(rng.random() < 0.3),
        seed=int(rng.integers(1 << 30)),
    )
