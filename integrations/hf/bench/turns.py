"""Peers take turns: only one computes at a time, each is warm, and medians over the rounds count."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

from hf_paged.integrations.bench.peers import Peer
from hf_paged.integrations.bench.result import Run
from hf_paged.integrations.bench.workload import Workload

Note = Callable[[str], None]


def take_turns(
    peers: Sequence[Peer], load: Workload, repeats: int, note: Note, done: Callable[[], None]
) -> dict[str, list[Run]]:
    """Warm all peers, then run each in turn, `repeats` times over.

    Args:
        note: told what begins. done: called after each warm-up and each run.
    """
    for peer in peers:
        note(f"{peer.name}: warm-up")
        peer.warm(load)
        done()
    runs: dict[str, list[Run]] = {peer.name: [] for peer in peers}
    for turn in range(repeats):
        for peer in peers:
            note(f"{peer.name}: run {turn + 1} of {repeats}")
            gc.collect()
            runs[peer.name].append(peer.run(load))
            done()
    return runs
