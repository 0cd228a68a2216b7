"""`ckptool download`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from ckptool.cli import talk
from ckptool.cli._fetch import checked
from ckptool.cli._options import Command
from ckptool.text import readable, table, visible

if TYPE_CHECKING:
    from ckptool.files.hub import Downloaded
    from ckptool.model.weights import Weights


@click.command("download", cls=Command)
@click.argument("what", metavar="NAME_OR_URL", required=False)
@click.option(
    "-o",
    "--output",
    "target",
    default=".",
    metavar="DIR_OR_FILE",
    help="Where to; a folder that is not there yet ends in a slash.  [default: this folder]",
)
@click.option("--sha256", metavar="HEX", help="What the file must be.")
@click.option("--force", is_flag=True, help="Replace a file that is another one.")
@click.option("--no-sync", is_flag=True, help="Leave the flush to disk to the system.")
@click.option("--list", "show", is_flag=True, help="List torchvision's weights: all, or by name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No talk, only errors and warnings.")
def command(
    what: str | None,
    target: str,
    sha256: str | None,
    force: bool,
    no_sync: bool,
    show: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Download weights of torchvision by name, or any URL, and check what came.

    \b
    ckptool download resnet18 -o weights/
    ckptool download ResNet50_Weights.IMAGENET1K_V1
    ckptool download https://example.org/resnet18-5c106cde.pth -o weights/
    ckptool download --list 'resnet*'

    Prints the path of the file. What an interrupted run left in NAME.part is gone on with. The
    file is checked against --sha256, or the hash in its name; one that is there already is
    checked and left alone.
    """
    if show:
        _list(what, as_json=as_json, quiet=quiet)
        return
    if what is None:
        raise click.UsageError("name weights or a URL, or use --list", click.get_current_context())
    weights = None if "://" in what else _weights(what, quiet=quiet)
    done = _downloaded(
        weights.url if weights else what,
        target,
        sha256=sha256,
        prefix=weights.sha256_prefix if weights else None,
        force=force,
        sync=not no_sync,
        quiet=quiet,
    )
    if as_json:
        from ckptool.cli.report import document

        done = replace(done, weights=weights.member if weights else None)
        talk.put([document(done.to_dict())])
    else:
        talk.put([visible(done.path)])
    talk.warn(map(visible, done.warnings))
    talk.say(_lines(done), quiet=quiet)


def _weights(name: str, *, quiet: bool) -> Weights:
    from ckptool.model import weights

    found = weights.resolve(name)
    talk.say([f"{visible(name)}: {found.member}, {found.url}"], quiet=quiet)
    return found


def _downloaded(
    url: str,
    target: str,
    *,
    sha256: str | None,
    prefix: str | None,
    force: bool,
    sync: bool,
    quiet: bool,
) -> Downloaded:
    from ckptool.files import http, hub

    with talk.Progress(http.shown(url), quiet=quiet) as progress:
        try:
            return hub.download(
                url,
                target,
                sha256=sha256,
                expected_prefix=prefix,
                force=force,
                sync=sync,
                progress=lambda done, total: progress.reached(done, total or 0),
            )
        except KeyboardInterrupt as error:
            talk.say(map(visible, getattr(error, "__notes__", [])))
            raise


def _lines(done: Downloaded) -> list[str]:
    """Say what a download did."""
    lines = []
    if done.already_there:
        how = checked(done)
        if done.checked == "size":
            how += ", and its size is the server's; --force downloads it again"
        lines.append(f"{visible(done.path)} is there already and was left alone; {how}")
    elif done.resumed_from:
        lines.append(f"went on after {readable(done.resumed_from)} that were there")
    if not done.already_there:
        lines.append(f"{visible(done.path)}: {readable(done.nbytes)}, {checked(done)}")
    return [*lines, f"sha256 {done.sha256}"]


def _list(pattern: str | None, *, as_json: bool, quiet: bool) -> None:
    from ckptool.errors import NoSuchModel
    from ckptool.model import weights

    found = weights.listing(pattern)
    if not found:
        hint = "ckptool download --list shows all"
        raise NoSuchModel(f"torchvision has no weights like `{pattern}`", hint=hint)
    if as_json:
        from ckptool.cli.report import document

        talk.put([document({"schema": "weights/1", "weights": [asdict(each) for each in found]})])
    else:
        talk.put(_table(found) if talk.on_terminal() else _rows(found))
    defaults = sum(each.default for each in found)
    talk.say(
        [f"{len(found)} weights of {defaults} models; * is what a bare name means"], quiet=quiet
    )


def _rows(found: Sequence[Weights]) -> list[str]:
    """List weights for programs: name, file, bytes, parameters, top-1, and * for a default."""
    cells = (
        (each.name, each.file, each.nbytes, each.parameters, each.top1, "*" * each.default)
        for each in found
    )
    return ["\t".join("" if cell is None else str(cell) for cell in row) for row in cells]


def _table(found: Sequence[Weights]) -> list[str]:
    """List weights for people."""
    rows = [("NAME", "FILE", "SIZE", "PARAMETERS", "TOP-1")]
    rows += [
        (
            f"{each.name}{' *' if each.default else ''}",
            each.file,
            "" if each.nbytes is None else readable(each.nbytes),
            "" if each.parameters is None else f"{each.parameters:,}",
            "" if each.top1 is None else f"{each.top1:.2f} %",
        )
        for each in found
    ]
    return table(rows, right=(2, 3, 4))
