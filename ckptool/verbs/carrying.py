"""What an output names that torch would import or run: refused if it is dangerous, or noted."""

from __future__ import annotations

from ckptool import containers
from ckptool.errors import UnsafePickle
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.verbs.options import Options

SHOWN = 6  # foreign names in a note


def judge(
    source: Checkpoint, container: str, options: Options, *, bare: bool
) -> tuple[list[str], list[str]]:
    """Return warnings and notes of what is carried on; raises `UnsafePickle` for what would run."""
    whole = safety.judge_file(source)
    named = {each: at for each, at in source.globals.items() if not each.followed}
    carried = safety.judge(named, source.calls)
    remade = containers.by_name(source.container).traits.remade
    if bare or remade or options.tensors_only or options.drop_beside:
        carried = safety.judge_tree(source.tree)
    if not containers.by_name(container).traits.objects:
        carried = safety.Verdict(Level.PLAIN, {}, {})
    if carried.level is Level.DANGEROUS:
        held = any(walk.tensors(source.tree))
        raise UnsafePickle(
            f"{source.path} would run code when loaded; nothing was executed or written",
            path=source.path,
            evidence=safety.evidence_of(carried, source),
            option="--tensors-only" if held else "",
            hint="keeps the tensors and leaves out the rest" if held else "",
        )
    danger = f"{source.path} would run code when loaded; the output does not carry it"
    warnings = [danger] if whole.level is Level.DANGEROUS else []
    return warnings, [f"copied unchanged: {_names(carried)}"] if carried.foreign else []


def _names(verdict: safety.Verdict) -> str:
    """List foreign names in a few words, as they are in the file."""
    names = [str(each) for each in verdict.foreign]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
