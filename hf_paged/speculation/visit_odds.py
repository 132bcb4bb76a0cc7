"""Odds of drafts as the compiled steps of a visit take them: tables by depth and kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_paged.kernels.native_verified import DEPTHS, MATCHES
from hf_paged.speculation.drafter import KINDS, RANKS, likelihood
from hf_paged.speculation.lookup import PRIOR
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.suffix import SURE, alone

OFTEN = 4  # visits between two looks at odds and costs


@dataclass(eq=False)
class Odds:
    """Tables of a speculator's odds, without those of rows: looked at now and then."""

    speculator: Speculator
    visits: int = 0
    texts: np.ndarray | None = None
    drafted: np.ndarray | None = None

    def look(self) -> None:
        """Look at what is known by now."""
        self.visits += 1
        if self.texts is not None and self.visits % OFTEN:
            return
        odds, drafter = self.speculator.acceptance.odds, self.speculator.drafter
        depths = range(1, DEPTHS + 1)
        looked = [[odds("lookup", kind, depth, PRIOR[kind]) for kind in range(MATCHES)] for depth in depths]
        alike = [alone(kind, SURE) for kind in range(MATCHES)]
        repeated = [[odds("suffix", kind, depth, prior) for kind, prior in alike] for depth in depths]
        self.texts = np.array([looked, repeated], np.float32)
        self.drafted = np.zeros((DEPTHS, RANKS * KINDS), np.float32)
        if drafter is not None:
            kinds = [
                (kind + KINDS * rank, rank, (kind + 0.5) / KINDS) for rank in range(RANKS) for kind in range(KINDS)
            ]
            for depth in depths:
                row = [odds(drafter.name, kind, depth, likelihood(prob, rank)) for kind, rank, prob in kinds]
                self.drafted[depth - 1] = row
