"""Which rows of a dataset are this process's."""

from __future__ import annotations

import os
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
    def of(cls, given: Shard | tuple[int, int] | None) -> Shard:
        """A shard as callers give it: itself, `(rank, world)`, or None for what the environment says."""
        if given is None:
            return cls.from_environment()
        return given if isinstance(given, Shard) else cls(*given)

    @classmethod
    def from_environment(cls) -> Shard:
        """What `accelerate launch` has set for this process; (0, 1) without it.

        `RANK` and `WORLD_SIZE` alone do not count: processes of one tensor-parallel model have them, too, and all of
        those compute every row.
        """
        launched = any(name.startswith("ACCELERATE_") for name in os.environ)
        if not launched or "WORLD_SIZE" not in os.environ:
            return cls()
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
