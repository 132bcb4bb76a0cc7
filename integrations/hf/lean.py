"""A lean forward for the Llama family: the model's own weights, without the modules' overhead.

It reads parameters where they are at every step, so weights that change in place, or are replaced, are honoured.
Modules of any other make (adapters, quantised layers, hooks) make `LeanForward.build` decline: the model's own forward
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hf_paged.config import allowed_memory, available_memory
from hf_paged.integrations.copies import Watched
from hf_paged.integrations.elementwise import elementwise_backend
from hf_paged.integrations.few import FewLines
from hf_paged.integrations.linear import OneDnnLinear, PackedLinear, TorchLinear, few_backend, linear_backend
from hf_paged.integrations.modules import modules_of, parameters_of
from hf_paged.integrations.tiled import TiledLinear
from hf_paged.kernels import paged_attention
from hf_paged.kernels.native_blocks import FewModel
from hf_paged.kernels.native_tiles import tile_ops
from hf_paged.plan import StepPlan
from hf_paged.store import KVStore

# Models whose forward is what `LeanForward` computes: pre-norm blocks of rotary attention and gated MLP.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


# Weights of up to so many bytes are copied into oneDNN's order, once so many tokens were computed with them.
PACK_BYTES = 64 * 2**20
PACK_AFTER = 512
TILED_SHARE = 8  # tiles may have so much of the memory: one part of 8
MOST_TILED = 1024  # lines of a step that one call computes from tokens to logits


def _plain(module: nn.Module, kind: type | str) -> bool:
    """Whether `module` is exactly of this kind, with its own forward (not a subclass's, nor a patch) and no hooks."""
    same = type(module).__name__.endswith(kind) if isinstance(kind, str) else type(module) is kind
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    own = type(module).forward.__module__.startswith(("transformers.", "torch."))
    return same and own and "forward" not in vars(module) and not any(hooks)


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters of one block, looked up in the modules' own dicts at every use."""

    norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    window: int | None

    def parts(self) -> list[nn.Module]:
        a, m = self.attention, self.mlp
        return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]

    def norms(self) -> list[nn.Module]:
        extra = [getattr(self.attention, name) for name in ("q_norm", "k_norm") if hasattr(self.attention, name)]
        return [self.norm, self.mlp_norm, *extra]

    def plain(self) -> bool:
        linears = all(_plain(part, nn.Linear) for part in self.parts())
        blocks = _plain(self.attention, "Attention") and _plain(self.mlp, "MLP")
        silu = type(self.mlp.act_fn).__name__ in ("SiLUActivation", "SiLU") and _plain(self.mlp.act_fn, "")
        return linears and blocks and silu and all(_plain(norm, "RMSNorm") for norm in self.norms())


