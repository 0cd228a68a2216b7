"""Verbs of the command line as functions, but for those that have a file of their own name.

    import ckptool

    done = ckptool.strip_prefix("in.pth", "out.pth", force=True)
    print(done.renamed, done.dropped)

Each raises a `CkptoolError` where the command line ends with another exit code than 0. What writes
takes the keywords of `WriteOptions`. A pattern may stand for a list of patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Unpack

from ckptool import containers
from ckptool.errors import EditError
from ckptool.files.copying import Begin, no_progress
from ckptool.state import edits
from ckptool.state.edit_options import stripping
from ckptool.state.edits import Edit
from ckptool.text import parse_size, several
from ckptool.verbs import surgery
from ckptool.verbs.options import Options, WriteOptions
from ckptool.verbs.surgery import Rewrite

if TYPE_CHECKING:  # each verb loads what it alone needs
    from pathlib import Path

    from ckptool.files.download import Downloaded
    from ckptool.verbs.listing import Listing
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
    from ckptool.files.http import Client, Limits
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
        client=Client(Limits(timeout=timeout)),
    )
    return replace(done, weights=known.member if known else None)
