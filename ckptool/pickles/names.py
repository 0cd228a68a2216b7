"""What importing a name would do: plain, foreign or dangerous, by tables of (module, name) pairs.

*plain* is exactly what `torch.load(weights_only=True)` accepts (torch/_weights_only_unpickler.py,
`_get_allowed_globals`), some of it once a module of torch was imported. *foreign* is what is known
to be inert, and any undotted name of a third-party package, which `calls` judges once it is called.
*dangerous* is everything else: naming counts like calling, because loading imports what is named.
"""

from __future__ import annotations

import re
import sys
from enum import IntEnum

from ckptool.pickles.tree import Global
from ckptool.tensors.dtype import DType


class Level(IntEnum):
    """How much loading would do; the higher, the worse."""

    PLAIN = 0
    FOREIGN = 1
    DANGEROUS = 2


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

_DISTRIBUTED = "torch.distributed"
# What it accepts once a module is imported, which registers them (`add_safe_globals` in
# torch/distributed/tensor/__init__.py and device_mesh.py).
AFTER_IMPORT = dict.fromkeys(
    _names(f"{_DISTRIBUTED}.tensor", "DTensor")
    | _names(f"{_DISTRIBUTED}.tensor._dtensor_spec", "DTensorSpec ShardOrderEntry TensorMeta")
    | _names(f"{_DISTRIBUTED}.tensor.placement_types", "Partial Replicate Shard _StridedShard")
    | _names(f"{_DISTRIBUTED}.device_mesh", "DeviceMesh")
    | _names(f"{_DISTRIBUTED}._mesh_layout", "_FlatLayout _MeshLayout"),
    f"{_DISTRIBUTED}.tensor",
)

_NESTED = (
    _names("torch._utils", "_rebuild_nested_tensor")
    | _names("torch.nested._internal.nested_tensor", "NestedTensor _rebuild_njt")
    | _names("torch._dynamo.decorators", "_DimRange")  # of the lengths in a jagged one
)
# Where it depends on torch's version: what 2.6 refuses and 2.14 accepts, and what 2.15 took away.
_VERSIONS = {
    **dict.fromkeys(
        _names("torch", "float8_e8m0fnu float4_e2m1fn_x2 bcomplex32")
        | _names(
            "torch", " ".join(f"{kind}int{bits}" for kind in ("", "u") for bits in range(1, 8))
        )
        | _names(f"{_DISTRIBUTED}.tensor._dtensor_spec", "ShardOrderEntry")
        | _names(f"{_DISTRIBUTED}.tensor.placement_types", "_StridedShard")
        | _names(f"{_DISTRIBUTED}._mesh_layout", "_FlatLayout _MeshLayout"),
        "torch newer than 2.6",
    ),
    **dict.fromkeys(_NESTED, "torch up to 2.14"),
}

_PATHS = "Path PurePath PosixPath WindowsPath PurePosixPath PureWindowsPath"
_NUMPY_TYPES = (
    "bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "longdouble complex64 complex128 str_ bytes_ datetime64 timedelta64 object_ void record "
    "recarray matrix generic number integer signedinteger unsignedinteger inexact floating "
    "complexfloating flexible character"
)
_GENERATORS = "MT19937 PCG64 PCG64DXSM Philox SFC64"
_EXCEPTIONS = (
    "BaseException BaseExceptionGroup Exception ExceptionGroup ArithmeticError AssertionError "
    "AttributeError BlockingIOError BrokenPipeError BufferError BytesWarning ChildProcessError "
    "ConnectionAbortedError ConnectionError ConnectionRefusedError ConnectionResetError "
    "DeprecationWarning EOFError EncodingWarning FileExistsError FileNotFoundError "
    "FloatingPointError FutureWarning GeneratorExit IOError ImportError ImportWarning "
    "IndentationError IndexError InterruptedError IsADirectoryError KeyError KeyboardInterrupt "
    "LookupError MemoryError ModuleNotFoundError NameError NotADirectoryError "
    "NotImplementedError OSError OverflowError PendingDeprecationWarning PermissionError "
    "ProcessLookupError RecursionError ReferenceError ResourceWarning RuntimeError "
    "RuntimeWarning StandardError StopAsyncIteration StopIteration SyntaxError SyntaxWarning "
    "SystemError SystemExit TabError TimeoutError TypeError UnboundLocalError "
    "UnicodeDecodeError UnicodeEncodeError UnicodeError UnicodeTranslateError UnicodeWarning "
    "UserWarning ValueError Warning ZeroDivisionError"
)
# They give back what they are given (torch/jit/_pickle.py).
_TYPE_TAGS = (
    "build_intlist build_tensorlist build_doublelist build_boollist build_tensor_from_id "
    "restore_type_tag"
)
_SHARDED = f"{_DISTRIBUTED}._shard"
_OLD_DTENSOR = f"{_DISTRIBUTED}._tensor"  # where DTensor was up to torch 2.4

