"""A lean forward's blocks over a few lines: the compiled op, and addresses of weights, looked up every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from hf_paged.kernels.native_blocks import FIELDS, LINEARS, NORMS, block_ops
from hf_paged.plan import StepPlan

if TYPE_CHECKING:
    from hf_paged.integrations.lean import LeanForward


class FewLines:
    """What `LeanForward` does for a few lines, its blocks in one compiled call.

    The forward is given every time, its `layers` may be cut short; two that held each other would outlive the model.
    """

    def __init__(self) -> None:
        self.ops = block_ops()
        self._places, self._seen, self._table = [], [], None
        self._eps, self._sizes = 0.0, (0, 0, 0, 0)

    def fit(self, lean: LeanForward) -> bool:
        """Whether the op serves the weights as they are now; where they are is known then."""
        layers = lean.layers
        if self.ops is None or not layers:
            return False
        if len(self._places) != len(layers) * (len(LINEARS) + len(NORMS)):
            self._look(lean)
        parts = [modules[name]._parameters if name in modules else {} for modules, name in self._places]
        pairs = [(part.get("weight"), part.get("bias")) for part in parts]
        found = [0 if p is None else p.data_ptr() for pair in pairs for p in pair]
        if found != self._seen:
            self._seen, self._table = found, self._made(lean, found)
        return self._table is not None

    def _look(self, lean: LeanForward) -> None:
        """Which modules there are, by the dicts that hold them."""
        self._places = []
        for layer in lean.layers:
            attention, mlp = layer.attention._modules, layer.mlp._modules
            self._places += [(attention if name in attention else mlp, name) for name in LINEARS]
            outer = {"norm": layer.norm, "mlp_norm": layer.mlp_norm}
            self._places += [(outer if name in outer else attention, name) for name in NORMS]

    def _made(self, lean: LeanForward, found: list[int]) -> np.ndarray | None:
        """The op's table, `[blocks, FIELDS]`; None where a weight does not lie as it must, or norms differ."""
        layers = lean.layers
        parts = [modules[name] for modules, name in self._places if modules.get(name) is not None]
        whole = all(p.is_contiguous() for part in parts for p in part._parameters.values() if p is not None)
        eps = {norm.variance_epsilon for layer in layers for norm in layer.norms()}
        widths = {layer.mlp.gate_proj.weight.shape[0] for layer in layers}
        key, dim = lean.store.keys[0], lean.head_dim
        heads = {layer.attention.q_proj.weight.shape[0] // dim for layer in layers}
        if not whole or len(eps) > 1 or len(widths) > 1 or len(heads) > 1:
            return None
        self._eps, self._sizes = eps.pop(), (widths.pop(), heads.pop(), key.shape[1], dim)
        parts = np.array(found, np.int64).reshape(len(layers), -1, 2)
        norms = parts[:, len(LINEARS) :, 0]
        table = np.zeros((len(layers), FIELDS), np.int64)
        table[:, :-3] = np.concatenate([parts[:, : len(LINEARS)].reshape(len(layers), -1), norms], 1)
        return table

    def __call__(self, lean: LeanForward, plan: StepPlan) -> torch.Tensor:
        """As `LeanForward`; `fit` has said so."""
        hidden = F.embedding(plan.token_ids, lean.embed.weight)
        rotation = lean.between.rotation(*(part[0] for part in lean.rotary(hidden[None], plan.positions[None])))
        for index in range(len(lean.layers)):
            pages = lean.store.keys[index], lean.store.values[index]
            self._table[index, -3:-1] = pages[0].data_ptr(), pages[1].data_ptr()
        windows = [layer.window for layer in lean.layers]
        self.ops(hidden, self._table, windows, plan.rows, rotation, self._sizes, lean.scale, self._eps)
        if len(plan.logits_at) < plan.tokens:
            hidden = hidden[plan.logits_at]
        return lean.few.linear(lean.between.rms_norm(hidden, lean.norm), lean.head)
