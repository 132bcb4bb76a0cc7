"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub name of a model; by default the one that ships here."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved).")]
Device = Annotated[str | None, typer.Option(help="As torch names it; by default cuda where there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables and text.")]
JsonOut = Annotated[
    str | None, typer.Option("--json", metavar="OUT", help="Write the report as JSON to a file; - prints it.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that torch uses; by default all cores.")]
VllmPython = Annotated[str | None, typer.Option(help="An interpreter that can import vllm, for peer vllm.")]

_panel = "Engine"
PageSize = Annotated[int | None, typer.Option(help="Tokens a page, 1 to 256 (16).", rich_help_panel=_panel)]
NumPages = Annotated[int | None, typer.Option(help="Pages in the pool.", rich_help_panel=_panel)]
MemoryFraction = Annotated[
    float | None, typer.Option(help="Share of memory that KV pages may take.", rich_help_panel=_panel)
]
MaxModelLen = Annotated[int | None, typer.Option(help="Tokens a row may have.", rich_help_panel=_panel)]
MaxBatchTokens = Annotated[int | None, typer.Option(help="Tokens computed in one step.", rich_help_panel=_panel)]
MaxSequences = Annotated[int | None, typer.Option(help="Rows that run at once.", rich_help_panel=_panel)]
KvDtype = Annotated[
    str | None, typer.Option(help="auto (the model's) or fp8 (half the memory).", rich_help_panel=_panel)
]
Backend = Annotated[str | None, typer.Option(help="auto, torch or triton.", rich_help_panel=_panel)]

Dataset = Annotated[
    str | None,
    typer.Option(help="File with prompts: .jsonl, .csv or .txt, gzipped or not; by default one that ships here."),
]
Field = Annotated[str, typer.Option(help="Field or column of the prompts.")]
Template = Annotated[str | None, typer.Option(help="Text around the prompt; names the field in braces.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; medians count.")]
QUESTION = "Question: {question}\nAnswer:"


def set_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def unescaped(template: str | None) -> str | None:
    r"""A template as typed in a shell, where `\n` stands for a newline; None for an empty one."""
    return template.replace("\\n", "\n") if template else None


def template_of(template: str | None, field: str) -> str | None:
    """The template of a benchmark: by default `QUESTION` for a field called question, and the bare text else."""
    if template is None:
        return QUESTION if field == "question" else None
    return unescaped(template)
