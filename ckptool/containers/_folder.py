"""The file of a folder that is read for it, or what the folder is: what wrote it, what is in it.

A folder is read from an index, or from the one checkpoint under a usual name: those of
transformers, diffusers and peft (transformers/utils/__init__.py, `WEIGHTS_NAME` and its like), and
Lightning's suffix.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence

from ckptool.containers import _others, _registry, _sets
from ckptool.errors import AmbiguousStateDict, CkptoolError, FormatError, Malformed, NotACheckpoint
from ckptool.files import paths
from ckptool.files.paths import Entry
from ckptool.text import argument, counted, readable, table

MAX_NAMES = 10_000
MAX_SHOWN = 12
MAX_FOLDERS = 100  # that are looked into
MAX_CHECKPOINTS = 20  # that are named where one must be chosen
_USUAL = re.compile(rf"({'|'.join(_others.STEMS)})(\.\w+)?\.(safetensors|bin)|.+\.ckpt")
_SHARD = re.compile(
    r"(?P<stem>.*)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<suffix>\.\w+)", re.ASCII
)
# Of one rank, with pieces of tensors (torch/distributed/checkpoint/_hf_utils.py, _gen_file_name).
_OF_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Of training, not of a model.
_STATES = ("optim", "sched", "rng", "random_states", "training_args", "scaler")


def checkpoint_in(folder: str) -> str:
    """Return the file that a folder is read from.

    Raises `AmbiguousStateDict` where there are several, `Malformed` for shards without their
    index, `NotACheckpoint` for any other folder and `NoSuchFile` for one that cannot be listed.
    """
    entries = paths.listing(folder)
    files = _file_names(entries)
    checkpoints = _checkpoints(files)
    if len(checkpoints) > 1:
        raise AmbiguousStateDict(
            f"{folder} is a folder of {len(checkpoints)} checkpoints",
            evidence=checkpoints[:MAX_CHECKPOINTS],
            hint="name one of them",
        )
    if not checkpoints:
        _refuse_interrupted(folder, entries)
        if part := _sets.file_in(folder, files, [each.name for each in entries if each.is_folder]):
            return part
        _refuse_shards(folder, files)
        raise _refusal(folder)
    return paths.join(folder, checkpoints[0])


def lacks_index(folder: str) -> bool:
    """Check for shards of a checkpoint in a folder without the index that joins them."""
    try:
        files = _file_names(paths.listing(folder))
    except CkptoolError:
        return False
    return not _checkpoints(files) and any(map(shard_of, files))


def shard_of(name: str) -> tuple[str, int, int] | None:
    """Split `model-00001-of-00002.safetensors` into `model.safetensors`, 1 and 2."""
    match = _SHARD.fullmatch(name)
    if match is None or _OF_RANK.fullmatch(name):
        return None
    return match["stem"] + match["suffix"], int(match["number"]), int(match["count"])


def shard_notes(path: str) -> list[str]:
    """Note that a file is one shard of a set; nothing of any other."""
    folder, name = paths.split(path)
    shard = shard_of(name)
    if shard is None:
        return []
    whole, number, count = shard
    index = f"{whole}.index.json"
    has_index = paths.is_file(paths.join(folder, index))
    more = f"; {index} names all of them" if has_index else ""
    return [f"this is shard {number} of {count}{more}"]


def _file_names(entries: Sequence[Entry]) -> list[str]:
    return [entry.name for entry in entries if entry.is_file]


def _checkpoints(names: Sequence[str]) -> list[str]:
    return [name for name in names if _registry.is_index(name) or _USUAL.fullmatch(name)]


def _refuse_interrupted(folder: str, entries: Sequence[Entry]) -> None:
    """Say where the files are that a killed run of ours had moved aside, to be replaced."""
    temporary = [entry for entry in entries if entry.name.endswith(".tmp")]
    if not temporary or paths.is_url(folder):
        return
    from ckptool.files.moves import ASIDE, TEMPORARY

    for entry in temporary:
        old = os.path.join(entry.path, ASIDE)
        if TEMPORARY.fullmatch(entry.name) and os.path.isdir(old) and os.listdir(old):
            raise Malformed(
                f"{folder} was being replaced when ckptool was killed; what was in it before is in "
                f"{old}",
                path=folder,
                hint=f"ckptool info {argument(old)}",
            )


def _refuse_shards(folder: str, names: Sequence[str]) -> None:
    sets = Counter((shard[0], shard[2]) for name in names if (shard := shard_of(name)))
    if sets:
        (whole, count), present = next(iter(sets.items()))
        raise Malformed(
            f"{folder} is a folder with {present} of {count} shards of {whole}, "
            f"without their index {whole}.index.json",
            path=folder,
            hint="get it from the source of the shards; a shard can also be read by itself",
        )


def _refusal(folder: str) -> NotACheckpoint:
    """Return the error for a folder: what it looks like, what may be read in it, the likeliest."""
    from ckptool.files import archives

    try:
        entries = paths.listing(folder, sizes=True)[:MAX_NAMES]
    except FormatError:  # a folder that may be listed, and not entered
        return NotACheckpoint(f"{folder} is a folder", path=folder)
    sizes = {entry.name: entry.nbytes for entry in entries if entry.is_file}
    names = {entry.name for entry in entries}
    kinds = _others.table("names in a folder")
    kind = next((f", {what}" for needed, what in kinds if names.issuperset(needed.split())), "")
    endings = (*_registry.suffixes(), *archives.SUFFIXES, ".model", ".index.json")
    weights = [name for name in sizes if name.endswith(endings)]
    weights.sort(key=lambda name: (-sizes[name], name))
    folders = [entry.name for entry in entries if entry.is_folder][:MAX_FOLDERS]
    inside = [name for name in folders if _is_checkpoint(paths.join(folder, name))]
    likely = sorted(weights + inside, key=lambda name: name.startswith(_STATES))
    return NotACheckpoint(
        f"{folder} is a folder{kind} ({_counts(len(sizes), len(entries) - len(sizes))})",
        path=folder,
        evidence=table(
            [(name, readable(sizes[name])) for name in weights[:MAX_SHOWN]]
            + [(f"{name}/", "a checkpoint") for name in inside[:MAX_SHOWN]],
            (1,),
        ),
        hint=f"ckptool info {argument(paths.join(folder, likely[0]))}" if likely else "",
    )


def _is_checkpoint(folder: str) -> bool:
    """Check whether a folder has the files of one checkpoint, by their names alone."""
    try:
        return len(_checkpoints(_file_names(paths.listing(folder)))) == 1
    except CkptoolError:
        return False


def _counts(files: int, folders: int) -> str:
    parts = [counted(n, noun) for n, noun in ((files, "file"), (folders, "folder")) if n]
    return ", ".join(parts) or "empty"
