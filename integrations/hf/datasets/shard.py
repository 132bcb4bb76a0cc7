"""Which rows of a dataset are this process's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _no_barrier() -> None:
    """One process waits for nobody."""


@dataclass(frozen=True)
class Shard:
    """Rows whose number leaves `rank` when divided by `world`.

    Attributes:
        rank: this process, 0 to `world` - 1. Process 0 prepares the output directory.
        world: processes that share the dataset.
        barrier: waits for all processes. It is called once, when process 0 has prepared the directory.

    Raises:
        ValueError: a rank outside of the world.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = _no_barrier

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"shard=({self.rank}, {self.world}): the first must be 0 to {self.world - 1}")

    def mine(self, row: int) -> bool:
        """Whether a row is this process's."""
        return row % self.world == self.rank

    @classmethod
    def of(cls, given: Shard | tuple[int, int]) -> Shard:
        """A shard as callers give it: itself, or `(rank, world)`."""
        return given if isinstance(given, Shard) else cls(*given)
