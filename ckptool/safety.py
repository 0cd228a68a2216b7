"""What loading a file elsewhere would do: plain, foreign or dangerous, judged by names alone.

*plain* is exactly what `torch.load(weights_only=True)` accepts (torch/_weights_only_unpickler.py,
`_get_allowed_globals`). *foreign* is what is known to be inert, and any undotted name of a
third-party package. *dangerous* is everything else: naming counts like calling, because loading
imports what is named.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol

from ckptool.dtype import DType
from ckptool.tensor import CompositeTensor, TensorInfo
from ckptool.tree import (
    ByteArray,
    Dict,
    Global,
    LongInteger,
    Node,
    Object,
    OldString,
    Pairs,
    PersistentId,
    Set,
    children,
)

SHOWN = 8  # dangerous calls in a message


class Level(IntEnum):
    """How much loading would do; the higher, the worse."""

    PLAIN = 0
    FOREIGN = 1
    DANGEROUS = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a file names beyond the plain, each with the offset where it first stands."""

    level: Level
    foreign: dict[Global, int]
    dangerous: dict[Global, int]


def _names(module: str, names: str) -> set[tuple[str, str]]:
    return {(module, name) for name in names.split()}


_OLD_TENSORS = "Double Float Half Long Int Short Char Byte Bool BFloat16"
_STORAGES = " ".join(dtype.storage_class for dtype in DType if dtype.storage_class)
_DTYPES = " ".join(dtype.torch_name for dtype in DType if dtype.torch_name)
_CUDA_STORAGES = " ".join(
    name for name in _STORAGES.split() if not name.startswith(("Q", "UntypedStorage"))
)

PLAIN = frozenset(
    _names("collections", "OrderedDict Counter")
    | _names("_codecs", "encode")
    | _names("builtins", "bytearray set complex")
    | _names("torch", "Size Tensor device")
    | _names("torch", _STORAGES)
    | _names("torch", _DTYPES)
    | _names("torch", " ".join(f"{kind}int{bits}" for kind in ("", "u") for bits in range(1, 8)))
    | _names("torch", "per_tensor_affine per_tensor_symmetric per_channel_affine")
    | _names("torch", "per_channel_symmetric per_channel_affine_float_qparams")
    | _names("torch", " ".join(f"{kind}Tensor" for kind in _OLD_TENSORS.split()))
    | _names("torch.cuda", " ".join(f"{kind}Tensor" for kind in _OLD_TENSORS.split()))
    | _names(
        "torch.sparse", " ".join(f"{kind}Tensor" for kind in _OLD_TENSORS.split() if kind != "Bool")
    )
    | _names(
        "torch.cuda.sparse",
        " ".join(f"{kind}Tensor" for kind in _OLD_TENSORS.split() if kind != "Bool"),
    )
    | _names("torch.cuda", _CUDA_STORAGES)
    | _names("torch.storage", "TypedStorage UntypedStorage")
    | _names("torch.nn.parameter", "Parameter")
    | _names("torch.serialization", "_get_layout")
    | _names("torch._tensor", "_rebuild_from_type_v2")
    | _names(
        "torch._utils",
        "_rebuild_parameter _rebuild_parameter_with_state _rebuild_qtensor _rebuild_tensor "
        "_rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_sparse_tensor "
        "_rebuild_meta_tensor_no_storage _rebuild_wrapper_subclass "
        "_rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor",
    )
)

_PATHS = "Path PurePath PosixPath WindowsPath PurePosixPath PureWindowsPath"
_NUMPY_SCALARS = (
    "bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "longdouble complex64 complex128 str_ bytes_ datetime64 timedelta64"
)
_GENERATORS = "MT19937 PCG64 PCG64DXSM Philox SFC64"
_DISTRIBUTED = "torch.distributed"
# They give back what they are given (torch/jit/_pickle.py).
_TYPE_TAGS = (
    "build_intlist build_tensorlist build_doublelist build_boollist build_tensor_from_id "
    "restore_type_tag"
)

