"""Linear layers over copies of their weights in tiles of bfloat16: for weights that came from such a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_paged.integrations.copies import Watched
from hf_paged.integrations.linear import TorchLinear, parameters
from hf_paged.kernels.native_tiles import TileOps, Tiles

HEADS, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class TiledLinear(TorchLinear, Watched):
    """The same as `TorchLinear`, over copies half as large; made by `build`.

    Attributes:
        of: tiles of an attention's queries, keys and values, of an MLP's gate and up, and of single layers.
    """

    def __init__(self, ops: TileOps, of: dict[nn.Module, Tiles], layers: Sequence[nn.Linear]) -> None:
        self.ops, self.of = ops, of
        self.watch(layers)

    @classmethod
    def build(
        cls, ops: TileOps, attentions: Sequence[nn.Module], mlps: Sequence[nn.Module], head: nn.Linear
    ) -> TiledLinear | None:
        """None where a weight is not exact in bfloat16."""
        of: dict[nn.Module, Tiles] = {}
        seen: list[nn.Linear] = []
        for attention, mlp in zip(attentions, mlps, strict=True):
            for key, names in ((attention, HEADS), (attention.o_proj, ()), (mlp, MLP), (mlp.down_proj, ())):
                layers = [getattr(key, name) for name in names] or [key]
                seen += layers
                of[key] = ops.tiles([parameters(layer) for layer in layers], gated=names == MLP)
                if of[key] is None:
                    return None
        of[head] = ops.tiles([parameters(head)])
        return None if of[head] is None else cls(ops, of, [*seen, head])

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self.ops.linear(x, self.of[layer])

    def heads(self, x: torch.Tensor, attention: nn.Module) -> tuple[torch.Tensor, ...]:
        sizes = [getattr(attention, name).out_features for name in HEADS]
        return self.ops.linear(x, self.of[attention]).split(sizes, -1)

    def gated(self, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        return self.ops.linear(x, self.of[mlp], gated=True)

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.of[layer], add=other)

    @property
    def address(self) -> int:
        """Where the first of the copies lies."""
        return next(iter(self.of.values())).weight.data_ptr()

    def addresses(self, key: nn.Module) -> tuple[int, int]:
        """Of the tiles of one of `of`, and of their bias or 0."""
        tiles = self.of[key]
        return tiles.weight.data_ptr(), 0 if tiles.bias is None else tiles.bias.data_ptr()

    def fields(self, attention: nn.Module, mlp: nn.Module) -> list[int]:
        """Of a block, as `blocks.c` takes them: of layers that are one, the first."""
        none = (0, 0)
        joined = self.addresses(attention), none, none, self.addresses(attention.o_proj)
        return [at for part in (*joined, self.addresses(mlp), none, self.addresses(mlp.down_proj)) for at in part]
