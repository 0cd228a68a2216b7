"""Sets of files that ranks wrote, each a part of one checkpoint: found by names, joined by content.

Names only find the files that may be a set. The container of the set reads them, and says by what
is in them whether they are parts; where they are not, each is a checkpoint of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ckptool.containers import _registry
from ckptool.errors import AmbiguousStateDict, of_system
from ckptool.files import fileio
from ckptool.files.fileio import Reader
from ckptool.text import counted

if TYPE_CHECKING:
    from ckptool.pickles.tree import Node
    from ckptool.state.checkpoint import Checkpoint

MAX_SETS = 20  # that are named where one must be chosen
LATEST = "latest"  # of DeepSpeed (engine.py, `_save_checkpoint`): the folder of the last step
MAX_LATEST = 1 << 12
_STEP = re.compile(r"global_step(\d+)", re.ASCII)
# Module of the container -> names; what the group `part` matches differs between files of a set.
# Its `join(files, values)` reads them as one checkpoint, of those `values` where there are several;
# None where what is in them says that they are no parts.
_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    # torch/distributed/checkpoint/_hf_utils.py, `_gen_file_name`: of a rank, a part of the model
    (
        "dcp_safetensors",
        re.compile(r"shard-(?P<part>\d{5}-model-\d{5})-of-\d{5}\.safetensors", re.ASCII),
    ),
    # verl, torchtune, accelerate and others: model_world_size_2_rank_0.pt, model.rank_0.pth
    ("rank_files", re.compile(r".*rank[-_]?(?P<part>\d+)[^/]*\.(pt|pth|bin|ckpt)", re.ASCII)),
)


class FileSet(NamedTuple):
    """Files whose names are those of one set, by the numbers in them, and the `module` to ask."""

    module: str
    files: tuple[str, ...]

    def join(self, reader: Reader, values: str) -> Checkpoint | None:
        """Return the checkpoint they make, None where what is in them is no part of one.

        `reader` is of the file that is named in errors which name none.
        """
        module = _registry.module(self.module)
        return _registry.read_by(
            module.CONTAINERS[0], lambda _: module.join(self.files, values), reader
        )


def of_file(path: str) -> FileSet | None:
    """Return the files that a file may be in one set with, itself among them."""
    folder, name = os.path.split(path)
    if _kind(name) is None:
        return None
    path = os.path.join(folder, name)
    return next((each for each in in_folder(folder) if path in each.files), None)


def in_folder(folder: str) -> list[FileSet]:
    """List the sets that names in a folder are those of."""
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in entries if _kind(entry.name) and entry.is_file()]
    except OSError as error:
        raise of_system(error, folder, "listed") from None
    return grouped(folder, names)


def grouped(folder: str, names: Iterable[str]) -> list[FileSet]:
    """Group names of files in a folder by the set they are of; others are left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names, key=by_number):
        kind = _kind(name)
        if kind is not None:
            found.setdefault(kind, []).append(os.path.join(folder, name))
    return [FileSet(module, tuple(files)) for (module, _), files in sorted(found.items())]


def file_in(folder: str, names: Sequence[str], folders: Sequence[str]) -> str:
    """Return a file of the one set in a folder, or in that of a step; empty where there is none.

    DeepSpeed's `latest` names the step. Raises `AmbiguousStateDict` where one must be chosen.
    """
    sets = grouped(folder, names)
    if not sets:
        steps = [name for name in folders if _STEP.fullmatch(name)]
        if LATEST in names and (latest := _latest(folder)) in folders:
            steps = [latest]
        if len(steps) > 1:
            steps.sort(key=by_number)
            raise _several(folder, "steps", [os.path.join(folder, step) for step in steps], 0)
        sets = in_folder(os.path.join(folder, steps[0])) if steps else []
    if len(sets) > 1:
        files = [counted(len(each.files), "file") for each in sets]
        shown = [f"{each.files[0]}   {count}" for each, count in zip(sets, files, strict=True)]
        raise _several(folder, "sets of files", shown, len(sets))
    return sets[0].files[0] if sets else ""


def read_part(path: str, before: int) -> Checkpoint:
    """Read one file of a set as it is; so many files of it were read before."""
    with Reader(path) as reader:
        part = _registry.read(reader, shard=True)
    fileio.spare(reader.file, before)
    return part


def nothing(reader: Reader) -> None:
    """Read no file alone: what one of a set is, is asked of all of them."""


def _kind(name: str) -> tuple[str, str] | None:
    """Return which set a name is of: its module, and the name without what differs in it."""
    for module, pattern in _NAMES:
        match = pattern.fullmatch(name)
        if match is not None:
            return module, name[: match.start("part")] + name[match.end("part") :]
    return None


def by_number(name: str) -> list[tuple[int, str]]:
    """Order names by the numbers in them: rank 10 comes after rank 9."""
    return [(int(part or -1), text) for text, part in re.findall(r"(\D*)(\d{0,18})", name)]


def _latest(folder: str) -> str:
    with Reader(os.path.join(folder, LATEST)) as reader:
        return reader.read(0, min(reader.nbytes, MAX_LATEST)).decode("utf-8", "replace").strip()


def _several(folder: str, what: str, shown: Sequence[str], count: int) -> AmbiguousStateDict:
    return AmbiguousStateDict(
        f"{folder} is a folder of {count or len(shown)} {what}",
        evidence=shown[:MAX_SETS],
        hint="name one of them; any file of a set stands for all of it",
    )


def combined(
    path: str,
    container: str,
    tree: Node,
    parts: Mapping[str, Checkpoint],
    notes: Sequence[str] = (),
) -> Checkpoint:
    """Return a checkpoint that is made of parts, by their names."""
    from dataclasses import replace

    first = next(iter(parts.values()))
    return replace(
        first,
        path=path,
        container=container,
        tree=tree,
        nbytes=sum(each.nbytes for each in parts.values()),
        globals={name: at for each in parts.values() for name, at in each.globals.items()},
        calls=[call for each in parts.values() for call in each.calls],
        records={f"{n}/{name}": r for n, s in parts.items() for name, r in s.records.items()},
        unlisted=sum(each.unlisted for each in parts.values()),
        flaws=tuple(f"{name}: {flaw}" for name, each in parts.items() for flaw in each.flaws),
        files=tuple(f for s in parts.values() for f in s.files),
        shards=tuple(parts.values()),
        notes=(*notes, *(note for each in parts.values() for note in each.notes)),
    )
