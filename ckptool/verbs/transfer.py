"""`transfer`: what is asked of it, read; `fitting` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Unpack

from ckptool.errors import EditError
from ckptool.files.copying import Begin, no_progress
from ckptool.model import live
from ckptool.state import edits
from ckptool.state.adapting import read_asked
from ckptool.state.classes import read_rows
from ckptool.state.edit_options import recipe_edits
from ckptool.text import quoted, several
from ckptool.verbs import fitting
from ckptool.verbs.fitting import Reference, Transferred
from ckptool.verbs.options import MIN_MATCH, Options, WriteOptions

if TYPE_CHECKING:  # a transfer without a model loads none of it
    from pathlib import Path

    from ckptool.model.initial import Fill, Rule
    from ckptool.model.live import CheckpointLike
    from ckptool.model.zoo import ModelLike
    from ckptool.state.classes import Lines
    from ckptool.state.edits import Edit


def transfer(
    source: CheckpointLike,
    target: str | Path | None = None,
    *,
    steps: Sequence[Edit] = (),
    drop: str | Sequence[str] = (),
    keep: str | Sequence[str] = (),
    rename: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    recipe: str | Sequence[str] = (),
    reverse: bool = False,
    anywhere: bool = False,
    keep_bookkeeping: bool = False,
    like: CheckpointLike | None = None,
    like_at: str | None = None,
    model: ModelLike | None = None,
    model_args: Mapping[str, object] | None = None,
    adapt: str | Sequence[str] = (),
    classes: Lines | None = None,
    class_names: Lines = (),
    pos_grid: str | None = None,
    pos_prefix: int | None = None,
    init: str | Sequence[str] = (),
    init_missing: bool = False,
    seed: int = 0,
    min_match: float = MIN_MATCH,
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Transferred:
    """Write the bare state_dict with what fits a target: another checkpoint, or a model.

    `source` and `like` are files, state_dicts or modules; `model` is a spec (`resnet18`,
    `file.py:factory`) made with `model_args`, or an `nn.Module`. Wrapper prefixes come off first,
    with `anywhere` every `module.` inside keys too; what a wrapper keeps for itself goes with it,
    unless `keep_bookkeeping`. Then come `steps` of `ckptool.edits` in order, then `drop` and
    `keep`, a pattern or several each, then `rename`, rules as of `--rename`, all of one step, and
    `recipe`, names of recipes, backwards with `reverse`.
    `adapt` are kinds of tensors to bring into the target's shape (`pos-embed`, `in-chans`,
    `classes`, `vocab`), patterns of keys, or `PATTERN=KIND`; `classes` is a file or a list with
    the row or the name of what each class was, `class_names` one with the names in the file;
    `pos_grid` and `pos_prefix` are the grids of position embeddings (`14x14:16x24`) and the count
    of tokens before them. What is not filled then is written with values of `init`, rules as of
    `--init`, and with `init_missing` as the model has it, from a `seed`. Raises `PoorFit` where
    less than `min_match` of the target's elements would be filled, `EditError`, `FormatError`,
    `WriteError`, and `MissingExtra` where torch is needed and not installed.

    >>> done = ckptool.transfer("model_best.pth.tar", "init.pth", like="flowers.safetensors")
    >>> done.rewrite.written, [mismatch.key for mismatch in done.fit.mismatched]
    (6, ['classifier.weight', 'classifier.bias'])
    """
    if like is not None and model is not None:
        raise EditError("a transfer has one target: --like or --model")
    if model is None and (model_args or init_missing):
        raise EditError("--model-arg and --init-missing need --model")
    if like is None and like_at is not None:
        raise EditError("--like-at needs --like")
    if like is None and model is None and (adapt or init):
        raise EditError("--adapt and --init need --like or --model")
    asked = None
    if adapt:
        rows = read_rows(classes, class_names) if classes is not None else None
        asked = read_asked(several(adapt), classes=rows, grid=pos_grid, prefix=pos_prefix)
    elif classes is not None or class_names or pos_grid is not None or pos_prefix is not None:
        raise EditError("--classes, --class-names, --pos-grid and --pos-prefix need --adapt")
    pairs = list(rename.items() if isinstance(rename, Mapping) else rename)
    flags = {"anywhere": anywhere, "keep_bookkeeping": keep_bookkeeping}
    steps = [edits.strip_wrappers(required=False, **flags), *steps]
    steps += [edits.drop(drop)] if drop else []
    steps += [edits.keep(keep)] if keep else []
    steps += [edits.renames(pairs)] if pairs else []
    steps += recipe_edits(recipe, reverse=reverse)
    reference: Reference | None = None
    fill: Fill | None = None
    rules: list[Rule] = []
    if init:
        from ckptool.model.initial import read_rule

        rules = [read_rule(each) for each in several(init)]
    if like is not None:
        reference = _like(like, like_at, anywhere)
    elif model is not None:
        given = model_args or {}
        reference, fill = _model(model, given, seed if init_missing else None, anywhere)
    if rules and reference is not None:
        from ckptool.model.initial import one_after_other, ruled_values

        by_rules = ruled_values(rules, reference.shapes, reference.dtypes, seed)
        fill = one_after_other(by_rules, fill) if fill else by_rules
    how = Options(**options)
    if how.in_place and not isinstance(source, str | PathLike):
        raise EditError("--in-place needs a file", hint="name an output")
    with live.opened(source) as checkpoint:
        return fitting.transfer(
            checkpoint.path,
            target,
            like=reference,
            steps=steps,
            min_match=min_match,
            options=how,
            progress=progress,
            fill=fill,
            adapt=asked,
            opened=checkpoint,
        )


def _like(given: CheckpointLike, at: str | None, anywhere: bool) -> Reference:
    if not isinstance(given, str | PathLike | Mapping):  # a model, which may have no values
        return _model(given, {}, None, anywhere)[0]
    with live.opened(given) as checkpoint:
        return fitting.reference_of(checkpoint, at, anywhere=anywhere)


def _model(
    spec: ModelLike, args: Mapping[str, object], seed: int | None, anywhere: bool
) -> tuple[Reference, Fill | None]:
    from ckptool.model import initial, zoo

    layout = zoo.layout(spec, args)
    fill = None if seed is None else initial.initial_values(spec, args, seed)
    words = [quoted(zoo.argument(*each)) for each in args.items()]
    option = (
        " --model-arg ".join([f"--model {quoted(spec)}", *words]) if isinstance(spec, str) else ""
    )
    return fitting.reference(zoo.named(spec), layout, anywhere=anywhere, option=option), fill
