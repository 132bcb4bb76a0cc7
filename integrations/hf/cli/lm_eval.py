"""`hf-paged lm-eval`: lm-evaluation-harness's own command, with the model type `hf-paged`."""

from __future__ import annotations

import sys

import typer

from hf_paged.integrations.cli.console import command

# Everything behind the name goes to lm-eval, --help included.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@command
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness, with `--model hf-paged`: all arguments are those of `lm_eval`."""
    from hf_paged.integrations.bench.data import BadInput

    try:
        from lm_eval.__main__ import cli_evaluate

        import hf_paged.integrations.lm_eval  # noqa: F401  (registers the model type)
    except ImportError as error:
        raise BadInput(f"lm-eval is needed ({error}): pip install 'hf-paged[lm-eval]'") from error
    before = sys.argv
    sys.argv = ["lm-eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