FOREIGN = frozenset(
    _names("argparse", "Namespace")
    | _names("builtins", "object dict list tuple frozenset bytes int float str bool slice range")
    | _names("collections", "defaultdict deque ChainMap UserDict UserList")
    | _names("copyreg", "_reconstructor __newobj__")
    | _names("datetime", "date datetime time timedelta timezone")
    | _names("decimal", "Decimal")
    | _names("fractions", "Fraction")
    | _names("functools", "partial")
    | _names("_io", "BytesIO")  # a buffer in memory: `_extra_state` of Megatron core
    | _names("pathlib", _PATHS)
    | _names("pathlib._local", _PATHS)
    | _names("re", "_compile")
    | _names("types", "SimpleNamespace")
    | _names("typing", "Any")  # in every DictConfig of OmegaConf
    | _names("logging", "getLogger")
    | _names("random", "Random")
    | _names("uuid", "UUID")
    | {
        (f"{base}.{module}", name)
        for base in ("numpy.core", "numpy._core")
        for module, names in (
            ("multiarray", "_reconstruct scalar"),
            ("numeric", "_frombuffer"),
        )
        for name in names.split()
    }
    | _names("numpy", "ndarray dtype " + _NUMPY_SCALARS)
    | _names("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor")
    | {(f"numpy.random._{name.lower()}", name) for name in _GENERATORS.split()}
    | _names("numpy.random", "__RandomState_ctor")  # before 1.17
    | {
        (f"torch.{module}", name)
        for module in ("amp.grad_scaler", "cuda.amp.grad_scaler")
        for name in ("GradScaler", "OptState")
    }
    | _names("torch", "memory_format contiguous_format channels_last preserve_format strided")
    | _names("torch._utils", "_rebuild_nested_tensor _rebuild_xla_tensor")
    | _names("torch.autograd.variable", "Variable")
    | _names("torch.nn.backends.thnn", "_get_thnn_function_backend")  # models saved before 1.5
    | _names("torch.torch_version", "TorchVersion")
    | _names("torch.jit._pickle", "build_intlist build_tensorlist build_doublelist build_boollist")
    | _names("torch.jit._pickle", "build_tensor_from_id restore_type_tag")
    | _names(
        "torch.nn.functional",
        "relu gelu silu elu selu leaky_relu softmax log_softmax tanh "
        "sigmoid softplus hardswish mish relu6 prelu glu logsigmoid dropout",
    )
    | _names("torch._C._nn", "gelu silu leaky_relu elu hardtanh log_sigmoid softplus relu6")
    | _names("torch.jit._pickle", _TYPE_TAGS)
    | _names(f"{_DISTRIBUTED}.tensor", "DTensor")
    | _names(f"{_DISTRIBUTED}.tensor._dtensor_spec", "DTensorSpec TensorMeta")
    | _names(f"{_DISTRIBUTED}.tensor.placement_types", "Partial Replicate Shard")
    | _names(f"{_DISTRIBUTED}.device_mesh", "DeviceMesh")
    | _names(
        f"{_DISTRIBUTED}.checkpoint.metadata",
        "Metadata MetadataIndex TensorProperties "
        "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata StorageMeta "
        "_MEM_FORMAT_ENCODING",
    )
    | _names(f"{_DISTRIBUTED}.checkpoint.filesystem", "_StorageInfo")
    | _names(
        f"{_DISTRIBUTED}._shard.sharded_tensor.metadata", "TensorProperties MEM_FORMAT_ENCODING"
    )
)