FOREIGN = frozenset(
    _names("argparse", "Namespace")
    | _names("array", "array _array_reconstructor")
    | _names("builtins", "object dict list tuple frozenset bytes int float str bool slice range")
    | _names("builtins", "Ellipsis NotImplemented " + _EXCEPTIONS)
    | _names("collections", "defaultdict deque ChainMap UserDict UserList UserString")
    | _names("copyreg", "_reconstructor __newobj__ __newobj_ex__")
    | _names("dataclasses", "_MISSING_TYPE _HAS_DEFAULT_FACTORY_CLASS")
    | _names("datetime", "date datetime time timedelta timezone")
    | _names("decimal", "Decimal DecimalTuple")
    | _names("fractions", "Fraction")
    | _names("functools", "partial")
    | _names("http", "HTTPMethod HTTPStatus")
    | _names("inspect", "Parameter Signature _ParameterKind _empty")
    | _names("ipaddress", "IPv4Address IPv4Interface IPv4Network")
    | _names("ipaddress", "IPv6Address IPv6Interface IPv6Network")
    | _names("_io", "BytesIO")  # a buffer in memory: `_extra_state` of Megatron core
    | _names("pathlib", _PATHS)
    | _names("pathlib._local", _PATHS)
    | _names("calendar", "Day Month")
    | _names("platform", "uname_result")
    | _names("re", "_compile RegexFlag")
    | _names("signal", "Handlers Sigmasks Signals")
    | _names("socket", "AddressFamily AddressInfo MsgFlag SocketKind")
    | _names("statistics", "NormalDist")
    | _names("string", "Template")
    | _names("time", "struct_time")
    | _names("types", "GenericAlias SimpleNamespace")
    | _names("typing", "Any Callable Dict FrozenSet Iterable List Mapping")  # Any: in OmegaConf
    | _names("typing", "Optional Sequence Set Tuple Type Union")
    | _names("urllib.parse", "DefragResult ParseResult SplitResult")
    | _names("logging", "getLogger")
    | _names("random", "Random")
    | _names("uuid", "UUID SafeUUID")
    | {
        (f"{base}.{module}", name)
        for base in ("numpy.core", "numpy._core")
        for module, names in (
            ("multiarray", "_reconstruct scalar"),
            ("numeric", "_frombuffer"),
        )
        for name in names.split()
    }
    | _names("numpy", "ndarray dtype " + _NUMPY_TYPES)
    | {
        (module, name)
        for module in ("numpy.rec", "numpy.core.records", "numpy._core.records")
        for name in ("recarray", "record")
    }
    | _names("joblib.numpy_pickle", "NumpyArrayWrapper")
    | _names("numpy.matrixlib.defmatrix", "matrix")
    | _names("numpy.ma", "MaskedArray")
    | _names("numpy.ma.core", "MaskedArray MaskedConstant mvoid _mareconstruct")
    | _names("numpy.random.bit_generator", "SeedSequence SeedlessSeedSequence")
    | _names(
        "numpy.random.bit_generator",
        "__pyx_unpickle_SeedSequence __pyx_unpickle_SeedlessSeedSequence",
    )
    | _names("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor")
    | {(f"numpy.random._{name.lower()}", name) for name in _GENERATORS.split()}
    | _names("numpy.random", "__RandomState_ctor")  # before 1.17
    | {
        (f"torch.{module}", name)
        for module in ("amp.grad_scaler", "cuda.amp.grad_scaler")
        for name in ("GradScaler", "OptState")
    }
    | _names("torch", "memory_format contiguous_format channels_last preserve_format strided")
    | _names("torch", "ScriptObject Generator")  # of a class compiled into the process
    | _names("torch._C", "ScriptObject Generator")
    | _names("torch._utils", "_rebuild_xla_tensor")
    | _NESTED
    | _names("torch.utils.hooks", "RemovableHandle")
    | _names("torch.autograd.variable", "Variable")
    | _names("torch.nn.backends.thnn", "_get_thnn_function_backend")  # models saved before 1.5
    | _names("torch.torch_version", "TorchVersion")
    | _names(
        "torch.nn.functional",
        "relu gelu silu elu selu leaky_relu softmax log_softmax tanh "
        "sigmoid softplus hardswish mish relu6 prelu glu logsigmoid dropout",
    )
    | _names("torch._C._nn", "gelu silu leaky_relu elu hardtanh log_sigmoid softplus relu6")
    | _names("torch.jit._pickle", _TYPE_TAGS)
    | _names(_OLD_DTENSOR, "DTensor DeviceMesh Partial Replicate Shard")
    | _names(f"{_OLD_DTENSOR}.api", "DTensor")
    | _names(f"{_OLD_DTENSOR}.device_mesh", "DeviceMesh")
    | _names(f"{_OLD_DTENSOR}._dtensor_spec", "DTensorSpec TensorMeta")
    | _names(
        f"{_OLD_DTENSOR}.placement_types",
        "DTensorSpec Partial Replicate Shard TensorMeta _Partial _StridedShard",
    )
    | _names(f"{_DISTRIBUTED}.tensor._api", "DTensor")
    | _names(f"{_DISTRIBUTED}.remote_device", "_remote_device")
    | _names(f"{_SHARDED}.metadata", "ShardMetadata")
    | _names(f"{_SHARDED}.sharded_tensor.api", "ShardedTensor")
    | _names(f"{_SHARDED}.sharded_tensor.shard", "Shard")
    | _names(f"{_SHARDED}.sharded_tensor.metadata", "ShardedTensorMetadata")
    | _names(f"{_SHARDED}.sharding_spec.api", "DevicePlacementSpec EnumerableShardingSpec")
    | _names(f"{_SHARDED}.sharding_spec.chunk_sharding_spec", "ChunkShardingSpec")
    | _names(
        f"{_DISTRIBUTED}.checkpoint.metadata",
        "Metadata MetadataIndex TensorProperties "
        "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata StorageMeta "
        "_MEM_FORMAT_ENCODING",
    )
    | _names(f"{_DISTRIBUTED}.checkpoint.filesystem", "_StorageInfo")
    | _names(f"{_SHARDED}.sharded_tensor.metadata", "TensorProperties MEM_FORMAT_ENCODING")
)

