"""Tell a file from what a server sends in its place: a page, a pointer, nothing, or packed."""

from __future__ import annotations

from collections.abc import Iterator

from ckptool.errors import DownloadFailed
from ckptool.files.http import SHOWN, Answer, shown

HEAD = 512  # bytes that tell what a body is


def refuse_encoding(url: str, answer: Answer) -> None:
    """Raise `DownloadFailed` where the bytes sent are not those of the file."""
    encoding = answer.header("Content-Encoding").lower()
    if encoding not in ("", "identity"):
        raise DownloadFailed(
            f"{shown(url)}: the server packs the file ({encoding[:SHOWN]}), "
            "which was not asked for",
            hint="look for another link",
        )


def head(stream: Iterator[bytes]) -> bytes:
    """Take the first bytes of a body."""
    first = b""
    while len(first) < HEAD and (data := next(stream, b"")):
        first += data
    return first


def refuse_page(url: str, answer: Answer, first: bytes) -> None:
    """Raise `DownloadFailed` where a server sends something else than a file, and calls it one."""
    start = first[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    html = answer.header("Content-Type").lower().startswith(("text/html", "application/xhtml"))
    if start.startswith((b"<!doctype", b"<html", b"<head")) or (html and b"\0" not in first):
        raise DownloadFailed(
            f"{shown(url)} is an HTML page, not a file; nothing was kept",
            hint="a server sends this when a link is wrong or needs a login; "
            "look for the link of the file itself",
        )
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise DownloadFailed(
            f"{shown(url)} is a git-LFS pointer, not the file itself; nothing was kept",
            hint="use the link behind `download` on the file's page "
            "(/resolve/ or media.githubusercontent.com, not /raw/), or git lfs pull",
        )
    if not first and not answer.nbytes:
        raise DownloadFailed(f"{shown(url)}: the server sends an empty file")
