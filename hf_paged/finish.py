"""Whether a row is finished after its newest token, and why."""

from __future__ import annotations

from hf_paged.request import Row
from hf_paged.text import Decode, IncrementalText, find_stop


def check_finished(row: Row, decode: Decode | None) -> bool:
    """Set `finish_reason` and `stop_reason` of a row that its newest token finishes.

    End-of-sequence and stop tokens come first, then the front door's own criteria, stop strings, and the length. Stop
    strings are looked for once `min_tokens` tokens are there; the text of the row then ends before the string.
    """
    params, output = row.request.params, row.output_ids
    token = output[-1]
    reason = None
    if token in row.sampling.eos_ids:
        row.finish_reason = "stop"
        return True
    if params.stop_token_ids and token in params.stop_token_ids:
        reason = token
    if reason is None and row.hooks.stop is not None:
        reason = row.hooks.stop(row)
        reason = None if reason is False else reason
    if reason is None and params.stop:
        reason = _stop_string(row, decode, len(output) >= params.min_tokens)
    if reason is not None:
        row.finish_reason = "stop"
        row.stop_reason = None if reason is True else reason
        return True
    if len(output) >= row.request.max_tokens:
        row.finish_reason = "length"
        return True
    return False


def _stop_string(row: Row, decode: Decode, armed: bool) -> str | None:
    if row.text is None:
        row.text = IncrementalText(decode)
    added = row.text.update(row.output_ids)
    if not added or not armed:
        return None
    found = find_stop(row.text.text, len(added), row.request.params.stop)
    if found is None:
        return None
    row.text_length = found[1]
    return found[0]