# Packages whose classes (undotted names that start with a capital) are inert.
_CLASS_PACKAGES = (
    "torch.nn.modules",
    "torch.nn.parallel",
    "torch.nn.parameter",
    "torch.nn.quantized",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    *(  # hooks that such layers have in a whole model
        f"torch.nn.utils.{module}" for module in ("prune", "spectral_norm", "weight_norm")
    ),
    "torch.ao.nn",
    *(
        f"{base}.{module}"
        for base in ("torch.ao.quantization", "torch.quantization")
        for module in ("observer", "fake_quantize", "stubs", "qconfig")
    ),
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "numpy.dtypes",
)
# Classes in or behind them that compile or run what they are given (torch.fx, RPC).
_RUNS_CODE = re.compile(
    r"(Graph|GraphModule|Node|Tracer|Interpreter|CodeGen|RRef)$|\.feature_extraction\."
)
# Third-party packages whose functions run what they are given, or send it away.
_EXECUTORS = frozenset(
    (
        "cloudpickle dill joblib jsonpickle IPython six fire numexpr yaml pytest _pytest py "
        "pexpect ptyprocess sh plumbum invoke fabric paramiko xonsh cffi multiprocess pathos "
        "billiard loky requests httpx aiohttp urllib3"
    ).split()
)
# Functions that do so in whatever package: their own, or the standard library's taken over
# (`gevent.subprocess.Popen`, `pandas.read_pickle`, `sympy.parsing.sympy_parser.parse_expr`).
_RUNNER_NAMES = (
    "eval exec execfile system popen Popen check_call check_output getoutput getstatusoutput "
    "import_module run_module run_path run_code parse_expr sympify read_pickle loads load_module "
    "load_library __import__ __builtins__ __loader__ __spec__"
)
_RUNNERS = frozenset(_RUNNER_NAMES.split())
_PYTHON_2_MODULES = frozenset(["__builtin__", "copy_reg", "exceptions"])
# Of the standard library, of the installer or of torch, in any version of Python, and not always
# listed: `sys.stdlib_module_names` is that of the Python here, and leaves `test` out.
_RESERVED = frozenset(
    (
        "torch torchvision numpy pip setuptools pkg_resources wheel _distutils_hack "
        "distutils __builtin__ commands popen2 cPickle copy_reg exceptions posix nt os2 "
        "ce ntpath macpath posixpath imp asyncore asynchat smtpd pipes crypt nis msilib "
        "telnetlib urllib2 execfile thread _thread dummy_thread builtins "
        "torchgen functorch caffe2 test sitecustomize usercustomize lib2to3 binhex formatter "
        "parser symbol dummy_threading _bootlocale aifc audioop cgi cgitb chunk imghdr mailcap "
        "nntplib ossaudiodev sndhdr spwd sunau uu xdrlib _pyrepl _colorize _android_support "
        "_apple_support _ios_support _aix_support _osx_support _interpreters _interpchannels "
        "_interpqueues _xxsubinterpreters _xxinterpchannels _testcapi _testinternalcapi "
        "_testlimitedcapi _opcode_metadata _sysconfig _suggestions _pylong _pydatetime "
        "_py_warnings _remote_debugging _wmi _zstd annotationlib compression"
    ).split()
)


def level(named: Global) -> Level:
    """Judge one name, as it stands and as Python 3 reads the names of Python 2.

    Where Python 2 had another name for a module, only the new one is known to the tables.
    """
    renamed = python3_name(named)
    if renamed == (named.module, named.name):
        return _level(*renamed)
    old_only = named.module in _PYTHON_2_MODULES
    return _level(*renamed) if old_only else max(_level(*renamed), _level(named.module, named.name))


def python3_name(named: Global) -> tuple[str, str]:
    """Give what Python 3 imports for a name in a pickle of protocol 2 or less."""
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    pair = (named.module, named.name)
    return NAME_MAPPING.get(pair, (IMPORT_MAPPING.get(named.module, named.module), named.name))


def _level(module: str, name: str) -> Level:
    if (module, name) in PLAIN:
        return Level.PLAIN
    if (module, name) in FOREIGN:
        return Level.FOREIGN
    steps = module.split(".")
    if not name.isidentifier() or not all(step.isidentifier() for step in steps):
        return Level.DANGEROUS
    if _is_known_class(module, name):
        return Level.FOREIGN
    top = steps[0]
    third_party = top not in _RESERVED | _EXECUTORS and top not in sys.stdlib_module_names
    return Level.FOREIGN if third_party and name not in _RUNNERS else Level.DANGEROUS


def _is_known_class(module: str, name: str) -> bool:
    inside = any(
        module == package or module.startswith(package + ".") for package in _CLASS_PACKAGES
    )
    return inside and name[:1].isupper() and not _RUNS_CODE.search(f"{module}.{name}")


def judge(named: Mapping[Global, int]) -> Verdict:
    """Judge all names of a file."""
    foreign, dangerous = {}, {}
    for each, offset in named.items():
        found = level(each)
        if found is Level.DANGEROUS:
            dangerous[each] = offset
        elif found is Level.FOREIGN:
            foreign[each] = offset
    worst = Level.DANGEROUS if dangerous else Level.FOREIGN if foreign else Level.PLAIN
    return Verdict(worst, foreign, dangerous)


def names_in(tree: Node) -> dict[Global, int]:
    """Collect the names that a tree would carry on, each node visited once."""
    found: dict[Global, int] = {}
    for node in _walk(tree):
        if isinstance(node, Global):
            found.setdefault(node, 0)
    return found


