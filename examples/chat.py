"""A chat whose history grows: every turn computes what was said since the last one, and nothing again.

python examples/chat.py [MODEL]           # the turns below
python examples/chat.py [MODEL] --ask     # yours
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_paged
from hf_paged.integrations.registry import REGISTRY

GIVEN = [argument for argument in sys.argv[1:] if argument != "--ask"]
MODEL = GIVEN[0] if GIVEN else str(Path(__file__).parent / "models" / "target")
TURNS = [
    "A bakery sells 14 loaves in the morning and 9 in the afternoon. How many loaves does it sell?",
    "A ticket costs 3 dollars. How much do 5 tickets cost?",
    "Ben has 20 marbles and gives 6 to Ann. How many has he left?",
    "A train makes 4 trips a day. How many trips does it make in a week?",
]
# The bundled model was trained on questions and answers, and has no template of its own.
TEMPLATE = (
    "{% for m in messages %}{{ 'Question: ' + m.content if m.role == 'user' else 'Answer:' + m.content }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def turns() -> list[str]:
    if "--ask" not in sys.argv:
        return TURNS
    return iter(lambda: input("you> "), "")


def main() -> None:
    hf_paged.enable()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer, cache_implementation="paged")
    history, before = [], (0, 0)
    for turn in turns():
        history.append({"role": "user", "content": turn})
        (answer,) = chat(history, max_new_tokens=64, do_sample=False, stop_sequence="\n")
        history = answer["generated_text"]
        history[-1]["content"] = history[-1]["content"].rstrip("\n")
        stats = REGISTRY.find(model).stats()
        computed, cached = stats.prompt_tokens - before[0], stats.cached_tokens - before[1]
        before = (stats.prompt_tokens, stats.cached_tokens)
        print(f"you> {turn}\nbot>{history[-1]['content']}")
        print(f"     [{computed} tokens of the history computed, {cached} were there]")


if __name__ == "__main__":
    main()
