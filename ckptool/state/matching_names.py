"""What the names of modules say when two naming schemes are compared: words, synonyms, numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ckptool.text import length

# Words of one meaning in the names of modules, the first of each line for all of them.
SYNONYMS = {
    word: words.split()[0]
    for words in (
        "q query wq",
        "k key wk",
        "v value wv",
        "out output o proj projection dense wo",
        "attention attn sa mha",
        "cross crossattention encdec enc",
        "mlp ffn ff feedforward",
        "gate w1",
        "down w2",
        "up w3",
        "norm normalization norms bn batchnorm ln layernorm gn groupnorm rmsnorm",
        "shortcut downsample skip identity residual",
        "head heads fc classifier logits",
        "first 1 before input pre",
        "second 2 after post",
        "conv convolution",
        "dw depthwise",
        "pw pointwise",
        "expand expansion",
        "embed embedding embeddings embeds emb",
        "pos position positional positions wpe",
        "word words wte",
        "cls class",
        "dist distillation",
        "type segment",
        "scale gamma lambda ls",
        "bias biases",
        "rel relative",
        "decoder dec",
    )
    for word in words.split()
}
# A norm after the attention is none of the attention: `post_attention_layernorm` of Llama.
PREPOSITIONS = frozenset("post pre after before".split())
# What a name may have or not without a change of what it names.
PLAIN = frozenset(
    "layer layers block blocks stage stages module modules model net h weight parameter "
    "backbone features table self".split()
)
# Names of projections that are several in one: how many equal parts, and what those are called.
FUSED = {
    **dict.fromkeys(
        "qkv in_proj qkv_proj to_qkv c_attn query_key_value wqkv".split(), ("q", "k", "v")
    ),
    **dict.fromkeys("gate_up gate_up_proj w12".split(), ("gate", "up")),
}
MAX_NAME = 200  # characters of a component that is taken apart
MAX_DIGITS = 9
_WORD = re.compile(r"w[qkvo123](?![a-z0-9])|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
# Letters count where they are whole components: `f.a`, `f.b` and `f.c` of RegNet.
_NUMBER = re.compile(
    rf"(?<![0-9])[0-9]{{1,{MAX_DIGITS}}}(?![0-9])|(?<![^.])[a-d](?![^.])", re.ASCII
)
Words = frozenset[str]


@lru_cache(1 << 14)
def words_of(component: str) -> Words:
    """Return the words of one component, as the table calls them."""
    if len(component) > MAX_NAME:
        return frozenset([component])
    found, where = set[str](), False
    for word in map(str.lower, _WORD.findall(component)):
        meant = SYNONYMS.get(word, word)
        if meant == "norm" or not where:
            found.add(meant)
        where = (where or word in PREPOSITIONS) and meant != "norm"
    return frozenset(found)


def words(components: Iterable[str]) -> Words:
    """Return the words of several components that say something."""
    return frozenset[str]().union(*map(words_of, components)) - PLAIN


def last_words(components: Sequence[str]) -> Words:
    """Return the words of the last component that has any besides a number."""
    for component in reversed(components):
        if said := {word for word in words((component,)) if not word.isdigit()}:
            return frozenset(said)
    return frozenset()


def agree(one: Sequence[str], other: Sequence[str]) -> bool:
    """Check whether the last words of two names are the same, or of one all in the other's."""
    here, there = last_words(one), last_words(other)
    return bool(here and there) and (here <= there or there <= here)


def numbers(path: str) -> tuple[int, ...]:
    """Return the numbers in a path, in order."""
    return tuple(
        ord(text) if text.isalpha() else length(text, 10) or 0 for text in _NUMBER.findall(path)
    )


def numberless(path: str) -> str:
    """Return a path with a sign for each number."""
    return _NUMBER.sub("#", path)
