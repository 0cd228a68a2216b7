"""The verbs of the command line as functions: its names, and the results that its JSON is made of.

    import ckptool

    done = ckptool.strip_prefix("in.pth", "out.pth")
    print(done.renamed, done.dropped)

Each raises a `CkptoolError` where the command line ends with another exit code than 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptool import containers
from ckptool.containers import sharding
from ckptool.errors import EditError
from ckptool.files.copying import Begin, no_progress
from ckptool.state import edits
from ckptool.state.edits import Edit
from ckptool.verbs import checking, fitting, listing, surgery, survey
from ckptool.verbs.checking import Checked
from ckptool.verbs.fitting import MIN_MATCH, Reference, Transferred
from ckptool.verbs.listing import Listing
from ckptool.verbs.suggestions import Suggestion, suggestions
from ckptool.verbs.surgery import Options, Rewrite
from ckptool.verbs.survey import Survey

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.files.hub import Downloaded
    from ckptool.model.initial import Fill
    from ckptool.model.verify import Verification
    from ckptool.verbs.compare import Difference

AUTO = "auto"


def keys(
    path: str | Path,
    *,
    at: str | None = None,
    every: bool = False,
    select: Sequence[str] = (),
    sort: str = "file",
) -> Listing:
    """List the tensors of a checkpoint; `every` lists all of the file, by path.

    `sort` is `file`, `size` or `name`; `select` holds patterns. Raises what reading raises, and
    `AmbiguousStateDict` where `at` must choose.
    """
    return listing.chosen(listing.listing(containers.read(path), at, every=every), select, sort)


def info(path: str | Path, *, at: str | None = None) -> tuple[Survey, list[Suggestion]]:
    """Say what a file is and what is in it, and which commands would help.

    Raises what reading raises; several state_dicts are all described, unless `at` chooses.
    """
    facts = survey.survey(containers.read(path), at)
    return facts, suggestions(facts)


def check(
    path: str | Path,
    *,
    sha256: bool = False,
    finite: bool = False,
    strict: bool = False,
    progress: Begin = no_progress,
) -> Checked:
    """Say whether a file is whole, and whether loading it elsewhere would run code.

    `finite` counts NaN and infinity, `strict` calls foreign names unsafe. Never raises for what
    a file holds: its `status` says that.
    """
    return checking.check(path, sha256=sha256, finite=finite, strict=strict, progress=progress)


def diff(
    left: str | Path,
    right: str | Path,
    *,
    at: str | None = None,
    left_at: str | None = None,
    right_at: str | None = None,
    every: bool = False,
    structure: bool = False,
    atol: float = 0.0,
    rtol: float = 0.0,
    select: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    ignore_prefix: str | None = None,
    progress: Begin = no_progress,
) -> Difference:
    """Compare two checkpoints bit for bit, or within `atol + rtol * |left|`.

    `at` is where the state_dict sits on both sides, `every` compares all there is by path,
    `structure` reads no values; `rename` gives dotted prefixes of the left their names on the
    right; `ignore_prefix` is a prefix or `auto`. Raises what reading raises,
    `AmbiguousStateDict`, and `NothingMatched` for what no key has.
    """
    from ckptool.verbs import compare
    from ckptool.verbs.compare_sides import Asked, tolerance

    asked = Asked(
        at if left_at is None else left_at,
        at if right_at is None else right_at,
        every,
        structure,
        tolerance(atol, rtol),
        select,
        tuple((rename or {}).items()),
        ignore_prefix,
    )
    return compare.diff(containers.read(left), containers.read(right), asked, progress)


def strip_prefix(
    source: str | Path,
    target: str | Path | None = None,
    *,
    prefix: str = edits.DEFAULT_PREFIX,
    every: bool = False,
    anywhere: bool = False,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Take a prefix off keys; `auto` peels every known wrapper that all keys share."""
    if prefix == AUTO and (every or anywhere):
        raise EditError("--prefix auto takes neither --every nor --anywhere")
    step = (
        edits.strip_wrappers()
        if prefix == AUTO
        else edits.strip_prefix(prefix, every=every, anywhere=anywhere)
    )
    return surgery.rewrite(source, target, [step], options=options, progress=progress)


