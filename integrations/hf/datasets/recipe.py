"""How a row becomes a request: prompt, tokens, parameters, seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.template import RowFailed, Template
from hf_paged.ordering import depth_first
from hf_paged.params import SamplingParams
from hf_paged.seeds import mix_seed

POLICIES = ("fail", "truncate-left")
GREEDY = SamplingParams(temperature=0.0, max_tokens=256)


@dataclass(frozen=True)
class Recipe:
    """All that decides what is generated for a row, beside the model. Pickles where its template does.

    Attributes:
        template: row → prompt.
        chat: put a prompt that is text into the tokenizer's chat template, as a user's turn.
        sampling: for all rows; the seed in it is not used.
        seed: of the run; row `i` is drawn with `mix_seed(seed, i)`.
        too_long: a prompt that does not fit beside `max_tokens` fails its row (`fail`), or loses its first tokens
            (`truncate-left`).

    Raises:
        BadInput: on a value that cannot be used.
    """

    template: Template = field(default_factory=Template)
    chat: bool = False
    sampling: SamplingParams = GREEDY
    seed: int = 0
    too_long: str = "fail"

    def __post_init__(self) -> None:
        if self.too_long not in POLICIES:
            raise BadInput(f"too_long={self.too_long!r}: must be one of {', '.join(POLICIES)}")
        if self.sampling.num_samples != 1:
            raise BadInput(f"sampling.n={self.sampling.num_samples}: a row has one completion; give n=1")
        if self.sampling.max_tokens is None:
            raise BadInput("sampling.max_tokens=None: must be a number")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise BadInput(f"seed={self.seed!r}: must be an integer")

    def params(self, row: int) -> SamplingParams:
        """Parameters of a row."""
        return self.sampling if self.sampling.greedy else replace(self.sampling, seed=mix_seed(self.seed, row))

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of it: as JSON gives it back."""
        sampling = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.sampling).items() if k != "seed"}
        sampling["logits_processors"] = [type(p).__name__ for p in self.sampling.logits_processors]
        return {
            "template": self.template.describe(),
            "chat": self.chat,
            "sampling": {
                k: {str(t): b for t, b in v.items()} if isinstance(v, dict) else v for k, v in sampling.items()
            },
            "seed": self.seed,
            "too_long": self.too_long,
        }


@dataclass(slots=True)
class Prepared:
    """A row ready to be queued.

    Attributes:
        row: its number.
        prompt: its text; None where there is none.
        ids: its tokens.
        truncated: tokens that were cut off its beginning.
        error: why it cannot be queued.
    """

    row: int
    prompt: str | None = None
    ids: list[int] = field(default_factory=list)
    truncated: int = 0
    error: str | None = None


class Ingest:
    """Rows into tokens, a batch at a time. Has a tokenizer of its own: the engine decodes in another thread.

    Args:
        tokenizer: of the model.
        room: tokens that a prompt may have.
        page_size: tokens a page.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, room: int, page_size: int) -> None:
        from copy import deepcopy

        if tokenizer is None:
            raise BadInput("no tokenizer: give one, or an engine that has one")
        self.recipe, self.room, self.page_size = recipe, room, page_size
        self.tokenizer = deepcopy(tokenizer)
        needs_chat = recipe.chat or recipe.template.messages is not None
        if needs_chat and not getattr(tokenizer, "chat_template", None):
            raise BadInput("the model's tokenizer has no chat template: give a plain template")

    def __call__(self, rows: Sequence[tuple[int, Any]]) -> list[Prepared]:
        """Prepare rows, in the order in which they share prefixes best; those that failed come first."""
        made = [Prepared(number) for number, _ in rows]
        plain, chats = [], []
        for ready, (_, row) in zip(made, rows, strict=True):
            try:
                self._render(ready, row, plain, chats)
            except RowFailed as error:
                ready.error = str(error)
        self._tokenise(plain, special=True)
        self._tokenise(chats, special=False)
        good = [ready for ready in made if ready.error is None]
        for ready in good:
            self._fit(ready)
        lengths = [self.recipe.sampling.max_tokens] * len(good)
        order = depth_first([r.ids for r in good], lengths, [0] * len(good), self.page_size) if good else []
        return [ready for ready in made if ready.error is not None] + [good[i] for i in order]

    def _render(self, ready: Prepared, row: Any, plain: list[Prepared], chats: list[Prepared]) -> None:
        prompt = self.recipe.template(row)
        if isinstance(prompt, str) and self.recipe.chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            ready.prompt = prompt
            plain.append(ready)
        elif isinstance(prompt[0], dict):
            ready.prompt = self._chat(prompt)
            chats.append(ready)
        else:
            ready.ids, ready.prompt = list(prompt), self.tokenizer.decode(prompt)

    def _chat(self, messages: list[dict]) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a chat template is a program of its author's: it may raise anything
            raise RowFailed(f"the chat template failed: {type(error).__name__}: {error}") from error

    def _tokenise(self, batch: list[Prepared], special: bool) -> None:
        """Ids as `tokenizer(text)` gives them; a text that cannot be encoded fails alone."""
        if not batch:
            return
        try:
            ids = self._encode([ready.prompt for ready in batch], special)
        except Exception as error:  # what a tokenizer raises is its own affair
            if len(batch) == 1:
                batch[0].error = f"the prompt cannot be tokenised: {type(error).__name__}: {error}"
                return
            for ready in batch:
                self._tokenise([ready], special)
            return
        for ready, tokens in zip(batch, ids, strict=True):
            ready.ids = tokens

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def _fit(self, ready: Prepared) -> None:
        """Cut a long prompt's beginning off, but for the token that opens every text, where that is asked for."""
        over = len(ready.ids) - self.room
        if over <= 0 or self.recipe.too_long == "fail":
            return
        opening = ready.ids[:1] if ready.ids[0] == self.tokenizer.bos_token_id else []
        ready.ids = opening + ready.ids[over + len(opening) :]
        ready.truncated = over
