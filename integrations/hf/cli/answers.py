"""Answers of the engine on a terminal, as plain text and as JSON lines."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from hf_paged.integrations.cli.console import Bar, complain

if TYPE_CHECKING:
    from hf_paged import Engine, SamplingParams
    from hf_paged.outputs import RequestOutput


def show_stream(engine: Engine, text: str, ids: list[int], params: SamplingParams) -> bool:
    """Print a prompt and, as they come, its tokens; False if it fails."""
    try:
        events = engine.stream(ids, params)
        sys.stdout.write(text)
        for event in events:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    except ValueError as error:
        sys.stdout.write("\n")
        complain(f"not answered: {error}")
        return False
    sys.stdout.write("\n")
    return True


def answer_all(engine: Engine, texts: list[str], ids: list[list[int]], params: SamplingParams, as_json: bool) -> int:
    """Answer all prompts at once, print in their order, and tell how many failed."""
    outputs: dict[int, RequestOutput] = {}
    errors: dict[int, Exception] = {}
    with Bar() as bar:
        bar.plan(len(ids))
        bar.note("generating")
        for number, prompt in enumerate(ids):
            try:
                engine.submit(prompt, params, request_id=str(number))
            except ValueError as error:
                errors[number] = error
                bar.done()
        while engine.has_work:
            for output in engine.step():
                outputs[int(output.request_id)] = output
                bar.done()
    errors |= {number: output.error for number, output in outputs.items() if output.error is not None}
    for number, text in enumerate(texts):
        error = errors.get(number)
        if as_json:
            typer.echo(json.dumps(row_of(number, text, outputs.get(number), error), ensure_ascii=False))
        elif error is None:
            print_answers(text, outputs[number], number)
        if error is not None:
            complain(f"prompt {number + 1} was not answered: {error}")
    return len(errors)


def print_answers(text: str, output: RequestOutput, number: int) -> None:
    """Prompt and answers as plain text, the way they would stand in a document."""
    if number:
        typer.echo("-" * 60)
    for completion in output.outputs:
        typer.echo(text + completion.text)


def row_of(number: int, text: str, output: RequestOutput | None, error: Exception | None) -> dict[str, Any]:
    """A result as JSON; without an output, that of a request refused at the door."""
    row = {"index": number, "prompt": text, "error": None if error is None else str(error), "outputs": []}
    if output is None:
        return row
    row["prompt_tokens"] = len(output.prompt_token_ids)
    row["outputs"] = [completion_row(completion) for completion in output.outputs]
    times = output.metrics
    if times.first_token_time is not None:
        row["seconds_to_first_token"] = times.first_token_time - times.arrival_time
    if times.finished_time is not None:
        row["seconds"] = times.finished_time - times.arrival_time
    return row


def completion_row(completion: Any) -> dict[str, Any]:
    row = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        row["cumulative_logprob"] = completion.cumulative_logprob
        row["logprobs"] = [
            [{"token_id": t.token_id, "raw": t.raw, "processed": t.processed, "rank": t.rank} for t in best.values()]
            for best in completion.logprobs
        ]
    return row
