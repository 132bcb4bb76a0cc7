"""What the tests of the generate contract's "State" share."""

import torch
from conftest import spread
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


def tiny_neox(seed=0, **settings):
    """A model that the engine runs through its own forward."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return spread(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=256, **settings)))


def generate(model, batch, **settings):
    return model.generate(**batch, **{"max_new_tokens": 8, "cache_implementation": "paged", **settings})


def plain(model, batch, **settings):
    return model.generate(**batch, **{"max_new_tokens": 8, **settings}).tolist()


def as_found(model):
    """Everything about a model that a call might change."""
    modules = dict(model.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "attention": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
    }


class Oops(Exception):
    pass


def failing(after, error):
    """A function that raises `error` when it is called for the `after`-th time."""
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise error

    return fail


def raising_behind(function, left, error):
    """`function`, which raises `error` behind its `left[0]`-th call from when that was set."""

    def fail(*args):
        left[0] -= 1
        made = function(*args)
        if left[0] == 0:
            raise error("on purpose")
        return made

    return fail


def answers_despite(engine, prompts, params, error, left):
    """Results of an engine that is stepped on where `raising_behind` raises."""
    names = [engine.submit(prompt, given) for prompt, given in zip(prompts, params, strict=True)]
    found = {}
    while engine.has_work:
        try:
            found |= {result.request_id: result for result in engine.step()}
        except error:
            assert left[0] == 0
    return [found[name] for name in names]
