"""TRL's GRPO trainer with its continuous batching, on hf_paged: no rollout has KV of other weights."""

import pytest
import torch
from conftest import MODELS, assert_clean, engine_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from hf_paged.integrations.validity import Validity

trl = pytest.importorskip("trl", reason="needs trl: pip install hf-paged[trl]")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("paged")]
PROMPT = "Question: Ann has 3 apples and buys 4 more. How many has she?\nAnswer:"


def load():
    return AutoModelForCausalLM.from_pretrained(MODELS / "target", dtype=torch.float32)


def rewards(completions, **columns):
    """Short answers with digits."""
    return [sum(c.isdigit() for c in text) - len(text) / 20 for text in completions]


def train(model, steps, folder):
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        learning_rate=5e-3,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"seed": 5},
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": [PROMPT] * 8}),
        reward_funcs=rewards,
        processing_class=AutoTokenizer.from_pretrained(MODELS / "target"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("stale", [False, True])
def test_rollouts_are_those_of_the_weights_as_they_are(tmp_path, monkeypatch, stale):
    """Each rollout is a fresh engine's on a copy of the model; with a tree that is never emptied it would not be."""
    model = load()
    rollouts = []

    def recorded(prompts, **settings):
        fresh = load()
        fresh.load_state_dict(model.state_dict())
        wanted = fresh.generate_batch(prompts, **settings)
        with monkeypatch.context() as blind:
            if stale:
                blind.setattr(Validity, "begin", lambda self: False)
                blind.setattr(Validity, "step", lambda self: False)
            made = GenerationMixin.generate_batch(model, prompts, **settings)
        rollouts.append([[o.generated_tokens for o in of.values()] for of in (made, wanted)])
        return made

    # An engine from before the training outlives each rollout, as one does that answers other calls beside it.
    ids = AutoTokenizer.from_pretrained(MODELS / "target")(PROMPT, return_tensors="pt")
    model.generate(**ids, max_new_tokens=2, cache_implementation="paged")
    model.generate_batch = recorded
    trainer = train(model, 3, tmp_path)
    assert trainer.state.global_step == 3 and len(rollouts) == 3
    assert engine_of(model).stats().cached_tokens > 0
    assert all(made == wanted for made, wanted in rollouts) is not stale
    assert rollouts[0][0] == rollouts[0][1] != rollouts[1][1] != rollouts[2][1]
    assert_clean(model)
