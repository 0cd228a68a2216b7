"""`ckptool recipe`."""

from __future__ import annotations

from typing import Any

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers, refuse_idle
from ckptool.text import counted

DIFFERENT = 1


@click.command("recipe", cls=Command)
@click.argument("file", metavar="FILE", required=False)
@click.option("--from", "source", metavar="A", type=INPUT, help="The checkpoint to try it on.")
@click.option("--at", metavar="NAME", help="Where the state_dict of A sits (dotted).")
@click.option(
    "--like", metavar="B", type=INPUT, help="A checkpoint with the expected keys and shapes."
)
@click.option("--like-at", metavar="NAME", help="Where the state_dict of B sits.")
@click.option("--reverse", is_flag=True, help="Do the steps backwards.")
@click.option("--list", "listed", is_flag=True, help="List the recipes that come with ckptool.")
@answers
def command(file: str | None, source: str | None, reverse: bool, listed: bool, **how: Any) -> int:
    """Check a recipe: what each step changes in a checkpoint. Writes nothing.

    \b
    ckptool recipe --list
    ckptool recipe torchvision-vit-to-timm
    ckptool recipe map.toml --from vit_b_16.pth
    ckptool recipe map.toml --from vit_b_16.pth --like timm_vit.safetensors

    FILE is a recipe, or the name of one that comes with ckptool. Exit code 1 where the keys,
    shapes and dtypes that come out are not those of B. `ckptool convert --recipe FILE` writes.
    """
    from ckptool.cli import report_recipe
    from ckptool.state import recipes

    refuse_idle({"at": "source", "like": "source", "like_at": "like", "as_json": "source"})
    if listed == (file is not None):
        raise click.UsageError("name a recipe, or use --list")
    if file is None:
        refuse_idle({"source": "not listed", "reverse": "not listed"})
        talk.put(report_recipe.shipped_lines(recipes.shipped(), talk.columns()))
        return 0
    recipe = recipes.Recipe.load(file)
    if source is None:
        talk.put(report_recipe.step_lines(recipe, talk.columns(), reverse=reverse))
        talk.say([f"{counted(len(recipe.steps), 'step')}; --from A tries the recipe"])
        return 0
    from ckptool.verbs import recipe as verb

    found = verb.tried(recipe, source, reverse=reverse, **how)
    lines = report_recipe.tried_lines(found)
    talk.answer(found, report_recipe.count_lines, lines)
    return 0 if found.fits else DIFFERENT
