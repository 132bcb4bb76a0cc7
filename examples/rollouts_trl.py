"""TRL's GRPO trainer, its rollouts on hf_paged: `enable()` is all that is added. Needs `pip install hf-paged[trl]`.

python examples/rollouts_trl.py [MODEL]
"""

import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import hf_paged

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "target")


def reward(completions: list[str], **columns: list) -> list[float]:
    """One point for an answer in the form of the training data, `#### number`, and a little for every number."""
    return [("####" in text) + 0.02 * len(re.findall(r"\d+", text)) for text in completions]


def timed(model: torch.nn.Module) -> list[float]:
    """Seconds of each rollout from now on."""
    seconds, generate_batch = [], model.generate_batch

    def rollout(*args, **kwargs):
        begun = time.perf_counter()
        outputs = generate_batch(*args, **kwargs)
        seconds.append(time.perf_counter() - begun)
        return outputs

    model.generate_batch = rollout
    return seconds


def main() -> None:
    hf_paged.enable()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rows = load_dataset("json", data_files=str(HERE / "data" / "prompts.jsonl"), split="train")
    rows = rows.map(lambda row: {"prompt": f"Question: {row['question']}\nAnswer:"}, remove_columns=rows.column_names)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=64,
            learning_rate=1e-4,
            use_transformers_continuous_batching=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model, args=settings, train_dataset=rows, reward_funcs=reward, processing_class=tokenizer
        )
        seconds = timed(model)
        trainer.train()
    for step, spent in zip((log for log in trainer.state.log_history if "reward" in log), seconds, strict=True):
        print(f"step {step['step']}: reward {float(step['reward']):.2f}, rollouts of 16 x 64 tokens in {spent:.1f} s")


if __name__ == "__main__":
    main()
