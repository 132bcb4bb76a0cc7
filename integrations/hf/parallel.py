"""Tensor parallelism: the processes that hold parts of one model, and how they stay in step.

Each process runs an engine of its own over its share of the KV heads. Collectives inside the model's forward pair off
only if all processes compute the same plans in the same order, so what a process cannot know of the others is agreed
on: the first one's seeds and times, the smallest pool, and before each forward whether all have the same plan. Callers
make the same calls in the same order in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import MaxTimeCriteria, StoppingCriteria

from hf_paged.config import EngineConfig, require
from hf_paged.plan import StepPlan

# Odd, so that each place of a plan counts; its products wrap around.
STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)


class OutOfStep(RuntimeError):
    """The processes of a tensor-parallel model do not do the same any more."""


class Team:
    """The processes that hold parts of one model.

    Args:
        group: of torch.distributed, with these processes.
        device: where its collectives work.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.leader = dist.get_global_rank(group, 0)
        self.failed = False

    @classmethod
    def of(cls, model: nn.Module) -> Team | None:
        """The processes of a model that was loaded with a `tp_plan`; None where one process holds it."""
        if (getattr(model, "_tp_size", None) or 1) == 1:
            return None
        shards = [p for p in model.parameters() if hasattr(p, "device_mesh")]
        if not shards:
            return None
        mesh = shards[0].device_mesh
        return cls(mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"), shards[0].device)

    def first(self, value: int | float) -> Any:
        """What the first process gives."""
        kind = torch.float64 if isinstance(value, float) else torch.int64
        return self._run(dist.broadcast, torch.tensor([value], dtype=kind, device=self.device), self.leader)[0].item()

    def least(self, value: int) -> int:
        """The smallest of all."""
        return self._reduce(torch.tensor([value], device=self.device), dist.ReduceOp.MIN)[0].item()

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.least(int(not flag)) == 0

    def same(self, plan: StepPlan) -> None:
        """Whether all processes are about to compute this plan.

        Raises:
            OutOfStep: they are not; all of them are told.
        """
        numbers = torch.cat([plan.token_ids, plan.positions, plan.rows.slots, plan.logits_at])
        places = torch.arange(1, len(numbers) + 1, device=numbers.device) * STRIDE
        digest = (numbers * places).sum() ^ len(numbers)
        low, high = self._reduce(torch.stack([digest, ~digest]), dist.ReduceOp.MIN).tolist()
        if low != ~high:
            raise OutOfStep(
                "the processes of this tensor-parallel model are about to compute different things: each must make "
                "the same calls, with the same arguments, in the same order"
            )

    def leave(self) -> None:
        """A step failed here: it is not known where the others are, so nothing more is done with them."""
        self.failed = True

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp) -> torch.Tensor:
        return self._run(dist.all_reduce, tensor, op)

    def _run(self, collective: Callable, tensor: torch.Tensor, how: Any) -> torch.Tensor:
        if self.failed:
            raise OutOfStep(
                "a step failed in this process of a tensor-parallel model, so that it is no longer in step with the "
                "others: start all processes again"
            )
        collective(tensor, how, group=self.group)
        return tensor


class InStep:
    """A forward that is made only if all processes make the same."""

    def __init__(self, forward: Callable[[StepPlan], torch.Tensor], team: Team) -> None:
        self.forward, self.team = forward, team

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        self.team.same(plan)
        return self.forward(plan)


class FirstClock(StoppingCriteria):
    """`max_time` by the clock of the first process."""

    def __init__(self, criterion: MaxTimeCriteria, team: Team) -> None:
        self.criterion, self.team = criterion, team

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        met = self.criterion(input_ids, scores, **kwargs)
        return torch.full_like(met, self.team.first(int(met.any())))


def by_one_clock(criteria: tuple[StoppingCriteria, ...], team: Team | None) -> tuple[StoppingCriteria, ...]:
    """The same criteria; where several processes ask them, those of transformers that look at a clock look at one."""
    if team is None:
        return criteria
    return tuple(FirstClock(c, team) if isinstance(c, MaxTimeCriteria) else c for c in criteria)


def refuse_tiers(config: EngineConfig) -> None:
    """Restoring from a second tier follows from measured speed, and its files name one process's share of the KV.

    Raises:
        ValueError: one is asked for.
    """
    for name in ("host_cache_bytes", "disk_cache"):
        value = getattr(config, name)
        require(not value, name, value, "the model is tensor-parallel, where there is no second tier")


def refuse_files(team: Team | None) -> None:
    """Files of prefixes hold all KV heads of a model; a process of a tensor-parallel one has a share of them.

    Raises:
        ValueError: the model is tensor-parallel.
    """
    if team is not None:
        raise ValueError("prefix files of a tensor-parallel model are not supported: load it in one process")
