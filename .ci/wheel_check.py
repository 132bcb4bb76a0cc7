"""Run by `.ci/wheel-check` with the installed wheel: import it from elsewhere and generate with it."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged
import hf_paged.integrations
import hf_paged.kernels
from hf_paged.kernels.native_build import SOURCES

checkout = Path(sys.argv[1]).resolve()
for module in (hf_paged, hf_paged.kernels, hf_paged.integrations):
    path = Path(module.__file__).resolve()
    if checkout in path.parents:
        raise SystemExit(f"{module.__name__} was imported from the checkout: {path}")

if not any(path.suffix == ".c" for path in SOURCES):
    raise SystemExit("the wheel holds none of the C sources")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
prompts = [[5, 9, 17, 4], [33, 2, 8], [7] * 40]
params = hf_paged.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
with hf_paged.Engine(model, max_model_len=128) as engine:
    outputs = engine.generate(prompts, params)
    engine.check()
for prompt, output in zip(prompts, outputs, strict=True):
    ids = torch.tensor([prompt])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    got = output.outputs[0].token_ids
    if got != want[0, len(prompt) :].tolist():
        raise SystemExit(f"tokens differ from generate's: {got} != {want[0, len(prompt) :].tolist()}")

hf_paged.enable()
ids = torch.tensor([prompts[0]])
paged = model.generate(ids, cache_implementation="paged", max_new_tokens=24, do_sample=False)
hf_paged.disable()
plain = model.generate(ids, max_new_tokens=24, do_sample=False)
if not torch.equal(paged, plain):
    raise SystemExit("cache_implementation='paged' gives other tokens than generate")
print(f"wheel-check: {len(outputs)} prompts generated with hf_paged from {Path(hf_paged.__file__).parent}")
