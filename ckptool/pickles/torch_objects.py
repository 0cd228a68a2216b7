"""torch's words in the tree: tensors, storages and Parameters <-> `TensorInfo` and `Storage`.

The rebuild functions and their arguments are those of `torch/_utils.py` and `torch/_tensor.py`;
persistent ids are those of `torch/serialization.py` (`persistent_id` in `_save` and
`_legacy_save`). Tensors of early 2017 are objects of a tensor class that get
`(storage, offset, size, stride)` as their state; Variables and Parameters of that time get
`(data, grad, hooks, requires_grad, volatile)` (torch/autograd/variable.py, `__reduce_ex__`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptool.errors import Malformed
from ckptool.pickles import phrases, subclasses
from ckptool.pickles.phrases import PUTS, Template
from ckptool.pickles.pickle_reader import Memo, Phrase, Vocabulary
from ckptool.pickles.subclasses import FROM_TYPE, UTILS, dtype_of, sizes_of
from ckptool.pickles.tree import ORDERED_DICT, Dict, Global, Node, Object, PersistentId, items
from ckptool.records import NamedTuple, dataclass
from ckptool.tensors.dtype import BY_STORAGE_CLASS, DType
from ckptool.tensors.tensor import AnyTensor, CompositeTensor, Storage, TensorInfo, problem
from ckptool.text import length

if TYPE_CHECKING:  # a listing writes nothing
    from ckptool.pickles.pickle_writer import Written

_UNTYPED = ("UntypedStorage", "_UntypedStorage")

# Functions that rebuild a tensor from (storage, storage_offset, size, stride, ...): where
# requires_grad, the hooks and the metadata of lazy bits stand among their arguments.
_PLAIN_REBUILDS = {
    "_rebuild_tensor": (None, None, None),
    "_rebuild_tensor_v2": (4, 5, 6),
    "_rebuild_tensor_v3": (4, 5, 7),
    "_rebuild_qtensor": (5, 6, None),
}
# Calls that wrap a finished tensor, their first argument.
_WITH_STATE = Global(UTILS, "_rebuild_parameter_with_state")
_WRAPPERS = {
    Global(UTILS, "_rebuild_parameter"),
    _WITH_STATE,
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.autograd.variable", "Variable"),
}
# What protocols 0 and 1 call where 2 has the opcode NEWOBJ (CPython, Lib/copyreg.py).
_NEW_OBJECT = {Global("copyreg", "__newobj__"), Global("copy_reg", "__newobj__")}
NOT_LAZY: frozenset[str] = frozenset()
_QUANTIZED = Global(UTILS, "_rebuild_qtensor")
_TYPE_TAG = Global("torch.jit._pickle", "restore_type_tag")
# Compiled when first used: few files have ids of protocol 0, and a listing writes none.
_PROTOCOL_0_ID = (
    r"\('storage', <class '([\w.]+)\.(\w+)'>, '([^']*)', '([^']*)', (\d+)(?:, (None))?\)"
)


_AT_ONCE, _LONGEST_KEY = 1 << 8, 1 << 10
_Like = tuple[TensorInfo, DType | None, str, int, int]  # its storage's words, how many opcodes


class StorageId(NamedTuple):
    """What a pickle says of a storage: `numel` counts elements of `dtype`, bytes where None."""

    key: str
    dtype: DType | None
    location: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Count the bytes that the pickle says the storage has."""
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True, slots=True, eq=False)
class StorageView:
    """A part of a storage that a legacy file names as a storage of its own, in elements."""

    storage: Storage
    offset: int
    numel: int


