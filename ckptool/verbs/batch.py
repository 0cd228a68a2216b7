"""What the outputs of several inputs are called in one folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from unicodedata import normalize

from ckptool import containers
from ckptool.containers import OTHER_FORMATS, Container
from ckptool.errors import EditError, NameCollision
from ckptool.files import archives, filename, paths, sites
from ckptool.files.fileio import MARK


def name(source: str) -> str:
    """Return the last name of an input: of a path, a URL, or a member of an archive.

    An index is called as transformers calls the file that was cut, or else as its folder. Raises
    `EditError` for what has no name.
    """
    found = "" if source == "-" else _last(source)
    if containers.is_index(found):
        whole, _, kind = found.partition(".index.")
        found = whole if kind or _known(found) else _last(source.rpartition("/")[0] or ".")
    if not found:
        raise EditError(f"{source} has no name for an output", hint="name the output itself")
    return found


def _last(source: str) -> str:
    if paths.is_url(source):
        place, _, query = source.partition("?")
        return filename.of_url(f"{place.rpartition(MARK)[2].rstrip('/')}?{query}")
    if containers.member_of(source):
        return filename.safe(source.rpartition(MARK)[2])
    return os.path.basename(os.path.abspath(source))


def _known(name: str) -> Container | None:
    """Return the container that is written under a name."""
    return containers.by_suffix(os.path.splitext(name)[1].lower())


def stem(name: str) -> str:
    """Return a name without the suffix of a checkpoint, or of an archive of one."""
    known = {*containers.suffixes(), *archives.SUFFIXES, *OTHER_FORMATS}
    first, suffix = os.path.splitext(name)
    if suffix.lower() not in known:
        return name
    second, inner = os.path.splitext(first)
    packed = suffix.lower() in (".tar", *archives.SUFFIXES)
    return second if packed and inner.lower() in known else first


def output(source: str, to: str | None, *, as_folder: bool) -> str:
    """Return what an output is called: as its input, with the suffix of what it is `to` be.

    A folder's name gets that of the container which is written. Raises what reading it raises.
    """
    found = name(source)
    if as_folder:
        return stem(found)
    place = sites.of(source)
    known = _known(found)
    if to is None and (known or not (containers.is_index(_last(source)) or paths.is_folder(place))):
        return found
    if to is None:
        own = containers.by_name(containers.read(place).container)
        wanted = own if own.writer else containers.by_name(own.written_as)
    else:
        wanted = containers.by_word(to)
        if known and known.name == wanted.name:
            return found
    return stem(found) + (wanted.writer.default_suffix if wanted.writer else "")


def refuse_collisions(pairs: Sequence[tuple[str, str]]) -> None:
    """Raise `NameCollision` where two inputs would be written to one place."""
    seen: dict[str, str] = {}
    for source, target in pairs:
        first = seen.setdefault(_place(target), source)
        if first is not source:
            raise NameCollision(
                f"{first} and {source} would both be written to {target}",
                hint="name the outputs one by one, or other folders for them",
            )


def _place(target: str) -> str:
    """Identify a place: links lead to one, and so do names that the file system takes for one."""
    if paths.is_url(target):
        return target
    place = os.path.realpath(target)
    if sys.platform in ("darwin", "win32"):
        place = normalize("NFC", place).casefold()
    return place
