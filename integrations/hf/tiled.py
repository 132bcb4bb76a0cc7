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
        groups: dict[nn.Module, list[nn.Linear]] = {}
        for attention, mlp in zip(attentions, mlps, strict=True):
            groups[attention] = [getattr(attention, name) for name in HEADS]
            groups[mlp] = [getattr(mlp, name) for name in MLP]
            groups |= {layer: [layer] for layer in (attention.o_proj, mlp.down_proj)}
        groups[head] = [head]
        given = {key: [parameters(layer) for layer in layers] for key, layers in groups.items()}
        if not all(map(ops.likely, given.values())):  # soon seen, before anything is copied
            return None
        sizes = [ops.size(layers, gated=key in mlps) for key, layers in given.items()]
        rooms = ops.room(sum(sizes)).split(sizes)
        of: dict[nn.Module, Tiles] = {}
        for (key, layers), room in zip(given.items(), rooms, strict=True):
            tiles = ops.tiles(layers, key in mlps, room)
            if tiles is None:
                return None
            of[key] = tiles
        return cls(ops, of, [layer for layers in groups.values() for layer in layers])

    @property
    def most(self) -> int:
        """Lines up to which these are faster than a matrix library's."""
        return self.ops.most

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self.ops.linear(x, self.of[layer])

    def heads(self, x: torch.Tensor, attention: nn.Module) -> tuple[torch.Tensor, ...]:
        sizes = [getattr(attention, name).out_features for name in HEADS]
        return self.ops.linear(x, self.of[attention]).split(sizes, -1)

    def gated(self, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        return self.ops.linear(x, self.of[mlp], gated=True)

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.of[layer], add=other)

    def addresses(self, key: nn.Module) -> tuple[int, int]:
        """Of the tiles of one of `of`, and of their bias or 0."""
        tiles = self.of[key]
        return tiles.weight.data_ptr(), 0 if tiles.bias is None else tiles.bias.data_ptr()

    def fields(self, attention: nn.Module, mlp: nn.Module) -> list[int]:
        """Of a block, as `blocks.c` takes them: of layers that are one, the first."""
        none = (0, 0)
        joined = self.addresses(attention), none, none, self.addresses(attention.o_proj)
        return [at for part in (*joined, self.addresses(mlp), none, self.addresses(mlp.down_proj)) for at in part]
