"""Scoring multiple choice: log-likelihoods of endings, what they cost, and the perplexity of a document.

python examples/scoring.py [MODEL]
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import Engine

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "target")
CODE = "def add(a, b):\n    return a"
OPTIONS = [" + b", " - c", " banana", " while"]


def endings() -> list[tuple[str, list[str]]]:
    """First halves of questions, and four second halves each, of which the first is its own; under one header."""
    rows = [json.loads(line)["question"].split() for line in (HERE / "data" / "prompts.jsonl").open()]
    halves = [(" ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :])) for words in rows]
    header = "".join(f"Question: {begin}{end}\n\n" for begin, end in halves[-4:])
    rng = random.Random(0)
    questions = []
    for begin, end in halves[:-4]:
        others = rng.sample([other for _, other in halves[:-4] if other != end], 3)
        questions.append((f"{header}Question: {begin}", [end, *others]))
    return questions


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with Engine(model, tokenizer=tokenizer) as engine:
        print(f"{CODE!r} goes on with")
        for option, score in zip(OPTIONS, engine.score(CODE, OPTIONS), strict=True):
            greedy = ", as greedy decoding would" if score.is_greedy else ""
            print(f"{score.logprob:8.2f}  {option!r}{greedy}")

        questions = endings()
        engine.reset_stats()
        found = engine.score([context for context, _ in questions], [options for _, options in questions])
        likeliest = [min(range(len(scores)), key=lambda i: scores[i].perplexity) for scores in found]
        print(f"\n{likeliest.count(0)} of {len(questions)} questions get their own ending among four")
        texts = [tokenizer(context + end)["input_ids"] for context, options in questions for end in options]
        computed = engine.stats().prompt_tokens
        print(f"their {len(texts)} texts have {sum(map(len, texts))} tokens, of which {computed} were computed")

        document = (HERE / "data" / "prompts.jsonl").read_text()
        for stride in (None, 128):
            (score,) = engine.perplexity(document, window=512, stride=stride)
            print(f"perplexity of {len(score.token_ids)} tokens, {stride or 512} a window: {score.perplexity:.1f}")


if __name__ == "__main__":
    main()
