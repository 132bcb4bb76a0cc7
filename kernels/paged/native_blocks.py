"""A whole forward over a few lines in one compiled call: `csrc/blocks.c`. Optional.

For a request alone, the calls from Python to a forward's ops take longer than the ops.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from hf_paged.kernels.native import address, native_ops
from hf_paged.kernels.rows import PagedRows
from hf_paged.kernels.torch_path import grouped_step, seen_by

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# Of a block, as in `model_block` of `blocks.h`: weight and bias of each, weights of norms, pages, what is seen.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("norm", "mlp_norm", "q_norm", "k_norm")
FIELDS = 2 * len(LINEARS) + len(NORMS) + 3
FREQUENCIES = 1  # the field of `ends` for angles a place of the rotation; 0: they are given with the lines


@dataclass(frozen=True, eq=False)
class FewModel:
    """A model of pre-norm blocks of rotary attention and gated MLP; all tensors float32 on the CPU, contiguous.

    Attributes:
        ends: int64, the fields of `ends` in `blocks.h`.
        blocks: int64 `[blocks, FIELDS]`, addresses, but for what is seen. windows: of each block.
        sizes: width, that of the MLP, heads, KV heads, head_dim, and whether weights are tiles.
        outputs: logits a line. most: lines that pay.
        turn: factor of cosines and sines, where `ends` names frequencies.
        scale: of products of queries and keys. eps: of all norms.
        kept: what holds weights that are nobody else's.
    """

    ends: np.ndarray
    blocks: np.ndarray
    windows: list[int | None]
    sizes: tuple[int, int, int, int, int, int]
    outputs: int
    most: int
    turn: float
    scale: float
    eps: float
    kept: object = None

    @cached_property
    def places(self) -> tuple[int, int, int]:
        """Where `ends` and `blocks` lie, and how many of these there are."""
        return address(self.ends), address(self.blocks), len(self.blocks)

    @cached_property
    def slots(self) -> int:
        """Slots of a row up to which no window hides any."""
        return min((window for window in self.windows if window is not None), default=1 << 60)

    @property
    def sharing(self) -> int:
        """Heads of a query that share keys."""
        return self.sizes[2] // self.sizes[3]

    @cached_property
    def kinds(self) -> set[int | None]:
        """Windows that there are."""
        return set(self.windows)


class ForwardOp:
    """Tokens to logits."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.few_forward
        self._run.argtypes = [_P, _P, _P, _I, _P, _P, _P, _P, _F, _F, _F]

    def __call__(
        self,
        model: FewModel,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_at: torch.Tensor,
        rows: PagedRows,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Logits `[len(logits_at), outputs]`; KV of the tokens is stored in `rows.slots`.

        Args:
            token_ids, positions: int64 `[tokens]`. logits_at: int64, tokens whose logits are wanted.
            rows: of the step; every token is a query of it.
            rotation: cosines and sines `[tokens, head_dim]`; None where `model` names frequencies.

        Raises:
            IndexError: a token that the model does not have.
            MemoryError: there was none for the lines' numbers on their way.
        """
        sights = {window: _sight(rows, window, model.sharing) for window in model.kinds}
        at = {window: address(sight) for window, sight in sights.items()}
        model.blocks[:, -1] = [at[window] for window in model.windows] if len(at) > 1 else at[model.windows[0]]
        table, out = rows.page_table, torch.empty(len(logits_at), model.outputs)
        shape = np.array([len(token_ids), *model.sizes, rows.page_size, table.shape[1]], np.int64)
        tensors = token_ids.data_ptr(), positions.data_ptr(), rows.slots.data_ptr()
        inputs = np.array([*tensors, address(table), logits_at.data_ptr(), len(logits_at)], np.int64)
        cos, sin = (None, None) if rotation is None else (part.data_ptr() for part in rotation)
        places = *model.places, address(shape), address(inputs)
        failed = self._run(out.data_ptr(), *places, cos, sin, model.turn, model.scale, model.eps)
        if failed == 2:
            raise IndexError(f"a token of {token_ids.tolist()} is none of the model's")
        if failed:
            raise MemoryError(f"no memory for {len(token_ids)} lines of {model.sizes[0]} numbers")
        return out


def see_all(model: FewModel, rows: PagedRows) -> np.ndarray | None:
    """Tell all blocks that attention sees all of a step's rows: windows do not hide anything.

    Returns:
        the first slot of each row that is in no group; None where there are no groups.
    """
    model.blocks[:, -1] = address(_sight(rows, None, model.sharing))
    step = grouped_step(rows, None, model.sharing)
    return None if step is None else step.groups.own


def _sight(rows: PagedRows, window: int | None, heads: int) -> np.ndarray:
    """The fields of `sight` in `blocks.h`. What they point to lives as long as `rows`."""

    def make() -> np.ndarray:
        step = grouped_step(rows, window, heads)
        if step is not None:
            return np.array([step.address, 0, 0, 0, 0, 0], np.int64)
        seen = seen_by(rows, window)
        arrays = seen.line_of, seen.context, seen.begin, seen.visible, seen.base
        return np.array([0, *(address(array) or 0 for array in arrays)], np.int64)

    return rows.derived(("sight", window, heads), make)


@lru_cache(maxsize=1)
def forward_op() -> ForwardOp | None:
    """The compiled op, or None where there is none."""
    ops = native_ops()
    return None if ops is None else ForwardOp(ops.library)
