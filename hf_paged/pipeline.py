"""Pipelines of transformers-style logits processors, run over a batch; a row's faults stay its own."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_paged.sampling import SamplingRow

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (input_ids [n, L], scores [n, V]) -> [n, V]


@dataclass(frozen=True)
class Pipeline:
    """Processors in order, as (processor, batched).

    batched: the processor ignores input_ids, and changes each row's scores without regard to other rows; it
    is called once for all rows of a batch that share this very Pipeline, with input_ids of no columns. Else
    it is called a row at a time, with the row's prompt and output ids, int64 [1, L], and its scores, float32
    [1, V].

    drafting: those of the steps that have no state, so that drafts may be filtered by them too.
    """

    steps: tuple[tuple[Processor, bool], ...]
    drafting: tuple[tuple[Processor, bool], ...] = ()


def token_tensor(parts: Iterable[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Token ids of some sequences, one after another: int64 [total]. Much faster than torch.tensor(list)."""
    ids = array("q", chain.from_iterable(parts))
    return (torch.frombuffer(ids, dtype=torch.int64) if ids else torch.empty(0, dtype=torch.int64)).to(device)


def run_pipelines(logits: torch.Tensor, rows: Sequence["SamplingRow"], errors: list[Exception | None]) -> torch.Tensor:
    """Scores after each row's pipeline: `logits` (float32 [S, V]) itself if no row has one, else a copy.

    Rows that have an error already are passed over. A processor that raises an Exception or returns anything
    but a tensor of the shape it was given puts an error into `errors`, for its row or, if batched, its group.
    """
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.pipeline is not None and row.pipeline.steps and errors[i] is None:
            groups.setdefault(id(row.pipeline), []).append(i)
    if not groups:
        return logits
    scores = logits.clone()
    for members in groups.values():
        _run(scores, members, rows, errors)
    return scores


def _run(
    scores: torch.Tensor, members: list[int], rows: Sequence["SamplingRow"], errors: list[Exception | None]
) -> None:
    """Run the pipeline that the rows `members` share, and write what comes out into `scores`."""
    part = scores[members]
    ids: dict[int, torch.Tensor] = {}
    no_ids = torch.empty(len(members), 0, dtype=torch.int64, device=scores.device)
    for processor, batched in rows[members[0]].pipeline.steps:
        if batched:
            part, failures = _try(processor, no_ids[: len(members)], part)
            failed = dict.fromkeys(range(len(members)), failures) if failures else {}
        else:
            for i in members:
                if i not in ids:
                    ids[i] = token_tensor((rows[i].prompt_ids, rows[i].output_ids), scores.device)[None]
            failed = _each(processor, [ids[i] for i in members], part)
        for place, error in failed.items():
            errors[members[place]] = error
        if failed:
            stay = [place for place in range(len(members)) if place not in failed]
            members, part = [members[place] for place in stay], part[stay]
        if not members:
            return
    scores[members] = part


def _each(processor: Processor, ids: list[torch.Tensor], part: torch.Tensor) -> dict[int, Exception]:
    """Call a processor a row at a time, results going back into `part`. Returns the errors by place."""
    failed = {}
    for place, row_ids in enumerate(ids):
        given = part[place : place + 1]
        out, error = _try(processor, row_ids, given)
        if error is not None:
            failed[place] = error
        elif out is not given:
            part[place] = out[0]
    return failed


def _try(processor: Processor, ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, Exception | None]:
    """Call a processor; its result as float32, or the scores given and the error."""
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        out = processor(ids, scores)
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"logits processor {name} returned {type(out).__name__}: must be a tensor")
        if out.shape != scores.shape:
            shapes = f"{list(out.shape)}: must be {list(scores.shape)}, the shape it was given"
            raise ValueError(f"logits processor {name} returned scores of shape {shapes}")
        return out.to(device=scores.device, dtype=torch.float32), None
    except Exception as error:
        error.add_note(f"raised in the logits processor {name}")
        return scores, error
