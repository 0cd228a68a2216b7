"""`ckptool download`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import screen, talk
from ckptool.cli._options import Command, answers, no_sync, refuse_idle
from ckptool.text import readable, visible

if TYPE_CHECKING:
    from ckptool.files.download import Downloaded
    from ckptool.model.weights import Weights


@click.command("download", cls=Command)
@click.argument("what", metavar="NAME_OR_URL", required=False)
@click.option(
    "-o",
    "--output",
    "target",
    default=".",
    show_default=False,
    metavar="DIR_OR_FILE",
    help="Folder or file (end a new folder with /).  [default: this folder]",
)
@click.option("--sha256", metavar="HEX", help="Expected sha256 of the file.")
@click.option("--force", is_flag=True, help="Overwrite a different file.")
@no_sync
@click.option("--list", "show", is_flag=True, help="List torchvision's weights: all, or by name.")
@answers
def command(what: str | None, target: str, no_sync: bool, show: bool, **how: Any) -> None:
    """Download weights of torchvision by name, or any URL, and check what came.

    \b
    ckptool download resnet18 -o weights/
    ckptool download ResNet50_Weights.IMAGENET1K_V1
    ckptool download https://example.org/resnet18-5c106cde.pth -o weights/
    ckptool download --list 'resnet*'

    Prints the path of the file. Resumes the NAME.part of an interrupted run. The
    file is checked against --sha256, or the hash in its name; one that is there already is
    checked and left alone.
    """
    refuse_idle(dict.fromkeys(["target", "sha256", "force", "no_sync", "timeout"], "not show"))
    if show:
        _list(what)
        return
    if what is None:
        raise click.UsageError("name weights or a URL, or use --list")
    from ckptool.files import http, sites
    from ckptool.verbs import api

    url = what if "://" in what else _url(what)
    with talk.Progress(http.shown(url)) as progress:
        done = api.download(
            what,
            target,
            sync=not no_sync,
            timeout=sites.manner().timeout,
            progress=progress.reached,
            **how,
        )
    for line in done.warnings:
        talk.warn(visible(line))
    if talk.speaks_json():
        talk.put_document(done.to_dict())
    else:
        talk.put([visible(done.path)])
    talk.say(_lines(done))


def _checked(done: Downloaded) -> str:
    """Return what a download was checked against, in words."""
    if done.checked in ("nothing to check against", "size"):
        return "not checked: no hash is known"
    return f"checked: {done.checked}"


def _url(name: str) -> str:
    from ckptool.model import weights

    entry = weights.resolve(name)
    talk.say([f"{visible(name)}: {entry.member}, {entry.url}"])
    return entry.url


def _lines(done: Downloaded) -> list[str]:
    """Return what a download did, in lines of talk."""
    sha256 = f"sha256 {done.sha256}"
    if done.already_there:
        how = _checked(done)
        if done.checked == "size":
            how = "same size as the server's; content not verified (no hash); "
            how += "--force downloads it again"
        return [f"{visible(done.path)}: already there, {how}", sha256]
    written = f"{visible(done.path)}: {readable(done.nbytes)}, {_checked(done)}"
    if done.resumed_from:
        resumed = f"resumed after {readable(done.resumed_from)}"
        return [resumed, written, sha256]
    return [written, sha256]


def _list(pattern: str | None) -> None:
    from ckptool.errors import NoSuchModel
    from ckptool.model import weights

    entries = weights.listing(pattern)
    if not entries:
        hint = "ckptool download --list shows all"
        raise NoSuchModel(f"torchvision has no weights like `{pattern}`", hint=hint)
    if talk.speaks_json():
        talk.put_document({"schema": "weights/1", "weights": [asdict(entry) for entry in entries]})
    else:
        width = talk.columns()
        talk.put(_table(entries, width) if width else _rows(entries))
    defaults = sum(entry.default for entry in entries)
    talk.say([f"{len(entries)} weights of {defaults} models; * is the default of a bare name"])


def _rows(entries: Sequence[Weights]) -> list[str]:
    """List weights for programs: name, file, bytes, parameters, top-1, and * for a default."""
    return [
        "\t".join(map(_cell, (e.name, e.file, e.nbytes, e.parameters, e.top1, "*" * e.default)))
        for e in entries
    ]


def _table(entries: Sequence[Weights], width: int) -> list[str]:
    """List weights for people."""
    rows = [("NAME", "FILE", "SIZE", "PARAMETERS", "TOP-1")]
    rows += [
        (
            f"{entry.name}{' *' if entry.default else ''}",
            entry.file,
            _cell(entry.nbytes, readable),
            _cell(entry.parameters, "{:,}".format),
            _cell(entry.top1, "{:.2f} %".format),
        )
        for entry in entries
    ]
    return screen.table(rows, width, right=(2, 3, 4), spare=(1,))


def _cell(value: Any, form: Callable[[Any], str] = str) -> str:
    return "" if value is None else form(value)
