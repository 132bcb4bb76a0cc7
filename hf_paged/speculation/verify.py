"""Sample-and-match: the target's own tokens, drawn along the drafts that they confirm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.request import Row
from hf_paged.sampling import NotFinite, SampleResult, SamplingRow, sample
from hf_paged.speculation.proposal import Proposal, Verdict

# Appends entry `i` of what was drawn to a row. False: the row ends, or the request failed.
Take = Callable[[Row, SampleResult, int], bool]


@dataclass(eq=False, slots=True)
class Drawing:
    """A row that draws tokens in this step.

    Attributes:
        line: of the logits behind its last token; those behind draft `i` are line `line + 1 + i`.
        proposal: drafts that were computed with it, or None.
        path: drafts that were taken.
        places: entry of what was drawn, by draft, where all were drawn at once.
        ended: whether the row ended on its way.
        spoilt: whether a number behind one of its tokens was not finite, which a draft may have brought in.
    """

    row: Row
    line: int
    proposal: Proposal | None = None
    path: list[int] = field(default_factory=list)
    places: list[int] | None = None
    ended: bool = False
    spoilt: bool = False

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.proposal, tuple(self.path), self.ended)

    def take(self, take: Take, sampled: SampleResult, at: int) -> bool:
        """Tell of a token; whether the row goes on."""
        if self.proposal is not None and isinstance(sampled.errors[at], NotFinite):
            self.spoilt = True
            return False
        self.ended = not take(self.row, sampled, at)
        return not self.ended


def draw(drawings: Sequence[Drawing], logits: torch.Tensor, take: Take) -> None:
    """Draw every row's next tokens: one, and one more for each draft that turns out to be the target's own token.

    Tokens are drawn one behind another, as far as drafts are taken, so that no processor is asked about a token that is
    not certain (it may keep a state), and none is drawn in vain. Greedy rows without processors take the largest logit
    behind all their drafts at once: this costs less than to ask again.

    Args:
        logits: `[n, vocab]`, see `Drawing.line`.
        take: told of every token that is certain, in order.
    """
    lines: list[int] = []  # in the order of logits: where all of them are drawn from, nothing is copied
    rows: list[SamplingRow] = []
    first: list[int] = []
    for drawing in drawings:
        first.append(len(lines))
        lines.append(drawing.line)
        rows.append(drawing.row.sampling)
        if drawing.proposal is not None and _cheap(drawing.row.sampling):
            drawing.places = list(range(len(lines), len(lines) + len(drawing.proposal)))
            lines += range(drawing.line + 1, drawing.line + 1 + len(drawing.proposal))
            rows += _ahead(drawing.row.sampling, drawing.proposal)
    sampled = sample(_lines(logits, lines), rows)
    drawn = zip(first, drawings, strict=True)
    alive = [drawing for at, drawing in drawn if drawing.take(take, sampled, at) and drawing.proposal]
    while alive:
        alive = [drawing for drawing in alive if _follow(drawing, sampled, take)]
        if alive:
            lines = [drawing.line + 1 + drawing.path[-1] for drawing in alive]
            own = sample(_lines(logits, lines), [drawing.row.sampling for drawing in alive])
            alive = [drawing for at, drawing in enumerate(alive) if drawing.take(take, own, at)]


def _follow(drawing: Drawing, sampled: SampleResult, take: Take) -> bool:
    """Go from draft to draft as long as each is the row's last token. True: the token behind it is yet to be drawn."""
    while True:
        node = drawing.path[-1] if drawing.path else -1
        child = drawing.proposal.child(node, drawing.row.tokens[-1])
        if child is None:
            return False
        drawing.path.append(child)
        if drawing.places is None:
            return True
        if not drawing.take(take, sampled, drawing.places[child]):
            return False


def _lines(logits: torch.Tensor, lines: list[int]) -> torch.Tensor:
    first, count = lines[0], len(lines)
    if lines[-1] - first == count - 1 and lines == list(range(first, first + count)):
        return logits[first : first + count]
    return logits[torch.tensor(lines, dtype=torch.long, device=logits.device)]


def _cheap(row: SamplingRow) -> bool:
    """Whether what would be drawn may be asked for tokens that are not certain, and costs little."""
    return row.params.greedy and row.pipeline is None


def _ahead(row: SamplingRow, proposal: Proposal) -> list[SamplingRow]:
    """The row as it would be behind each draft."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return [row.ahead(path) for path in paths]
