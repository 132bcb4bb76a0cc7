"""Token events of a request that runs."""

from __future__ import annotations

from dataclasses import dataclass

from hf_paged.outputs import TokenEvent
from hf_paged.request import Request, Row
from hf_paged.text import Decode, IncrementalText, held_back


@dataclass
class _Sent:
    """What was given out of a row: tokens and characters."""

    text: IncrementalText | None
    tokens: int = 0
    characters: int = 0


class EventFeed:
    """Gives every token of a request once, with the text that it adds.

    The pieces of a row join to the text of its result: what may turn out to begin a stop string is held back.

    Args:
        decode: token ids → text; None: events have no text.
    """

    def __init__(self, request: Request, decode: Decode | None) -> None:
        self.request = request
        self._sent = [_Sent(IncrementalText(decode) if decode else None) for _ in request.rows]

    def take(self) -> list[TokenEvent]:
        """Events of the tokens that came since the last call. No step may run meanwhile."""
        return [event for row in self.request.rows for event in self._of(row)]

    def _of(self, row: Row) -> list[TokenEvent]:
        sent, tokens, events = self._sent[row.index], row.output_ids, []
        for at in range(sent.tokens, len(tokens)):
            reason = row.finish_reason if at == len(tokens) - 1 else None
            piece = self._piece(row, sent, at + 1, reason is not None)
            logprob = row.logprobs[at].get(tokens[at]) if self.request.params.logprobs is not None else None
            events.append(TokenEvent(self.request.request_id, row.index, tokens[at], piece, logprob, reason))
        sent.tokens = len(tokens)
        return events

    def _piece(self, row: Row, sent: _Sent, length: int, last: bool) -> str:
        """Text that can be given out once the row has `length` tokens."""
        if sent.text is None:
            return ""
        sent.text.update(row.output_ids[:length], final=last)
        text = sent.text.text
        end = len(text) if last else len(text) - held_back(text, self.request.params.stop)
        if last and row.text_length is not None:
            end = row.text_length
        begin, sent.characters = sent.characters, max(sent.characters, end)
        return text[begin:end]
