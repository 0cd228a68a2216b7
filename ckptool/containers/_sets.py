"""Sets of files that ranks wrote, each a part of one checkpoint: found by names, joined by content.

Names only find the files that may be a set. The container of the set reads them, and says by what
is in them whether they are parts; where they are not, each is a checkpoint of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from ckptool import records
from ckptool.containers import _registry
from ckptool.errors import AmbiguousStateDict
from ckptool.files import budget, fileio, paths
from ckptool.files.fileio import Reader
from ckptool.pickles import calls as shapes, safety
from ckptool.pickles.names import Level
from ckptool.records import NamedTuple
from ckptool.state.checkpoint import Checkpoint
from ckptool.text import counted, listed

if TYPE_CHECKING:
    from ckptool.containers._container import Container
    from ckptool.pickles.tree import Node

MAX_SETS = 20  # that are named where one must be chosen
LATEST = "latest"  # of DeepSpeed (engine.py, `_save_checkpoint`): the folder of the last step
MAX_LATEST = 1 << 12
_STEP = r"(?a:global_step(\d+))"
# Module of the container -> names; what the group `part` matches differs between files of a set.
# Its `join(files, values)` reads them as one checkpoint, of those `values` where there are several;
# None where what is in them says that they are no parts.
_NAMES = (
    # torch/distributed/checkpoint/_hf_utils.py, `_gen_file_name`: of a rank, a part of the model
    ("dcp_safetensors", r"(?a:shard-(?P<part>\d{5}-model-\d{5})-of-\d{5}\.safetensors)"),
    # deepspeed/runtime/engine.py, `_get_ckpt_name`, `_get_zero_ckpt_name`
    (
        "zero",
        r"(?a:(?P<part>\w*?((zero_pp|expp)_rank_\d+_)?mp_rank_\d+_(model|optim)_states)\.pt)",
    ),
    # verl, torchtune, accelerate and others: model_world_size_2_rank_0.pt, model.rank_0.pth
    ("rank_files", r"(?a:.*rank[-_]?(?P<part>\d+)[^/]*\.(pt|pth|bin|ckpt))"),
)
_IN_NAMES = ("shard-", "rank")  # one is in each: most files are of no set
# Megatron-LM and NeMo have a folder for each rank of a model, with a file of one name in each
# (megatron/training/checkpointing.py, `get_checkpoint_name`).
_FOLDER = r"(?a:[mt]p_rank_\d+(_(pp_rank_)?\d+)?)"
_IN_FOLDER = r"(?a:model(_\w+)?\.(pt|ckpt))"


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
    folder, name = paths.split(path)
    if re.fullmatch(_IN_FOLDER, name) and re.fullmatch(_FOLDER, paths.split(folder)[1]):
        return _of_folders(paths.split(folder)[0], name)
    if _kind(name) is None:
        return None
    path = paths.join(folder, name)
    return next((each for each in in_folder(folder) if path in each.files), None)


def in_folder(folder: str) -> list[FileSet]:
    """List the sets that names in a folder are those of."""
    entries = paths.listing(folder)
    return grouped(folder, [each.name for each in entries if each.is_file and _kind(each.name)])


def _of_folders(parent: str, name: str) -> FileSet:
    """Return the files of one name in the folders of ranks."""
    names = (each.name for each in paths.listing(parent))
    folders = sorted(filter(_of_rank, names), key=by_number)
    files = (paths.join(parent, folder, name) for folder in folders)
    return FileSet("megatron", tuple(filter(paths.is_file, files)))


def grouped(folder: str, names: Iterable[str]) -> list[FileSet]:
    """Group names of files in a folder by the set they are of; others are left out."""
    kinds = ((_kind(name), paths.join(folder, name)) for name in sorted(names, key=by_number))
    found = records.grouped((kind, path) for kind, path in kinds if kind is not None)
    return [FileSet(module, tuple(files)) for (module, _), files in sorted(found.items())]


def file_in(folder: str, names: Sequence[str], folders: Sequence[str]) -> str:
    """Return a file of the one set in a folder, or in that of a step; empty where there is none.

    DeepSpeed's `latest` names the step. Raises `AmbiguousStateDict` where one must be chosen.
    """
    sets = grouped(folder, names)
    if not sets:
        steps = [name for name in folders if re.fullmatch(_STEP, name)]
        if LATEST in names and (latest := _latest(folder)) in folders:
            steps = [latest]
        if len(steps) > 1:
            steps.sort(key=by_number)
            raise _several(folder, "steps", [paths.join(folder, step) for step in steps], 0)
        sets = in_folder(paths.join(folder, steps[0])) if steps else _in_folders(folder, folders)
    if len(sets) > 1:
        files = [counted(len(each.files), "file") for each in sets]
        shown = [f"{each.files[0]}   {count}" for each, count in zip(sets, files, strict=True)]
        raise _several(folder, "sets of files", shown, len(sets))
    return sets[0].files[0] if sets else ""


def _in_folders(folder: str, folders: Sequence[str]) -> list[FileSet]:
    """List the sets that have a file in the folder of each rank."""
    first = next(filter(_of_rank, folders), None)
    names = [each.name for each in paths.listing(paths.join(folder, first))] if first else []
    found = sorted(name for name in names if re.fullmatch(_IN_FOLDER, name))
    return [_of_folders(folder, name) for name in found]


def _of_rank(folder: str) -> bool:
    return re.fullmatch(_FOLDER, folder) is not None


def read_part(files: Sequence[str], number: int, first: Container | None = None) -> Checkpoint:
    """Read one file of a set as it is, by the container that is tried `first`, or any.

    It may take the share of memory that all files up to it have of the whole.
    """
    budget.current().share = (number + 1) / len(files)
    with Reader(files[number]) as reader:
        part = _registry.read(reader, shard=True, first=first)
    fileio.spare(reader.file, number + 1)
    return part


def harmful(part: Checkpoint) -> Checkpoint:
    """Leave out of a part the calls that do nothing, and the names that they alone have."""
    named, calls = safety.without_nested(part)
    verdict = safety.judge(named, calls)
    shaped = {id(call) for call in verdict.calls}
    found = (
        call
        for call in calls
        if id(call) in shaped or shapes.innermost(call.callee) in verdict.dangerous
    )
    kept = [*islice(found, safety.MAX_CALLS)] if verdict.dangerous else []
    return replace(part, globals=named, calls=kept)


def slim(part: Checkpoint) -> Checkpoint:
    """Leave out of a part what only the first is asked for: the tree, calls that do nothing."""
    return replace(harmful(part), tree=None)


def _kind(name: str) -> tuple[str, str] | None:
    """Return which set a name is of: its module, and the name without what differs in it."""
    for module, pattern in _NAMES if any(part in name for part in _IN_NAMES) else ():
        match = re.fullmatch(pattern, name)
        if match is not None:
            return module, name[: match.start("part")] + name[match.end("part") :]
    return None


def by_number(name: str) -> list[tuple[int, str]]:
    """Order names by the numbers in them: rank 10 comes after rank 9."""
    return [(int(part or -1), text) for text, part in re.findall(r"(\D*)(\d{0,18})", name)]


def _latest(folder: str) -> str:
    with Reader(paths.join(folder, LATEST)) as reader:
        return reader.read(0, min(reader.nbytes, MAX_LATEST)).decode("utf-8", "replace").strip()


def _several(folder: str, what: str, shown: Sequence[str], count: int) -> AmbiguousStateDict:
    return AmbiguousStateDict(
        f"{folder} is a folder of {count or len(shown)} {what}",
        evidence=shown[:MAX_SETS],
        hint="name one of them; any file of a set selects the whole set",
    )


def combined(
    path: str,
    container: str,
    tree: Node,
    parts: Mapping[str, Checkpoint],
    notes: Sequence[str] = (),
) -> Checkpoint:
    """Return a checkpoint whose tree was made of parts, given by the names of their files."""
    first = next(iter(parts.values()))
    called = {name: f"{name}: {each.pickle_name}" for name, each in parts.items()}
    return Checkpoint(
        path,
        container,
        tree,
        sum(each.nbytes for each in parts.values()),
        globals={name: at for each in parts.values() for name, at in each.globals.items()},
        calls=[call for each in parts.values() for call in each.calls],
        pickle_name=_pickle_name(parts),
        byteorder=next((p.byteorder for p in parts.values() if p.byteorder != "little"), "little"),
        generation=first.generation,
        protocol=first.protocol,
        unread=tuple(f"{name}: {what}" for name, each in parts.items() for what in each.unread),
        unread_nbytes=sum(each.unread_nbytes for each in parts.values()),
        records={f"{n}/{name}": r for n, p in parts.items() for name, r in p.records.items()},
        unlisted=sum(each.unlisted for each in parts.values()),
        flaws=tuple(f"{name}: {flaw}" for name, each in parts.items() for flaw in each.flaws),
        files=tuple(file for each in parts.values() for file in each.files),
        shards=tuple(
            replace(each, pickle_name=called[name] if each.pickle_name else "")
            for name, each in parts.items()
        ),
        notes=(*notes, *(f"{name}: {note}" for name, each in parts.items() for note in each.notes)),
    )


def _pickle_name(parts: Mapping[str, Checkpoint]) -> str:
    """Name the parts that would run code when loaded, or all, if there is a pickle in them."""
    pickles = [name for name, part in parts.items() if part.pickle_name]
    dangerous = [
        name for name in pickles if safety.judge_file(parts[name]).level is Level.DANGEROUS
    ]
    return listed(dangerous or pickles, 3)
