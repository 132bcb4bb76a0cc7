"""Who drafts in one engine, and what they are told of its memory."""

from __future__ import annotations

from collections.abc import Callable

from hf_paged.memory import Memory, PageCopy
from hf_paged.request import Row
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.cost import StepCosts
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.guide import Overhead
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.suffix import SuffixIndex


class Proposers:
    """Speculators and draft models.

    Args:
        memory: the engine's.
        measured: seconds that were measured here → those to go by: several processes must decide the same.

    Attributes:
        cost, overhead: what steps of the target take.
        speculators: by settings and draft model.
        drafters: all draft models.
    """

    def __init__(self, memory: Memory, measured: Callable[[float], float] | None = None) -> None:
        self.memory = memory
        self.cost, self.overhead, self.measured = StepCosts(), Overhead(), measured or float
        self.suffixes: SuffixIndex | None = None
        self.speculators: dict[tuple[SpeculationConfig, Drafter | None], Speculator] = {}
        self.drafters: list[Drafter] = []

    def speculator(self, config: SpeculationConfig, drafter: Drafter | None = None) -> Speculator | None:
        """The speculator of these settings; None where nothing is to be drafted."""
        if config.off:
            return None
        known = self.speculators.get((config, drafter))
        if known is None:
            if config.method in ("suffix", "auto") and self.suffixes is None:
                self.suffixes = SuffixIndex(config.suffix_tokens)
            known = Speculator(config, self.cost, self.overhead, self.suffixes, drafter, self.measured)
            self.speculators[config, drafter] = known
            if drafter is not None and drafter not in self.drafters:
                self.drafters.append(drafter)
                drafter.measured = self.measured
                self.memory.pool.taken = self._taken
        return known

    def drop(self, drafter: Drafter) -> None:
        """Nothing is drafted by `drafter` any more; its KV is freed."""
        if drafter in self.drafters:
            self.drafters.remove(drafter)
        self.speculators = {key: known for key, known in self.speculators.items() if key[1] is not drafter}

    def _taken(self, pages: list[int]) -> None:
        for drafter in self.drafters:
            drafter.taken(pages)

    def copied(self, copies: list[PageCopy]) -> None:
        """Pages were copied."""
        if copies and self.speculators:
            for drafter in self.drafters:
                drafter.copied(copies)

    def look_again(self, closely: bool = False) -> None:
        """Draft models may have changed: of one that did, what its drafts are worth is not known."""
        changed = [drafter for drafter in self.drafters if drafter.look_again(closely)]
        for (_, drafter), speculator in self.speculators.items():
            if drafter in changed:
                speculator.begin_anew()

    def forget(self) -> None:
        """The model is not what it was."""
        for drafter in self.drafters:
            drafter.forget()

    def tidy(self) -> None:
        """Rows may have ended or wait: nothing is kept of them."""
        for drafter in self.drafters:
            drafter.tidy(self.memory.sequences)

    def check(self) -> None:
        """Verify the laws of drafters' own memory.

        Raises:
            AssertionError: one does not hold.
        """
        for drafter in self.drafters:
            drafter.check(self.memory.sequences)

    def ended(self, row: Row) -> None:
        """A row has ended."""
        if row.request.speculator is not None:
            row.request.speculator.ended(row)
