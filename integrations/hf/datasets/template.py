"""From the columns of a row to its prompt: Jinja, plain fields, messages, or a function."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.readers import BadRow

JINJA = re.compile(r"\{\{|\{%|\{#")
FIELD = re.compile(r"\{([A-Za-z_][\w .-]*)\}")
FILES = (".txt", ".jinja", ".jinja2", ".j2", ".tmpl")


class RowFailed(ValueError):
    """A row that gives no prompt; the message says why."""


class ColumnMissing(RowFailed):
    """A row lacks a column that the template names."""


class Template:
    """Makes a prompt of a row: a text, a list of messages, or token ids.

    Args:
        source: a Jinja text (`{{ question }}`); a text with plain fields (`{question}`) where it holds no mark of
            Jinja's; a function of the row; or None: column `prompt`.
        messages: a column that holds a list of messages, instead of `source`.

    Raises:
        BadInput: it cannot be read as a template.
    """

    def __init__(self, source: str | Callable[[Mapping], Any] | None = None, *, messages: str | None = None) -> None:
        if messages is not None and source is not None:
            raise BadInput("give a template or a column of messages, not both")
        if not (source is None or isinstance(source, str) or callable(source)):
            raise BadInput(f"template is a {type(source).__name__}: give a text or a function")
        self.source, self.messages = source, messages
        self._render = self._made()

    @classmethod
    def load(cls, given: str, escapes: bool = False) -> Template:
        r"""The template in a file of this name (less its last newline), else this text.

        Args:
            escapes: the text comes from a shell: newlines for `\n`.

        Raises:
            BadInput: no such file, or no template.
        """
        try:
            path = Path(given).expanduser()
            found = "\n" not in given and path.is_file()
        except (OSError, RuntimeError, ValueError):  # a text that cannot be a name
            found = False
        if found:
            return cls(path.read_text(encoding="utf-8").removesuffix("\n"))
        if given.endswith(FILES) and not JINJA.search(given) and not FIELD.search(given):
            raise BadInput(f"template {given}: no such file")
        return cls(given.replace("\\n", "\n") if escapes else given)

    def __call__(self, row: Any) -> str | list[dict] | list[int]:
        """The prompt of a row.

        Raises:
            RowFailed: the row has none.
        """
        if isinstance(row, BadRow):
            raise RowFailed(row.reason)
        return self._render(row)

    def check(self, sample: Sequence[Any]) -> None:
        """Hold the template against the first good row.

        Raises:
            BadInput: it names a column that there is not, which would fail every row.
        """
        row = next((row for row in sample if isinstance(row, Mapping)), None)
        if row is None:
            return
        try:
            self._render(row)
        except ColumnMissing as error:
            raise BadInput(f"{error}; the dataset has {', '.join(map(str, row))}") from error
        except RowFailed:
            pass

    def describe(self) -> Any:
        """What a manifest keeps of it."""
        if self.messages is not None:
            return {"messages": self.messages}
        if not callable(self.source):
            return self.source
        name = f"{self.source.__module__}.{getattr(self.source, '__qualname__', type(self.source).__name__)}"
        try:
            text = inspect.getsource(self.source)
        except (OSError, TypeError):
            text = ""
        return {"function": name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "messages": self.messages}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._render = self._made()

    def _made(self) -> Callable[[Mapping], Any]:
        if self.messages is not None:
            return lambda row: _messages(_column(row, self.messages), self.messages)
        if self.source is None:
            return lambda row: _text(_column(row, "prompt"), "prompt")
        if callable(self.source):
            return self._called
        return _jinja(self.source) if JINJA.search(self.source) else self._filled

    def _filled(self, row: Mapping) -> str:
        return FIELD.sub(lambda found: _text(_column(row, found[1]), found[1]), self.source)

    def _called(self, row: Mapping) -> Any:
        try:
            made = self.source(row)
        except Exception as error:  # the user's own function: whatever it raises is this row's fault
            raise RowFailed(f"the template function failed: {type(error).__name__}: {error}") from error
        if isinstance(made, str) or (isinstance(made, list) and made and isinstance(made[0], int)):
            return made
        return _messages(made, "of the template function")


def _jinja(source: str) -> Callable[[Mapping], str]:
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
    from jinja2.sandbox import SandboxedEnvironment

    env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_no_none)
    try:
        compiled = env.from_string(source)
    except TemplateSyntaxError as error:
        raise BadInput(f"the template does not compile: line {error.lineno}: {error.message}") from error

    def render(row: Mapping) -> str:
        try:
            return compiled.render(row)
        except UndefinedError as error:
            raise ColumnMissing(f"the template names what the row has not: {error}") from error
        except RowFailed:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RowFailed(f"the template does not render: {type(error).__name__}: {error}") from error

    return render


def _no_none(value: Any) -> Any:
    if value is None:
        raise RowFailed("the template would print None: the row has no value there")
    return value


def _column(row: Mapping, name: str) -> Any:
    if name not in row:
        raise ColumnMissing(f"no column {name!r}")
    return row[name]


def _text(value: Any, name: str) -> str:
    if value is None or isinstance(value, (list, dict, bytes)):
        raise RowFailed(f"column {name!r} is a {type(value).__name__}, where text or a number should be")
    return str(value)


def _messages(value: Any, name: str) -> list[dict]:
    good = isinstance(value, list) and value and all(isinstance(m, Mapping) and "role" in m for m in value)
    if not good:
        raise RowFailed(f"messages {name} are no list of dicts with role and content: {str(value)[:80]}")
    return [dict(message) for message in value]
