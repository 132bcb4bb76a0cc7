"""Bursts of decode steps: the tokens of the loop, whatever ends in between; their buffers and buckets."""

import os
from dataclasses import replace

import interpreter  # noqa: F401  (before Triton is imported)
import numpy as np
import pytest
import torch
from conftest import tiny_llama
from engine_helpers import alone, assert_as_alone, assert_idle, run, submit_all, toy_core
from tiny_models import make as make_model

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.integrations import decode_inputs
from hf_paged.integrations.decode_inputs import Layout, batch_bucket, clear, width_bucket
from hf_paged.plan import PlanRow, build_plan
from hf_paged.sampling import sample


class ToyStepper:
    """Steps through the core's own forward, a token at a time: what a stepper must do, without a device."""

    def __init__(self, core, most=4):
        self.core, self.most, self.bursts = core, most, []
        core.stepper = self

    def run(self, rows, steps):
        self.bursts.append(steps)
        return self._steps(rows, steps)

    def _steps(self, rows, steps):
        sequences = [planned.sequence for planned in rows]
        for _ in range(steps):
            plan = build_plan([PlanRow(p.row, p.sequence, 1, 1) for p in rows], self.core.memory.page_size)
            logits = self.core.forward(plan)
            sampled = sample(logits, [planned.row.sampling for planned in rows])
            yield sampled.tokens, logits.amax(1).tolist()
            if any(planned.row.finish_reason or s.pages == [] for planned, s in zip(rows, sequences, strict=True)):
                break  # the toy model cannot go on with pages that were given back


@pytest.mark.parametrize("settings", [{}, {"max_sequences": 3}, {"num_pages": 24}, {"prefix_caching": True}], ids=str)
def test_bursts_change_no_token(settings):
    core = toy_core(eos=True, **settings)
    stepper = ToyStepper(core)
    requests = submit_all(core, max_tokens=23, temperature=0.9, top_p=0.95)
    run(core)
    assert_as_alone(requests, eos=True)
    assert max(stepper.bursts) > 1
    if not settings.get("prefix_caching"):
        assert_idle(core)


def test_rows_that_need_the_host_go_the_long_way():
    core = toy_core()
    stepper = ToyStepper(core)
    for params in ({"logprobs": 1}, {"repetition_penalty": 1.2}, {"min_tokens": 8}, {"logit_bias": {3: 1.0}}):
        request = core.submit([1, 2, 3], SamplingParams(max_tokens=8, **params), seed=1)
        run(core)
        assert request.rows[0].output_ids == alone([1, 2, 3], request.params, 1).rows[0].output_ids
    assert stepper.bursts == []


def test_a_row_whose_logits_are_not_finite_fails_alone():
    core = toy_core()
    stepper = ToyStepper(core)
    requests = submit_all(core, max_tokens=12)
    run_steps = stepper._steps

    def broken(rows, steps):
        for tokens, tops in run_steps(rows, steps):
            at = [place for place, planned in enumerate(rows) if planned.row.request is requests[1]]
            tops = [float("nan") if place in at else top for place, top in enumerate(tops)]
            yield tokens, tops

    stepper._steps = broken
    run(core)
    assert "NaN" in str(requests[1].error)
    assert_as_alone([request for request in requests if request is not requests[1]])


def test_captured_steps_outlive_new_numbers_but_no_weight_that_moves():
    """A graph reads weights where they lay when it was captured."""

    class Noting:
        def forget(self, now=None):
            seen.append(now)

    seen, known, model = [], [], tiny_llama()
    with Engine(model) as engine:
        settings = SamplingParams(max_tokens=2, ignore_eos=True)
        engine.generate([[1, 2, 3]], settings)
        engine.stepper, weight = Noting(), model.lm_head.weight
        with torch.no_grad():
            for change in (
                lambda: weight.mul_(1.5),
                lambda: weight.mul_(2),
                lambda: setattr(weight, "data", weight * 2),
            ):
                change()
                engine.generate([[1, 2, 3]], settings)
                known.append(seen[-1])
    first, again, moved = known
    assert first == again != moved


