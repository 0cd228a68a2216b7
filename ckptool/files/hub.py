"""Repositories of the Hugging Face Hub: `hf://ORG/REPO[@REV][/FILE]`, read at one commit.

The addresses are those of huggingface_hub (hf_api.py, `model_info`; file_download.py,
`hf_hub_url`), and so is where the token is from (utils/_auth.py, constants.py). It goes to the
endpoint alone, over https, or within this machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from ckptool.errors import DownloadFailed, NoSuchFile
from ckptool.files import budget, http, remote
from ckptool.files.http import shown
from ckptool.files.paths import Entry, stays_inside
from ckptool.records import dataclass

if TYPE_CHECKING:
    from ckptool.files.paths import Url
    from ckptool.files.remote import Source
    from ckptool.files.web import Web

ENDPOINT = "https://huggingface.co"
MAX_ANSWER = 16 << 20  # of the list of a repository's files
_PARTS = re.compile(  # of revisions, those of `refs/` alone may have slashes that are not quoted
    r"([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[\w.-]+|[^/]+))?(?:/+(.*))?", re.ASCII | re.DOTALL
)
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_LOCAL = ("localhost", "127.0.0.1", "::1")
_YES = ("1", "true", "yes", "on")
_FORM = "hf://ORG/REPO, hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE"
_HINTS = {
    401: "HF_TOKEN=... before the command, or hf auth login; check the name, too",
    403: "the model's page says who may read it; HF_TOKEN needs that right",
    404: "check the name and the revision on the model's page",
}


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit: the sizes of its files by name, -1 where they are not stated."""

    name: str
    commit: str
    files: dict[str, int]


class Hub:
    """What is asked of the Hugging Face Hub in one run; each revision becomes one commit once."""

    is_web = False

    def __init__(self, web: Web) -> None:
        self._web, self.opened = web, remote.Opened(self.open)
        self._endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        http.parsed(self._endpoint)
        self._found: dict[tuple[str, str], Repository] = {}

    def open(self, url: Url) -> Source:
        """Open a file at the commit; raises `NoSuchFile` where there is none."""
        repository, path = self._at(url)
        if path not in repository.files:
            raise _absent(url, repository, path)
        commit = quote(repository.commit, safe="")
        address = f"{self._endpoint}/{repository.name}/resolve/{commit}/{quote(path)}"
        try:
            source = self._web.ranged(address, self._headers(), str(url))
        except DownloadFailed as error:
            raise _named(error, url, shown(address)) from error
        said = getattr(source, "said", {}).get("X-Repo-Commit")
        if said not in (None, "", repository.commit):
            what = f": commit {repository.commit} was asked for, and {said} came"
            raise DownloadFailed(f"{url}{what}")
        return source

    def is_file(self, url: Url) -> bool:
        """Check whether the repository has a file."""
        repository, path = self._at(url)
        return path in repository.files

    def is_folder(self, url: Url) -> bool:
        """Check whether it has a folder, or is one."""
        repository, path = self._at(url)
        return not path or any(name.startswith(f"{path}/") for name in repository.files)

    def listing(self, url: Url) -> list[Entry]:
        """List a folder of the repository."""
        repository, path = self._at(url)
        start = f"{path}/" if path else ""
        found: dict[str, Entry] = {}
        for name, nbytes in repository.files.items():
            if name.startswith(start):
                first, slash, _ = name.removeprefix(start).partition("/")
                place = url.inside(first)
                found[first] = Entry(first, place, not slash, bool(slash), -1 if slash else nbytes)
        return list(found.values())

    def _at(self, url: Url) -> tuple[Repository, str]:
        name, revision, path = _parts(url)
        if (name, revision) not in self._found:
            self._found[name, revision] = self._resolved(url, name, revision)
        return self._found[name, revision], path

    def _resolved(self, url: Url, name: str, revision: str) -> Repository:
        """Ask which commit a revision is, and what is in it."""
        address = f"{self._endpoint}/api/models/{name}/revision/{quote(revision, safe='')}?blobs=1"
        try:
            with self._web.client.asked(address, self._headers()) as answer:
                data = bytearray()
                for chunk in answer.chunks():
                    data += chunk
                    if len(data) > MAX_ANSWER:
                        raise DownloadFailed(f"{url}: the list of its files does not end")
        except DownloadFailed as error:
            raise _named(error, url, shown(address)) from error
        budget.current().read(len(data))
        try:
            told: Any = json.loads(data)
        except (ValueError, RecursionError):
            told = None
        match told:
            case {"sha": str(commit), "siblings": list(siblings)} if _NAME.fullmatch(commit):
                files = {
                    each["rfilename"]: size if isinstance(size := each.get("size"), int) else -1
                    for each in siblings
                    if isinstance(each, dict)
                    and isinstance(each.get("rfilename"), str)
                    and stays_inside(each["rfilename"])
                }
                return Repository(name, commit, files)
        raise DownloadFailed(f"{url}: {shown(self._endpoint)} does not answer as the Hub does")

    def _headers(self) -> dict[str, str]:
        parts = urlsplit(self._endpoint)
        is_safe = parts.scheme == "https" or parts.hostname in _LOCAL
        found = token() if is_safe else ""
        return {"authorization": f"Bearer {found}"} if found else {}


def token(of: Callable[[str], str | None] = os.environ.get) -> str:
    """Return the token of the Hugging Face environment; an empty string for none."""
    if (of("HF_HUB_DISABLE_IMPLICIT_TOKEN") or "").lower() in _YES:
        return ""
    found = of("HF_TOKEN") or of("HUGGING_FACE_HUB_TOKEN") or ""
    if not found.strip():
        home = of("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        home = of("HF_HOME") or os.path.join(home, "huggingface")
        path = of("HF_TOKEN_PATH") or os.path.join(home, "token")
        try:
            with open(os.path.expandvars(os.path.expanduser(path)), encoding="utf-8") as file:
                found = file.read(1 << 12)
        except (OSError, ValueError):
            return ""
    found = found.replace("\r", "").replace("\n", "").strip()
    return found if found.isascii() and found.isprintable() else ""


def _parts(url: Url) -> tuple[str, str, str]:
    """Return the name of a repository, the revision, and the path of a file in it."""
    found = _PARTS.fullmatch(url.full.partition("://")[2].partition("?")[0].rstrip("/"))
    if found is None:
        raise NoSuchFile(f"{url} names no repository", path=url, hint=_FORM)
    return found[1], unquote(found[2] or "main"), found[3] or ""


def _absent(url: Url, repository: Repository, path: str) -> NoSuchFile:
    from difflib import get_close_matches

    close = get_close_matches(path, repository.files, n=1, cutoff=0.7)
    start = str(url).removesuffix(path)
    hint = f"did you mean {start}{close[0]}?" if close and path else ""
    return NoSuchFile(f"{url} does not exist", path=url, hint=hint)


def _named(error: DownloadFailed, url: Url, address: str) -> DownloadFailed:
    """Return the error of an address as one of the URL that stands for it."""
    message = error.message.replace(address, str(url))
    hint = _HINTS.get(error.status, error.hint)
    named = DownloadFailed(message, hint=hint, evidence=error.evidence)
    named.status, named.lost = error.status, error.lost
    return named
