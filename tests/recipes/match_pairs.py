"""`ckptool match` on pairs of models of three libraries, judged by what both models put out.

    python tests/recipes/match_pairs.py
    python tests/recipes/match_pairs.py swin vgg --show

Both models of a pair get random parameters, statistics and heads, in float64, and the same eps. The
recipe that `match` writes is used as it is, then with the choices that it leaves open: those in the
order of the files first, then others, until a file comes out that loads strictly and gives the
outputs of the model that it was made from. A choice is a line that is uncommented; nothing else of
the recipe is touched. So where a pair is complete, each line that was not commented is right too:
no output survives two modules that changed places.

A row: rules, keys that are sure, ambiguous, left on either side; which attempt at the choices it
was. The exit status is 1 if fewer than `--least` pairs are complete, or one that is sure gives
other outputs.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from match_models import PAIRS
from tiny import shaken
from torch import nn

import ckptool

CLOSE = 1e-9
ATTEMPTS = 200
CHOICE = re.compile(r"    # (\[(['\"].*?['\"]), (['\"].*?['\"])\],)")


def settled(text: str) -> Iterator[str]:
    """Yield a recipe with one line of each choice, in different combinations."""
    text = re.sub(r"^# (\[\[step\]\]|split = |fuse = |reshape = )", r"\1", text, flags=re.MULTILINE)
    lines = text.splitlines()
    open_lines: dict[str, list[int]] = {}
    for at, line in enumerate(lines):
        if found := CHOICE.fullmatch(line):
            open_lines.setdefault(found[2], []).append(at)
    for chosen in itertools.product(*open_lines.values()):
        targets = [CHOICE.fullmatch(lines[at])[3] for at in chosen]  # type: ignore[index]
        if len(set(targets)) == len(targets):
            yield "\n".join(
                CHOICE.sub(r"    \1", line) if at in chosen else line
                for at, line in enumerate(lines)
            )


def prepared(model: Any) -> nn.Module:
    model = shaken(model).double()
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-5
    return model


def answer(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(torch.randn(1, 3, 224, 224, dtype=torch.float64))
    return out if isinstance(out, torch.Tensor) else out.logits


def fits(model: nn.Module, file: Path, wanted: torch.Tensor) -> str:
    """Return why a file is not that of a model with these outputs, an empty text if it is."""
    missing, unexpected = model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    computed = ("relative_position_index", "num_batches_tracked", "attn_mask")
    missing = [key for key in missing if not key.endswith(computed)]
    unexpected = [key for key in unexpected if not key.endswith(computed)]
    if missing or unexpected:
        return f"does not load: missing {missing[:3]}, unexpected {unexpected[:3]}"
    off = float((answer(model) - wanted).abs().max() / wanted.abs().max())
    return "" if off < CLOSE else f"other outputs, by {off:.1g}"


def judge(name: str, folder: Path, show: bool) -> tuple[str, str]:
    one, other = (prepared(make()) for make in PAIRS[name])
    source, like, recipe = (folder / each for each in ("a.pth", "b.pth", "map.toml"))
    torch.save(one.state_dict(), source)
    torch.save(other.state_dict(), like)
    wanted = answer(one)
    found = ckptool.match(source, like=like)
    if show:
        print(found.text)
    counts = (
        f"{found.draft.plan.count} rules, {found.paired} sure, {found.unsettled} ambiguous, "
        f"{len(found.left)} and {len(found.missing)} left"
    )
    why = "no choice"
    texts = [found.text] if found.sure else settled(found.text)
    for number, text in enumerate(itertools.islice(texts, ATTEMPTS), 1):
        recipe.write_text(text, encoding="utf-8")
        out = folder / "out.pth"
        steps = [ckptool.Recipe.load(recipe).edit()]
        try:
            ckptool.convert(source, out, steps=steps, unwrap=False, force=True)
        except ckptool.CkptoolError as error:
            why = str(error)
            continue
        why = fits(other, out, wanted)
        if not why:
            return "complete" if found.sure else "settled", f"{counts}; attempt {number}"
    return "WRONG" if found.sure else "open", f"{counts}; {why}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of names; all pairs if none is given")
    parser.add_argument("--show", action="store_true", help="print the recipes")
    parser.add_argument("--least", type=int, default=1, help="pairs that must be complete")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [n for n in PAIRS if not options.words or any(word in n for word in options.words)]
    verdicts = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            verdict, row = judge(name, Path(folder), options.show)
        verdicts.append(verdict)
        print(f"{name:24} {verdict:9} {row}", flush=True)
    done = verdicts.count("complete") + verdicts.count("settled")
    print(f"{done} of {len(names)} complete")
    return int("WRONG" in verdicts or done < options.least)


if __name__ == "__main__":
    sys.exit(main())
