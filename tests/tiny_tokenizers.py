"""Tokenizers made on the spot, of several kinds, and models whose every token has another id."""

from __future__ import annotations

import copy
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "def mirror(text, tokens):\n    return [token for token in tokens if token in text]\n",
    "The other tokenizer reads the same words, but it cuts them in other places than the first.\n",
    "Tom has 12 apples and eats 7 of them: 12 - 7 = 5 are left. How many does he eat on 3 days?\n",
]
PAD, END = "<|pad|>", "<|end|>"
LETTERS = [chr(i) for i in range(33, 127)] + ["Ġ"]  # all of ASCII that can be seen, and the space


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left")


def letters() -> PreTrainedTokenizerFast:
    """A token a letter: however they follow each other, the text is cut that way. 97 ids."""
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([PAD, END, *LETTERS])}, merges=[]))
    tokenizer.add_special_tokens([PAD, END])
    return wrapped(tokenizer)


def trained(size: int, alphabet=()) -> PreTrainedTokenizerFast:
    """A byte-level BPE: of `alphabet`, or of what the texts hold."""
    made = wrapped(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, END], initial_alphabet=list(alphabet), show_progress=False
    )
    made.backend_tokenizer.train_from_iterator(TEXT, trainer)
    return made


def bytes_of(size):
    return trained(size, pre_tokenizers.ByteLevel.alphabet())


def permuted(model, tokenizer, noise=0.0):
    """Copies of a model and of its tokenizer in which every token has another id."""
    size = model.config.vocab_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))  # by new id
    new = torch.argsort(order).tolist()
    torch.manual_seed(1)
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    made.model.embed_tokens.weight.data = made.model.embed_tokens.weight.data[order]
    made.lm_head.weight.data = made.lm_head.weight.data[order]
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {token: new[i] for token, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    return made, wrapped(Tokenizer.from_str(json.dumps(content)))


def spaces(size):
    """Words that begin with their space, as SentencePiece has them: the text's first one, too."""
    made = trained(size, LETTERS)
    made.backend_tokenizer.pre_tokenizer, made.backend_tokenizer.decoder = (
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[PAD, END], show_progress=False)
    made.backend_tokenizer.train_from_iterator([*TEXT, "\u00e9 \U0001f34e\u4e00"], trainer)
    return made


class Slow:
    """A tokenizer that is not one of the fast kind."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)
