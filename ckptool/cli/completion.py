"""What a shell offers to complete: keys and places of the file named before, models, recipes.

Nothing is offered where the file is broken, far, or takes too long to read: nobody waits for it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.shell_completion import CompletionItem

SECONDS = 0.5  # for reading a file
MEMORY = 64 << 20
MANY = 50  # keys from which modules are offered instead

Offer = Callable[[click.Context, str, str], Iterable[str]]


def attach(command: click.Command) -> click.Command:
    """Let the options and arguments of a command offer names, or files."""
    for each in command.params:
        offer = _OFFERS.get((command.name, each.name)) or _OFFERS.get((None, each.name))
        if offer or _is_argument(each):
            each.type = _Offered(offer)
    return command


class _Offered(click.types.StringParamType):
    """A text, and what it may be."""

    def __init__(self, offer: Offer | None) -> None:
        self._offer = offer

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin so; files where there are none, and it may be one."""
        try:
            with _limited():
                found = self._offer(ctx, param.name or "", incomplete) if self._offer else ()
                names = [name for name in dict.fromkeys(found) if name.startswith(incomplete)]
        except Exception:  # of a shell that waits for names, nobody reads errors
            names = []
        if names or (self._offer in (_keys, _places) and param.name != "key"):
            return [CompletionItem(name) for name in _at_a_level(names, incomplete)]
        return [CompletionItem(incomplete, type="file")]


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `TimeoutError` in what takes too long, and bound its memory."""
    from ckptool.files import budget

    def stop(*_: object) -> None:
        raise TimeoutError

    clock = getattr(signal, "setitimer", None)
    if clock:
        signal.signal(signal.SIGALRM, stop)
        clock(signal.ITIMER_REAL, SECONDS)
    try:
        with budget.run(MEMORY, anew=True):
            yield
    finally:
        if clock:
            clock(signal.ITIMER_REAL, 0)


def _at_a_level(names: list[str], start: str) -> list[str]:
    """Return names, or of many the modules that are next: any of them selects what is in it."""
    while len(names) > MANY:
        ends = [name.find(".", len(start)) for name in names]
        shorter = [name[:end] if end > 0 else name for name, end in zip(names, ends, strict=True)]
        modules = list(dict.fromkeys(shorter))
        if len(modules) != 1:
            return modules
        start = f"{modules[0]}."
    return names


def _path(context: click.Context, name: str) -> str:
    """Return the path of the file that an option is about: the first one, or the other.

    click leaves arguments in `args` where the option that is completed has no value yet.
    """
    other = {"like_at": "like", "right_at": "right"}.get(name)
    arguments = [each.name or "" for each in context.command.params if _is_argument(each)]
    wanted = other or arguments[0]
    place = arguments.index(wanted) if wanted in arguments else len(context.args)
    value = context.params.get(wanted) or context.args[place]
    return os.path.expanduser(value if isinstance(value, str) else value[0])


def _is_argument(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Argument)


def _read(context: click.Context, name: str) -> Any:
    from ckptool import containers
    from ckptool.files.paths import is_url

    path = _path(context, name)
    if is_url(path):
        raise ValueError(path)
    return containers.read(path)


def _keys(context: click.Context, name: str, start: str) -> Iterator[str]:
    """Offer the keys that a command selects from: those without wrappers in `transfer`."""
    from ckptool.state.wrappers import peeling
    from ckptool.verbs.listing import listing

    every = bool(context.params.get("every")) and context.command.name == "keys"
    found = listing(_read(context, name), context.params.get("at"), every=every)
    if context.command.name == "transfer" and found.state:
        taken = peeling(found.state.entries)
        yield from filter(None, map(taken, found))
    else:
        yield from found


def _places(context: click.Context, name: str, start: str) -> Iterator[str]:
    from ckptool.state import checkpoint, walk

    found = checkpoint.candidates(_read(context, name).tree)
    return (walk.dotted(each.at) for each in found)


def _models(context: click.Context, name: str, start: str) -> Iterable[str]:
    from ckptool.model import registry

    return registry.models()


def _weights(context: click.Context, name: str, start: str) -> Iterable[str]:
    from ckptool.model import registry

    return [*registry.models(), *registry.weights()]


def _recipes(context: click.Context, name: str, start: str) -> Iterable[str]:
    from ckptool.state import recipes

    return recipes.shipped()


_OFFERS: dict[tuple[str | None, str | None], Offer] = {
    ("show", "key"): _keys,
    ("recipe", "file"): _recipes,
    ("download", "what"): _weights,
    **{(None, name): _keys for name in ("select", "drop", "keep")},
    **{(None, name): _places for name in ("at", "left_at", "right_at", "like_at")},
    **{(None, name): _models for name in ("model", "candidate_model")},
    (None, "recipe"): _recipes,
}
