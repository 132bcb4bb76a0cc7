"""Tokens to a transformers streamer, a column of the batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_paged.request import Row


class ColumnStream:
    """Calls `streamer.put` as `generate` does: once for each place, with the tokens of all rows `[batch]`.

    Args:
        streamer: has `put` and `end`.
        pad: what stands behind the end of a row.
    """

    def __init__(self, streamer: Any, pad: int) -> None:
        self.streamer, self.pad, self.sent = streamer, pad, 0

    def update(self, rows: Sequence[Row], width: int) -> None:
        """Send every column of which all tokens are known, of `width` that there are so far."""
        known = min((len(row.output_ids) for row in rows if row.finish_reason is None), default=width)
        for at in range(self.sent, min(known, width)):
            column = [row.output_ids[at] if at < len(row.output_ids) else self.pad for row in rows]
            self.streamer.put(torch.tensor(column))
            self.sent = at + 1

    def end(self) -> None:
        """All is sent."""
        self.streamer.end()
