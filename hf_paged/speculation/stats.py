"""Sight: what became of drafts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
    """

    proposed: int = 0
    accepted: int = 0
    by_depth: tuple[float, ...] = ()

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted, 0 to 1."""
        return self.accepted / self.proposed if self.proposed else 0.0


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
    sums: dict[str, tuple[list[int], dict[int, list[int]]]] = {}
    for speculator in speculators:
        for source, tally in speculator.tallies.items():
            totals, depths = sums.setdefault(source, ([0, 0], {}))
            totals[0] += tally.proposed
            totals[1] += tally.accepted
            for depth, (tested, taken) in tally.depths.items():
                seen = depths.setdefault(depth, [0, 0])
                seen[0] += tested
                seen[1] += taken
    proposers = {
        source: ProposerStats(*totals, tuple(taken / tested for _, (tested, taken) in sorted(depths.items()) if tested))
        for source, (totals, depths) in sums.items()
    }
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