def test_buckets_hold_what_they_are_for():
    for rows in range(1, 700):
        bucket = batch_bucket(rows)
        assert rows <= bucket == batch_bucket(bucket) and bucket <= max(2 * rows - 1, rows + 127)
    for size in (1, 16, 256):
        for slots in (1, 1023, 1024, 1025, 5000):
            assert slots <= width_bucket(slots, size) * size <= max(1024, 2 * slots)


def test_fields_lie_apart_and_aligned():
    layout = Layout(5, 7)
    buffer = np.zeros(layout.size, np.uint8)
    arrays, tensors = layout.arrays(buffer), layout.tensors(torch.from_numpy(buffer))
    for number, array in enumerate(arrays.values(), 1):
        array.fill(number)
    for number, (name, array) in enumerate(arrays.items(), 1):
        assert (array == number).all() and (tensors[name] == number).all() and tensors[name].data_ptr() % 16 == 0
    clear(arrays)
    assert set(arrays["slots"]) == {-1} and not arrays["context"].any() and arrays["table"].shape == (5, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model goes to a CPU here")
def test_graphs_are_refused_where_there_are_none():
    model = make_model("Llama", {})
    with pytest.raises(ValueError, match="cuda_graphs=True is not allowed: the model is on cpu"):
        Engine(model, num_pages=20, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs='yes'"):
        EngineConfig(cuda_graphs="yes")


needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def tokens_of_static_steps(prompts, params, **settings):
    """Tokens of the loop, and of the step that is captured on a GPU, in Triton's interpreter; the stepper."""
    from hf_paged.integrations.cuda_step import DecodeStepper, Direct

    got = []
    for static in (False, True):
        with Engine(make_model("Llama", {}), page_size=4, backend="triton", check=True, **settings) as engine:
            if static:
                stepper = DecodeStepper(engine.forward, engine.store, 8, 128, "triton", Direct(), most=4)
                engine.core.stepper = stepper
            got.append([r.outputs[0].token_ids for r in engine.generate(prompts, params, raise_errors=True)])
    return *got, stepper


@needs_interpreter
def test_static_steps_give_the_tokens_of_the_loop(monkeypatch):
    """Rows that end, padding, a new page."""
    from hf_paged.kernels import draw

    monkeypatch.setattr(draw, "BLOCK", 32)  # the interpreter computes whole blocks
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    params = [
        SamplingParams(temperature=0.0, max_tokens=5),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.9, max_tokens=3, seed=3),
        SamplingParams(max_tokens=5, seed=4),
    ]
    expected, got, stepper = tokens_of_static_steps(prompts, params, num_pages=40)
    assert got == expected and not any(bucket.shared for bucket in stepper._steps)


@needs_interpreter
def test_static_steps_over_a_shared_prefix(monkeypatch):
    """Pages that rows have in common are read once for several of them; no token changes."""
    from hf_paged.kernels import draw, triton_path, worklist

    monkeypatch.setattr(draw, "BLOCK", 32)
    monkeypatch.setattr(decode_inputs, "LEAST_SLOTS", 64)
    monkeypatch.setattr(worklist, "LEAST_SHARED", 1)
    tiles_of = triton_path.tiles_of
    monkeypatch.setattr(triton_path, "tiles_of", lambda *args: replace(tiles_of(*args), block_n=16, split=16))
    prefix = [3 + (7 * i) % 60 for i in range(40)]
    prompts = [[*prefix, 5 + i] for i in range(3)]
    params = [SamplingParams(max_tokens=4, seed=i) for i in range(3)]
    expected, got, stepper = tokens_of_static_steps(prompts, params, num_pages=80)
    assert got == expected and any(bucket.shared for bucket in stepper._steps)
