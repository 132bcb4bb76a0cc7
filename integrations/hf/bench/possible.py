"""What drafts could have given in a benchmark: acceptance and costs as an engine measured them, put into `ceiling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_paged.integrations.bench.ceiling import Ceiling, Seconds, Source, ceiling
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.workload import Workload
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.proposal import Verdict
from hf_paged.speculation.stats import Tally

DEEP = 16  # drafts behind each match of which odds are measured


class KindTally(Tally):
    """Counts drafts by their kind, too, which all drafts of a chain share."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[int, Tally] = {}

    def add(self, verdict: Verdict) -> None:
        """Count one proposal."""
        super().add(verdict)
        self.kinds.setdefault(verdict.proposal.kinds[0], Tally()).add(verdict)


def lookup_sources(loaded: Loaded, load: Workload, params: Sequence[Any], settings: dict[str, Any]) -> list[Source]:
    """How often drafts of prompt lookup are taken, by the length of the match.

    An engine that adapts drafts deep only where it is sure: what it saw of deep drafts holds for such rows alone. So
    this is another run, in which every match is followed as deep.
    """
    from hf_paged import Engine, SpeculationConfig

    config, tally = SpeculationConfig(method="lookup", adaptive=False, max_draft_tokens=DEEP), KindTally()
    with Engine(loaded.model, prefix_caching=False, speculation=config, **settings) as engine:
        engine.speculator.tallies["lookup"] = tally
        engine.generate([list(prompt) for prompt in load.prompts], params, raise_errors=True)
    steps = max(load.tokens - len(load) - tally.accepted, 1)  # of each row's the first one reads its prompt
    return [Source(kind.stats().by_rank, kind.proposals / steps) for kind in tally.kinds.values()]


class Possible:
    """What an engine's drafts could have given, from what is measured from now on.

    Args:
        engine: it has just been warmed.
        batch: requests that it answers at a time.
        texts: who drafts, where that was measured apart.
    """

    def __init__(self, engine: Any, batch: int, texts: Sequence[Source] | None = None) -> None:
        self.engine, self.batch, self.texts = engine, batch, texts
        drafting = engine.core.drafting
        self.target, self.drafter = drafting.cost.of(batch), getattr(engine.speculator, "drafter", None)
        tables = [self.target] if self.drafter is None else [self.target, self.drafter.cost]
        self._passed = {table: table.passed for table in tables}

    def _costs(self, table: CostTable) -> tuple[Seconds, list[tuple[float, float]]]:
        """Seconds of a forward by how many tokens it computes, and what was measured. At the mean pace of the runs: the
        machine's present one would be that of a moment."""
        pace = table.pace_since(self._passed[table])
        return lambda tokens: table.seconds(tokens, pace), table.points(pace)

    def row(self, load: Workload, runs: int, prompt_seconds: float, overhead: float, rate: float) -> dict[str, Any]:
        """What the measured acceptance and costs allow, and how much of it there was: see `ceiling`.

        The prompts take as long as without drafts, and each gives its row's first token; a draft model that drafts has
        to read them, too.

        Args:
            runs: how often all requests were answered.
            prompt_seconds, overhead: of a run without drafts: its prompts, and a step outside of its forward.
            rate: tokens a second that there were.
        """
        (target, cost), sources = self._costs(self.target), self._sources(len(load), runs)
        draft, draft_cost = self._costs(self.drafter.cost) if self.drafter is not None else (None, [])
        groups = [range(first, min(first + self.batch, len(load))) for first in range(0, len(load), self.batch)]
        made = [source for _, source in sources]
        best = {size: ceiling(size, made, target, cost[-1][0], overhead) for size in set(map(len, groups))}
        seconds = prompt_seconds
        for group in groups:
            step = best[len(group)]
            seconds += sum(load.lengths[i] - 1 for i in group) / step.tokens_per_second
            if any(source.draft and tree.depth for source, tree in zip(made, step.trees, strict=True)):
                seconds += draft(sum(len(load.prompts[i]) for i in group))
        return {
            "best_tokens_per_second": load.tokens / seconds,
            "of_best": rate * seconds / load.tokens,
            "best_trees": _trees(sources, best[len(groups[0])]),
            "cost": cost,
            "draft_cost": draft_cost,
        }

    def _sources(self, requests: int, runs: int) -> list[tuple[str, Source]]:
        """Who drafted, as measured: texts for the share of rows for which they did, a draft model for all others."""
        if self.texts is not None:
            return [("lookup", source) for source in self.texts]
        stats, drafter = self.engine.speculation_stats(), self.drafter
        # Of each row's steps the first one reads its prompt.
        steps = max(self.engine.stats().generated_tokens - stats.accepted - requests * runs, 1)
        made = [
            (name, Source(one.by_rank, min(one.proposals / steps, 1.0)))
            for name, one in stats.proposers.items()
            if drafter is None or name != drafter.name
        ]
        if drafter is not None and drafter.name in stats.proposers:
            rest = max(1.0 - sum(source.share for _, source in made), 0.0)
            draft, _ = self._costs(drafter.cost)
            made.append((drafter.name, Source(stats.proposers[drafter.name].by_rank, rest, draft)))
        return made


def _trees(sources: Sequence[tuple[str, Source]], best: Ceiling) -> dict[str, dict[str, float]]:
    """By name the share of rows for which something is drafted, and the mean of their trees."""
    found: dict[str, dict[str, float]] = {}
    for (name, source), tree in zip(sources, best.trees, strict=True):
        mean = found.setdefault(name, {"share": 0.0, "depth": 0, "nodes": 0.0, "taken": 0.0})
        share = mean["share"] + source.share
        for part in ("nodes", "taken"):
            mean[part] += (getattr(tree, part) - mean[part]) * source.share / max(share, 1e-9)
        mean["share"], mean["depth"] = share, max(mean["depth"], tree.depth)
    return found
