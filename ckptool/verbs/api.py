"""The verbs of the command line as functions: its names, and the results that its JSON is made of.

    import ckptool

    done = ckptool.strip_prefix("in.pth", "out.pth", force=True)
    print(done.renamed, done.dropped)

Each raises a `CkptoolError` where the command line ends with another exit code than 0. What writes
takes the keywords of `WriteOptions`. A pattern may stand for a list of patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Literal, Unpack

from ckptool import containers
from ckptool.errors import EditError
from ckptool.files import budget
from ckptool.files.copying import Begin, no_progress
from ckptool.state import edits
from ckptool.state.edit_options import recipe_edits, stripping
from ckptool.state.edits import Edit
from ckptool.text import parse_size, quoted, several
from ckptool.verbs import surgery
from ckptool.verbs.options import MIN_MATCH, Options, WriteOptions
from ckptool.verbs.surgery import Rewrite

if TYPE_CHECKING:  # each verb loads what it alone needs
    from pathlib import Path

    from ckptool.files.download import Downloaded
    from ckptool.model.initial import Fill, Rule
    from ckptool.model.live import CheckpointLike
    from ckptool.model.zoo import ModelLike
    from ckptool.state.classes import Lines
    from ckptool.verbs.checking import Checked
    from ckptool.verbs.combining import Averaged
    from ckptool.verbs.difference import Difference
    from ckptool.verbs.fitting import Reference, Transferred
    from ckptool.verbs.listing import Listing
    from ckptool.verbs.match import Matched, Side
    from ckptool.verbs.survey import Survey


def keys(
    path: str | Path,
    *,
    at: str | None = None,
    all: bool = False,
    select: str | Sequence[str] = (),
    sort: Literal["file", "size", "name", "absmax", "nan", "std"] = "file",
    stats: bool = False,
    progress: Begin = no_progress,
) -> Listing:
    """List the tensors of a checkpoint.

    `at` chooses among several state_dicts, `all` lists every tensor of the file by its path,
    `select` takes a pattern or several, `stats` adds what the values are on the whole: the three
    last words of `sort` need it. Raises what reading raises (`FormatError`), `AmbiguousStateDict`
    where `at` must choose, `NoSuchKey` and `NothingMatched`.

    >>> listing = ckptool.keys("model_best.pth.tar", select="module.classifier")
    >>> listing
    <Listing of model_best.pth.tar: 2 tensors, 200 B>
    >>> listing["module.classifier.weight"].shape
    (10, 4)
    """
    from ckptool.verbs import listing

    listed = listing.listing(containers.read(path, alone=all), at, every=all)
    return listing.chosen(listed, select, sort, progress if stats else None)


def info(path: str | Path, *, at: str | None = None) -> Survey:
    """Describe what a file is, what is in it, and which commands would help.

    Several state_dicts are all described, unless `at` chooses. Raises what reading raises
    (`FormatError`), and `NoSuchKey`.

    >>> survey = ckptool.info("model_best.pth.tar")
    >>> survey.total.count, survey.to_dict()["safety"]
    (8, 'plain')
    >>> survey.suggestions[0].command
    'ckptool strip-prefix model_best.pth.tar model_best.stripped.pth'
    """
    from ckptool.verbs import survey
    from ckptool.verbs.suggestions import suggestions

    facts = survey.survey(containers.read(path, alone=True), at)
    return replace(facts, suggestions=tuple(suggestions(facts)))


def check(
    path: str | Path,
    *,
    sha256: bool = False,
    finite: bool = False,
    as_dtype: str | None = None,
    max_size: int | str | None = None,
    strict: bool = False,
    plugins: bool = False,
    progress: Begin = no_progress,
) -> Checked:
    """Check whether a file is whole, and whether loading it elsewhere would run code.

    `sha256` hashes the file, `finite` counts NaN and infinity, `as_dtype` what a cast to a dtype
    would make infinite, zero or subnormal; more than `max_size` (bytes, or a text: `100MiB`) is too
    large, `strict` calls foreign names unsafe, `plugins` lets installed ones read what no container
    of ckptool is. Raises nothing for what a file holds: its `status` says that.

    >>> ckptool.check("model_best.pth.tar").status
    <Status.OK: 'ok'>
    """
    from ckptool.verbs import checking

    return checking.check(
        path,
        sha256=sha256,
        finite=finite,
        as_dtype=as_dtype,
        max_size=max_size,
        strict=strict,
        plugins=plugins,
        progress=progress,
    )


@budget.run()
def diff(
    left: CheckpointLike,
    right: CheckpointLike,
    *,
    at: str | None = None,
    left_at: str | None = None,
    right_at: str | None = None,
    all: bool = False,
    structure: bool = False,
    atol: float = 0.0,
    rtol: float = 0.0,
    select: str | Sequence[str] = (),
    map: Mapping[str, str] | None = None,
    recipe: str | Sequence[str] = (),
    reverse: bool = False,
    ignore_prefix: str | Sequence[str] | None = None,
    anywhere: bool = False,
    progress: Begin = no_progress,
) -> Difference:
    """Compare two checkpoints bit for bit, or within `atol + rtol * |left|`.

    Each is a file, a state_dict or an `nn.Module`. `at` is where the state_dict sits on both
    sides, `left_at` and `right_at` on one; `all` compares all there is by path, `structure` reads
    no values; `map` has rules as of `--rename`, what the left and the right call it; `recipe`
    names recipes that make the right's tensors of the left's, backwards with `reverse`;
    `ignore_prefix` is a prefix or several, or `auto`, and `anywhere` ignores them inside keys too.
    Raises what reading raises (`FormatError`), `AmbiguousStateDict`, `NoSuchKey`, and
    `NothingMatched` for what no key has.

    >>> ckptool.diff("data_parallel.pth", "plain.pth", ignore_prefix="auto").equal
    True
    >>> [change.key for change in ckptool.diff("flowers.safetensors", "plain.pth")]
    ['classifier.bias', 'classifier.weight']
    """
    from ckptool.model import live
    from ckptool.verbs import compare
    from ckptool.verbs.compare_sides import Asked, tolerance

    asked = Asked(
        at=at,
        left_at=left_at,
        right_at=right_at,
        every=all,
        structure=structure,
        tolerance=tolerance(atol, rtol),
        select=select,
        rename=tuple((map or {}).items()),
        recipe=recipe,
        reverse=reverse,
        ignore_prefix=ignore_prefix or (),
        anywhere=anywhere,
    )
    with live.opened(left) as one, live.opened(right) as other:
        return compare.diff(one, other, asked, progress)


def strip_prefix(
    source: str | Path,
    target: str | Path | None = None,
    *,
    prefix: str | Sequence[str] = edits.DEFAULT_PREFIX,
    every: bool = False,
    anywhere: bool = False,
    keep_bookkeeping: bool = False,
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Rewrite:
    """Take prefixes off keys, in this order; `auto` peels every known wrapper that all keys share.

    `every` insists that all keys have it, `anywhere` takes it inside keys too; what a wrapper
    keeps for itself (`n_averaged`) is dropped, unless `keep_bookkeeping`. Raises `NothingMatched`,
    `KeyCollision`, `FormatError` for the source and `WriteError` for the target.

    >>> done = ckptool.strip_prefix("model_best.pth.tar", "clean.pth.tar")
    >>> done.renamed, done.map[0]
    (8, ('module.features.0.weight', 'features.0.weight'))
    """
    flags = {"every": every, "anywhere": anywhere, "keep_bookkeeping": keep_bookkeeping}
    steps = [stripping([each], **flags) for each in several(prefix)]
    return surgery.rewrite(source, target, steps, options=Options(**options), progress=progress)


def add_prefix(
    source: str | Path,
    target: str | Path | None = None,
    *,
    prefix: str = edits.DEFAULT_PREFIX,
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Rewrite:
    """Put a prefix before every key.

    Raises `EditError`, `FormatError` for the source and `WriteError` for the target.

    >>> ckptool.add_prefix("plain.pth", "parallel.pth", dry_run=True)
    <Rewrite plain.pth -> parallel.pth: read 8, would write 8>
    """
    steps = [edits.add_prefix(prefix)]
    return surgery.rewrite(source, target, steps, options=Options(**options), progress=progress)


def unwrap(
    source: str | Path,
    target: str | Path | None = None,
    *,
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Rewrite:
    """Write the state_dict alone, without what is beside it.

    Raises `EditError` where it is alone already, `AmbiguousStateDict` where `at` must choose,
    `FormatError` for the source and `WriteError` for the target.

    >>> ckptool.unwrap("model_best.pth.tar", "weights.pth").not_carried
    ('epoch', 'arch', 'best_acc1', 'optimizer')
    """
    how = Options(**options)
    return surgery.rewrite(source, target, bare=True, unwrap=True, options=how, progress=progress)


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    steps: Sequence[Edit] = (),
    dtype: str | None = None,
    dtype_only: str | Sequence[str] = (),
    dtype_except: str | Sequence[str] = (),
    overflow: Literal["refuse", "inf", "clamp"] = "refuse",
    unwrap: bool = False,
    max_shard_size: int | str | None = None,
    distributed: bool = False,
    values: str = "",
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Rewrite:
    """Write a checkpoint again, in the container of the target, with edits in their order.

    `steps` are of `ckptool.edits`. After them, floats are rounded to `dtype` (`bf16`, `float16`,
    ...), all or those of the keys that `dtype_only` selects and `dtype_except` does not; `Overflow`
    is raised where a finite number would become infinite, unless `overflow` is `inf`, or `clamp`
    to the largest. With `to="dcp"`, the target is the folder of a distributed
    checkpoint. With `max_shard_size`, bytes or text such as `5GB`, it is a folder of shards.
    `distributed` writes with all ranks of a launcher, each of which calls this; what is lost in
    casts is in the result of rank 0. Of DeepSpeed's ZeRO, the float32 masters are written, or with
    `values="module"` the weights in the training dtype. Raises `EditError`, `FormatError` for the
    source, `WriteError` for the target, and `RankLost`.

    >>> steps = [ckptool.edits.drop("classifier")]
    >>> ckptool.convert("plain.pth", "plain.safetensors", steps=steps, force=True)
    <Rewrite plain.pth -> plain.safetensors: read 8, written 6>
    """
    how, form = Options(**options), surgery.FILE
    if dtype is not None:
        cast = edits.cast(dtype, only=dtype_only, except_=dtype_except, overflow=overflow)
        steps = [*steps, cast]
    elif dtype_only or dtype_except or overflow != "refuse":
        raise EditError("--dtype-only, --dtype-except and --overflow need --dtype")
    if how.to == "dcp":
        if max_shard_size is not None:
            raise EditError("a distributed checkpoint is not cut by --max-shard-size")
        form = surgery.Form(distributed=True)
    elif max_shard_size is not None:
        form = surgery.Form(parse_size(str(max_shard_size), "--max-shard-size 5GB"))
    opened = containers.read(source, values=values) if values else None
    write = partial(
        surgery.rewrite,
        source,
        target,
        steps,
        bare=unwrap,
        progress=progress,
        form=form,
        opened=opened,
    )
    if not distributed:
        return write(options=how)
    from ckptool.model import ranks

    with ranks.joined() as group:
        if target is not None and (str(target) == "-" or "://" in str(target)):
            raise EditError(
                f"{target} is not on a file system, to which all ranks could write",
                hint="name a file or a folder that all machines share",
            )
        return write(options=how, group=group)


def transfer(
    source: CheckpointLike,
    target: str | Path | None = None,
    *,
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
    `file.py:factory`) made with `model_args`, or an `nn.Module`. `drop` and `keep` take a pattern
    or several, matched after wrapper prefixes came off, with `anywhere` every `module.` inside
    keys too; what a wrapper keeps for itself goes with it, unless `keep_bookkeeping`; `rename`
    are rules as of `--rename`, all of one step, and `recipe` names recipes that come after them,
    backwards with `reverse`.
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
    from ckptool.state.adapting import read_asked
    from ckptool.state.classes import read_rows
    from ckptool.verbs import fitting

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
    moves = [edits.renames(pairs)] if pairs else []
    moves += recipe_edits(recipe, reverse=reverse)
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
    from ckptool.model import live

    with live.opened(source) as checkpoint:
        return fitting.transfer(
            checkpoint.path,
            target,
            like=reference,
            steps=fitting.first_steps(
                moves, drop, keep, anywhere=anywhere, keep_bookkeeping=keep_bookkeeping
            ),
            min_match=min_match,
            options=how,
            progress=progress,
            fill=fill,
            adapt=asked,
            opened=checkpoint,
        )


def match(
    source: CheckpointLike,
    like: CheckpointLike | None = None,
    *,
    at: str | None = None,
    like_at: str | None = None,
    model: ModelLike | None = None,
    model_args: Mapping[str, object] | None = None,
) -> Matched:
    """Pair the keys of a checkpoint with those of another, or of a model: a recipe to review.

    Each is a file, what `ckptool keys --json` printed (`.json`), a state_dict or an `nn.Module`;
    `model` is a spec made with `model_args`. Reads no weights. Raises what reading raises.

    >>> found = ckptool.match("data_parallel.pth", like="plain.pth")
    >>> found.sure, found.paired
    (True, 8)
    """
    from ckptool.verbs import match as verb

    if (like is None) == (model is None):
        raise EditError("a match has one target: --like or --model")
    if model is None and model_args:
        raise EditError("--model-arg needs --model")
    if like is None and like_at is not None:
        raise EditError("--like-at needs --like")
    if model is not None:
        target = _model_side(model, model_args or {})
    elif like is not None:
        target = _side(like, like_at, "--like-at")
    return verb.matched(_side(source, at, "--at"), target)


def _side(given: CheckpointLike, at: str | None, option: str) -> Side:
    """Return the keys and shapes of what a match is of."""
    from ckptool.model import live
    from ckptool.state import checkpoint as places
    from ckptool.verbs import match as verb

    if not isinstance(given, str | PathLike | Mapping):  # a model, which may have no values
        return _model_side(given, {})
    if isinstance(given, str | PathLike) and (rows := verb.listed_keys(given)) is not None:
        return verb.Side(str(given), rows)
    with live.opened(given) as checkpoint:
        return verb.side(checkpoint.path, places.find(checkpoint, at, option).entries)


def _model_side(spec: ModelLike, args: Mapping[str, object]) -> Side:
    from ckptool.model import zoo
    from ckptool.verbs import match as verb

    return verb.Side(zoo.named(spec), zoo.layout(spec, args)[0])


def average(
    sources: str | Path | Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Averaged:
    """Write the mean of the floats of several checkpoints, or a sum with `weights`.

    Keys, order and dtypes are the first's, integers and what else cannot be averaged the last's;
    wrapper prefixes do not count when keys are matched. Raises `EditError` where keys or shapes
    differ, `Overflow` where finite numbers would become infinite, `FormatError` for the sources
    and `WriteError` for the target.

    >>> ckptool.average(["data_parallel.pth", "plain.pth"], "mean.pth")
    <Averaged 2 -> mean.pth: averaged 7, written 8>
    """
    from ckptool.verbs import combining

    how = Options(**options)
    return combining.average(sources, target, weights=weights, options=how, progress=progress)


def _like(given: CheckpointLike, at: str | None, anywhere: bool) -> Reference:
    from ckptool.model import live
    from ckptool.verbs import fitting

    if not isinstance(given, str | PathLike | Mapping):  # a model, which may have no values
        return _model(given, {}, None, anywhere)[0]
    with live.opened(given) as checkpoint:
        return fitting.reference_of(checkpoint, at, anywhere=anywhere)


def _model(
    spec: ModelLike, args: Mapping[str, object], seed: int | None, anywhere: bool
) -> tuple[Reference, Fill | None]:
    from ckptool.model import initial, zoo
    from ckptool.verbs import fitting

    shapes, dtypes, ties = zoo.layout(spec, args)
    fill = None if seed is None else initial.initial_values(spec, args, seed)
    words = [quoted(zoo.argument(*each)) for each in args.items()]
    option = (
        " --model-arg ".join([f"--model {quoted(spec)}", *words]) if isinstance(spec, str) else ""
    )
    name = zoo.named(spec)
    return fitting.reference(name, shapes, ties, dtypes, anywhere=anywhere, option=option), fill


def download(
    what: str,
    target: str | Path = ".",
    *,
    sha256: str | None = None,
    force: bool = False,
    sync: bool = True,
    timeout: float = 60,
    progress: Callable[[int, int | None], None] | None = None,
) -> Downloaded:
    """Download a torchvision weight by name, or any URL, into a folder or to a file.

    The file is checked against `sha256`, or the hash in its name. A server may send less than
    1 KiB a second for `timeout` seconds. Raises `DownloadFailed`,
    `HashMismatch`, `OutputExists`, `WriteError`; for names `NoSuchModel` and `MissingExtra`.

    >>> ckptool.download("resnet18", "weights/").path  # doctest: +SKIP
    'weights/resnet18-f37072fd.pth'
    """
    from ckptool.files.download import download as fetch
    from ckptool.files.http import Limits
    from ckptool.model import weights

    known = None if "://" in what else weights.resolve(what)
    done = fetch(
        known.url if known else what,
        target,
        sha256=sha256,
        expected_prefix=known.sha256_prefix if known else None,
        force=force,
        sync=sync,
        progress=progress,
        limits=Limits(timeout=timeout),
    )
    return replace(done, weights=known.member if known else None)
