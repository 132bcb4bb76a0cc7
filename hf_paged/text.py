"""Text of a row that grows token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class IncrementalText:
    """Decodes a growing list of token ids without decoding all of it again.

    A token's text may depend on its neighbours (spaces, characters of several bytes), so two windows over the last
    tokens are decoded and what the newer has more is the new text; an unfinished character is held back.

    Args:
        decode: token ids → text.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._start = self._read = 0
        self.text = ""

    @property
    def read(self) -> int:
        """Tokens, from the first, whose text was given out."""
        return self._read

    def update(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Take in what `token_ids` has more than at the last call.

        Args:
            token_ids: all tokens so far.
            final: no more come: also give out what was held back.

        Returns:
            the text that was added.
        """
        before = self._decode(token_ids[self._start : self._read])
        now = self._decode(token_ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        new = now[len(before) :]
        self._start, self._read = self._read, len(token_ids)
        self.text += new
        return new


def find_stop(text: str, added: int, stops: Sequence[str]) -> tuple[str, int] | None:
    """The stop string that is found first in `text`, of which the last `added` characters are new.

    Returns:
        the string and where it begins, or None.
    """
    found = None
    for stop in stops:
        at = text.find(stop, max(0, len(text) - added - len(stop) + 1))
        if at >= 0 and (found is None or at < found[1]):
            found = (stop, at)
    return found


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of `text` may turn out to begin a stop string: they cannot be given out yet."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
