"""Products over copies of weights in tiles of bfloat16, and models whose weights are such."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lean import GREEDY, alone, make, tokens

from hf_paged import Engine, SamplingParams, SpeculationConfig
from hf_paged.integrations import copies, lean
from hf_paged.integrations.linear import PackedLinear
from hf_paged.integrations.tiled import TiledLinear
from hf_paged.kernels.native_tiles import tile_ops

pytestmark = [
    pytest.mark.skipif(tile_ops() is None, reason="no C compiler: nothing is compiled"),
    pytest.mark.usefixtures("products"),
]


def short(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that bfloat16 holds."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def rounded(kind: str) -> torch.nn.Module:
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


@contextmanager
def team(threads: int):
    """So many threads: of many lines each works on its own, of few on its share of the weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def always(method: str, **more) -> SpeculationConfig:
    return SpeculationConfig(method=method, adaptive=False, max_draft_tokens=3, **more)


@settings(max_examples=80, deadline=None)
@given(
    lines=st.integers(0, 70),
    inputs=st.sampled_from([1, 2, 31, 32, 33, 64, 100, 384]),
    widths=st.lists(st.sampled_from([1, 7, 15, 16, 17, 32, 48, 130]), min_size=1, max_size=3),
    biased=st.booleans(),
    gated=st.booleans(),
    size=st.sampled_from([1e-30, 1.0, 1e15]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_products_are_as_exact_as_in_float32(lines, inputs, widths, biased, gated, size, threads):
    widths = widths[:1] * 2 if gated else widths
    layers = [(short(n, inputs, seed=i), short(n, seed=9) if biased else None) for i, n in enumerate(widths)]
    x = torch.randn(lines, inputs + 3, generator=torch.Generator().manual_seed(1))[:, :inputs] * size
    tiles = tile_ops().tiles(layers, gated)
    parts = [F.linear(x.double(), weight.double(), None if bias is None else bias.double()) for weight, bias in layers]
    scales = [F.linear(x.double().abs(), weight.double().abs()) + 3 for weight, _ in layers]
    add = None if gated else torch.randn(lines, sum(widths)) * size
    with team(threads):
        got = tile_ops().linear(x, tiles, add, gated).double()
    if gated:
        wanted, most = F.silu(parts[0]) * parts[1], scales[0] * scales[1]
    else:
        wanted, most = torch.cat(parts, -1) + add, torch.cat(scales, -1) + add.abs()
    assert got.shape == wanted.shape and bool(((got - wanted).abs() <= 3e-6 * most).all())


@pytest.mark.parametrize("outputs, biased", [(64, False), (64, True), (100, False)])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("inputs", [40, 384])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_line_does_not_depend_on_its_company(threads, inputs, gated, added, outputs, biased):
    layers = [(short(outputs, inputs, seed=i), short(outputs) if biased else None) for i in range(1 + gated)]
    tiles, x, add = tile_ops().tiles(layers, gated), torch.randn(61, inputs), torch.randn(61, outputs)
    add = add if added else None

    def of(lines: slice) -> torch.Tensor:
        with team(threads):
            return tile_ops().linear(x[lines], tiles, None if add is None else add[lines], gated)

    with team(1):
        whole = tile_ops().linear(x, tiles, add, gated)
    for count in (1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 32, 33, 37, 48, 61):
        assert torch.equal(of(slice(count)), whole[:count])
        assert torch.equal(of(slice(-count, None)), whole[-count:])


@pytest.mark.parametrize("lines", [7, 19])
def test_what_is_no_number_stays_with_its_line(lines):
    tiles = tile_ops().tiles([(short(40, 64), None)])
    x = torch.randn(lines, 64)
    clean = tile_ops().linear(x, tiles)
    x[2, 5], x[4, 63] = float("nan"), float("inf")
    got = tile_ops().linear(x, tiles)
    assert not got[2].isfinite().any() and not got[4].isfinite().any()
    others = [0, 1, 3, *range(5, lines)]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("at", [(0, 0), (39, 63), (17, 20)])
def test_weights_that_bfloat16_does_not_hold_are_declined(at):
    weight = short(40, 64)
    weight[at] = 1 + 2**-12
    assert tile_ops().tiles([(short(40, 64), None), (weight, None)]) is None
    assert tile_ops().tiles([(weight, None), (short(40, 64), None)], gated=True) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_tokens_are_the_models(kind):
    model = rounded(kind)
    with Engine(model, num_pages=64, page_size=4) as engine:
        assert tokens(engine) == alone(model)
        assert isinstance(engine.forward.run.tiles, TiledLinear)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("most", [0, 1024])
def test_logits_do_not_depend_on_the_batch(most, threads, monkeypatch):
    """Bit for bit: in a call for the whole forward, and in one for each op."""
    monkeypatch.setattr(lean, "MOST_TILED", most)
    model, seen = rounded("llama"), []
    count = min(18, tile_ops().most // 4)  # more lines of prompts are a matrix library's
    prompts = [[3 + i, 9, 2 * i + 1, 4] for i in range(count)]
    wanted = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    for batch in (1, 3, 12, 18):  # by AMX, up to 8 lines lie otherwise than more
        with team(threads), Engine(model, num_pages=64, page_size=4, prefix_caching=False) as engine:
            made = [engine.generate(prompts[i : i + batch], wanted) for i in range(0, count, batch)]
        answers = [request.outputs[0] for part in made for request in part]
        seen.append([(answer.token_ids, answer.logprobs) for answer in answers])
    assert seen[0] == seen[1] == seen[2] == seen[3]


@pytest.mark.parametrize("change", ["data", "in place", "replaced", "no longer exact"])
def test_no_stale_copy_in_the_next_call(change):
    model = rounded("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        before, layer = tokens(engine), model.model.layers[0].mlp.down_proj
        with torch.no_grad():
            if change == "data":
                layer.weight.data.mul_(-2)
            elif change == "in place":
                layer.weight.mul_(-2)
            elif change == "replaced":
                layer.weight = torch.nn.Parameter(layer.weight * -2)
            else:
                layer.weight.mul_(-2.01)
        after = tokens(engine)
        assert after == alone(model) and after != before
        assert (engine.forward.run.tiles is None) == (change == "no longer exact")


@pytest.mark.parametrize("replaced", [False, True])
def test_copies_are_dropped_when_a_weight_changes_between_steps(replaced):
    model = rounded("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        engine.submit([30, 5], GREEDY)
        engine.step()
        tiles, layer = engine.forward.run.tiles, model.model.layers[1].self_attn.q_proj
        with torch.no_grad():
            if replaced:
                layer.weight = torch.nn.Parameter(layer.weight * 2)
            else:
                layer.weight.mul_(2)
        assert tiles is not None and not tiles.current()
        engine.step()
        assert engine.forward.run.tiles is not tiles


def test_a_change_that_copies_alone_have_seen_voids_kv_too(monkeypatch):
    model = rounded("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        tokens(engine)
        monkeypatch.setattr(engine.validity, "begin", lambda: False)  # as if none of its samples had changed
        model.model.layers[0].mlp.down_proj.weight.data.mul_(-2)
        assert tokens(engine) == alone(model)
        assert engine.stats().evictions == 0 and engine.forward.run.tiles.unchanged()


def test_what_cannot_be_copied_is_tried_once(monkeypatch):
    model, tried = rounded("llama"), []
    built = TiledLinear.build.__func__
    monkeypatch.setattr(TiledLinear, "build", classmethod(lambda *given: tried.append(1) or built(*given)))
    with torch.no_grad():
        model.lm_head.weight[90] *= 1.01
    with Engine(model, num_pages=64, page_size=4) as engine:
        assert tokens(engine) == alone(model) == tokens(engine) and len(tried) == 1
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.bfloat16().float())
        assert tokens(engine) == alone(model) and len(tried) == 2 and engine.forward.run.tiles is not None


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = rounded("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        assert tokens(engine) == alone(model) and engine.forward.run.tiles is not None


@pytest.mark.parametrize("name", ["lm_head", "o_proj", "q_proj"])
def test_a_draft_model_of_which_a_layer_is_replaced(name):
    model, draft = rounded("llama"), rounded("llama")
    with Engine(model, draft_model=draft, num_pages=64, page_size=4, speculation=always("draft")) as engine:
        wanted = tokens(engine)
        run = next(drafter for _, drafter in engine._drafters.values()).forward
        before = run.run.tiled()
        owner = draft if name == "lm_head" else draft.model.layers[0].self_attn
        layer = getattr(owner, name)
        setattr(owner, name, torch.nn.Linear(layer.in_features, layer.out_features, bias=False))
        with torch.no_grad():
            getattr(owner, name).weight.copy_(layer.weight * 2)
        assert tokens(engine) == wanted == alone(model)
        assert before is not None and run.run.tiled() not in (None, before)


def test_large_copies_are_looked_at_share_by_share(monkeypatch):
    """One number written through `.data` is seen after as many looks as there are shares."""
    monkeypatch.setattr(copies, "LOOK_BYTES", 2000)
    model = rounded("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        tokens(engine)
        tiles = engine.forward.run.tiles
        assert all(tiles.unchanged() for _ in range(50))
        model.model.layers[1].mlp.up_proj.weight.data[3, 7] += 1
        assert tiles.current() and not all(tiles.unchanged() for _ in range(50))


def test_forgetting_drops_copies():
    with Engine(rounded("llama"), num_pages=64, page_size=4) as engine:
        tokens(engine)
        before = engine.forward.run.tiles
        tokens(engine)
        assert engine.forward.run.tiles is before
        engine.forget()
        assert engine.forward.run.tiles is None


@pytest.mark.parametrize("pack, memory, copied", [("auto", 1 << 30, True), ("auto", 8, False), (True, 8, True)])
def test_models_are_copied_where_there_is_memory(pack, memory, copied, monkeypatch):
    monkeypatch.setattr(lean, "allowed_memory", lambda: memory)
    with Engine(rounded("llama"), num_pages=64, page_size=4, pack_weights=pack) as engine:
        tokens(engine)
        assert (engine.forward.run.tiles is not None) == copied


def test_nothing_is_copied_unless_wanted(monkeypatch):
    monkeypatch.setattr(lean, "PACK_AFTER", 0)
    with Engine(rounded("llama"), num_pages=64, page_size=4, pack_weights=False) as engine:
        tokens(engine)
        assert engine.forward.run.tiles is None and not isinstance(engine.forward.run.ops, PackedLinear)
    with pytest.raises(ValueError, match="pack_weights='yes' is not allowed"):
        Engine(rounded("llama"), pack_weights="yes")


def test_the_first_layers_alone_share_the_copies():
    model = rounded("llama")
    with Engine(model, num_pages=64, page_size=4, speculation=always("layer_skip", early_exit=1)) as engine:
        assert tokens(engine) == alone(model)
        lean_one = next(drafter for _, drafter in engine._drafters.values()).forward.lean
        assert lean_one.tiled() is engine.forward.run.tiles and lean_one.tiles is None
