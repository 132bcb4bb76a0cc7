"""`hf-paged tune`: tiles of the attention kernels, measured on the card that is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_paged.integrations.bench.kernels import Scale, Scene, errors, make_scene, seconds_of
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.throughput import Progress
from hf_paged.kernels.backends import CARD_ERRORS
from hf_paged.kernels.card import target_of
from hf_paged.kernels.launch import HeadShape, Target, TileConfig
from hf_paged.kernels.triton_path import paged_attention
from hf_paged.kernels.tuned import KINDS, candidates, key_of, other_splits, worked_out

WORTH = 0.98  # of the time of what is worked out: a smaller gain may be noise
LARGEST_ERROR = {
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
    torch.float32: 1e-4,
}  # against float64, of the largest value


@dataclass(frozen=True, eq=False)
class TunedScene(Scene):
    """A scene whose kernels are launched as `config` says."""

    config: TileConfig

    def call(self, layer: int) -> torch.Tensor:
        pages = self.layers[layer % len(self.layers)]
        return paged_attention(self.query, *pages, self.rows, scale=self.scale, tiles=lambda *_: self.config)


@dataclass(frozen=True)
class Trial:
    """What came of one configuration: seconds of a call (the geometric mean over scenes), or why it is of no use."""

    config: TileConfig
    seconds: float = math.inf
    error: str | None = None


# Seconds of one call of a scene.
Clock = Callable[[TunedScene, Scale], float]


def clock(scene: TunedScene, scale: Scale) -> float:
    """On the card, see `seconds_of`."""
    return seconds_of(scene.call, scale, max(4, len(scene.layers)))


def scenes_of(kind: str, scale: Scale) -> list[Scene]:
    """Steps that a kernel should be fast at: `bench kernels` has the same."""
    if kind == "decode":
        return [make_scene(scale, [1] * rows, [context] * rows) for rows, context in scale.decodes]
    if kind == "few":
        rows, tokens, context = scale.verify
        lone = max(context for _, context in scale.decodes)  # many rows alone would do best without any splits
        return [make_scene(scale, [tokens] * n, [slots] * n) for n, slots in ((rows, context), (1, context), (1, lone))]
    return [make_scene(scale, [scale.prefill], [scale.prefill])]


def attempt(config: TileConfig, scenes: Iterable[Scene], scale: Scale, clock: Clock = clock) -> Trial:
    """Try a configuration: its numbers must be right before its time counts.

    Raises:
        torch.OutOfMemoryError, torch.AcceleratorError: what the card reports of itself; nothing can follow.
    """
    logs = []
    try:
        for scene in scenes:
            tuned = TunedScene(scene.query, scene.layers, scene.rows, scene.scale, config)
            error = errors(tuned, scale)["relative_error"]
            if not error <= LARGEST_ERROR[scale.dtype]:
                return Trial(config, error=f"relative error {error:.1e}")
            logs.append(math.log(clock(tuned, scale)))
    except CARD_ERRORS:
        raise
    except Exception as error:  # it does not compile, or takes more than the card has
        return Trial(config, error=f"{type(error).__name__}: {str(error).strip()[:200]}")
    return Trial(config, math.exp(sum(logs) / len(logs)))


def search(kind: str, shape: HeadShape, target: Target, attempt: Callable[[TileConfig], Trial]) -> list[Trial]:
    """Trials, the worked out configuration first: all tiles with its splits, then the best tiles with other splits."""
    trials = [attempt(worked_out(kind, shape, target))]
    trials += map(attempt, candidates(kind, shape, target))
    best = min(trials, key=lambda trial: trial.seconds)
    return trials + [attempt(config) for config in other_splits(best.config)]


def run_tune(
    scale: Scale, progress: Progress | None = None, clock: Clock = clock
) -> tuple[dict[str, Any], dict[str, TileConfig]]:
    """Measure all kernels for one shape.

    Returns:
        a report: the card, and of each kernel what was chosen, what is worked out, their times, and what failed;
        tiles to keep, by `key_of`: only those that are faster than what is worked out.
    """
    progress = progress or Progress()
    target = target_of(torch.device(scale.device))
    group, itemsize = scale.heads // scale.kv_heads, scale.dtype.itemsize
    shape = HeadShape(group, scale.kv_heads, scale.dim, scale.dim, itemsize, scale.page_size)
    progress.plan(sum(6 + len(list(candidates(kind, shape, target))) for kind in KINDS))
    kernels, chosen = {}, {}
    for kind in KINDS:
        scenes = scenes_of(kind, scale)

        def tried(config: TileConfig, kind: str = kind, scenes: list[Scene] = scenes) -> Trial:
            progress.note(f"{kind} {config.block_m}×{config.block_n}, {config.warps} warps, {config.stages} stages")
            trial = attempt(config, scenes, scale, clock)
            progress.done()
            return trial

        trials = search(kind, shape, target, tried)
        best = faster(trials)
        if best is not trials[0]:
            chosen[key_of(kind, shape)] = best.config
        kernels[kind] = told(trials, best)
    heads = [scale.heads, scale.kv_heads, scale.dim]
    report = {
        "benchmark": "tune",
        "card": asdict(target),
        "heads": heads,
        "dtype": str(scale.dtype),
        "kernels": kernels,
    }
    return {**report, "machine": machine()}, chosen


def faster(trials: list[Trial]) -> Trial:
    """The fastest, unless it hardly gains on the first, which is what is worked out."""
    best = min(trials, key=lambda trial: trial.seconds)
    return best if best.seconds < WORTH * trials[0].seconds else trials[0]


def told(trials: list[Trial], best: Trial) -> dict[str, Any]:
    """What is reported of a kernel."""
    return {
        "chosen": asdict(best.config),
        "seconds": best.seconds,
        "worked_out": asdict(trials[0].config),
        "worked_out_seconds": trials[0].seconds,
        "tried": len(trials),
        "failed": [{"config": asdict(trial.config), "error": trial.error} for trial in trials if trial.error],
    }
