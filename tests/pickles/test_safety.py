"""What loading would do, judged by names: the tables, evidence, and what is kept of a file."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ckptool import containers
from ckptool.pickles import pickle_reader, safety
from ckptool.pickles.names import (
    AFTER_IMPORT,
    FOREIGN,
    PLAIN,
    Level,
    level,
    python3_name,
    torch_for,
)
from ckptool.pickles.pruning import only_plain
from ckptool.pickles.safety import judge
from ckptool.pickles.tree import Dict, Global, Node, Object, Set

TABLE_OF = (2, 15)  # the torch that the table of plain names was taken from
UP_TO_2_14 = {("torch._utils", "_rebuild_nested_tensor")}  # what that one accepts no more


def allowed_by_torch() -> set[tuple[str, str]]:
    pytest.importorskip("torch")
    from torch import _weights_only_unpickler as unpickler

    names = set(unpickler._get_allowed_globals())
    return {tuple(name.rsplit(".", 1)) for name in names}  # type: ignore[misc]


def version() -> tuple[int, int]:
    torch = pytest.importorskip("torch")
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def test_plain_is_what_torch_accepts() -> None:
    """Equal to the torch it was taken from; an older one accepts no more, a newer one no less.

    Names that it took away are foreign, whichever torch is installed.
    """
    allowed, here = allowed_by_torch(), version()
    python_2 = {pair for pair in allowed if pair[0] == "__builtin__"}
    if here <= TABLE_OF:
        assert allowed - python_2 - (UP_TO_2_14 if here < TABLE_OF else set()) <= PLAIN
    if here >= TABLE_OF:
        assert allowed >= PLAIN
    for module, name in python_2:
        assert level(Global(module, name)) is Level.PLAIN
    for module, name in UP_TO_2_14:
        assert level(Global(module, name)) is Level.FOREIGN


def test_a_verdict_that_depends_on_torch_says_on_which() -> None:
    """The torch here accepts what is said of it, and refuses what others alone accept."""
    allowed, here = allowed_by_torch(), version()
    if (2, 6) < here < (2, 14):
        pytest.skip("in which torch between the two a name came is not known")
    words = {"torch newer than 2.6": here > (2, 6), "torch up to 2.14": here <= (2, 14)}
    said = {pair for pair in PLAIN | UP_TO_2_14 if torch_for(Global(*pair))}
    assert said > UP_TO_2_14
    for pair in said:
        assert (pair in allowed) is words[torch_for(Global(*pair))], pair
    assert here > (2, 6) or said >= PLAIN - allowed


def test_what_torch_accepts_after_an_import() -> None:
    """Equal to what torch.distributed.tensor registers, in the versions since all of it exists."""
    pytest.importorskip("torch")
    script = (
        "import torch; from torch import _weights_only_unpickler as u\n"
        "import torch.distributed.tensor; print(*u._get_user_allowed_globals())"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    allowed = {tuple(n.rsplit(".", 1)) for n in names if n.startswith("torch.distributed.")}
    assert {pair for pair in AFTER_IMPORT if pair not in allowed} == set() or version() < (2, 14)
    assert allowed <= AFTER_IMPORT.keys() or version() > TABLE_OF
    assert set(AFTER_IMPORT.values()) == {"torch.distributed.tensor"}


def test_what_is_foreign_of_the_standard_library_runs_nothing() -> None:
    """Each name is a class, a constant, or one of the few functions that make a value again."""
    functions = {"_reconstructor", "__newobj__", "__newobj_ex__", "_compile", "getLogger"}
    for module, name in FOREIGN:
        if module.partition(".")[0] in sys.stdlib_module_names:
            found = getattr(import_module(module.removesuffix("._local")), name, None)
            known = found in (None, ..., NotImplemented) or isinstance(found, type)
            inert = known or module == "typing" or name in functions
            assert inert or name == "_array_reconstructor", (module, name)


def test_torch_blocks_nothing_that_is_plain_or_foreign() -> None:
    pytest.importorskip("torch")
    from torch import _weights_only_unpickler as unpickler

    blocked = set(unpickler._blocklisted_modules)
    assert "os" in blocked
    assert not {module for module, _ in PLAIN | FOREIGN} & blocked


def test_the_tables_do_not_overlap() -> None:
    assert not PLAIN & FOREIGN
    assert not (PLAIN | FOREIGN) & AFTER_IMPORT.keys()


LEVELS = {
    Level.PLAIN: """
        collections.OrderedDict collections.Counter torch._utils._rebuild_tensor_v2
        torch._utils._rebuild_parameter torch.nn.parameter.Parameter torch.FloatStorage
        torch.BFloat16Storage torch.cuda.HalfStorage torch.storage.UntypedStorage torch.float32
        torch.Size torch.device torch.FloatTensor torch.cuda.FloatTensor _codecs.encode
        builtins.set builtins.bytearray builtins.complex __builtin__.set
        torch.distributed.tensor.DTensor torch.distributed.tensor.placement_types.Shard
        torch.distributed.device_mesh.DeviceMesh torch.distributed._mesh_layout._MeshLayout
    """,
    Level.FOREIGN: """
        argparse.Namespace pathlib.PosixPath pathlib._local.PosixPath functools.partial
        collections.defaultdict collections.deque datetime.datetime uuid.UUID decimal.Decimal
        types.SimpleNamespace builtins.dict builtins.slice __builtin__.object
        copy_reg._reconstructor
        numpy.ndarray numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct
        numpy.dtypes.Float64DType numpy.random._pickle.__generator_ctor
        torch.nn.modules.conv.Conv2d torch.nn.modules.container.Sequential
        torch.nn.parallel.data_parallel.DataParallel torch.optim.adam.Adam
        torch.optim.lr_scheduler.StepLR torchvision.models.resnet.ResNet
        torchvision.transforms.transforms.Normalize torch.nn.functional.relu
        torch.torch_version.TorchVersion torch.distributed._tensor.api.DTensor
        signal.Signals socket.AddressFamily http.HTTPStatus re.RegexFlag uuid.SafeUUID
        inspect._ParameterKind ipaddress.IPv4Address ipaddress.IPv6Network builtins.Ellipsis
        __builtin__.Ellipsis builtins.NotImplemented builtins.ValueError exceptions.ValueError
        time.struct_time urllib.parse.ParseResult urlparse.ParseResult array.array
        UserString.UserString types.GenericAlias typing.Optional string.Template
        torch.ScriptObject torch._C.ScriptObject torch._C.Generator
        torch.nn.modules.module._WrappedHook torch.utils.hooks.RemovableHandle
        torch.ao.quantization.observer._PartialWrapper
        torch.nested._internal.nested_tensor.NestedTensor
        torch.nested._internal.nested_tensor._rebuild_njt
        torch.distributed._shard.sharded_tensor.api.ShardedTensor
        torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata
        torch.distributed._shard.metadata.ShardMetadata
        torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec
        torch.distributed.remote_device._remote_device
        numpy.random.bit_generator.SeedSequence
        numpy.random.bit_generator.__pyx_unpickle_SeedSequence
        numpy.ma.core._mareconstruct numpy.ma.MaskedArray numpy.ma.core.MaskedConstant
        numpy.rec.recarray numpy.core.records.recarray numpy.record numpy.void numpy.matrix
        transformers.training_args.TrainingArguments pytorch_lightning.callbacks.ModelCheckpoint
        omegaconf.dictconfig.DictConfig models.yolo.Model __main__.Config
        timm.models.vit.VisionTransformer
    """,
    Level.DANGEROUS: """
        os.system posix.system nt.system os.popen builtins.eval builtins.exec builtins.__import__
        builtins.getattr builtins.open builtins.compile builtins.map builtins.print __builtin__.eval
        __builtin__.apply commands.getoutput popen2.popen3 subprocess.Popen subprocess.call
        runpy.run_path runpy._run_code pty.spawn code.interact ctypes.CDLL importlib.import_module
        operator.attrgetter operator.methodcaller functools.reduce functools.lru_cache
        shutil.rmtree pathlib.Path.unlink socket.socket urllib.request.urlopen webbrowser.open
        pickle.loads _pickle.loads cPickle.loads marshal.loads types.CodeType types.FunctionType
        collections.namedtuple itertools.starmap asyncio.run timeit.timeit cProfile.run pdb.run
        bdb.Bdb doctest.debug_script unittest.main this.s antigravity.fly sys.exit
        logging.config.listen
        torch.load torch.hub.load torch.jit.load torch.ops.load_library torch.serialization.load
        torch.serialization.os.system torch.utils.cpp_extension.load torch._dynamo.eval_frame.run
        torch.nn.modules.module.register_module_forward_hook torch.compile torch.unknown
        torchvision.models.resnet.resnet18 torchvision.datasets.utils.download_url
        numpy.load numpy.f2py.compile numpy.testing.runstring
        numpy.distutils.exec_command.exec_command
        pip.main pip._internal.main setuptools.sandbox.run_setup pkg_resources.run_script
        distutils.spawn.spawn distutils.core.run_setup
        sympy.core.sympify.sympify sympy.core.singleton.S sympy.N
        cloudpickle.loads dill.loads joblib.load jsonpickle.decode IPython.start_ipython six.exec_
        argparse.ArgumentParser argparse._sys numexpr.evaluate
        signal.signal signal.raise_signal socket.create_connection http.client.HTTPConnection
        re.sub inspect.getmodule ipaddress.ip_address builtins.type builtins.min
        typing.get_type_hints types.MappingProxyType string.Formatter os.stat_result
        numpy.memmap numpy._core._ufunc_reconstruct numpy.core._ufunc_reconstruct numpy.fromfile
        numpy.ma.core.MaskedArray.tofile numpy.recfromtxt numpy.rec.fromfile
        torch.storage._load_from_bytes torch._C._import torch._C.PyTorchFileReader
        torch.fx.graph_module.reduce_graph_module torch.fx.graph_module.GraphModule
        torch.nn.modules.module._addindent torch.nn.parallel.distributed.RRef
        torch.distributed.tensor.distribute_tensor torch.distributed.rpc.rpc_sync
        torch.distributed._shard.sharded_tensor.empty
        torch.distributed.checkpoint.filesystem.FileSystemReader
        torch.nested._internal.nested_tensor.nested_view_from_values_offsets
    """,
}
CASES = [(expected, name) for expected, names in LEVELS.items() for name in names.split()]


@pytest.mark.parametrize(("expected", "name"), CASES, ids=[name for _, name in CASES])
def test_levels(expected: Level, name: str) -> None:
    assert level(Global(*name.rsplit(".", 1))) is expected


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.serialization", "os.system"),  # a dotted name walks through attributes
        ("argparse", "Namespace.__init__"),
        ("collections", "OrderedDict.__reduce__"),
        ("models", "Net.forward"),
        ("torch.nn.modules.linear", "Linear.forward"),
        ("transformers", "x.y"),
        ("", "system"),
        ("os", ""),
        ("os\n", "system"),
        (" os", "system"),
        ("os.", "system"),
        ("mod-ule", "name"),
        ("module", "na me"),
        ("module", "name\x00"),
    ],
)
def test_odd_names_are_dangerous(module: str, name: str) -> None:
    assert level(Global(module, name)) is Level.DANGEROUS


def test_every_module_of_this_python_is_known() -> None:
    """An unlisted name of the standard library is dangerous, whichever module it is in."""
    for module in sys.stdlib_module_names:
        assert level(Global(module, "unlisted")) is Level.DANGEROUS, module
        assert level(Global(f"{module}.inner", "Unlisted")) is Level.DANGEROUS, module
    for module in ("builtins", "__builtin__", "torch", "torchvision", "numpy", "pip", "setuptools"):
        assert level(Global(module, "Unlisted")) is Level.DANGEROUS


def test_modules_that_later_or_earlier_pythons_lack_are_known() -> None:
    for module in ("imp", "asyncore", "distutils", "pipes", "crypt", "nis", "telnetlib", "smtpd"):
        assert level(Global(module, "run")) is Level.DANGEROUS, module


def test_python_2_names_mean_what_python_3_makes_of_them() -> None:
    assert python3_name(Global("__builtin__", "eval")) == ("builtins", "eval")
    assert python3_name(Global("commands", "getoutput")) == ("subprocess", "getoutput")
    assert level(Global("__builtin__", "unicode")) is level(Global("builtins", "str"))


def test_the_worst_counts() -> None:
    plain, foreign, bad = Global("torch", "Size"), Global("a", "B"), Global("os", "system")
    assert judge({}).level is Level.PLAIN
    assert judge({plain: 3}).level is Level.PLAIN
    verdict = judge({plain: 3, foreign: 5})
    assert (verdict.level, verdict.foreign, verdict.dangerous) == (Level.FOREIGN, {foreign: 5}, {})
    verdict = judge({plain: 3, bad: 7, foreign: 5})
    assert (verdict.level, verdict.dangerous) == (Level.DANGEROUS, {bad: 7})


# Evidence.


def lines_of(path: Path) -> list[str]:
    found = containers.read(path)
    verdict = judge(found.globals)
    return safety.evidence_of(verdict, found)


EVIDENCE = [
    ("os_system.pth", "os.system('echo > ckptool-was-executed')   at `hook`"),
    ("in_metadata.pth", "posix.system('echo > ckptool-was-executed')   at `_metadata`"),
    ("in_state_dict.pth", "posix.system('echo > ckptool-was-executed')   at `fc.hook`"),
    ("popped_call.pth", "posix.system('echo > ckptool-was-executed')"),
    ("named_only.pth", "this.s   at `hook`"),
    ("newobj.pth", "__builtin__.map(posix.system, ['echo > ckptool-was-executed'])   at `hook`"),
    ("legacy_os_system.pth", "posix.system('echo > ckptool-was-executed')   at `x`"),
    ("legacy_keys_call.pth", "posix.system('echo > ckptool-was-executed')"),
]


@pytest.mark.parametrize(("name", "said"), EVIDENCE)
def test_evidence_shows_call_place_and_key(hostile: Path, name: str, said: str) -> None:
    first = lines_of(hostile / name)[0]
    assert first.endswith(f": {said}")
    assert first.startswith("the pickle, byte " if "legacy" in name else "data.pkl, byte ")


def test_evidence_offsets_are_those_of_the_call() -> None:
    pickled = b"\x80\x02}X\x01\0\0\0acos\nsystem\nX\x02\0\0\0ls\x85Rs."
    found = pickle_reader.load(pickled)
    (call,) = safety.evidence(judge(found.globals), found.calls, found.tree)
    assert (call.text, call.where) == ("os.system('ls')", "a")
    assert pickled[call.offset : call.offset + 1] == b"R"


def test_evidence_is_short() -> None:
    """Long arguments are cut, of many calls the first are shown, and text stays one line."""
    system = Global("os", "system")
    calls = [Object(system, ("x" * 1000 + "\n", b"y" * 1000, 10**30, [1], None)) for _ in range(50)]
    found = safety.evidence(judge({system: 0}), calls, list(calls))
    assert len(found) == 8
    assert all(len(call.text) < 250 and "\n" not in call.text for call in found)


def test_nothing_dangerous_has_no_evidence(good: Path) -> None:
    for path in sorted(good.iterdir()):
        if path.name not in ("plain_pickle.pkl", "torch_0_1.tar"):
            assert lines_of(path) == [], path.name


# Keeping what is plain.

BAD = Object(Global("os", "system"), ("x",))
NAMESPACE = Object(Global("argparse", "Namespace"), ())
NUMBER = Object(Global("torch", "Size"), ((1,),))
CYCLE: list[Node] = []
CYCLE.append(CYCLE)

KEPT: list[tuple[list[tuple[Node, Node]], list[str], list[str]]] = [
    ([("a", 1), ("b", BAD)], ["a"], ["b"]),
    ([("a", NAMESPACE), ("b", "text")], ["b"], ["a"]),
    ([("a", [1, BAD]), ("b", [1, 2])], ["b"], ["a"]),
    ([("a", (1, (2, BAD)))], [], ["a"]),
    ([("a", Dict([("x", BAD), ("y", 2)]))], ["a"], ["a.x"]),
    ([("a", Set([1, 2])), ("b", Set([BAD], frozen=True))], ["a"], ["b"]),
    ([(("t", BAD), 1), ("b", 2)], ["b"], ["a key"]),
    ([("a", BAD.callee), ("b", Global("torch", "float32"))], ["b"], ["a"]),
    ([("a", NUMBER), ("b", Object(Global("torch", "Size"), (BAD,)))], ["a"], ["b"]),
    ([("a", None), ("b", True), ("c", 1.5), ("d", b"x")], ["a", "b", "c", "d"], []),
    ([("a", CYCLE), ("b", 1)], ["b"], ["a"]),
]


@pytest.mark.parametrize(("pairs", "kept", "left"), KEPT, ids=[str(row[1:]) for row in KEPT])
def test_only_plain(pairs: list[tuple[Node, Node]], kept: list[str], left: list[str]) -> None:
    tree = Dict(pairs)
    pruned, behind, _ = only_plain(tree)
    assert [key for key, _ in pruned.pairs] == kept
    assert behind == left
    assert judge(safety.names_in(pruned)).level is Level.PLAIN
    assert tree.pairs is pairs  # the tree that was read is not changed
    assert len(pairs) == len(kept) + len(left) or left == ["a.x"]


def test_a_root_that_is_not_plain_leaves_an_empty_dict() -> None:
    pruned, _, _ = only_plain(BAD)
    assert isinstance(pruned, Dict)
    assert pruned.pairs == []


def test_dicts_that_lose_their_class_are_counted_where_they_are_kept() -> None:
    def of(name: str) -> Object:
        return Object(Global("m", name), (), "newobj", steps=[("setitem", [("k", 1)])])

    twice = of("Config")
    tree = Dict([("a", twice), ("b", twice), ("c", of("Config")), ("d", [of("Other"), BAD])])
    assert only_plain(tree)[2] == {"m.Config": 2}


def test_what_is_shared_stays_shared() -> None:
    shared = [1, 2]
    pruned, _, _ = only_plain(Dict([("a", shared), ("b", shared), ("c", BAD)]))
    values = dict(pruned.pairs)
    assert values["a"] is values["b"]


def test_names_in_a_tree_are_found_everywhere() -> None:
    names = [Global("m", str(index)) for index in range(8)]
    tree = Dict([
        (names[0], [names[1], (names[2],)]),
        ("k", Object(names[3], (names[4],), kwargs=Dict([("x", names[5])]),
                     steps=[("setitem", [("y", names[6])]), ("build", Set([names[7]]))])),
    ])  # fmt: skip
    assert set(safety.names_in(tree)) == set(names)


def test_tensors_survive_what_hangs_on_them(hostile: Path) -> None:
    found = containers.read(hostile / "in_hooks.pth")
    pruned, _, _ = only_plain(found.tree)
    assert judge(safety.names_in(pruned)).level is Level.PLAIN
    before, after = dict(found.tree.steps[0][1]), dict(pruned.steps[0][1])
    assert after.keys() == before.keys()
    assert after["fc.weight"].view == before["fc.weight"].view