def _walk(tree: Node) -> Iterator[Node]:
    seen: set[int] = set()
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _LEAVES):
            if isinstance(node, Global):
                yield node
            continue
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack.extend(children(node))


_LEAVES = (str, int, float, bytes, type(None), Global)


_LONGEST_KEY = 200  # characters that are shown of one


@dataclass(frozen=True, slots=True)
class Call:
    """A dangerous call, or a name that nothing calls (`arguments` None), as people read it.

    At which byte of its pickle, and under which key if any.
    """

    named: Global
    arguments: tuple[str, ...] | None
    offset: int
    where: str

    @property
    def text(self) -> str:
        """Write it as Python would."""
        if self.arguments is None:
            return str(self.named)
        return f"{self.named}({', '.join(self.arguments)})"


def evidence(
    verdict: Verdict, calls: Iterable[Object], tree: Node, limit: int = SHOWN
) -> list[Call]:
    """List the dangerous calls with their arguments, then names that nothing calls."""
    found: list[tuple[Node, Global, tuple[str, ...] | None, int]] = []
    named: set[Global] = set()
    for call in calls:
        callee = call.callee
        if isinstance(callee, Global) and callee in verdict.dangerous:
            named.add(callee)
            if len(found) < limit:
                arguments = tuple(_shown(argument) for argument in call.args)
                found.append((call, callee, arguments, call.offset))
    for name, offset in verdict.dangerous.items():
        if name not in named and len(found) < limit:
            found.append((name, name, None, offset))
    where = _where(tree, [node for node, *_ in found])
    return [
        Call(callee, arguments, offset, where.get(id(node), ""))
        for node, callee, arguments, offset in found
    ]


def evidence_lines(
    verdict: Verdict, calls: Iterable[Object], tree: Node, pickle_name: str
) -> list[str]:
    """Show what is dangerous in a file, a line for each call."""
    return [evidence_line(call, pickle_name) for call in evidence(verdict, calls, tree)]


def evidence_line(call: Call, pickle_name: str) -> str:
    """Show one call, and where it is."""
    where = f"   at `{call.where}`" if call.where else ""
    return f"{pickle_name}, byte {call.offset}: {call.text}{where}"


class Pickled(Protocol):
    """What safety looks at in a checkpoint."""

    @property
    def tree(self) -> Node:
        """Give all that the pickle holds."""

    @property
    def globals(self) -> Mapping[Global, int]:
        """Give the names in it, each with its offset."""

    @property
    def calls(self) -> Iterable[Object]:
        """Give the calls in it."""

    @property
    def pickle_name(self) -> str:
        """Name it."""

    @property
    def shards(self) -> Sequence[Pickled]:
        """Give the files of a set."""


def evidence_of(verdict: Verdict, checkpoint: Pickled) -> list[str]:
    """Show what is dangerous in a checkpoint; each file of a set by its own name."""
    lines: list[str] = []
    for part in checkpoint.shards or (checkpoint,):
        here = {name: at for name, at in part.globals.items() if name in verdict.dangerous}
        found = replace(verdict, dangerous=here)
        lines += evidence_lines(found, part.calls, part.tree, part.pickle_name)
    return lines[:SHOWN]


def _shown(node: Node) -> str:
    """Write an argument in a few characters."""
    match node:
        case str() | bytes():
            text = repr(node[:60])
            return text if len(node) <= 60 else f"{text}..."
        case bool() | int() | float() | None:
            return str(node)[:40]
        case Global():
            return str(node)[:60]
        case _:
            return "..."


_Way = tuple[Any, str] | None  # the way to the parent, and a key


def _where(tree: Node, wanted: Sequence[Node]) -> dict[int, str]:
    """Name the keys above nodes, the first way to each, by their `id`."""
    left = {id(node) for node in wanted}
    found: dict[int, str] = {}
    seen: set[int] = set()
    stack: list[tuple[_Way, Node]] = [(None, tree)]
    while stack and left:
        way, node = stack.pop()
        if id(node) in left:
            left.discard(id(node))
            found[id(node)] = _dotted(way)
        if isinstance(node, _LEAVES) or id(node) in seen:
            continue
        seen.add(id(node))
        keyed = {id(value): key for key, value in _keyed(node) if isinstance(key, str)}
        for child in children(node):
            key = keyed.get(id(child))
            stack.append(((way, key) if key else way, child))
    return found


