"""TorchScript archives: what `torch.jit.save` writes; their state_dict, taken out as data.

A zip archive with `data.pkl` (the modules as objects of classes named `__torch__...`),
`constants.pkl` (the tensors that the code holds), the source of the classes under `code/` and the
storages under `data/` (torch/csrc/jit/serialization/export_module.cpp, pickler.cpp). Which
attributes are parameters and buffers is in that source alone; what `torch.jit.load` shows as
the state_dict are those whose type is Tensor (torch/csrc/jit/api/module.h, `ParameterPolicy` and
`BufferPolicy`), a module's own before those of its submodules. Archives of torch 1.0 to 1.2 say
all this in `model.json` instead: see `_model_json`.

Never written: the code cannot be taken along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import field, replace

from ckptool.containers import _model_json
from ckptool.containers._container import Container
from ckptool.containers._records import Budget, Records, budget, read_records
from ckptool.containers._script_source import ScriptClass, parse
from ckptool.containers.torch_zip import sniff
from ckptool.errors import LimitExceeded, Malformed
from ckptool.files import budget as costs
from ckptool.files.fileio import Reader
from ckptool.pickles.pickle_reader import Pickle
from ckptool.pickles.torch_objects import StorageId, TorchVocabulary
from ckptool.pickles.tree import MAX_NESTING, Dict, Global, Node, Object
from ckptool.records import dataclass
from ckptool.state.checkpoint import Checkpoint, items
from ckptool.state.replacing import make_state_dict
from ckptool.state.walk import dotted, tensors
from ckptool.tensors.tensor import TENSORS, Storage, TensorInfo
from ckptool.text import counted, listed

SPACE = "__torch__"  # the names of an archive's own classes start with it
_KNOWN = ("data.pkl", "byteorder", "version", ".data/serialization_id")


def read(reader: Reader) -> Checkpoint | None:
    """Read the modules and the declarations in the source; None for any other zip archive."""
    records = read_records(reader, "data.pkl")
    if records is not None and "constants.pkl" in records.members:
        return _read(records)
    old = read_records(reader, "model.json")
    if old is None:
        return None
    checkpoint, left, fixed = _model_json.read(old)
    return replace(checkpoint, notes=(_PROGRAM, *_notes(left, fixed)))


_PROGRAM = "a TorchScript archive is a program; none of its code was run or judged"


def _read(records: Records) -> Checkpoint:
    byteorder = records.byteorder()
    parsed = _load(records, "data.pkl", ("data", "tensors"), byteorder)
    constants = _load(records, "constants.pkl", ("constants", "data", "tensors"), byteorder)
    root = parsed.tree
    if not isinstance(root, Object) or not isinstance(root.callee, Global):
        raise Malformed("data.pkl of a TorchScript archive holds no module")
    taken = _Modules(records)
    entries = {key: _detached(info) for key, info in taken.walk(root)}
    left = [
        dotted(path) for path, info in tensors(parsed.tree) if id(info) not in taken.tensors_seen
    ]
    fixed = sum(1 for _ in tensors(constants.tree))
    named = {**parsed.globals, **constants.globals}
    return Checkpoint(
        records.reader.path,
        "torchscript",
        make_state_dict(entries, None),
        records.reader.nbytes,
        globals={name: at for name, at in named.items() if not _own(name)},
        calls=[call for call in (*parsed.calls, *constants.calls) if not _own(call.callee)],
        pickle_name="data.pkl",
        byteorder=byteorder,
        generation="torch 1.3 or newer",
        protocol=parsed.protocol,
        unread=_unread(records),
        records=records.described(),
        unlisted=records.unlisted,
        program=f"TorchScript module {title(root.callee)}",
        notes=(_PROGRAM, *_notes(left, fixed), *taken.notes()),
    )


def _own(node: Node) -> bool:
    """Check for the name of a class of the archive, which nothing imports."""
    return isinstance(node, Global) and (node.module + ".").startswith(f"{SPACE}.")


def title(named: Global) -> str:
    """Return the name of a class as its source had it, without what torch puts into it."""
    steps = f"{named}".split(".")
    return ".".join(s for s in steps if s != SPACE and not s.startswith("___torch_mangle_"))


def _load(records: Records, name: str, folders: tuple[str, ...], byteorder: str) -> Pickle:
    def find_storage(storage: StorageId) -> Storage:
        names = [f"{folder}/{storage.key}" for folder in folders]
        record = next((name for name in names if name in records.members), names[0])
        return records.storage(storage, record, byteorder)

    return records.load(name, TorchVocabulary(find_storage))


def _detached(info: Node) -> Node:
    """Return a tensor as a state_dict has it: without requires_grad."""
    plain = isinstance(info, TensorInfo) and info.origin is None
    return replace(info, requires_grad=False) if plain else info


def _unread(records: Records) -> tuple[str, ...]:
    """Name what else is in the archive: folders as one."""
    tops = (name.partition("/") for name in records.members if name not in _KNOWN)
    counts = Counter(top + slash for top, slash, _ in tops if top not in ("data", "tensors"))
    return tuple(
        f"{name} ({counted(count, 'record')})" if name.endswith("/") else name
        for name, count in counts.items()
    )


def _notes(left: list[str], fixed: int) -> Iterator[str]:
    if left:
        what = f"{counted(len(left), 'tensor')} in other attributes"
        yield f"left out {what}, as torch.jit.load's state_dict does: {listed(left, 4)}"
    if fixed:
        yield f"left out {counted(fixed, 'tensor')} without a name, constants of the code"


@dataclass(slots=True)
class _Modules:
    """A walk over the modules of an archive, in the order of torch's state_dict.

    A module in several places is walked in each. The names made that way are bounded
    by the bytes of the pickle, so that modules which repeat each other end soon.
    """

    records: Records
    tensors_seen: set[int] = field(default_factory=set)
    without_source: dict[str, None] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    _sources: dict[str, dict[str, ScriptClass]] = field(default_factory=dict)
    _budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        self._budget = budget(self.records.members["data.pkl"].nbytes)

    def walk(self, module: Object, path: str = "", depth: int = 0) -> Iterator[tuple[str, Node]]:
        """Yield the parameters, the buffers, then what the submodules have."""
        if depth > MAX_NESTING:
            raise LimitExceeded(f"modules nested more than {MAX_NESTING} deep")
        declared = self._declared(module)
        if declared is None:
            self.without_source[title(module.callee)] = None
        pairs = self._attributes(module, path, declared)
        self._budget.spend(path, len(pairs))
        for kind in (_is_parameter, _is_buffer):
            for name, value in pairs:
                if isinstance(value, TENSORS) and kind(declared, name):
                    self._budget.spend(path + name)
                    self.tensors_seen.add(id(value))
                    yield path + name, value
        for name, value in pairs:
            if isinstance(value, Object) and _own(value.callee) and self._is_module(value):
                yield from self.walk(value, f"{path}{name}.", depth + 1)

    def notes(self) -> Iterator[str]:
        """Note where the state_dict may differ from that of torch."""
        if self.without_source:
            yield (
                f"no source says which attributes of {listed(self.without_source)} are parameters "
                "or buffers: all tensors are taken"
            )
        if self.unknown:
            yield (
                f"only their own code (__setstate__) determines the parameters of "
                f"{listed(self.unknown)}: left out"
            )

    def _attributes(
        self, module: Object, path: str, declared: ScriptClass | None
    ) -> list[tuple[str, Node]]:
        state = module.state
        if isinstance(state, Dict) and not (declared and declared.own_state):
            pairs = dict(pair for pair in items(state) or [] if isinstance(pair[0], str))
            return list(pairs.items())
        if declared is None or declared.parameters | declared.buffers:
            self.unknown.append(path.removesuffix(".") or "the module")
        return []

    def _is_module(self, module: Object) -> bool:
        """Distinguish modules from other objects, as those of C++ classes (`torch.classes`)."""
        declared = self._declared(module)
        return declared.is_module if declared else isinstance(module.state, Dict)

    def _declared(self, module: Object) -> ScriptClass | None:
        """Return the declaration of a module's class in the source."""
        named = module.callee
        if named.module not in self._sources:
            self._sources[named.module] = self._source(named.module)
        return self._sources[named.module].get(named.name)

    def _source(self, module: str) -> dict[str, ScriptClass]:
        path = module.replace(".", "/")
        names = (f"code/{path}.py", f"libs/{path}.py")
        name = next((name for name in names if name in self.records.members), None)
        if name is None:
            return {}
        source = self.records.small(name)
        lines = source.count(b"\n") * costs.NAME
        costs.current().spend(2 * len(source) + lines + source.count(b'"') * costs.TEXT)
        return parse(source.decode("utf-8", "replace"))


_Kind = Callable[[ScriptClass | None, str], bool]


def _is_parameter(declared: ScriptClass | None, name: str) -> bool:
    return declared is None or name in declared.parameters


def _is_buffer(declared: ScriptClass | None, name: str) -> bool:
    """Check whether torch shows an attribute as a buffer: by its list and its declared type."""
    if declared is None:
        return False  # all tensors went before, as if they were parameters
    return name in declared.buffers and declared.types.get(name, "Tensor") == "Tensor"


CONTAINERS = (
    Container("torchscript", "TorchScript", suffixes=(".jit", ".ptl"), sniff=sniff, read=read),
)
