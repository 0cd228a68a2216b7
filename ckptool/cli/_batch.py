"""Several inputs into one folder: all planned before the first is written, a line for each.

What is wrong with one input ends no other; what is wrong with all together (two outputs of one
name, too little room) ends the run before it writes. Where the disk is full after all, or the run
is interrupted, what was finished stays, and the rest is named.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn

from ckptool.cli import _many, report, talk
from ckptool.cli._request import Request, Told, tell
from ckptool.errors import CkptoolError, EditError, Interrupted, NoSpace, SameFile, WriteError
from ckptool.files import budget, paths, sites
from ckptool.files.publish import Target, free_space
from ckptool.records import dataclass
from ckptool.text import counted, listed, readable, visible
from ckptool.verbs import batch

Document = Mapping[str, object]
Add = Callable[[Document], None]
STOPPED = 130
SHOWN = 3  # inputs that were not reached


def run(request: Request, call: Callable[..., Told]) -> int:
    """Write each input into the folder; return the worst exit code."""
    folder = str(request.target)
    if not paths.is_url(folder) and os.path.lexists(folder[:-1]) and not os.path.isdir(folder):
        raise WriteError(f"{folder[:-1]} is not a folder", hint="name a folder as the output")
    if len(request.sources) == 1 and not talk.speaks_json():
        source = request.sources[0]
        tell(request, call(source, _target(request, source), parents=True))
        return 0
    return _Batch(request, call).run()


def _target(request: Request, source: str) -> str:
    """Return where the output of an input goes."""
    name = batch.output(source, request.options["to"], as_folder=request.is_set)
    return paths.join(sites.of(str(request.target)), name)


@dataclass(slots=True)
class _Item:
    """An input on its way: where it goes, how large that is, which files it is read from.

    `before` identifies what was at the target; it was `refused`, or `written` there, and `ended`
    where that was told.
    """

    source: str
    target: str = ""
    nbytes: int = 0
    files: Sequence[str] = ()
    refused: CkptoolError | None = None
    before: int | None = None
    written: bool = False
    ended: bool = False

    def look(self) -> bool:
        """Return whether it was written, which a run that is interrupted may not know."""
        self.written |= not self.refused and _node(self.target) not in (None, self.before)
        return self.written


@dataclass(slots=True)
class _Batch:
    """What was asked of several inputs, and what became of them."""

    request: Request
    call: Callable[..., Told]
    items: list[_Item] = field(default_factory=list)
    worst: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)  # inputs that were not reached
    details: dict[str, list[str]] = field(default_factory=dict)  # what is said -> of which inputs

    @property
    def dry_run(self) -> bool:
        """Return whether all that is asked for is the plan."""
        return bool(self.request.options["dry_run"])

    def run(self) -> int:
        """Plan, refuse and write; return the worst exit code."""
        self.items = [self._named(source) for source in self.request.sources]
        pairs = [(item.source, item.target) for item in self.items if not item.refused]
        batch.refuse_collisions(pairs)
        with _many.documents(self.dry_run) as add:
            for item in self.items:
                told = self._called(item, dry_run=True)
                if told:
                    item.nbytes, item.files = told.result.nbytes, told.result.files
                    item.before = _node(item.target)
                if self.dry_run:
                    self._end(item, told, add)
        self._refuse_together()
        with _many.documents(not self.dry_run) as add:
            try:
                if not self.dry_run:
                    self._write(add)
                self._tell_rest()
            except (KeyboardInterrupt, SystemExit) as error:
                self._interrupted(error, add)
        return self.worst

    def _named(self, source: str) -> _Item:
        item = _Item(talk.without_secrets(source))
        try:
            item.source = sites.of(source)  # which shows no secret either
            with budget.run(anew=True):
                item.target = _target(self.request, item.source)
        except Exception as error:
            self._failed(item, error)
        return item

    def _write(self, add: Add) -> None:
        """Write what is planned; a full disk leaves out the rest."""
        for item in self.items:
            planned = not item.refused
            self._end(item, self._called(item), add)
            if planned and isinstance(item.refused, NoSpace):
                self._leave("the disk is full", item.refused.exit_code, add)
                return

    def _called(self, item: _Item, **more: Any) -> Told | None:
        """Plan or write one output; None where it is refused, or was before."""
        if not item.refused:
            try:
                with budget.run(anew=True):
                    return self.call(item.source, item.target, parents=True, **more)
            except Exception as error:
                self._failed(item, error)
        return None

    def _end(self, item: _Item, told: Told | None, add: Add) -> None:
        """Tell what became of an input."""
        document: Document = {}
        if told:
            self._finished(item, told)
            document = told.document or told.result.to_dict()
        elif item.refused:
            document = _many.failure(item.source, item.refused)
        item.ended = True
        add(document)

    def _finished(self, item: _Item, told: Told) -> None:
        """Say in a line what was done, or would be; keep what else there is to say."""
        result = told.result
        item.written = True
        self.counts.update(report.counts(result))
        for line in result.warnings:
            talk.warn(visible(line if item.source in line else f"{item.source}: {line}"))
        self._keep(item, [*report.rewrite_lines(result, fold=talk.folds()), *told.more])
        line = report.output_line(result)
        if result.dry_run and not talk.speaks_json():
            talk.put([line])
        else:
            talk.say([line])

    def _failed(self, item: _Item, error: Exception) -> None:
        """Say in a line why there is no output; keep what would help."""
        item.refused = refused = _many.refusal(error)
        if not any(name and name in refused.message for name in (item.source, item.target)):
            refused.within(item.source)
        self.worst = max(self.worst, refused.exit_code)
        if not talk.speaks_json():
            talk.complain(refused, in_a_line=True)
            self._keep(item, [f"hint: {visible(refused.hint)}"] if refused.hint else [])

    def _keep(self, item: _Item, lines: Iterable[str]) -> None:
        for line in lines:
            self.details.setdefault(line, []).append(visible(item.source))

    def _leave(self, why: str, exit_code: int, add: Add) -> None:
        """Name what was not reached."""
        for item in self.items:
            if item.ended:
                continue
            if item.refused:
                self._end(item, None, add)
                continue
            if item.look():
                error, message = "interrupted", f"{item.target} was written"
            else:
                error, message = "not-reached", f"{item.source} was not written: {why}"
                self.left.append(item.source)
            document = _many.failure(item.source, Interrupted(message))
            item.ended = True
            add({**document, "error": error, "exit": exit_code})

    def _interrupted(self, error: BaseException, add: Add) -> NoReturn:
        """Name what was not reached, and say what was done in the words of what ends the run."""
        self._leave("interrupted", STOPPED, add)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(self._summary()) from None
        talk.say([self._summary()], always=True)
        raise error

    def _refuse_together(self) -> None:
        """Raise what is wrong with all outputs together.

        `EditError` is one checkpoint that several inputs are files of, `SameFile` an output that
        would replace another input before that is read, `NoSpace` one that finds no room behind
        those before it.
        """
        items = [item for item in self.items if not item.refused]
        wholes: dict[tuple[str, ...], _Item] = {}
        for item in items:
            first = wholes.setdefault(tuple(sorted(item.files)), item)
            if first is not item and len(item.files) > 1:
                raise EditError(
                    f"{first.source} and {item.source} are files of one checkpoint",
                    hint="name its folder, or one of its files",
                )
        items = [item for item in items if not paths.is_url(item.target)]
        places = {os.path.realpath(item.target): item for item in items}
        needed = most = 0
        for item in items:
            for file in item.files:
                other = places.get(os.path.realpath(file), item)
                if other is not item:
                    raise SameFile(
                        f"{other.target} would replace {file}, which is an input too",
                        hint="name another folder as the output",
                    )
            most = max(most, needed + item.nbytes)
            needed += item.nbytes - _size(item.target)
        free = self._free()
        if free is not None and most > free:
            raise NoSpace(
                f"{self.request.target} needs {readable(most)}; {readable(free)} are free",
                hint="make room, or name an output on another file system",
            )

    def _free(self) -> int | None:
        """Count the bytes that are free where all outputs go, None where nobody knows."""
        folder = os.path.realpath(str(self.request.target))
        return free_space(Target(os.path.join(folder, "_"), parents=True))

    def _tell_rest(self) -> None:
        """Say once what there is to say of several inputs, then how many outputs there are."""
        for line, sources in self.details.items():
            who = sources[0] if len(sources) == 1 else counted(len(sources), "file")
            talk.say([f"{who}: {line}"])
        if self.dry_run and not talk.speaks_json():
            talk.put([self._summary()])
        else:
            talk.say([self._summary()], always=bool(self.left))

    def _summary(self) -> str:
        files, verb, room = counted(len(self.items), "file"), "written", ""
        if self.dry_run:
            free = self._free()
            nbytes = readable(sum(item.nbytes for item in self.items))
            verb = "would be written"
            room = f"; {nbytes} to write, {'unknown' if free is None else readable(free)} free"
        done = f"{sum(item.written for item in self.items)} of {files} {verb}"
        counts = f"; {report.in_words(self.counts)}" if self.counts else ""
        left = f"; not reached: {listed(self.left, SHOWN)}" if self.left else ""
        return f"{visible(str(self.request.target))}: {done}{counts}{room}{left}"


def _node(path: str) -> int | None:
    """Identify what is at a path, None where nothing is."""
    return os.stat(path).st_ino if os.path.exists(path) else None


def _size(path: str) -> int:
    """Return the size of a file that will be replaced; none where there is no file."""
    return os.path.getsize(path) if os.path.isfile(path) else 0