def _dotted(way: _Way) -> str:
    """Write a way; joined only here, as keys may be long and ways many."""
    keys: list[str] = []
    while way is not None:
        way, key = way
        keys.append(key[:_LONGEST_KEY])
    return ".".join(reversed(keys))


def _keyed(node: Node) -> Pairs:
    if isinstance(node, Dict):
        return node.pairs
    if isinstance(node, Object):
        return [pair for kind, payload in node.steps if kind == "setitem" for pair in payload]
    return []


# Leaving behind what is not plain.


class _Left:
    """Stands for a node that is left behind."""


_LEFT = _Left()
_PLAIN_VALUES = (str, int, float, bytes, type(None), ByteArray, LongInteger, OldString)


def only_plain(tree: Node) -> tuple[Node, list[str]]:
    """Give the tree with tensors and plain values alone, and the places that were left behind.

    What holds something left behind goes with it, up to the nearest dictionary entry. A root
    that is itself not plain leaves an empty dictionary.
    """
    pruner = _Pruner()
    pruned = pruner.node(tree, "")
    return (Dict() if pruned is _LEFT else pruned), pruner.left


class _Pruner:
    def __init__(self) -> None:
        self.left: list[str] = []
        self.done: dict[int, Any] = {}
        self.kept: list[Node] = []

    def node(self, node: Node, path: str) -> Node | _Left:
        if isinstance(node, _PLAIN_VALUES):
            return node
        if isinstance(node, Global):
            return node if level(node) is Level.PLAIN else _LEFT
        if id(node) not in self.done:
            self.kept.append(node)
            self.done[id(node)] = _LEFT  # what contains itself is not plain
            self.done[id(node)] = self.composed(node, path)
        return self.done[id(node)]

    def composed(self, node: Node, path: str) -> Node | _Left:
        match node:
            case Dict():
                return Dict(self.pairs(node.pairs, path))
            case list() | tuple():
                members = [self.node(item, path) for item in node]
                if any(member is _LEFT for member in members):
                    return _LEFT
                return type(node)(members)
            case Set():
                members = [self.node(item, path) for item in node.items]
                return _LEFT if _LEFT in members else Set(members, node.frozen)
            case PersistentId():
                return _LEFT
            case Object():
                return self.object(node, path)
            case TensorInfo():
                return self.tensor(node, path)
            case CompositeTensor():
                origin = self.node(node.origin, path)
                return _LEFT if origin is _LEFT else replace(node, origin=origin)
        return node

    def pairs(self, pairs: Pairs, path: str) -> Pairs:
        kept = []
        for key, value in pairs:
            here = f"{path}.{key}".lstrip(".") if isinstance(key, str) else path or "a key"
            new_key, new_value = self.node(key, here), self.node(value, here)
            if new_key is _LEFT or new_value is _LEFT:
                self.left.append(here)
            else:
                kept.append((new_key, new_value))
        return kept

    def object(self, node: Object, path: str) -> Node | _Left:
        callee, args, kwargs = (
            self.node(part, path) for part in (node.callee, node.args, node.kwargs)
        )
        if callee is _LEFT or isinstance(args, _Left) or kwargs is _LEFT:
            filled = [pair for kind, payload in node.steps if kind == "setitem" for pair in payload]
            # A dict of a class that is not plain (defaultdict ...) is kept as a plain one.
            return Dict(self.pairs(filled, path)) if filled else _LEFT
        steps: list[tuple[str, Any]] = []
        for kind, payload in node.steps:
            if kind == "setitem":
                steps.append((kind, self.pairs(payload, path)))
            else:
                kept = self.node(payload, path)
                if kept is _LEFT:
                    return _LEFT
                steps.append((kind, kept))
        return replace(node, callee=callee, args=args, kwargs=kwargs, steps=steps)

    def tensor(self, node: TensorInfo, path: str) -> TensorInfo | _Left:
        """Keep the tensor; what hangs on it only if that is plain."""
        origin = None if node.origin is None else self.node(node.origin, path)
        if origin is not _LEFT:
            return node if origin is None else replace(node, origin=origin)
        return _LEFT if node.dtype.quantized else replace(node, origin=None)