# Functions that make a value again of what they are given, text too, and do no more; and at which
# places they get what they call, or a class whose `__new__` they call: a name there is judged like
# one that is called, and what a call returned may have `__new__` as an attribute.
RECONSTRUCTORS = {
    ("copyreg", "_reconstructor"): (0, 1),
    ("copyreg", "__newobj__"): (0,),
    ("copyreg", "__newobj_ex__"): (0,),
    ("numpy.ma.core", "_mareconstruct"): (0,),
    ("numpy.random._pickle", "__generator_ctor"): (1,),
    ("numpy.random._pickle", "__randomstate_ctor"): (1,),
    ("torch._tensor", "_rebuild_from_type_v2"): (0,),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): (0,),  # its method `to`
    ("functools", "partial"): (),  # not before it is called itself
    # As torch's own, of fastai's tensors.
    ("fastai.torch_core", "_rebuild_from_type"): (0,),
    ("jax._src.array", "_reconstruct_array"): (0,),  # numpy's function, which gets the bytes
    # An index of the class, of its data and names.
    ("pandas.core.indexes.base", "_new_Index"): (0,),
    ("pandas.core.indexes.datetimes", "_new_DatetimeIndex"): (0,),
    ("pandas.core.indexes.interval", "_new_IntervalIndex"): (0,),
    ("pandas.core.indexes.period", "_new_PeriodIndex"): (0,),
    ("pandas.core.indexes.timedeltas", "_new_TimedeltaIndex"): (0,),
    # A block around an array, a moment, a span: of numbers, and the name of a time zone.
    ("pandas._libs.internals", "_unpickle_block"): (),
    ("pandas.core.internals.blocks", "new_block"): (),
    ("pandas._libs.tslibs.timestamps", "_unpickle_timestamp"): (),
    ("pandas._libs.tslibs.timedeltas", "_timedelta_unpickle"): (),
    ("pytz", "_p"): (),  # one of pytz's own time zones
    # An empty object of the class, which BUILD fills.
    ("sklearn.metrics._dist_metrics", "newObj"): (0,),
    ("sklearn.neighbors._ball_tree", "newObj"): (0,),
    ("sklearn.neighbors._dist_metrics", "newObj"): (0,),
    ("sklearn.neighbors._kd_tree", "newObj"): (0,),
}

# Packages whose classes (undotted, a capital first but for `_`: `_WrappedHook`) are inert.
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
        "billiard loky fsspec requests httpx aiohttp urllib3 sympy"  # whose classes evaluate text
    ).split()
)
# Functions that do so in whatever package: their own, or the standard library's taken over
# (`gevent.subprocess.Popen`, `pandas.read_pickle`, `sympy.parsing.sympy_parser.parse_expr`).
_RUNNER_NAMES = (
    "eval exec execfile system popen Popen check_call check_output getoutput getstatusoutput "
    "import_module run_module run_path run_code parse_expr sympify read_pickle loads load_module "
    "load_library __import__ __builtins__ __loader__ __spec__ "
    "CDLL PyDLL FileIO ZipFile TarFile GzipFile BZ2File LZMAFile "  # they load or empty a file
    "_reconstruct_persistent_obj"  # of StyleGAN: it runs the source text in its arguments
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
    return inside and name.lstrip("_")[:1].isupper() and not _RUNS_CODE.search(f"{module}.{name}")