class LeanForward:
    """Plan → logits for one model of `FAMILIES`. Made by `build`.

    Args:
        model: the causal model; only its submodules are kept, so that a model can be freed while its engine lives.
        store: KV of the model.
        backend, pack: as `backend` and `pack_weights` in `EngineConfig`.
    """

    def __init__(self, model: nn.Module, store: KVStore, backend: str = "auto", pack: bool | str = "auto") -> None:
        body = model.model
        self.store, self.pack = store, pack
        self.embed, self.norm, self.rotary, self.head = (
            body.embed_tokens,
            body.norm,
            body.rotary_emb,
            model.lm_head,
        )
        self.layers = [
            Layer(
                layer.input_layernorm,
                layer.self_attn,
                layer.post_attention_layernorm,
                layer.mlp,
                getattr(layer.self_attn, "sliding_window", None) or _window(model.config, index),
            )
            for index, layer in enumerate(body.layers)
        ]
        self.scale = body.layers[0].self_attn.scaling
        self.head_dim = body.layers[0].self_attn.head_dim
        self.plain = self.ops = linear_backend(self.embed.weight, backend)
        self.few = few_backend(self.embed.weight, backend)
        self.most = 0  # lines of its
        self._tile_ops = tile_ops() if self.few is not None else None
        # Behind a window each query is computed by itself, which does not pay for a long chunk.
        windowed = any(layer.window is not None for layer in self.layers)
        self._most_tiled = MOST_TILED // 8 if windowed else MOST_TILED
        self.tiles: TiledLinear | None = None
        self.lender: Callable[[], object] | None = None  # whose copies of weights serve here too
        self.between = elementwise_backend(self.embed.weight, backend)
        # Attention is compiled where what lies between the products is.
        compiled = self.few is not None and backend == "auto" and store.dtype == torch.float32
        self.blocks = FewLines() if compiled else None
        self.rounds = self.embed.weight.device.type == "cpu"
        # Weights are in place as long as this is the same, says an owner who looks at them before each step.
        self.vouched: object | None = None
        self._tiled_for: object | None = None  # as `vouched`, when tiles were looked at last
        self._refused: Watched | None = None  # weights that are not exact in bfloat16
        self.computed = 0  # tokens, since the weights were looked at last

    @classmethod
    def build(
        cls, model: nn.Module, store: KVStore, backend: str = "auto", pack: bool | str = "auto"
    ) -> LeanForward | None:
        """A lean forward for `model`, or None where its own forward must run."""
        if type(model).__name__ not in FAMILIES or not _plain(model, "ForCausalLM"):
            return None
        body = model.model
        outer = _plain(body, "Model") and all(_plain(layer, "DecoderLayer") for layer in body.layers)
        ends = _plain(body.embed_tokens, nn.Embedding) and _plain(model.lm_head, nn.Linear)
        ends = ends and _plain(body.norm, "RMSNorm") and _plain(body.rotary_emb, "RotaryEmbedding")
        parameters = parameters_of(modules_of(model))
        kinds = {(p.device, p.dtype) for p in parameters}
        made = all(type(p) is nn.Parameter for p in parameters)  # not quantised, nor spread over processes
        if not (outer and ends and made and len(kinds) == 1):
            return None
        forward = cls(model, store, backend, pack)
        same = len({(layer.self_attn.scaling, layer.self_attn.head_dim) for layer in body.layers}) == 1
        whole = 2 * getattr(body.rotary_emb, "inv_freq", model.lm_head.weight).shape[-1] == forward.head_dim
        if not (same and whole and all(layer.plain() for layer in forward.layers)):
            return None
        if forward.few is not None:
            forward.most = forward.few.most(forward._weight_bytes())
        return forward

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        """Logits behind the tokens that the plan names: float32 `[len(plan.logits_at), vocab]`."""
        return self.logits(plan).float()

    def logits(self, plan: StepPlan) -> torch.Tensor:
        """The same in the model's dtype."""
        tiles = self.tiled()
        if self.blocks is not None and plan.tokens <= self.most_lines(tiles) and self.blocks.fit(self):
            return self.blocks(self, plan)
        if tiles is None or plan.tokens > tiles.most:
            self._choose_weights(plan.tokens)
        return self._op_by_op(plan, tiles)

    @torch.no_grad()
    def _op_by_op(self, plan: StepPlan, tiles: TiledLinear | None) -> torch.Tensor:
        ops, spare = self._products(plan.tokens, tiles)
        token_ids, positions = F.pad(plan.token_ids, (0, spare)), F.pad(plan.positions, (0, spare))
        slots = F.pad(plan.rows.slots, (0, spare))  # slot 0 lies on the page that takes what goes nowhere
        hidden = F.embedding(token_ids, self.embed.weight)
        cos, sin = self.rotary(hidden[None], positions[None])
        rotation = self.between.rotation(cos[0], sin[0])
        last, wanted = len(self.layers) - 1, len(plan.logits_at)
        for index, layer in enumerate(self.layers):
            few = index == last and wanted < plan.tokens
            mixed = self._attention(index, layer, ops, hidden, rotation, slots, plan, few)
            if few:  # nothing reads the other tokens any more: their KV is stored
                ops, spare = self._products(wanted, tiles)
                hidden = hidden[F.pad(plan.logits_at, (0, spare))]
            mixed = F.pad(mixed, (0, 0, 0, spare)) if spare else mixed
            hidden = ops.add(mixed, layer.attention.o_proj, hidden)
            normed = self.between.rms_norm(hidden, layer.mlp_norm)
            hidden = ops.add(ops.gated(normed, layer.mlp), layer.mlp.down_proj, hidden)
        return ops.linear(self.between.rms_norm(hidden, self.norm), self.head)[:wanted]

    def few_model(self) -> FewModel | None:
        """What compiled ops over a few lines take, as long as no weight changes; None where they do not serve."""
        return self.blocks.model(self) if self.blocks is not None else None

    def _products(self, lines: int, tiles: TiledLinear | None) -> tuple[TorchLinear, int]:
        """Products for so many lines, and how many to add: oneDNN keeps code for every number of lines, so they are
        rounded up to few numbers."""
        if tiles is not None and lines <= tiles.most:
            return tiles, 0
        if self.few is not None and lines <= self.most:
            return self.few, 0
        return self.ops, _spare(lines) if self.rounds else 0

    def keep(self, other: LeanForward) -> bool:
        """Take over the copies of weights that `other` made, if they are still good.

        Returns:
            False if numbers were changed that nobody else may have seen change.
        """
        here = {self.head, *self._parts()}

        def still(copy: Watched | None) -> Watched | None:
            return copy if copy is not None and here.issuperset(copy.layers) else None

        self._refused, tiles = still(other._refused), still(other.tiles)
        packed = still(other.ops) if isinstance(other.ops, PackedLinear) else None
        known = [copy for copy in (tiles, packed) if copy is not None]
        good = [copy for copy in known if copy.unchanged()]
        self.tiles = tiles if tiles in good else None
        if packed in good:
            self.ops = packed
        if packed in good or not isinstance(other.ops, PackedLinear):
            self.computed = other.computed
        return all(copy in good or not copy.current() for copy in known)

    def good(self) -> bool:
        """Whether all copies of weights are still good."""
        copies = [copy for copy in (self.tiles, self.ops) if isinstance(copy, Watched)]
        return all([copy.unchanged() for copy in copies])

    def tiled(self) -> TiledLinear | None:
        """Products over tiles of the weights as they are now; None where tiles do not serve."""
        if self.lender is not None:
            lender = self.lender()
            return lender.tiled() if isinstance(lender, LeanForward) else None
        if self._tile_ops is None or (self.vouched is not None and self.vouched is self._tiled_for):
            return self.tiles
        if self.tiles is not None and not self.tiles.current():
            self.tiles = None
        refused = self._refused is not None and self._refused.current()
        if self.tiles is None and not refused and self._tiles_fit():
            attentions, mlps = [layer.attention for layer in self.layers], [layer.mlp for layer in self.layers]
            self.tiles = TiledLinear.build(self._tile_ops, attentions, mlps, self.head)
            if self.tiles is None:
                self._refused = Watched()
                self._refused.place([*self._parts(), self.head])
        self._tiled_for = self.vouched
        return self.tiles

    def _tiles_fit(self) -> bool:
        """Whether there is to be memory for tiles."""
        if self.pack != "auto":
            return bool(self.pack)
        size = (self._weight_bytes() + self.head.weight.nbytes) // 2
        return size <= min(allowed_memory() // TILED_SHARE, available_memory() // 2)

    def most_lines(self, tiles: TiledLinear | None) -> int:
        """Lines up to which a forward is one call."""
        return self.most if tiles is None else min(self._most_tiled, tiles.most)

    def _choose_weights(self, tokens: int) -> None:
        """Copy small models' weights into oneDNN's order once they were used enough to pay for it."""
        self.computed += tokens
        if isinstance(self.ops, PackedLinear):
            if not self.ops.current():
                self.ops, self.computed = self.plain, 0
        elif self.pack and isinstance(self.ops, OneDnnLinear) and self.computed > PACK_AFTER and self._is_small():
            self.ops = self._packed()

    def _is_small(self) -> bool:
        return self._weight_bytes() <= PACK_BYTES

    def _weight_bytes(self) -> int:
        """Of all blocks' products."""
        return sum(part.weight.nbytes for part in self._parts())

    def _parts(self) -> list[nn.Module]:
        return [part for layer in self.layers for part in layer.parts()]

    def _packed(self) -> PackedLinear:
        """The products over packed weights, with those of one input joined where what follows is compiled."""
        ops = getattr(self.between, "ops", None)
        blocks = [layer.attention for layer in self.layers]
        single = [part for layer in self.layers for part in (layer.attention.o_proj, layer.mlp.down_proj)]
        if ops is not None:
            blocks += [layer.mlp for layer in self.layers]
        else:
            single += [part for layer in self.layers for part in (layer.mlp.gate_proj, layer.mlp.up_proj)]
        return PackedLinear(single, blocks, ops)  # the head is read as it is: a copy gains little

    def _attention(
        self, index: int, layer: Layer, ops: TorchLinear, hidden, rotation, slots, plan: StepPlan, few: bool
    ) -> torch.Tensor:
        """Attention of one layer before its output projection, `[tokens, heads * head_dim]`; stores KV.

        Args:
            few: of the tokens at `plan.logits_at` alone.
        """
        attention, tokens, dim = layer.attention, hidden.shape[0], self.head_dim
        normed = self.between.rms_norm(hidden, layer.norm)
        query, key, value = (part.view(tokens, -1, dim) for part in ops.heads(normed, attention))
        norms = (attention.q_norm, attention.k_norm) if "q_norm" in attention._modules else None
        pages = self.store.keys[index], self.store.values[index]
        query, key = self.between.rotate_and_store(query, key, value, rotation, pages, slots, plan.rows, norms)
        rows, fresh = plan.rows, (key[: plan.tokens], value[: plan.tokens])
        trimmed = few and self.rounds  # on a GPU the host would wait for `logits_at`
        if trimmed and not len(plan.logits_at):
            return query.new_empty(0, query.shape[1] * dim)
        if trimmed:
            query, rows, fresh = query[plan.logits_at], plan.wanted(), None
        out = paged_attention(query[: plan.tokens], *pages, rows, scale=self.scale, window=layer.window, fresh=fresh)
        out = out.view(len(out), -1)
        return out[plan.logits_at] if few and not trimmed else out


def _spare(lines: int) -> int:
    """Lines to add to a product of so many: up to a multiple of 4, 24 or 32, whichever costs little.

    Code for multiples of 24 takes several MB less than for those of 16.
    """
    return 0 if lines <= 1 else -lines % (4 if lines <= 16 else 24 if lines <= 144 else 32)


def _window(config, index: int) -> int | None:
    """Sliding window of a layer, as the model's mask would have it."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        return window if kinds[index] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None
