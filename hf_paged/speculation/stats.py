"""Sight: what became of drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_paged.speculation.proposal import Verdict

if TYPE_CHECKING:
    from hf_paged.speculation.drafter import Drafter
    from hf_paged.speculation.speculator import Speculator
    from hf_paged.stats import Recorder


@dataclass(frozen=True)
class ProposerStats:
    """What became of one proposer's drafts.

    Attributes:
        proposed: drafts that the target verified.
        accepted: those that were its own tokens.
        by_depth: for the first, second, ... draft of a path: share of times that it was accepted, once those before it
            were.
        by_rank: for each depth, the same share by whether it was the likeliest draft there, the second likeliest, ...
        proposals: trees or chains of drafts, each for one row and one step.
    """

    proposed: int = 0
    accepted: int = 0
    by_depth: tuple[float, ...] = ()
    by_rank: tuple[tuple[float, ...], ...] = ()
    proposals: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted, 0 to 1."""
        return self.accepted / self.proposed if self.proposed else 0.0


@dataclass(eq=False)
class Tally:
    """Counts what becomes of one proposer's drafts.

    Attributes:
        tested: by depth, how often a draft of that depth could have been taken.
        taken: by depth and rank (0: the likeliest of its depth), how often one was.
    """

    proposals: int = 0
    proposed: int = 0
    accepted: int = 0
    tested: Counter[int] = field(default_factory=Counter)
    taken: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        """Count one proposal."""
        self.proposals += 1
        self.proposed += len(verdict.proposal)
        self.accepted += verdict.accepted
        deepest = min(max(verdict.proposal.depths()), verdict.deepest)
        self.tested.update(range(1, deepest + 1))
        self.taken.update(enumerate(verdict.ranks(), 1))

    def include(self, other: Tally) -> None:
        """Add what another has counted."""
        self.proposals += other.proposals
        self.proposed += other.proposed
        self.accepted += other.accepted
        self.tested.update(other.tested)
        self.taken.update(other.taken)

    def stats(self) -> ProposerStats:
        by_depth, by_rank = [], []
        for depth, tested in sorted(self.tested.items()):
            widest = max((rank for at, rank in self.taken if at == depth), default=0)
            taken = [self.taken[depth, rank] for rank in range(widest + 1)]
            by_depth.append(sum(taken) / tested)
            by_rank.append(tuple(times / tested for times in taken))
        return ProposerStats(self.proposed, self.accepted, tuple(by_depth), tuple(by_rank), self.proposals)


@dataclass(frozen=True)
class SpeculationStats:
    """What speculation did since the engine was made.

    Attributes:
        proposers: by name.
        verified_forwards: target forwards that held drafts.
        tokens_per_row: tokens that a row got from one target forward, mean over rows and steps.
        draft_seconds, verify_seconds, other_seconds: time in drafting forwards, in target forwards with drafts, and in
            the rest of all steps.
    """

    proposers: dict[str, ProposerStats] = field(default_factory=dict)
    verified_forwards: int = 0
    tokens_per_row: float = 1.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def proposed(self) -> int:
        return sum(one.proposed for one in self.proposers.values())

    @property
    def accepted(self) -> int:
        return sum(one.accepted for one in self.proposers.values())


def collect(
    speculators: Iterable[Speculator],
    drafters: Iterable[Drafter],
    verified: int,
    verify_seconds: float,
    recorder: Recorder,
) -> SpeculationStats:
    """Add up what speculators have counted."""
    sums: dict[str, Tally] = {}
    for speculator in speculators:
        for source, tally in speculator.tallies.items():
            sums.setdefault(source, Tally()).include(tally)
    proposers = {source: tally.stats() for source, tally in sums.items()}
    accepted, generated = sum(one.accepted for one in proposers.values()), recorder.counts["generated_tokens"]
    drafting = sum(drafter.seconds for drafter in drafters)
    return SpeculationStats(
        proposers,
        verified,
        generated / (generated - accepted) if generated > accepted else 1.0,
        drafting,
        verify_seconds,
        max(recorder.step_seconds - drafting - verify_seconds, 0.0),
    )
