"""`hf-paged generate`: answer prompts from arguments, a file or stdin."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.console import (
    FAILURE,
    command,
    quiet_transformers,
    settings_of,
    users_values,
)

_sampling = "Sampling"
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts; - or nothing reads them from stdin.")]
File = Annotated[
    str | None, typer.Option("--file", "-f", help="Prompts from a .txt (one a line), .jsonl or .csv file.")
]
PromptField = Annotated[str, typer.Option(help="Field or column of a .jsonl or .csv file's prompts.")]
Whole = Annotated[bool, typer.Option("--whole", help="Stdin is one prompt, rather than one a line.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt in the tokenizer's chat template.")]
Stream = Annotated[bool | None, typer.Option(help="Show tokens as they come; by default for one prompt on a terminal.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to make at most.", rich_help_panel=_sampling)]
MinTokens = Annotated[int, typer.Option(help="Tokens to make at least.", rich_help_panel=_sampling)]
Temperature = Annotated[float, typer.Option(help="0 takes the best token each time.", rich_help_panel=_sampling)]
TopK = Annotated[int, typer.Option(help="Keep the best K tokens; 0 keeps all.", rich_help_panel=_sampling)]
TopP = Annotated[float, typer.Option(help="Keep the best tokens up to this mass.", rich_help_panel=_sampling)]
MinP = Annotated[float, typer.Option(help="Keep tokens of at least this share of the best.", rich_help_panel=_sampling)]
Penalty = Annotated[float, typer.Option(rich_help_panel=_sampling)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_sampling)]
Number = Annotated[int, typer.Option("--n", help="Completions of each prompt.", rich_help_panel=_sampling)]
Stop = Annotated[list[str] | None, typer.Option(help="Ends at this text; may be repeated.", rich_help_panel=_sampling)]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.", rich_help_panel=_sampling)
]
Logprobs = Annotated[
    int | None, typer.Option(help="Log-probabilities of the best so many tokens, in --json.", rich_help_panel=_sampling)
]

# Options that are fields of SamplingParams under the same name.
SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "ignore_eos",
    "logprobs",
)


@command
def generate(
    prompts: Prompts = None,
    file: File = None,
    field: PromptField = "prompt",
    template: opt.Template = None,
    whole: Whole = False,
    chat: Chat = False,
    model: opt.Model = None,
    max_tokens: MaxTokens = 128,
    min_tokens: MinTokens = 0,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    presence_penalty: Penalty = 0.0,
    frequency_penalty: Penalty = 0.0,
    seed: Seed = None,
    n: Number = 1,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    stream: Stream = None,
    as_json: opt.AsJson = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    threads: opt.Threads = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    memory_fraction: opt.MemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
    kv_dtype: opt.KvDtype = None,
    backend: opt.Backend = None,
) -> None:
    """Answer prompts. With --json each answer is a line of JSON, in the order of the prompts.

    The exit code is 1 if a prompt could not be answered; the others are.
    """
    given = locals()
    from hf_paged import Engine, SamplingParams
    from hf_paged.integrations.bench.models import load
    from hf_paged.integrations.cli.answers import answer_all, show_stream

    with users_values():
        params = SamplingParams(stop=tuple(stop or ()), **{name: given[name] for name in SAMPLING})
    settings = settings_of(given)
    texts = read_texts(prompts, file, field, opt.unescaped(template), whole)
    quiet_transformers()
    opt.set_threads(threads)
    loaded = load(model, dtype, device)
    ids = [encode(loaded.tokenizer, text, chat) for text in texts]
    if stream is None:
        stream = len(texts) == 1 and sys.stdout.isatty()
    with Engine(loaded.model, tokenizer=loaded.tokenizer, **settings) as engine:
        if stream and not as_json and n == 1:
            failed = sum(not show_stream(engine, text, prompt, params) for text, prompt in zip(texts, ids, strict=True))
        else:
            failed = answer_all(engine, texts, ids, params, as_json)
    if failed:
        raise typer.Exit(FAILURE)


def read_texts(prompts: list[str] | None, file: str | None, field: str, template: str | None, whole: bool) -> list[str]:
    """Prompts from one of the three places.

    Raises:
        BadInput: if there are none, or they are given in two places.
    """
    from hf_paged.integrations.bench.data import BadInput, read_prompts

    if file is not None and prompts:
        raise BadInput("give prompts as arguments or with --file, not both")
    if file is not None:
        return read_prompts(file, field, template)
    if prompts and prompts != ["-"]:
        texts = prompts
    elif sys.stdin.isatty() and not prompts:
        raise BadInput("no prompt: give one as an argument, with --file, or on stdin")
    else:
        text = sys.stdin.read()
        texts = [text.rstrip("\n")] if whole else [line for line in text.splitlines() if line.strip()]
    if not any(texts):
        raise BadInput("no prompt: stdin is empty" if not prompts or prompts == ["-"] else "the prompt is empty")
    return [template.replace(f"{{{field}}}", text) for text in texts] if template else texts


def encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt, as a user's message in a chat if asked for."""
    from hf_paged.integrations.bench.data import BadInput

    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput("--chat: the model's tokenizer has no chat template")
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
