"""Which classes of a head become which: a line for each of the target's, in its order.

    # what it was: the row in the file, or its name
    17
    cat
    kitten = cat
    unicorn = -     # new: the mean of all

Names are those of a file with a name in each line, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from ckptool.errors import EditError, reason
from ckptool.records import dataclass
from ckptool.text import counted, did_you_mean, length

NEW = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """For each class of the target the name or the row of what it was."""

    olds: tuple[str, ...]
    names: tuple[str, ...] = ()
    where: str = "classes"

    def __len__(self) -> int:
        return len(self.olds)

    def of(self, count: int) -> list[int]:
        """Return the rows among so many, `NEW` for a new class; raises `EditError`."""
        if self.names and len(self.names) != count:
            raise EditError(f"{counted(len(self.names), 'name')} of {count} classes in the file")
        return [self._row(number, old, count) for number, old in enumerate(self.olds, 1)]

    def _row(self, number: int, old: str, count: int) -> int:
        if old == "-":
            return NEW
        if self.names.count(old) == 1:
            return self.names.index(old)
        place = f"{self.where}, class {number}"
        row = length(old, 10)
        if row is None:
            if not self.names:
                raise EditError(f"{place}: `{old}` is a name", option="--class-names names.txt")
            several = "several classes are" if old in self.names else "no class is"
            raise EditError(f"{place}: {several} named `{old}`", hint=did_you_mean(old, self.names))
        if row >= count:
            raise EditError(f"{place}: there is no row {row} of {count}")
        return row


Lines = str | PathLike[str] | Sequence[str | int]


def read_rows(classes: Lines, names: Lines = ()) -> Rows:
    """Read the classes, and the names of those in the file, from files or lists."""
    olds = [line.rpartition("=")[2].strip() for line in _lines(classes)]
    if not olds:
        raise EditError(f"{classes} names no class")
    where = str(classes) if isinstance(classes, str | PathLike) else "classes"
    return Rows(tuple(olds), tuple(_lines(names)), where)


def _lines(given: Lines) -> list[str]:
    """Return the lines of a file that hold something, without comments."""
    if not isinstance(given, str | PathLike):
        return [str(each) for each in given]
    try:
        with open(given, encoding="utf-8") as lines:
            read = [line.partition("#")[0].strip() for line in lines]
    except UnicodeDecodeError:
        raise EditError(f"{given} is not UTF-8 text") from None
    except OSError as error:
        raise EditError(f"{given} cannot be read: {reason(error)}") from None
    return [line for line in read if line]
