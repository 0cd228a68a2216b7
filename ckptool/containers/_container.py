"""What a container is: how to tell it by its first bytes, how to read it and how to write it.

These are named tuples because a dataclass takes ten times as long to make, at every start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptool.records import NamedTuple

if TYPE_CHECKING:
    from ckptool.files.copying import PlannedFile
    from ckptool.files.fileio import Reader
    from ckptool.pickles.tree import Node
    from ckptool.state.checkpoint import Checkpoint


class Traits(NamedTuple):
    """What a container keeps of a checkpoint, asked instead of its name.

    `around` is the dict around the state_dict, `strides` views of storages as they are, `ties`
    tensors that share one, `module_metadata` the versions of modules, `objects` what a pickle
    names, `records` files of its own beside them, `device_tags` which device a storage was on. With
    `beside_files` it is read from an index and the files that this names; with `remade` its tree is
    made of theirs, and nothing that they name is carried but what is in that; `memory_mapped` says
    whether `torch.load(mmap=True)` takes it; `read_as` as what else its files may be read, all of
    which `read` tells: "pickle", "tar", "zip".
    """

    around: bool = True
    strides: bool = True
    ties: bool = True
    module_metadata: bool = True
    objects: bool = True
    records: bool = False
    device_tags: bool = False
    beside_files: bool = False
    remade: bool = False
    memory_mapped: bool = False
    read_as: tuple[str, ...] = ()


class Left(NamedTuple):
    """What a container cannot hold as it is: `ties` map a key to the one it is tied to."""

    ties: dict[str, str]
    unfit: dict[str, str]


class Writer(NamedTuple):
    """How a container is written.

    `lay_out(checkpoint, entries, untie)` plans a file; `entries` are those of the state_dict, None
    where there is none. `unfit(entries, untie)` names what does not fit; None where all does that
    `lay_out` does not refuse. A set of shards is called `set_stem-00001-of-00002` and `set_suffix`.
    """

    lay_out: Callable[[Checkpoint, dict[str, Node] | None, bool], PlannedFile]
    default_suffix: str
    set_stem: str
    set_suffix: str
    unfit: Callable[[dict[str, Node], bool], Left] | None = None


def nothing(reader: Reader) -> None:
    """Read no file alone: what one of a set is, is asked of all of them."""


class Container(NamedTuple):
    """One container; one that reads sets of files alone has no `sniff` and no `read`.

    `sniff` sees the first bytes of a file. `read` returns None for a file of another container
    that starts with the same bytes, and raises a `FormatError` for a damaged one. `word` is what
    `--to` calls it, and its `suffixes` choose it for an output, where it has a `writer`; without
    one it is written again as another container, `written_as`. A folder with a file that matches
    one of `index_patterns` is that container. `library` names who else loads it, `torch` or
    `safetensors`; `plugin` the distribution that a reader from elsewhere came with.
    """

    name: str
    title: str
    word: str = ""
    suffixes: tuple[str, ...] = ()
    index_patterns: tuple[str, ...] = ()
    sniff: Callable[[bytes], bool] = lambda head: False
    read: Callable[[Reader], Checkpoint | None] = nothing
    writer: Writer | None = None
    traits: Traits = Traits()
    written_as: str = "torch-zip"
    library: str = ""
    plugin: str = ""
