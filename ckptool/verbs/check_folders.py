"""What `check` looks at in a folder: every file by its bytes; the rest is named.

The files of one checkpoint, its index first, are one line. A file that is no checkpoint gets a line
of its own where its name says that it is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import field

from ckptool import containers
from ckptool.errors import CkptoolError
from ckptool.files import archives, budget, paths, sites
from ckptool.records import dataclass
from ckptool.verbs.checked import Checked, Status


@dataclass(slots=True)
class Group:
    """What a path of the command line stands for: `files`, and what is not looked at, and why.

    A file in `sets` stands for all of a set that ranks wrote.
    """

    path: str
    folder: bool = False
    files: list[str] = field(default_factory=list)
    sets: set[str] = field(default_factory=set)
    unseen: dict[str, str] = field(default_factory=dict)

    def lists(self, found: Checked) -> bool:
        """Return whether a file gets a line: it was named, or its name says it is a checkpoint."""
        suffix = os.path.splitext(found.file)[1].lower()
        part = found.status is Status.UNSUPPORTED and suffix == ".distcp"  # of its .metadata
        if not self.folder or not (part or found.status is Status.NOT_A_CHECKPOINT):
            return True
        index = containers.is_index(os.path.basename(found.file))
        return index or os.path.isdir(found.file) or suffix in containers.suffixes(written=True)

    def other(self, found: Checked) -> bool:
        """Note a file without a line: an archive is not looked into; return whether it is none."""
        if not archives.is_archive(found.file):
            return True
        self.unseen[found.file] = f"{found.detail}: what is in it"
        return False


def groups(names: Sequence[str]) -> list[Group]:
    """Return what paths stand for, folders with the files in them and in those in them."""
    return [_group(path) for path in names]


def _group(path: str) -> Group:
    path = sites.of(path)
    if not os.path.isdir(path):
        return Group(path, files=[path])
    group = Group(path, folder=True)
    group.files += _found_in(group)
    return group


def _found_in(group: Group) -> Iterator[str]:
    """Yield the files in a folder, sorted; those of an index, or of one checkpoint, as one.

    A folder that cannot be listed stands for itself, and so, beside the files in it, does one
    whose shards lack their index.
    """
    denied: list[OSError] = []
    for here, folders, files in os.walk(group.path, onerror=denied.append):
        if "data.pkl" in files and _files_of(here):  # a torch file that was unpacked
            yield here
            folders.clear()
            continue
        for name in folders:
            if name.startswith(".") or os.path.islink(os.path.join(here, name)):
                why = "hidden" if name.startswith(".") else "a link to a folder"
                group.unseen[os.path.join(here, name)] = why
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for _ in paths.tries():
            before = paths.inode(here)
            found = [*_found_at(here, group)]
            if paths.inode(here) == before:
                break
        yield from found
    yield from (str(error.filename) for error in denied)


def _found_at(here: str, group: Group) -> Iterator[str]:
    """Yield what is in one folder; the folder itself where it is gone by now."""
    try:
        with os.scandir(here) as found:
            files = sorted(each.name for each in found if not each.is_dir())
    except OSError:
        yield here
        return
    indexes = [os.path.join(here, name) for name in files if containers.is_index(name)]
    yield from indexes
    if containers.lacks_index(here):
        yield here
    known = {path for index in indexes for path in (index, *_files_of(index))}
    for first, *_ in containers.sets_of_ranks(here):
        name = here if containers.is_read_from(here, first) else first
        joined = _files_of(name)
        name = name if joined else first
        group.sets.add(name)
        known |= {first, *joined}
        yield name
    for path in (os.path.join(here, name) for name in files):
        if path in known:
            continue
        if os.path.isfile(path) or os.path.islink(path):
            yield path
        else:
            group.unseen[path] = "not a regular file"


@budget.run(anew=True)
def _files_of(index: str) -> list[str]:
    """Name the files that are checked with an index, or a folder; none if it cannot be read."""
    try:
        return [str(path) for path, _ in containers.read(index, plugins=False).files]
    except CkptoolError:
        return []
