"""Output into a store: made and checked in a temporary folder, then put there as whole objects.

The index of a set comes last, and no set replaces another: a store cannot exchange several objects
at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from ckptool.errors import OutputExists, SameFile, WriteError
from ckptool.files import paths, publish as here
from ckptool.files.copying import Moved, Progress
from ckptool.files.paths import Url
from ckptool.files.target import Output, Owns, Target
from ckptool.files.temporary import ELSEWHERE, temporary_folder

if TYPE_CHECKING:
    from ckptool.files.stores import Store

_PLACES = "outputs go to files, and to s3://, gs:// and az://"


def refuse(url: Url, sources: Iterable[str], owns: Owns | None, *, force: bool) -> Target:
    """Return where output goes in a store: an object, or with `owns` a folder of them.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    if not url.startswith(tuple(f"{scheme}://" for scheme in paths.STORES)):
        raise WriteError(f"{url} cannot be written", hint=_PLACES)
    if any(url.full == getattr(getattr(source, "url", None), "full", "") for source in sources):
        raise SameFile(f"{url} is the input itself", hint="name another output")
    if owns is None:
        if url.endswith("/") or paths.is_folder(url):
            raise WriteError(f"{url} is a folder", hint="name an object as the output")
        if not force and paths.is_file(url):
            raise OutputExists(f"{url} exists", hint="name another output, or use --force")
    else:
        names = [each.name for each in paths.listing(url)] if paths.is_folder(url) else []
        if old := [name for name in names if owns(name)]:
            what = f"{url} holds {old[0]} already: a store replaces no set at once"
            raise OutputExists(what, hint="name another folder")
    return Target(str(url), force, url=url)


def publish(
    place: Target, output: Output, progress: Progress, check: Callable[[str, Moved], None]
) -> list[str]:
    """Write, check and put an output; return warnings. What fails is removed again.

    Raises a `WriteError`.
    """
    url = cast("Url", place.url)
    store = cast("Store", url.site)  # as `refuse` saw
    with temporary_folder() as folder:
        local = os.path.join(folder, paths.name_of(url) or "output")
        try:
            late = here.publish(Target(local, sync=False), output, progress, check)
        except WriteError as error:
            error.hint = error.hint or ELSEWHERE
            raise
        names = sorted((each.name for each in output.files), key=lambda name: name == output.last)
        files = {name: os.path.join(local, name) if name else local for name in names}
        put: list[Url] = []
        try:
            for name, file in files.items():
                to = url.inside(name) if name else url
                store.put(file, to, replace=place.force)
                put.append(to)
        except BaseException:
            for each in put:
                store.remove(each)
            raise
    return late
