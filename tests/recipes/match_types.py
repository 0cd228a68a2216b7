"""`ckptool match` on types of transformers, judged by the values of their parameters.

    python tests/recipes/match_types.py
    python tests/recipes/match_types.py mixtral detr --show

A tiny random model of each type that has conversion rules is there twice: as `save_pretrained`
writes it, with the names of checkpoints, and as its `state_dict()`; each tensor has other values
than all others, so the values say what is what. A third time it has names of another tradition
(WORDS), a fourth time words at random. No pair that `match` calls sure may have other values on
its two sides, in whatever order: some rules reorder rows. What is joined or cut on the way has no
partner.

A row: for each of the three the keys that are sure, ambiguous and left. The exit status is 1 if a
pair is wrong, or if fewer than `--least` types were built.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from transformers import logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers_models import at_most, tiny

import ckptool

SECONDS = 60  # for one type
WORDS = {
    r"\bq_proj\b|\bquery\b": "wq",
    r"\bk_proj\b|\bkey\b": "wk",
    r"\bv_proj\b|\bvalue\b": "wv",
    r"\bo_proj\b|\bout_proj\b": "wo",
    r"\bgate_proj\b": "w1",
    r"\bdown_proj\b": "w2",
    r"\bup_proj\b": "w3",
    r"\binput_layernorm\b|\battention_norm\b": "attention_norm",
    r"\bpost_attention_layernorm\b": "ffn_norm",
    r"\bembed_tokens\b": "tok_embeddings",
    r"\bself_attn\b": "attention",
    r"\bmlp\b": "feed_forward",
    r"\blayers\b": "blocks",
    r"\bdownsample\b": "shortcut",
    r"\bLayerNorm\b|\blayer_norm\b": "ln",
    r"\blm_head\b": "output",
}
State = Mapping[str, torch.Tensor]


def traditional(key: str) -> str:
    for word, other in WORDS.items():
        key = re.sub(word, other, key)
    return key


def at_random(seed: int) -> Callable[[str], str]:
    words, draw = dict[str, str](), random.Random(seed)

    def other(found: re.Match[str]) -> str:
        if found[0] not in words:
            words[found[0]] = f"{''.join(draw.choices('bdfgjpwyz', k=5))}x{len(words) * 'y'}"
        return words[found[0]]

    def renamed(key: str) -> str:
        path, _, leaf = key.rpartition(".")
        return f"{re.sub('[A-Za-z_]+', other, path)}.{leaf}".lstrip(".")

    return renamed


def renamed(state: State, name: Callable[[str], str]) -> State:
    made = {name(key): tensor for key, tensor in state.items()}
    keys = list(made)
    random.Random(0).shuffle(keys)
    return {key: made[key] for key in keys} if len(made) == len(state) else {}


def judged(here: State, there: State, folder: Path, show: bool) -> tuple[str, list[str]]:
    paths = folder / "here.safetensors", folder / "there.safetensors"
    for path, state in zip(paths, (here, there), strict=True):
        copies = {key: tensor.contiguous().clone() for key, tensor in state.items()}
        safetensors.torch.save_file(copies, path)
    found = ckptool.match(paths[0], like=paths[1])
    if show:
        print(found.text)
    wrong = [
        f"{old} is not {new}"
        for old, new in found.draft.wanted.items()
        if new in there and not same(here[old], there[new])
    ]
    return f"{found.paired} {found.unsettled} {len(found.left)}", wrong


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.is_floating_point() or one.numel() < 3:  # counters, and tables that are computed
        return True
    return torch.equal(*(each.flatten().sort().values for each in (one, other)))


def row(model_type: str, show: bool) -> tuple[list[str], list[str]] | None:
    """Return the cells of a type, and the pairs that are wrong."""
    with at_most(SECONDS), tempfile.TemporaryDirectory() as folder:
        model = tiny(model_type)
        if model is None:
            return None
        model.save_pretrained(folder)
        state = model.state_dict()
        saved = safetensors.torch.load_file(Path(folder) / "model.safetensors")
        cells, wrong = [], []
        others = saved, renamed(state, traditional), renamed(state, at_random(0))
        for other in others:
            if not other:
                cells.append("-")
                continue
            cell, found = judged(other, state, Path(folder), show)
            cells.append(cell)
            wrong += found
        return [str(len(state)), *cells], wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--show", action="store_true", help="print the recipes")
    parser.add_argument("--least", type=int, default=1, help="types that must be built")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    built = bad = 0
    for model_type in options.types or CONFIG_MAPPING_NAMES:
        try:
            found = row(model_type, options.show)
        except Exception as error:  # what transformers cannot build or save so small
            if options.types:
                print(f"{model_type:24} not built: {str(error)[:100]}", flush=True)
            continue
        if found is None:
            continue
        cells, wrong = found
        built += 1
        bad += bool(wrong)
        print(f"{model_type:24} {'WRONG' if wrong else 'right'} {' | '.join(cells)}", flush=True)
        for line in wrong[:5]:
            print(f"    {line}", flush=True)
    print(f"{built} types, {bad} with a wrong pair")
    return int(bad > 0 or built < options.least)


if __name__ == "__main__":
    sys.exit(main())
