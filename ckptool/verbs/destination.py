"""Where an output goes and in which container, or why it cannot go there."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import EditError, WriteError
from ckptool.files import paths, publish
from ckptool.files.stream import Pipe
from ckptool.files.target import Target
from ckptool.state.checkpoint import Checkpoint
from ckptool.text import quoted
from ckptool.verbs.layout import FILE, Form, names
from ckptool.verbs.options import Options

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path


def refuse_member(target: str) -> None:
    """Raise `WriteError` for the name of a member of an archive."""
    archive = containers.member_of(target)
    if archive:
        raise WriteError(
            f"{target} is in the archive {archive}: its members are read, never written",
            hint="name an output outside the archive",
        )


_WRITES = ("--max-shard-size", "--to dcp")  # unless distributed, and if it is


def refuse_no_folder(target: str | Path | None, form: Form, options: Options) -> None:
    """Raise `EditError`, or `WriteError` for a pipe, for what is no name of a folder."""
    if isinstance(target, Pipe):
        raise WriteError(
            f"{_WRITES[form.distributed]} writes a folder, and a pipe takes one file",
            hint="name a folder as the output",
        )
    if form.distributed:
        if target is None or options.in_place:
            raise EditError("a distributed checkpoint is a folder: name one as the output")
    elif options.in_place or target is None:
        raise EditError("--max-shard-size writes a folder", hint="name it as the output")
    there = form.distributed and os.path.lexists(str(target))  # which is refused as what it is
    if suffix(str(target)) in containers.suffixes(written=True) and not there:
        raise EditError(
            f"{_WRITES[form.distributed]} writes a folder, and {target} is the name of a file",
            hint="name a folder as the output",
        )


def place_of(
    checkpoint: Checkpoint, target: str, container: str, form: Form, options: Options
) -> Target:
    """Return where the output goes, or refuse to write there."""
    if isinstance(target, Pipe):
        return Target(str(target), pipe=target)
    sources = [path for path, _ in checkpoint.files] if not options.in_place else []
    if isinstance(target, paths.Url):
        from ckptool.files import uploads

        owns = None if form is FILE else names(container).owns if form.max_shard_size else bool
        return uploads.refuse(target, sources, owns, force=options.force)
    how = {"force": options.force, "sync": options.sync, "parents": options.parents}
    if form.distributed:
        from ckptool.containers import _dcp_output

        return publish.refuse_folder(target, sources, _dcp_output.owns, **how)
    if form.max_shard_size is not None:
        return publish.refuse_set(target, sources, names(container).owns, **how)
    return publish.refuse_target(target, sources, **how)


def in_place(
    checkpoint: Checkpoint, source: str | Path, target: str | Path | None, options: Options
) -> tuple[str | Path, Options]:
    """Return the target, which is the source in place, and options to replace that then."""
    if options.in_place:
        if target is not None:
            raise EditError("--in-place takes only the input, no output")
        if paths.is_url(source):
            raise EditError(
                f"{checkpoint.path} is remote: --in-place replaces a local file",
                hint="name an output",
            )
        if len(checkpoint.files) > 1 or os.path.isdir(source):
            what = "a folder" if os.path.isdir(source) else f"{len(checkpoint.files)} files"
            raise EditError(
                f"{source} is {what}: --in-place replaces one file", hint="name an output"
            )
        return source, replace(options, force=True)
    if target is None:
        raise EditError("no output was named", hint="name one, or use --in-place")
    return target, options


def suffix(target: str) -> str:
    """Return the suffix of a name, in lower case."""
    return os.path.splitext(target)[1].lower()


def container_of(checkpoint: Checkpoint, target: str, form: Form, options: Options) -> str:
    """Choose the output container: as told, by the suffix, or the input's own (in place too)."""
    if form.distributed:
        return "torch-dcp"
    if form.max_shard_size is not None:
        return containers.by_word(options.to or "safetensors").name
    if options.to == "dcp":
        raise EditError(
            "only convert writes a distributed checkpoint, and it takes edits as options",
            hint=f"ckptool convert {quoted(checkpoint.path)} {quoted(target)} --to dcp "
            "--strip-prefix auto --drop PATTERN ...",
        )
    if options.to is not None:
        return containers.by_word(options.to).name
    named = containers.by_suffix(suffix(target))
    if named is not None and not options.in_place:
        return named.name
    if suffix(target) in containers.OTHER_FORMATS and not options.in_place:
        raise EditError(
            f"{target} has the suffix of a format that cannot be written",
            hint="name it .safetensors or .pth, or choose what is written with --to",
        )
    own = containers.by_name(checkpoint.container)
    return own.name if own.writer else own.written_as


def suffix_notes(target: str, container: str, options: Options) -> list[str]:
    """Note a suffix that says nothing of the container, where nobody chose, or another one."""
    what = f"{target} is a {containers.by_name(container).title} file"
    named = containers.by_suffix(suffix(target))
    if named is not None:
        why = f" (--to {options.to})" if options.to else ""
        return [] if named.name == container else [f"{what} despite its suffix{why}"]
    chosen = options.to is not None or options.in_place
    return [] if chosen else [f"{what}: its suffix names no format; --to chooses"]
