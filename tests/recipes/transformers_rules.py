"""transformers' own conversion rules, as recipes: both directions, bitwise, for all types that fit.

    python tests/recipes/transformers_rules.py
    python tests/recipes/transformers_rules.py mixtral kimi_k25 --show

For each type that has rules (transformers/conversion_mapping.py) a tiny random model is saved by
`save_pretrained`, which writes the names of checkpoints, and by `torch.save(model.state_dict())`,
which has the names of the model. The rules become a recipe (transformers_recipe.py), and
`ckptool convert --recipe` must make each of the two files of the other: the same keys, shapes,
dtypes, bytes, and ties.

Nothing is loaded from a network. A row is a type: how many rules of how many find a key in this
model, the steps of the recipe, what they do; or why there is none. The exit status is 1 if a type
with a recipe differs, or if fewer than `--least` types have one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import transformers_recipe
from transformers import logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers_models import at_most, rules_of, tiny

SECONDS = 60  # for one type


class Unlike(Exception):
    """What differs from what transformers wrote."""


def convert(source: Path, target: Path, recipe: Path, *options: str) -> None:
    """Run the command; its error is ours."""
    command = [sys.executable, "-m", "ckptool", "convert", source, target, "--recipe", recipe]
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True)
    if done.returncode:
        raise Unlike(f"exit {done.returncode}: {' '.join(done.stderr.split())}")


def compare(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise for the first difference of two state_dicts; values are compared as bytes."""
    if missing := sorted(wanted.keys() - got.keys()):
        raise Unlike(f"{len(missing)} missing, as {missing[0]}")
    if extra := sorted(got.keys() - wanted.keys()):
        raise Unlike(f"{len(extra)} too many, as {extra[0]}")
    for key, tensor in wanted.items():
        if (got[key].shape, got[key].dtype) != (tensor.shape, tensor.dtype):
            raise Unlike(f"{key}: {got[key].dtype} {tuple(got[key].shape)}")
        one, other = (each.contiguous().flatten().view(torch.uint8) for each in (got[key], tensor))
        if not torch.equal(one, other):
            raise Unlike(f"{key}: other values")
    if ties(got) != ties(wanted):
        raise Unlike(f"ties: {sorted(map(sorted, ties(got) ^ ties(wanted)))}")


def ties(tensors: Mapping[str, torch.Tensor]) -> set[frozenset[str]]:
    """Return the groups of keys that have the same bytes of memory."""
    places: dict[tuple[int, torch.Size], set[str]] = {}
    for key, tensor in tensors.items():
        if tensor.numel():
            places.setdefault((tensor.data_ptr(), tensor.shape), set()).add(key)
    return {frozenset(keys) for keys in places.values() if len(keys) > 1}


def judge(model_type: str, folder: Path, show: bool) -> list[str] | None:
    """Return the row of a type whose recipe holds, None for one without rules."""
    model = tiny(model_type)
    if model is None:
        return None
    model.save_pretrained(folder)
    saved, state, recipe = folder / "model.safetensors", folder / "model.pth", folder / "r.toml"
    torch.save(model.state_dict(), state)
    checkpoint = safetensors.torch.load_file(saved)
    rules = rules_of(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint.items()}
    made = transformers_recipe.recipe_of(model, rules, shapes)
    if not made.steps:
        raise transformers_recipe.NotExpressible("no rule finds a key of this model")
    recipe.write_text(made.text(), encoding="utf-8")
    if show:
        print(made.text())
    there, back = folder / "there.pth", folder / "back.safetensors"
    convert(saved, there, recipe)
    compare(torch.load(there, weights_only=True), model.state_dict())
    convert(state, back, recipe, "--reverse")
    compare(safetensors.torch.load_file(back), checkpoint)
    words = Counter(word for word, _ in made.steps)
    steps = ", ".join(f"{count} {word}" for word, count in words.items())
    return [f"{len(shapes)} > {len(made.keys)}", f"{made.rules} of {len(rules)}", steps]


def row(model_type: str, show: bool) -> tuple[str, list[str]] | None:
    """Return the verdict about a type, and the cells of its row."""
    try:
        with at_most(SECONDS), tempfile.TemporaryDirectory() as folder:
            cells = judge(model_type, Path(folder), show)
        return None if cells is None else ("equal", cells)
    except Unlike as error:
        return "DIFFERS", [str(error)]
    except transformers_recipe.NotExpressible as error:
        return "no recipe", [str(error)]
    except Exception as error:  # what transformers cannot build or save so small
        return "not built", [f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--show", action="store_true", help="print the recipes")
    parser.add_argument(
        "--unbuilt", action="store_true", help="name what transformers did not build"
    )
    parser.add_argument("--least", type=int, default=1, help="types that must be equal")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    verdicts: Counter[str] = Counter()
    for model_type in options.types or CONFIG_MAPPING_NAMES:
        found = row(model_type, options.show)
        if found is None:
            continue
        verdict, cells = found
        verdicts[verdict] += 1
        if verdict != "not built" or options.unbuilt or options.types:
            print(f"{model_type:24} {verdict:10} {' | '.join(cells)}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    return int(verdicts["DIFFERS"] > 0 or verdicts["equal"] < options.least)


if __name__ == "__main__":
    sys.exit(main())
