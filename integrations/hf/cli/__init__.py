"""The `hf-paged` command line: `demo`, `generate`, `eval`, `bench`, `info`."""

from hf_paged.integrations.cli.app import app, main

__all__ = ["app", "main"]