class TorchVocabulary(Vocabulary):
    """Make storages, tensors and Parameters of what torch pickles."""

    def __init__(self, find: Callable[[StorageId], Storage]) -> None:
        self._find = find
        self._known: dict[str, Storage] = {}
        self._said: dict[str, StorageId] = {}  # of those that were found to be otherwise
        self._views: dict[str, StorageView] = {}
        self._spelling: tuple[Memo, tuple[bytes, ...]] | None = None

    def persistent(self, value: Node, offset: int) -> Node:
        """Turn a persistent id into a `Storage`, a view of one, or a class."""
        if isinstance(value, str):  # protocol 0 writes the text of the tuple
            value = _parsed(value)
        match value:
            case ("module", Global() as named, *_):
                return named
            case ("storage", Global() as kind, key, str(location), numel, *view):
                found = self._storage(kind, key, location, numel, offset)
                if view and view[0] is not None:
                    return self._view(found, view[0], offset)
                return found
        raise Malformed("a persistent id that names no storage", offset=offset)

    def _storage(self, kind: Global, key: Node, location: str, numel: Node, offset: int) -> Storage:
        if type(key) is int:
            key = str(key)
        if not isinstance(key, str) or length(numel) is None:
            raise Malformed("a persistent id that names no storage", offset=offset)
        return self._place(StorageId(key, storage_dtype(kind, offset), location, numel), offset)

    def _place(self, said: StorageId, offset: int) -> Storage:
        """Find a storage, one for all that is said of a key."""
        key = said.key
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._find(said)
            if (
                known.nbytes != said.nbytes
                or known.dtype is not said.dtype
                or known.location != said.location
                or known.key != key
            ):
                self._said[key] = said
            return known
        before = self._said.get(key) or _said_of(known)
        if before == said:
            return known
        if not _same_bytes(before, said):
            raise Malformed(f"storage {key} is described in two ways", offset=offset)
        if not said.nbytes:  # one record has one type: these are two
            key = f"{key} as {said.dtype.label if said.dtype else 'bytes'}"
        return replace(known, key=key, dtype=said.dtype)

    def _view(self, storage: Storage, view: Node, offset: int) -> StorageView:
        match view:
            case (key, start, numel):
                itemsize = storage.dtype.itemsize if storage.dtype else 1
                unknown = length(start) is None or length(numel) is None
                if unknown or (start + numel) * itemsize > storage.nbytes:
                    raise Malformed(
                        f"a view of storage {storage.key} beyond its end", offset=offset
                    )
                made = StorageView(storage, start, numel)
                return self._views.setdefault(str(key), made)
        raise Malformed("the view of a storage is not (key, offset, size)", offset=offset)

    def phrase(self, callee: Global, data: bytes, start: int, memo: Memo) -> Phrase | None:
        """Read a plain tensor at once, and the keys and plain tensors that follow it.

        None where anything about the first is out of the ordinary.
        """
        if callee.name != "_rebuild_tensor_v2" or callee.module != UTILS or memo.changed:
            return None
        call, number = phrases.call_at(data, start - 1), len(memo)
        last = number + PUTS - 1
        if call is None or call.number != number or memo.next_fetched(number) < last:
            return None
        like = memo.spelled.get(call.spelling)
        if like is None:  # the first of its kind: `called` learns what it is
            self._spelling = memo, call.spelling
            return None
        info = self._alike(like, call.key, call.storage_at)
        memo.leave_out(PUTS - 1)
        memo.append(info if last in memo.fetched else None)
        return self._followed(Phrase([info], call.found.end(), like[-1]), callee, data, memo)

    def _followed(self, begun: Phrase, callee: Global, data: bytes, memo: Memo) -> Phrase:
        """Read the keys and plain tensors that follow a tensor, of which nothing is fetched.

        The number before that of a key may be left out, as our own writer does.
        """
        nodes, position, opcodes = begun
        before = number = len(memo)
        fetched, recent = memo.next_fetched(number), list[tuple[Template, _Like]]()
        while len(nodes) < _AT_ONCE:
            text_at = position + 5
            end = text_at + int.from_bytes(data[position + 1 : text_at], "little")
            put = int.from_bytes(data[end + 1 : end + 5], "little")
            following = put + 1 + PUTS
            if (
                data[position : position + 1] != b"X"
                or data[end : end + 1] != b"r"
                or end - text_at > _LONGEST_KEY
                or not number <= put <= number + 1
                or following > fetched
            ):
                break
            for known in recent:
                if key := known[0].key_in(data, end + 5, put + 1):
                    break
            else:
                new = self._template(callee, data, end + 5, memo)
                if not new or not (key := new[0].key_in(data, end + 5, put + 1)):
                    break
                known, recent = new, [new, *recent[:1]]
            template, like = known
            try:
                name = data[text_at:end].decode("utf-8", "surrogatepass")
            except UnicodeDecodeError:  # which the opcode is to blame for
                break
            position = end + 5 + template.around + len(key)
            info = self._alike(like, key, position - template.view_nbytes)
            nodes += (name, info)
            opcodes += 3 + like[-1]
            memo.gaps += put - number
            number = following
        memo += [None] * (number - before)
        return Phrase(nodes, position, opcodes)

    def _template(
        self, callee: Global, data: bytes, start: int, memo: Memo
    ) -> tuple[Template, _Like] | None:
        """Return how the tensor there is written, and one of its kind; None for what is new."""
        call = phrases.call_at(data, start)
        if call is None or call.get is None or call.spelling not in memo.spelled:
            return None
        spelling = (call.get, *call.spelling)
        if spelling not in memo.spelled:
            number = int.from_bytes(call.get[1:], "little")
            if number >= len(memo) or memo[number] is not callee:
                return None
            memo.spelled[spelling] = phrases.template(call), memo.spelled[call.spelling]
        known: tuple[Template, _Like] = memo.spelled[spelling]
        return known

    def _alike(self, like: _Like, key: bytes, offset: int) -> TensorInfo:
        """Make a tensor that differs from another in its storage alone."""
        info, dtype, location, numel, _ = like
        storage = self._place(StorageId(key.decode(), dtype, location, numel), offset)
        return TensorInfo(
            info.dtype, info.shape, info.stride, storage, info.storage_offset, info.requires_grad
        )

    def _learn(self, info: TensorInfo, memo: Memo, spelling: tuple[bytes, ...]) -> None:
        """Remember a tensor as the pattern of others that are spelled like it."""
        self._spelling = None
        key = info.storage.key
        if info.origin is None and key not in self._said and self._known.get(key) is info.storage:
            dimensions = len(info.shape)
            opcodes = 25 + 2 * dimensions + (2 if dimensions > 3 else 0)
            memo.spelled[spelling] = info, *_said_of(info.storage)[1:], opcodes

    def called(self, node: Object) -> Node:
        """Turn a call of one of torch's rebuild functions into a tensor."""
        callee = node.callee
        if not isinstance(callee, Global):
            return node
        if callee.module == UTILS and callee.name in _PLAIN_REBUILDS:
            info = _plain(callee.name, node.args, node, node.offset)
            if self._spelling is not None:
                self._learn(info, *self._spelling)
            return info
        kind = node.args[0] if node.args else None
        if callee in _NEW_OBJECT and isinstance(kind, Global) and kind in _WRAPPERS:
            callee, node = kind, replace(node, callee=kind, args=node.args[1:], how="newobj")
        if callee in _WRAPPERS:
            return _wrapped(node)
        if callee == FROM_TYPE:
            return _from_type(node)
        rebuild = subclasses.REBUILDS.get(callee.name) if callee.module == UTILS else None
        return (rebuild(node) if rebuild else None) or node

    def built(self, node: Node, state: Node) -> Node | None:
        """Apply its state to an object; a tensor of 2017 becomes whole by it."""
        if isinstance(node, TensorInfo) and isinstance(node.origin, Object):
            stateful = node.origin.callee in (FROM_TYPE, _WITH_STATE)
            if node.origin.steps or stateful:  # no pickler gives a tensor its state twice
                return None
            origin = replace(node.origin, steps=[*node.origin.steps, ("build", state)])
            grad = state[0] if isinstance(state, tuple) and state else node.requires_grad
            return replace(node, origin=origin, requires_grad=grad is True)
        if _is_unfilled(node):
            return _filled_variable(node, state) or super().built(node, state)
        if _is_old_tensor(node) and isinstance(state, tuple) and len(state) == 4:
            return _plain("_rebuild_tensor", state, None, node.offset)
        return super().built(node, state)


