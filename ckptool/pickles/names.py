"""What importing a name would do: plain, foreign or dangerous, by the tables of `names.txt`.

*plain* is exactly what `torch.load(weights_only=True)` accepts (torch/_weights_only_unpickler.py,
`_get_allowed_globals`), some of it once a module of torch was imported. *foreign* is what is known
to be inert, and any undotted name of a third-party package, which `calls` judges once it is called.
*dangerous* is everything else: naming counts like calling, because loading imports what is named.
"""

from __future__ import annotations

import re
import sys
from enum import IntEnum

from ckptool.files import tables
from ckptool.pickles.tree import Global
from ckptool.tensors.dtype import DType


class Level(IntEnum):
    """How much loading would do; the higher, the worse."""

    PLAIN = 0
    FOREIGN = 1
    DANGEROUS = 2


_TABLES = tables.read(__file__, "names.txt")


def _pairs(section: str) -> set[tuple[str, str]]:
    return {(module, name) for module, names in _TABLES[section] for name in names.split()}


def _words(section: str) -> frozenset[str]:
    return frozenset(word for row in _TABLES[section] for cell in row for word in cell.split())


_OLD_TENSORS = "Double Float Half Long Int Short Char Byte Bool BFloat16".split()
_STORAGES = [dtype.storage_class for dtype in DType if dtype.storage_class]
_SMALL_INTEGERS = {("torch", f"{kind}int{bits}") for kind in ("", "u") for bits in range(1, 8)}

PLAIN = frozenset(
    _pairs("plain")
    | _SMALL_INTEGERS
    | {("torch", dtype.torch_name) for dtype in DType if dtype.torch_name}
    | {("torch", name) for name in _STORAGES}
    | {("torch.cuda", each) for each in _STORAGES if not each.startswith(("Q", "UntypedStorage"))}
    | {(f"torch{at}", f"{each}Tensor") for at in ("", ".cuda") for each in _OLD_TENSORS}
    | {
        (f"torch{at}.sparse", f"{each}Tensor")
        for at in ("", ".cuda")
        for each in _OLD_TENSORS
        if each != "Bool"
    }
)
AFTER_IMPORT = dict.fromkeys(_pairs("plain after import"), "torch.distributed.tensor")
# Where it depends on torch's version.
_VERSIONS = {
    **dict.fromkeys(_pairs("newer than 2.6") | _SMALL_INTEGERS, "torch newer than 2.6"),
    **dict.fromkeys(_pairs("up to 2.14"), "torch up to 2.14"),
}
FOREIGN = frozenset(_pairs("foreign") | _pairs("up to 2.14"))
RECONSTRUCTORS = {
    (module, name): tuple(map(int, " ".join(places).split()))
    for module, name, *places in _TABLES["reconstructors"]
}
_CLASS_PACKAGES = _words("packages of inert classes")
# Classes in or behind these that compile or run what they are given (torch.fx, RPC).
_RUNS_CODE = r"(Graph|GraphModule|Node|Tracer|Interpreter|CodeGen|RRef)$|\.feature_extraction\."
_EXECUTORS, _RUNNERS, _RESERVED = map(_words, ("executors", "runners", "reserved"))
_PYTHON_2_MODULES = frozenset(["__builtin__", "copy_reg", "exceptions"])


def level(named: Global) -> Level:
    """Judge one name, as it stands and as Python 3 reads the names of Python 2.

    Where Python 2 had another name for a module, only the new one is known to the tables.
    """
    if named.followed:
        return Level.FOREIGN
    renamed = python3_name(named)
    if renamed == (named.module, named.name):
        return _level(*renamed)
    old_only = named.module in _PYTHON_2_MODULES
    return _level(*renamed) if old_only else max(_level(*renamed), _level(named.module, named.name))


def is_listed(named: Global) -> bool:
    """Check for a name of which a table here says what it does."""
    pair = python3_name(named)
    return pair in PLAIN or pair in FOREIGN or pair in AFTER_IMPORT


def import_for(named: Global) -> str:
    """Return the module that makes `torch.load(weights_only=True)` accept a name once imported."""
    return AFTER_IMPORT.get((named.module, named.name), "")


def torch_for(named: Global) -> str:
    """Return which torch alone accepts a name so, "" where every one since 2.6 judges alike."""
    return _VERSIONS.get((named.module, named.name), "")


def is_accepted(named: Global) -> bool:
    """Check whether `torch.load(weights_only=True)` accepts a name, with nothing imported."""
    return level(named) is Level.PLAIN and not import_for(named)


def python3_name(named: Global) -> tuple[str, str]:
    """Return what Python 3 imports for a name in a pickle of protocol 2 or less."""
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    pair = (named.module, named.name)
    return NAME_MAPPING.get(pair, (IMPORT_MAPPING.get(named.module, named.module), named.name))


def _level(module: str, name: str) -> Level:
    if (module, name) in PLAIN or (module, name) in AFTER_IMPORT:
        return Level.PLAIN
    if (module, name) in FOREIGN:
        return Level.FOREIGN
    steps = module.split(".")
    if not name.isidentifier() or not all(step.isidentifier() for step in steps):
        return Level.DANGEROUS
    if _is_known_class(module, name):
        return Level.FOREIGN
    inert = is_third_party(module) and name not in _RUNNERS
    return Level.FOREIGN if inert else Level.DANGEROUS


def is_third_party(module: str) -> bool:
    """Check for a module of neither Python nor torch, nor of a package that runs what it gets."""
    top = module.partition(".")[0]
    return not (top in _RESERVED or top in _EXECUTORS or top in sys.stdlib_module_names)


def _is_known_class(module: str, name: str) -> bool:
    inside = any(
        module == package or module.startswith(package + ".") for package in _CLASS_PACKAGES
    )
    is_class = inside and name.lstrip("_")[:1].isupper()
    return is_class and not re.search(_RUNS_CODE, f"{module}.{name}")
