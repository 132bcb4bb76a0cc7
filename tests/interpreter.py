"""Turns Triton's interpreter on where there is no GPU. Imported before whatever imports Triton, which reads it then."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_PAGED_TILES", "")  # none that somebody has measured
