"""A lean forward over a few lines: the compiled op, and addresses of weights, looked up every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from hf_paged.kernels.native_blocks import FIELDS, FREQUENCIES, LINEARS, NORMS, FewModel, forward_op
from hf_paged.plan import StepPlan

if TYPE_CHECKING:
    from hf_paged.integrations.lean import LeanForward
    from hf_paged.integrations.tiled import TiledLinear


class FewLines:
    """What `LeanForward` does for a few lines, in one compiled call.

    The forward is given every time, its `layers` may be cut short; two that held each other would outlive the model.
    """

    def __init__(self) -> None:
        self.op = forward_op()
        self._places: list[tuple[dict[str, nn.Module], str]] = []
        self._modules: list[nn.Module | None] = []
        self._parameters: list[dict[str, nn.Parameter | None]] = []
        self._seen: list[int] = []
        self._model: FewModel | None = None
        self._tiles: TiledLinear | None = None
        self._vouched: object | None = None  # who vouched for the weights when they were looked at last

    def fit(self, lean: LeanForward) -> bool:
        """Whether the op serves the weights as they are now; where they are is known then."""
        layers, vouched = lean.layers, lean.vouched
        if vouched is not None and vouched is self._vouched:
            return self._model is not None
        if self.op is None or not layers:
            return False
        if len(self._places) != len(layers) * (len(LINEARS) + len(NORMS)) + 3:
            self._look(lean)
        modules = [modules.get(name) for modules, name in self._places]
        if modules != self._modules:
            self._modules, self._seen = modules, []
            self._parameters = [module._parameters if module is not None else {} for module in modules]
        parts = [part.get(name) for part in self._parameters for name in ("weight", "bias")]
        parts += _frequencies(lean.rotary), *lean.store.keys, *lean.store.values
        found = [0 if part is None else part.data_ptr() for part in parts]
        tiles = lean.tiled()
        if found != self._seen or tiles is not self._tiles:
            self._seen, self._tiles = found, tiles
            self._model = self._made(lean, found)
        self._vouched = vouched
        return self._model is not None

    def _look(self, lean: LeanForward) -> None:
        """Which modules there are, by the dicts that hold them."""
        self._places = []
        for layer in lean.layers:
            attention, mlp = layer.attention._modules, layer.mlp._modules
            self._places += [(attention if name in attention else mlp, name) for name in LINEARS]
            outer = {"norm": layer.norm, "mlp_norm": layer.mlp_norm}
            self._places += [(outer if name in outer else attention, name) for name in NORMS]
        ends = {"embed": lean.embed, "norm": lean.norm, "head": lean.head}
        self._places += [(ends, name) for name in ends]

    def _made(self, lean: LeanForward, found: list[int]) -> FewModel | None:
        """The op's model; None where a weight does not lie as it must, or norms differ."""
        layers = lean.layers
        whole = all(p.is_contiguous() for part in self._parameters for p in part.values() if p is not None)
        eps = {norm.variance_epsilon for norm in (lean.norm, *(norm for layer in layers for norm in layer.norms()))}
        widths = {layer.mlp.gate_proj.weight.shape[0] for layer in layers}
        key, dim, count = lean.store.keys[0], lean.head_dim, len(layers) * 2 * (len(LINEARS) + len(NORMS))
        heads = {layer.attention.q_proj.weight.shape[0] // dim for layer in layers}
        if not whole or len(eps) > 1 or len(widths) > 1 or len(heads) > 1:
            return None
        (vocab, width), outputs = lean.embed.weight.shape, len(lean.head.weight)
        blocks = np.zeros((len(layers), FIELDS), np.int64)
        weights, ends, angles, *pages = found[:count], found[count : count + 6], *found[count + 6 :]
        weights = np.array(weights, np.int64).reshape(len(layers), -1, 2)
        blocks[:, : 2 * len(LINEARS)] = weights[:, : len(LINEARS)].reshape(len(layers), -1)
        blocks[:, 2 * len(LINEARS) : -3] = weights[:, len(LINEARS) :, 0]
        blocks[:, -3:-1] = np.array(pages, np.int64).reshape(2, -1).T[: len(layers)]
        embed, _, norm, _, head, bias = ends
        if (tiles := self._tiles) is not None:
            head, bias = tiles.addresses(lean.head)
            for block, layer in zip(blocks, layers, strict=True):
                block[: 2 * len(LINEARS)] = tiles.fields(layer.attention, layer.mlp)
        return FewModel(
            ends=np.array([embed, angles, norm, head, bias, vocab, outputs], np.int64),
            blocks=blocks,
            windows=[layer.window for layer in layers],
            sizes=(width, widths.pop(), heads.pop(), key.shape[1], dim, int(tiles is not None)),
            outputs=outputs,
            most=lean.most_lines(tiles),
            turn=float(getattr(lean.rotary, "attention_scaling", 1.0)),
            scale=lean.scale,
            eps=eps.pop(),
            kept=tiles,
        )

    def model(self, lean: LeanForward) -> FewModel | None:
        """What the op takes of the forward and its pages; None where it does not serve."""
        return self._model if self.fit(lean) else None

    def __call__(self, lean: LeanForward, plan: StepPlan) -> torch.Tensor:
        """As `LeanForward`; `fit` has said so."""
        model, rotation = self._model, None
        if not model.ends[FREQUENCIES]:
            with torch.no_grad():
                hidden = lean.embed.weight[None, :1]  # for its dtype and device
                rotation = lean.between.rotation(*(part[0] for part in lean.rotary(hidden, plan.positions[None])))
        return self.op(model, plan.token_ids, plan.positions, plan.logits_at, plan.rows, rotation)


def _frequencies(rotary: nn.Module) -> torch.Tensor | None:
    """Angles a place of a rotation that is the same for texts of any length; None where the module must be asked."""
    kind, found = getattr(rotary, "rope_type", "dynamic"), rotary._buffers.get("inv_freq")
    steady = "dynamic" not in kind and kind != "longrope" and found is not None
    return found if steady and found.dtype == torch.float32 and found.is_contiguous() else None