def _said_of(storage: Storage) -> StorageId:
    itemsize = storage.dtype.itemsize if storage.dtype else 1
    return StorageId(storage.key, storage.dtype, storage.location, storage.nbytes // itemsize)


def _same_bytes(one: StorageId, other: StorageId) -> bool:
    """Return whether a storage may be under both types.

    An empty one may be under any (torch/serialization.py, `_load`), bytes under that of uint8
    and without a type (`persistent_id` in `_save`, which takes the one for the other).
    """
    if not one.nbytes and not other.nbytes:
        return True
    bytewise = {one.dtype, other.dtype} == {None, DType.U8}
    return bytewise and (one.location, one.nbytes) == (other.location, other.nbytes)


def _parsed(text: str) -> Node:
    """Read the text that protocol 0 writes for a persistent id."""
    found = re.fullmatch(_PROTOCOL_0_ID, text)
    if not found:
        return text
    module, name, key, location, numel, view = found.groups()
    known = ("storage", Global(module, name), key, location, length(numel, 10))
    return known if view is None else (*known, None)


def storage_dtype(kind: Global, offset: int) -> DType | None:
    """Return the dtype of a storage class, None for an untyped one."""
    if kind.name in _UNTYPED:
        return None
    dtype = BY_STORAGE_CLASS.get(kind.name)
    if dtype is None:
        raise Malformed(f"an unknown storage class {kind}", offset=offset)
    return dtype


def _is_old_tensor(node: Node) -> bool:
    return (
        isinstance(node, Object)
        and isinstance(node.callee, Global)
        and node.callee.module in ("torch", "torch.cuda")
        and node.callee.name.endswith("Tensor")
    )


def _lazy(metadata: Node) -> frozenset[str]:
    pairs = items(metadata) or []
    return frozenset(key for key, value in pairs if value is True and isinstance(key, str))


def _untagged(origin: Object | None, args: Node, at: int | None) -> tuple[Object | None, Node]:
    """Take the name of its type off the metadata, which TorchScript calls a function for."""
    if at is None or len(args) <= at:
        return origin, args
    tagged = args[at]
    if not isinstance(tagged, Object) or tagged.callee != _TYPE_TAG or not tagged.args:
        return origin, args
    args = (*args[:at], tagged.args[0], *args[at + 1 :])
    return replace(origin, args=args) if origin else None, args


def _plain(name: str, args: Node, origin: Object | None, offset: int) -> TensorInfo:
    """Read a tensor from the arguments of one of the plain rebuild functions."""
    grad_at, hooks_at, metadata_at = _PLAIN_REBUILDS[name]
    origin, args = _untagged(origin, args, metadata_at)
    storage, start = (*args[:2], None, None)[:2]
    view = storage if isinstance(storage, StorageView) else None
    start = length(start)
    if view is not None and start is not None:
        storage, start = view.storage, start + view.offset
    shape, stride = (sizes_of(args[2]), sizes_of(args[3])) if len(args) > 3 else (None, None)
    if not isinstance(storage, Storage):
        raise Malformed("a tensor without a storage", offset=offset)
    if start is None or shape is None or stride is None:
        what = "a size, stride or offset of a tensor is not a number from 0 to 2^63"
        raise Malformed(what, offset=offset)
    dtype = storage.dtype
    if name == "_rebuild_tensor_v3":
        dtype = dtype_of(args[6]) if len(args) > 6 else None
    if dtype is None:
        raise Malformed("a tensor without a dtype", offset=offset)
    metadata = args[metadata_at] if metadata_at and len(args) > metadata_at else None
    hooks = args[hooks_at] if hooks_at and len(args) > hooks_at else None
    info = TensorInfo(
        dtype,
        shape,
        stride,
        storage,
        start,
        requires_grad=bool(grad_at and len(args) > grad_at and args[grad_at] is True),
        lazy=_lazy(metadata) if metadata is not None else NOT_LAZY,
        origin=None if _says_no_more(name, hooks, metadata) else origin,
    )
    wrong = problem(info) or _beyond_view(info, view)
    if wrong:
        raise Malformed(f"a tensor in storage {storage.key} {wrong}", offset=offset)
    return info


def old_tensor(
    storage: Storage | StorageView,
    start: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
) -> TensorInfo:
    """Make a tensor of which no pickle says more; `offset` is where the file describes it."""
    return _plain("_rebuild_tensor", (storage, start, shape, stride), None, offset)


def _beyond_view(info: TensorInfo, view: StorageView | None) -> str:
    if view is None:
        return ""
    shifted = replace(
        info,
        storage=replace(info.storage, nbytes=view.numel * info.dtype.itemsize),
        storage_offset=info.storage_offset - view.offset,
    )
    return problem(shifted)


def _says_no_more(name: str, hooks: Node, metadata: Node) -> bool:
    """Return whether the fields of a `TensorInfo` say all that the call did."""
    no_hooks = hooks is None or (
        isinstance(hooks, Object) and hooks.callee == ORDERED_DICT and not hooks.steps
    )
    no_metadata = metadata is None or items(metadata) == []
    return name != "_rebuild_qtensor" and no_hooks and no_metadata


def _wrapped(node: Object) -> Node:
    """Read a Parameter or Variable around a tensor; anything else stays a call."""
    inner = node.args[0] if node.args else None
    grad = node.args[1] if len(node.args) > 1 else True
    if isinstance(inner, TensorInfo):
        return replace(inner, requires_grad=grad is True, origin=node)
    if isinstance(inner, CompositeTensor):
        return replace(inner, origin=node)
    return node


def _is_unfilled(node: Node) -> bool:
    """Return whether a node is a Variable or Parameter that was made without a tensor."""
    made = isinstance(node, Object) and not node.args and isinstance(node.callee, Global)
    return made and node.callee in _WRAPPERS


def _filled_variable(node: Object, state: Node) -> TensorInfo | None:
    """Read a Variable or Parameter that gets its tensor by its state, as those of 2017 do."""
    match state:
        case (TensorInfo() as inner, _, _, grad, _):
            origin = replace(node, steps=[*node.steps, ("build", state)])
            return replace(inner, requires_grad=grad is True, origin=origin)
    return None


def _from_type(node: Object) -> Node:
    """Read a tensor subclass or a tensor with attributes: (function, type, arguments, state)."""
    match node.args:
        case (Global() as function, _, tuple() as inner, _):
            if function.module == UTILS and function.name in _PLAIN_REBUILDS:
                return replace(_plain(function.name, inner, node, node.offset), origin=node)
            rebuild = subclasses.REBUILDS.get(function.name) if function.module == UTILS else None
            made = rebuild(Object(function, inner)) if rebuild else None
            return replace(made, origin=node) if made else subclasses.subclass(node) or node
    return node


def is_parameter(tensor: AnyTensor) -> bool:
    """Return whether a tensor is pickled as a Parameter."""
    return isinstance(tensor.origin, Object) and tensor.origin.callee in _WRAPPERS


def quantizer(info: TensorInfo) -> Node:
    """Return how the integers of a quantized tensor are to be read, None of any other tensor."""
    origin = _unwrapped(info.origin)
    if not isinstance(origin, Object):
        return None
    callee, args = origin.callee, origin.args
    if callee == FROM_TYPE:
        callee, _, args, *_ = args
    return args[4] if callee == _QUANTIZED and len(args) > 4 else None


def python_type(tensor: AnyTensor) -> Node:
    """Return the class of a tensor that is pickled with one, None of any other.

    With attributes a plain one is pickled with its class too, as an nn.Buffer is.
    """
    origin = _unwrapped(tensor.origin)
    named = origin.args[1] if isinstance(origin, Object) and origin.callee == FROM_TYPE else None
    return None if str(named) in ("torch.Tensor", "torch._tensor.Tensor") else named


def attributes(tensor: AnyTensor) -> Node:
    """Return what Python keeps on a tensor beside its data (`__dict__`), None for nothing.

    That is the gradient, too, which Variables had in their state until 2017.
    """
    origin = tensor.origin
    match origin:
        case Object(Global() as kind, state=(TensorInfo(), grad, _, _, _)) if kind in _WRAPPERS:
            return None if grad is None else Dict([("grad", grad)])
    if isinstance(origin, Object) and origin.callee == _WITH_STATE and len(origin.args) > 3:
        state = origin.args[3]
    else:
        origin = _unwrapped(origin)
        is_typed = isinstance(origin, Object) and origin.callee == FROM_TYPE
        # Of a wrapper subclass that holds the whole, that is the tensor.
        holds = is_typed and isinstance(tensor, TensorInfo) and subclasses.within(origin)
        state = origin.args[3] if is_typed and not holds else None
    return None if isinstance(state, Dict) and not state.pairs else state


def _unwrapped(origin: Node) -> Node:
    """Return the call inside those of Parameters and Variables."""
    while isinstance(origin, Object) and origin.callee in _WRAPPERS and origin.args:
        origin = getattr(origin.args[0], "origin", None)
    return origin


class Lowering:
    """Turn tensors back into torch's calls, and number their storages in order of first use.

    With a `location`, that is the device of all of them.
    """

    def __init__(self, location: str = "") -> None:
        self._location = location
        self.storages: dict[Storage, str] = {}
        self._spelled: dict[tuple[object, ...], tuple[Template, TensorInfo]] = {}

    def phrase(self, node: Any, memo: Container[object], first: int) -> Written | None:
        """Write a plain tensor as another was that differs in its storage alone."""
        if type(node) is not TensorInfo or node.origin is not None:
            return None
        template = self._spelled.get(_spelling(node))
        key = str(len(self.storages))
        if template is None or key in memo or self.storages.setdefault(node.storage, key) != key:
            return None
        return template[0].written(key.encode(), first), key, PUTS

    def learn(self, node: Any, written: bytes) -> None:
        """Remember how a plain tensor was written, between the key and the memo numbers."""
        if type(node) is not TensorInfo or node.origin is not None:
            return
        call = phrases.call_at(written, 0)
        if call is not None and call.get is not None and call.found.end() == len(written):
            self._spelled[_spelling(node)] = phrases.template(call), node

    def __call__(self, node: Any) -> Node:
        """Return the tree that rebuilds a record."""
        match node:
            case Storage():
                return self._storage(node)
            case StorageView(storage=storage):
                return self._storage(_cut(node, storage))
            case TensorInfo():
                made = _rebuild(node)
                return subclasses.on_device(made, self._location) if self._location else made
            case CompositeTensor():
                return node.origin
        raise TypeError(f"no place in a tree for a {type(node).__name__}")

    def _storage(self, storage: Storage) -> PersistentId:
        key = self.storages.setdefault(storage, str(len(self.storages)))
        if storage.dtype is None:
            kind, numel = Global("torch.storage", "UntypedStorage"), storage.nbytes
        else:
            kind = Global("torch", storage.dtype.storage_class)
            numel = storage.nbytes // storage.dtype.itemsize
        location = self._location or storage.location
        return PersistentId(("storage", kind, key, location, numel))


def _spelling(info: TensorInfo) -> tuple[object, ...]:
    """Return what plain tensors that are written alike share, tuples of the file by identity."""
    storage = info.storage
    return (
        id(info.dtype),
        id(storage.dtype),
        storage.location,
        storage.nbytes,
        info.storage_offset,
        id(info.shape),
        id(info.stride),
        info.requires_grad,
    )


def _cut(view: StorageView, storage: Storage) -> Storage:
    """Make a storage of a view that no tensor explains."""
    itemsize = storage.dtype.itemsize if storage.dtype else 1
    return replace(
        storage,
        key=f"{storage.key}[{view.offset}:{view.offset + view.numel}]",
        start=storage.start + view.offset * itemsize,
        nbytes=view.numel * itemsize,
        crc32=None,
    )


def _rebuild(info: TensorInfo) -> Object:
    if info.origin is None:
        return _fresh(info)
    origin: Object = info.origin
    if origin.callee in _WRAPPERS:
        inner = origin.args[0] if origin.args else origin.state[0]
        if (inner.storage, inner.storage_offset) == (info.storage, info.storage_offset):
            return origin
        moved = replace(inner, storage=info.storage, storage_offset=info.storage_offset)
        if moved.view != info.view:  # its numbers were computed, or moved
            moved = replace(info, requires_grad=inner.requires_grad, origin=None)
        if not origin.args:
            return replace(origin, steps=[("build", (moved, *origin.state[1:]))])
        return replace(origin, args=(moved, *origin.args[1:]))
    function = origin.args[0] if origin.callee == FROM_TYPE else origin.callee
    if function.name not in _PLAIN_REBUILDS:  # its elements are further inside
        inside = subclasses.within(origin)
        return origin if inside is None or inside.view == info.view else _fresh(info)
    if function is origin.callee:
        return replace(origin, args=_moved(origin.args, info))
    _, kind, inner, *rest = origin.args
    return replace(origin, args=(function, kind, _moved(inner, info), *rest))


def _moved(args: tuple[Node, ...], info: TensorInfo) -> tuple[Node, ...]:
    return (info.storage, info.storage_offset, *args[2:])


def _fresh(info: TensorInfo) -> Object:
    """Make the call that rebuilds a tensor of which there is nothing more to say."""
    hooks = Object(ORDERED_DICT, ())
    # Tensors read as one phrase share these tuples: in a pickle each has its own.
    shape, stride = (*info.shape, 0)[:-1], (*info.stride, 0)[:-1]
    args = (info.storage, info.storage_offset, shape, stride, info.requires_grad, hooks)
    if info.storage.dtype is info.dtype:
        return Object(Global(UTILS, "_rebuild_tensor_v2"), args)
    dtype = Global("torch", info.dtype.torch_name)
    return Object(Global(UTILS, "_rebuild_tensor_v3"), (*args, dtype))


def quantized_call(
    place: tuple[Storage, int],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    scale: float,
    zero_point: int,
) -> Object:
    """Make the call that rebuilds a tensor with one scale and zero point for all of it."""
    quantizer = (Global("torch", "per_tensor_affine"), scale, zero_point)
    args = (*place, shape, stride, quantizer, False, Object(ORDERED_DICT, ()))
    return Object(Global(UTILS, "_rebuild_qtensor"), args)
