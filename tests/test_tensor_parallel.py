"""Models that transformers spreads over processes (`tp_plan="auto"`): the tokens of one process, or a named end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_worker as worker
import torch
from conftest import MODELS, tiny_llama

import hf_paged
from hf_paged import Engine

pytestmark = pytest.mark.slow
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(what: str, folder: Path, *paths: Path) -> list[dict[str, Any]]:
    """What two processes of the worker saw."""
    out = folder / "seen"
    command = [*TWO, worker.__file__, what, str(out), *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    files = [Path(f"{out}.{rank}") for rank in (0, 1)]
    assert all(file.exists() for file in files), run.stderr[-5000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target of four layers and a draft, both random."""
    paths = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    for seed, path in enumerate(paths):
        tiny_llama(seed, num_hidden_layers=4 - 3 * seed, num_attention_heads=8).save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def seen(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("equal", tmp_path_factory.mktemp("seen"), *models)


@pytest.fixture(scope="module")
def alone(models: tuple[Path, Path]) -> dict[str, Any]:
    """The same in one process."""
    yield worker.cases(worker.load(models[0]), worker.load(models[1]), 0)
    hf_paged.disable()


def test_tokens_are_those_of_one_process(seen, alone):
    for rank in (0, 1):
        for name, tokens in alone.items():
            assert seen[rank][name] == tokens, (rank, name)
    assert len({str(alone[name]) for name in ("mixed", "again", "changed")}) == 3


def test_time_is_up_for_all_when_it_is_for_the_first(alone):
    assert len(alone["max_time"][0]) == len(worker.PROMPTS[0]) + 1


def test_each_process_holds_its_share_of_as_many_pages_as_the_smallest_has_room_for(seen):
    assert [s["kv_heads"] for s in seen] == [1, 1]
    assert seen[0]["pages"] == seen[1]["pages"]
    page = 4 * 2 * 16 * 4 * 4  # layers, keys and values, tokens, a head of four numbers of four bytes
    assert seen[0]["pages"] == int(2**23 * 0.4) // page


def test_what_needs_whole_kv_or_a_clock_is_refused_by_name(seen):
    for said in (s["refused"] for s in seen):
        assert "disk_cache" in said[0] and "tensor-parallel" in said[0]
        assert all("prefix files of a tensor-parallel model" in text for text in said[1:])


def test_processes_that_ask_for_different_things_are_told_so(seen):
    for said in (s["diverged"] for s in seen):
        assert said[0].startswith("OutOfStep") and "the same calls" in said[0]
        assert said[1].startswith("OutOfStep") and "start all processes again" in said[1]


def test_a_failure_in_one_process_ends_the_other(models, tmp_path):
    first, second = launch("failure", tmp_path, models[0], models[1])
    assert second["said"] == ["Broken", "OutOfStep"]
    assert first["said"][0] == "RuntimeError" and first["said"][1] == "OutOfStep"


def test_bundled_model(tmp_path):
    target = MODELS / "target"
    first, second = launch("bundled", tmp_path, target, target)
    torch.manual_seed(0)
    expected = Engine(worker.load(target), num_pages=64)
    assert first == second
    assert [len(tokens) for tokens in first["tokens"]] == [12] * 4
    assert worker.engine_tokens(expected, worker.GREEDY)[::2] == first["tokens"][::2]
