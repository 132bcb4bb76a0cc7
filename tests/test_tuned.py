"""Tiles that were measured on a card: kept, read, refused, chosen."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from kernel_cases import Case, make
from typer.testing import CliRunner

from hf_paged.integrations.cli.app import app
from hf_paged.kernels import launch, paged_attention, tuned
from hf_paged.kernels.tuned import KINDS, candidates, fits, key_of, read_table, tiles_of, worked_out, write_table

CARD = launch.Target("cuda", "sm_90", 132)
SHAPE = launch.HeadShape(4, 8, 128, 128, 2, 16)
KEY = key_of("decode", SHAPE)
OTHER = replace(worked_out("decode", SHAPE, CARD), block_n=16, stages=2, split=256)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A file with one entry, which engines look for."""
    path = tmp_path / "cache" / "tiles.json"
    write_table(path, CARD, {KEY: OTHER})
    monkeypatch.setenv("HF_PAGED_TILES", str(path))
    tuned.table_of.cache_clear()
    yield path
    tuned.table_of.cache_clear()


def test_measured_tiles_are_used_for_their_shape_alone(kept):
    assert tiles_of("decode", SHAPE, CARD) == OTHER
    assert tiles_of("decode", replace(SHAPE, page_size=64), CARD) == OTHER
    for kind, shape in (("few", SHAPE), ("many", SHAPE), ("decode", replace(SHAPE, group=8))):
        assert tiles_of(kind, shape, CARD) == worked_out(kind, shape, CARD)


def test_a_file_grows_and_is_replaced_whole(kept):
    write_table(kept, CARD, {key_of("few", SHAPE): worked_out("few", SHAPE, CARD)})
    assert set(read_table(kept, CARD)) == {KEY, key_of("few", SHAPE)} and len(list(kept.parent.iterdir())) == 1
    card = replace(CARD, processors=114)
    write_table(kept, card, {KEY: OTHER})  # another card's: nothing of before stays
    assert read_table(kept, card) == {KEY: OTHER}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored["card"].update(processors=114), "measured on sm_90 with 114"),
        (lambda stored: stored.update(format=2), "format 2"),
        (lambda stored: stored.pop("card"), "damaged"),
        (lambda stored: stored["tiles"][KEY].pop("split"), "damaged"),
        (lambda stored: stored["tiles"][KEY].update(block_n=24), "does not suit"),
        (lambda stored: stored["tiles"][KEY].update(block_n=128, split=64), "does not suit"),
        (lambda stored: stored["tiles"][KEY].update(block_m=2), "does not suit"),
        (lambda stored: stored["tiles"][KEY].update(block_n=1024, split=1024), "does not suit"),
        (lambda stored: stored["tiles"].update({"encode:1:1:1:1:2": stored["tiles"][KEY]}), "names no kernel"),
    ],
)
def test_a_file_that_is_no_good_is_named_and_left_out(kept, change, message):
    stored = json.loads(kept.read_text())
    change(stored)
    kept.write_text(json.dumps(stored))
    with pytest.warns(RuntimeWarning, match=message):
        assert tiles_of("decode", SHAPE, CARD) == worked_out("decode", SHAPE, CARD)
    kept.write_text("{")
    with pytest.raises(ValueError):
        read_table(kept, CARD)


def test_where_files_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_PAGED_TILES", "")
    assert tuned.table_path(CARD) is None
    monkeypatch.delenv("HF_PAGED_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.table_path(CARD) == tmp_path / "hf_paged" / "tiles-sm_90-132.json"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_candidates_fit(kind, dim):
    for itemsize in (2, 4):
        shape = replace(SHAPE, key_dim=dim, value_dim=dim, itemsize=itemsize)
        found = list(candidates(kind, shape, CARD))
        assert len(set(found)) == len(found) > 3 and worked_out(kind, shape, CARD) not in found
        assert all(fits(config, shape, CARD) for config in found)


# -- measuring, with a clock that says what it likes


def small_scale():
    from hf_paged.integrations.bench.kernels import Scale

    return Scale(4, 2, 16, 4, torch.float32, "cpu", 1, decodes=((2, 40),), prefill=24, verify=(2, 3, 40), layer_bytes=1)


@pytest.fixture
def tune():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    from hf_paged.integrations.bench import tune

    return tune


def test_the_fastest_is_chosen_if_it_gains_enough(tune, monkeypatch):
    """Tiles of 16 slots are the fastest by far in decode, hardly so elsewhere; one configuration does not compile."""
    few = [replace(worked_out(kind, SHAPE, CARD), block_n=16, stages=2) for kind in KINDS]
    monkeypatch.setattr(tune, "candidates", lambda kind, *_: [few[KINDS.index(kind)], few[KINDS.index(kind)]])

    def clock(scene, scale):
        if scene.config.split == 2048:
            raise RuntimeError("no room")
        gain = 0.5 if scene.rows.num_decodes else 0.99
        return 1e-3 * (gain if scene.config.block_n == 16 else 1.0) * (0.9 if scene.config.split == 512 else 1.0)

    report, chosen = tune.run_tune(small_scale(), clock=clock)
    shape = launch.HeadShape(2, 2, 16, 16, 4, 4)
    best = chosen[key_of("decode", shape)]
    assert (best.block_n, best.split) == (16, 512)
    told = report["kernels"]["decode"]
    assert told["chosen"] == asdict(best) and told["seconds"] == pytest.approx(0.45e-3)
    assert [entry["error"] for entry in told["failed"]] == ["RuntimeError: no room"]
    assert all(report["kernels"][kind]["tried"] > 3 for kind in KINDS)


def test_a_configuration_with_wrong_numbers_never_counts(tune):
    scale = small_scale()
    scene = tune.scenes_of("decode", scale)[0]
    config = worked_out("decode", SHAPE, CARD)
    right = tune.attempt(config, [scene], scale, lambda *_: 1.0)
    assert right == tune.Trial(config, 1.0)
    scene.layers[0][0][:] = math.nan
    wrong = tune.attempt(config, [scene], scale, lambda *_: 1.0)
    assert wrong.seconds == math.inf and "relative error" in wrong.error


def test_attention_with_measured_tiles(tune, kept):
    case = Case(rows=((200, None), (3, None), (40, 9)), page_size=4)
    step = make(case)
    shape = launch.head_shape(step.query.shape[1], step.keys, step.values)
    small = {
        key_of(kind, shape): replace(worked_out(kind, shape, CARD), block_n=16, split=64, stages=2) for kind in KINDS
    }
    write_table(kept, CARD, small)
    tuned.table_of.cache_clear()
    assert tiles_of("few", shape, CARD).split == 64
    got = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    torch.testing.assert_close(got, step.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu():
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 2 and "needs a GPU" in result.stderr


def test_info_says_where_tiles_come_from(tune, kept):
    told = CliRunner().invoke(app, ["info", "--backend", "triton"])
    assert told.exit_code == 0 and f"1 measured, in {kept}" in told.stdout
