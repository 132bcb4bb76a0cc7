"""Turns Triton's interpreter on where there is no GPU. Imported before whatever imports Triton, which reads it then."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_PAGED_TILES", "")  # none that somebody has measured


@pytest.fixture
def exact_products(monkeypatch):
    """Products whose bits do not depend on how many columns are computed at once, as a card's do not and numpy's do."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def product(_, a, b, d, *__):
        exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