def add_prefix(
    source: str | Path,
    target: str | Path | None = None,
    *,
    prefix: str = edits.DEFAULT_PREFIX,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Put a prefix before every key."""
    steps = [edits.add_prefix(prefix)]
    return surgery.rewrite(source, target, steps, options=options, progress=progress)


def unwrap(
    source: str | Path,
    target: str | Path | None = None,
    *,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Write the state_dict alone; raises `EditError` where it is alone already."""
    return surgery.rewrite(
        source, target, bare=True, unwrap=True, options=options, progress=progress
    )


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    steps: Sequence[Edit] = (),
    unwrap: bool = False,
    max_shard_size: int | str | None = None,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Write a checkpoint again, in the container of the target, with edits in their order.

    With `options.to` `dcp`, the target is the folder of a distributed checkpoint.
    With `max_shard_size`, bytes or text such as `5GB`, it is a folder of shards.
    """
    form = surgery.FILE
    if options is not None and options.to == "dcp":
        if max_shard_size is not None:
            raise EditError("a distributed checkpoint is not cut by --max-shard-size")
        form = surgery.Form(distributed=True)
    elif max_shard_size is not None:
        form = surgery.Form(sharding.parse_size(str(max_shard_size)))
    return surgery.rewrite(
        source, target, steps, bare=unwrap, options=options, progress=progress, form=form
    )


def transfer(
    source: str | Path,
    target: str | Path | None = None,
    *,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    like: str | Path | None = None,
    like_at: str | None = None,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    init_missing: bool = False,
    seed: int = 0,
    min_match: float = MIN_MATCH,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Transferred:
    """Write the bare state_dict with what fits a target: another file, or a model.

    Raises `PoorFit` where less than `min_match` of the target's elements would be filled.
    """
    if like is not None and model is not None:
        raise EditError("a transfer has one target: --like or --model")
    if model is None and (model_args or init_missing):
        raise EditError("--model-arg and --init-missing need --model")
    moves = [edits.rename(old, new) for old, new in (rename or {}).items()]
    reference: Reference | None = None
    fill: Fill | None = None
    if like is not None:
        reference = fitting.reference_of_file(like, like_at)
    elif model is not None:
        reference, fill = _model(model, model_args or {}, seed if init_missing else None)
    return fitting.transfer(
        source,
        target,
        like=reference,
        steps=fitting.first_steps(moves, drop, keep),
        min_match=min_match,
        options=options,
        progress=progress,
        fill=fill,
    )


def _model(spec: str, args: Mapping[str, Any], seed: int | None) -> tuple[Reference, Fill | None]:
    from ckptool.model import initial, zoo

    shapes = {key: shape for key, (_, shape) in zoo.shapes(spec, args).items()}
    fill = None if seed is None else initial.initial_values(spec, args, seed)
    return fitting.reference(spec, shapes), fill


def download(
    what: str,
    target: str | Path = ".",
    *,
    sha256: str | None = None,
    force: bool = False,
    sync: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
) -> Downloaded:
    """Download a torchvision weight by name, or any URL, into a folder or to a file.

    Raises `DownloadFailed`, `HashMismatch`, `OutputExists`, `WriteError`; for names `NoSuchModel`
    and `MissingExtra`.
    """
    from ckptool.files import hub
    from ckptool.model import weights

    known = None if "://" in what else weights.resolve(what)
    return hub.download(
        known.url if known else what,
        target,
        sha256=sha256,
        expected_prefix=known.sha256_prefix if known else None,
        force=force,
        sync=sync,
        progress=progress,
    )


def verify(
    reference: str | Path,
    candidate: str | Path,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> Verification:
    """Run a model on the weights of two files and compare the outputs, bit for bit.

    `options` are the fields of `ckptool.model.verify.Options` (`devices`, `partial`, `atol` ...).
    Raises `DoesNotLoad`, `NoDevice`, `NoSuchModel`, `BadInput`, `MissingExtra`, `OutOfMemory`.
    """
    from ckptool.model import verify as room

    return room.verify(reference, candidate, model, model_args, room.Options(**options))
