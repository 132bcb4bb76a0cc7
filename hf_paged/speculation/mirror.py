"""A row's text in the tokens of another vocabulary, kept up to date as the row grows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from hf_paged.memory import Memory
from hf_paged.sequence import Sequence
from hf_paged.text import Decode, IncrementalText

WINDOW = 40  # characters before new text that are encoded with it: tokens further back do not depend on it
CONTEXT = 8  # tokens before drafts that are decoded with them
UNFINISHED = "\ufffd"  # stands for a character that is not finished
UNREAD = 4  # bytes of a character: so many tokens may be without a text of their own
HELD = 8  # more tokens without a text: it will not come any more


@dataclass(frozen=True)
class Vocabulary:
    """How one model's tokens are read and written.

    Attributes:
        decode, encode: token ids → text and back, without anything added at either end.
        size: ids that the model takes.
        opening: ids with which the model's texts begin.
        closing: ids behind which its texts do not go on.
    """

    decode: Decode
    encode: Callable[[str], list[int]]
    size: int
    opening: tuple[int, ...] = ()
    closing: frozenset[int] = frozenset()


class Mirror:
    """One row's text as a sequence of the draft model's tokens, with drafts behind it.

    Any tokens of the right text would do; they are those that the draft's tokenizer gives the whole text, as far as
    this can be told from its end.

    Args:
        target, draft: the two vocabularies. The target's decodes to text that the draft's may encode, and the other
            way round.
        sequence: of the draft's memory, without tokens.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary, sequence: Sequence) -> None:
        self.target, self.draft, self.sequence = target, draft, sequence
        self.told = IncrementalText(target.decode)
        self.length = 0  # tokens of the sequence that are the row's text: the others are drafts
        self.tokens = 0  # of the row, when it was looked at last

    @property
    def ratio(self) -> float:
        """Draft tokens to one of the target's, in this row."""
        return self.length / max(self.tokens, 1)

    def follow(self, tokens: list[int], memory: Memory) -> None:
        """Bring the sequence up to the row's `tokens`. KV of drafts that became its text is kept.

        Raises:
            ValueError: the draft's tokenizer gives an id that its model does not know.
        """
        keep, rest = self.length, []
        added = self._read(tokens)
        if added or not self.length:
            keep, rest = self._retell(len(added))
        if rest and max(rest) >= self.draft.size:
            raise ValueError(f"the draft's tokenizer gives id {max(rest)}, its model takes {self.draft.size}")
        sequence, same = self.sequence, _common(self.sequence.tokens[keep:], rest)
        length = keep + len(rest)
        # The last token is computed anew in any case: its logits are wanted.
        memory.rollback(sequence, max(min(sequence.computed, keep + same, length - 1), 0))
        sequence.tokens[keep + same :] = rest[same:]
        self.length, self.tokens = length, len(tokens)

    def _read(self, tokens: list[int]) -> str:
        """What the row's text has more than before, without a last character that is not finished."""
        end = len(tokens)
        for cut in range(min(UNREAD, end - self.told.read)):
            if added := self.told.update(tokens[: end - cut]):
                return added
        return self.told.update(tokens, final=end - self.told.read > HELD)

    def _retell(self, added: int) -> tuple[int, list[int]]:
        """How many tokens stay as the text grows by its last `added` characters, and those behind them."""
        text, own = self.told.text, self.sequence.tokens
        end = len(text) - added
        begin = max(end - WINDOW, 0)
        before, after = self.draft.encode(text[begin:end]), self.draft.encode(text[begin:])
        same = _common(before, after)
        # Where the window begins, tokens may be others than in the whole text; those that change must be the row's own.
        keep = self.length - len(before) + same
        if self.length and same and own[max(keep, 0) : self.length] == before[same:]:
            return keep, after[same:]
        whole, opening = self.draft.encode(text) if begin else after, list(self.draft.opening)
        return 0, whole if whole[: len(opening)] == opening else opening + whole

    def drafts(self, tokens: list[int]) -> list[int]:
        """Tokens of the target that tell what the drafts behind the text do; none where they do not follow `tokens`."""
        own, at = self.sequence.tokens, self.length
        before = self.draft.decode(own[max(at - CONTEXT, 0) : at])
        now = self.draft.decode(own[max(at - CONTEXT, 0) :])
        if not now.startswith(before):
            return []
        new, text = now[len(before) :].rstrip(UNFINISHED), self.told.text[-WINDOW:]
        start, whole = self.target.encode(text), self.target.encode(text + new)
        held = tokens[self.told.read :]  # those of a character that is not finished
        if whole[: len(start) + len(held)] != start + held:
            return []
        return whole[len(start) + len(held) :]


def _common(one: Rows[int], other: Rows[int]) -> int:
    """Length of the longest prefix that both have."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
