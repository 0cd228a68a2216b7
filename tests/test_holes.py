"""Ways in and ways to lose something that were found once, and are closed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptool import containers
from ckptool.errors import KeyCollision, Malformed
from ckptool.pickles.names import Level, level
from ckptool.pickles.tree import ORDERED_DICT, Dict, Global, Object
from ckptool.state import checkpoint, replacing
from ckptool.text import quoted, visible

torch = pytest.importorskip("torch")

Run = Callable[..., Any]
W = torch.arange(4.0)


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def listed(path: Path) -> list[str]:
    return list(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    "name",
    [
        ("torch.ao.quantization.fx.graph_module", "GraphModule"),
        ("torch.ao.quantization.fx.graph_module", "ObservedGraphModule"),
        ("torch.ao.quantization.fx._equalize", "Node"),
        ("torchvision.models.feature_extraction", "DualGraphModule"),
        ("torch.nn.parallel.distributed", "RRef"),
    ],
)
def test_classes_that_compile_what_they_are_given_are_dangerous(name: tuple[str, str]) -> None:
    assert level(Global(*name)) is Level.DANGEROUS
    assert level(Global("torch.ao.quantization.stubs", "QuantStub")) is Level.FOREIGN


@pytest.mark.parametrize(
    "name",
    [
        "test.support.script_helper assert_python_ok",  # not in sys.stdlib_module_names
        "_pyrepl.pager pipe_pager",  # of Python 3.13
        "lib2to3.pgen2.pgen ParserGenerator",  # of Python 3.12 and before
        "telnetlib Telnet",
        "gevent.subprocess Popen",
        "fsspec.implementations.local LocalFileOpener",
        "wheel_of_others.compat ZipFile",
        "triton_of_others.runtime CDLL",
        "pandas.io.pickle read_pickle",
        "sympy.parsing.sympy_parser parse_expr",
        "py.process cmdexec",
        "requests.api get",
        "ray.cloudpickle loads",
        "anything __builtins__",
    ],
)
def test_what_runs_code_is_dangerous_whoever_looks(name: str) -> None:
    assert level(Global(*name.split())) is Level.DANGEROUS


@pytest.mark.parametrize(
    "name",
    [
        "typing Any",  # OmegaConf
        "logging getLogger",
        "torch.nn.utils.weight_norm WeightNorm",
        "torch.nn.utils.spectral_norm SpectralNormStateDictHook",
        "torch.cuda.amp.grad_scaler GradScaler",
        "pandas.core.frame DataFrame",
        "regex._regex compile",
        "model Net",
    ],
)
def test_what_ordinary_checkpoints_hold_is_no_alarm(name: str) -> None:
    assert level(Global(*name.split())) is Level.FOREIGN


def test_an_end_record_in_the_comment_of_another_is_not_believed(tmp_path: Path) -> None:
    path = saved({"w": W}, tmp_path / "two.pth")
    data = path.read_bytes()
    fake = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 9)  # a comment that is not there
    end = data.rfind(b"PK\5\6")
    path.write_bytes(data[: end + 20] + struct.pack("<H", len(fake)) + fake)
    with pytest.raises(Malformed):
        containers.read(path)


@pytest.mark.parametrize("name", ["data/0", "data.pkl", "evil/data/0"])
def test_a_record_outside_the_root_shadows_nothing(tmp_path: Path, name: str) -> None:
    path = saved({"w": W}, tmp_path / "shadow.pth")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"\xff" * 16)
    with pytest.raises(Malformed, match="outside"):
        containers.read(path)


def test_tensors_only_keeps_what_a_dict_of_another_class_holds(tmp_path: Path, run: Run) -> None:
    from collections import defaultdict

    for content in (defaultdict(list, a=W, b=W + 1), {"state_dict": defaultdict(list, a=W, b=W)}):
        source = saved(content, tmp_path / "source.pth")
        target = tmp_path / "target.pth"
        done = run("convert", "--unwrap", "--tensors-only", "--force", source, target)
        assert done.code == 0, done.err
        assert listed(target) == ["a", "b"]


def test_tensors_only_tells_equal_paths_apart(tmp_path: Path, run: Run) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("executed",))

    source = saved({"state_dict": {"hook": W, "w": W}, "hook": Evil()}, tmp_path / "source.pth")
    done = run("convert", "--tensors-only", "--json", source, tmp_path / "target.pth")
    assert done.code == 0, done.err
    assert done.document["written"] == 2
    assert done.document["not_carried"] == ["hook"]
    dotted = saved({"a": {"b": Evil()}, "a.b": Evil(), "w": W}, tmp_path / "dotted.pth")
    assert run("convert", "--tensors-only", dotted, tmp_path / "out.pth").code == 0


def test_keys_joined_by_dots_do_not_swallow_each_other(tmp_path: Path) -> None:
    content = {"m": {"a": {"b.c": W}, "a.b": {"c": W + 1}}}
    found = containers.read(saved(content, tmp_path / "joined.pth"))
    with pytest.raises(KeyCollision):
        checkpoint.find(found, "m")


def test_metadata_of_joined_parts_comes_along(tmp_path: Path, run: Run) -> None:
    parts = {"G": torch.nn.BatchNorm1d(2).state_dict(), "D": torch.nn.Linear(2, 2).state_dict()}
    source = saved({"nets": parts, "epoch": 1}, tmp_path / "parts.pth")
    target = tmp_path / "joined.pth"
    assert run("unwrap", "--at", "nets", source, target).code == 0
    loaded = torch.load(target, weights_only=True)
    assert loaded._metadata["G"] == {"version": 2}
    assert list(loaded._metadata) == ["G", "D"]


def test_rows_and_items_of_an_ordered_dict_both_count() -> None:
    node = Object(ORDERED_DICT, ([["a", 1]],), steps=[("setitem", [("b", 2)])])
    assert checkpoint.items(node) == [("a", 1), ("b", 2)]


def test_a_repeated_key_on_the_way_is_walked_by_its_last_value(tmp_path: Path, run: Run) -> None:
    tree = Dict([("m", 5), ("m", Dict([("n", Dict([("w", 7)]))]))])
    replaced = replacing.replaced(tree, ("m", "n"), Dict([("x", 8)]))
    assert checkpoint.state_dict_node(replaced, ("m", "n")).pairs == [("x", 8)]
    assert replaced.pairs[0] == ("m", 5)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def test_an_endless_text_in_a_header_takes_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "slow.safetensors"
    path.write_bytes(header(b'{"' + b'\\"' * 2_000_000))
    start = time.process_time()
    with pytest.raises(Malformed):
        containers.read(path)
    assert time.process_time() - start < 20


def test_half_a_character_in_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(header(json.dumps({"__metadata__": {"a": "\ud800"}}).encode()))
    with pytest.raises(Malformed):
        containers.read(path)


def test_untied_rows_take_their_own_bytes_alone(tmp_path: Path, run: Run) -> None:
    whole = torch.arange(100_000.0).view(1000, 100)
    source = saved({f"r{i}": whole[i] for i in range(1000)}, tmp_path / "rows.pth")
    target = tmp_path / "untied.pth"
    done = run("convert", "--untie", source, target)
    assert done.code == 0, done.err
    loaded = torch.load(target, weights_only=True)
    assert all(torch.equal(loaded[f"r{i}"], whole[i]) for i in range(1000))
    assert len({value.untyped_storage().data_ptr() for value in loaded.values()}) == 1000


def test_in_place_keeps_the_container(tmp_path: Path, run: Run) -> None:
    path = saved({"state_dict": {"w": W}, "epoch": 1}, tmp_path / "misnamed.safetensors")
    assert run("add-prefix", "--in-place", path).code == 0
    loaded = torch.load(path.rename(tmp_path / "named.pth"), weights_only=True)
    assert loaded["epoch"] == 1
    assert list(loaded["state_dict"]) == ["module.w"]


def test_an_empty_pattern_file_is_refused(tmp_path: Path, run: Run) -> None:
    source = saved({"w": W}, tmp_path / "in.pth")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    for option in ("--drop", "--keep"):
        assert run("convert", option, f"@{empty}", source, tmp_path / "out.pth").code == 2
    assert run("keys", "--select", f"@{empty}", source).code == 2


def test_outputs_that_are_no_files_are_refused(tmp_path: Path, run: Run) -> None:
    source = saved({"w": W}, tmp_path / "in.pth")
    assert run("convert", source, tmp_path).code == 5
    assert run("convert", source, "/dev/null").code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth"]


def test_one_state_dict_under_two_names_is_told(tmp_path: Path, run: Run) -> None:
    state = {"w": W}
    source = saved({"state_dict": state, "best": state, "epoch": 1}, tmp_path / "two.pth")
    target = tmp_path / "out.pth"
    done = run("add-prefix", source, target)
    assert done.code == 0, done.err
    assert "the same state_dict is also at `best`" in done.err
    loaded = torch.load(target, weights_only=True)
    assert (list(loaded["state_dict"]), list(loaded["best"])) == (["module.w"], ["w"])
    alone = saved({"state_dict": state, "best": dict(state)}, tmp_path / "copy.pth")
    assert "is also at `best`" in run("add-prefix", alone, tmp_path / "alone.pth").err


def test_views_that_inflate_without_end_are_refused(tmp_path: Path, run: Run) -> None:
    base = torch.zeros(1 << 20)
    plain = saved({f"v{i}": base[i : i + 2] for i in range(200)}, tmp_path / "plain.pth")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    target = tmp_path / "out.safetensors"
    done = run("convert", packed, target)
    assert done.code == 5
    assert "inflated" in done.err
    assert "--allow-expand" in done.err
    assert not target.exists()


def test_a_tensor_gets_its_state_once() -> None:
    from ckptool.pickles.torch_objects import TorchVocabulary
    from ckptool.tensors.dtype import DType
    from ckptool.tensors.tensor import Storage, TensorInfo

    def nowhere(said: object) -> Storage:
        raise AssertionError(said)

    call = Object(Global("torch.nn.parameter", "Parameter"), ())
    info = TensorInfo(DType.F32, (), (), Storage("f", "0", 0, 4, DType.F32), origin=call)
    vocabulary = TorchVocabulary(nowhere)
    once = vocabulary.built(info, (True, False, None))
    assert once.requires_grad
    assert vocabulary.built(once, (True, False, None)) is None


@pytest.mark.parametrize(
    "word", ["bad\udcff.pth", "new\nline's \x1b[31m\\x41.pth", "\u202eabc", "a b", "it's", "\x7fff"]
)
def test_a_command_to_paste_names_any_file(word: str) -> None:
    line = visible(quoted(word))
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word)


def test_a_record_on_another_disk_is_refused_as_torch_does(tmp_path: Path) -> None:
    path = saved({"w": W}, tmp_path / "one.pth")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 34] = 2
    path.write_bytes(data)
    with pytest.raises(RuntimeError):
        torch.load(path)
    with pytest.raises(Malformed, match="another part"):
        containers.read(path)


def test_a_tensor_rebuilt_without_its_dtype_is_refused_as_torch_does(tmp_path: Path) -> None:
    path = tmp_path / "v3.pth"
    torch.save({"w": W}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"))
    with pytest.raises(TypeError):
        torch.load(path)
    with pytest.raises(Malformed, match="without a dtype"):
        containers.read(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
def test_a_conjugate_view_in_a_torchscript_archive_is_conjugated(tmp_path: Path, run: Run) -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("c", torch.tensor([1 + 2j, 3 - 4j]).conj())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    source, target = tmp_path / "script.pt", tmp_path / "out.pth"
    torch.jit.trace(Holder(), W).save(source)
    assert run("convert", source, target).code == 0
    meant = torch.jit.load(source).state_dict()["c"]
    assert meant.is_conj()
    assert torch.equal(torch.load(target, weights_only=True)["c"], meant)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_distributed_tensor_of_no_elements_needs_no_chunk(tmp_path: Path, run: Run) -> None:
    checkpoints = pytest.importorskip("torch.distributed.checkpoint")
    checkpoints.save({"w": W, "none": torch.zeros(0, 3)}, checkpoint_id=tmp_path / "d")
    index = pickle.loads((tmp_path / "d/.metadata").read_bytes())
    index.state_dict_metadata["none"].chunks.clear()
    (tmp_path / "d/.metadata").write_bytes(pickle.dumps(index))
    done = run("convert", tmp_path / "d", tmp_path / "out.pth")
    assert done.code == 0, done.err
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert loaded["none"].shape == (0, 3)
    assert torch.equal(loaded["w"], W)


def test_a_text_without_its_end_in_the_source_of_a_script_is_passed_over_once() -> None:
    from ckptool.containers._script_source import parse

    row = '"w", "' + '\\"' * 100_000
    started = time.process_time()
    found = parse(f"class A(Module):\n  __parameters__ = [{row}]\n")["A"]
    assert found.parameters == {"w"}
    assert time.process_time() - started < 5


def test_modules_that_share_what_they_hold_are_no_bomb(tmp_path: Path, run: Run) -> None:
    shared = {f"b{index}": W for index in range(1000)}
    top = torch.nn.Module()
    for index in range(400):
        top.add_module(f"m{index}", torch.nn.Module())
        top._modules[f"m{index}"]._buffers = shared  # type: ignore[union-attr,assignment]
    done = run("unwrap", saved(top, tmp_path / "bomb.pth"), tmp_path / "out.pth")
    assert done.code == 3
    assert "modules that repeat each other without end" in done.err


def test_script_modules_that_share_their_attributes_take_no_time(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Part:
        pass

    Part.__module__, Part.__qualname__ = "__torch__", "Part"
    monkeypatch.setitem(sys.modules, "__torch__", SimpleNamespace(Part=Part))  # type: ignore[misc]
    shared = {f"a{index}": None for index in range(4000)}
    top = Part()
    for index in range(4000):
        inner = top.__dict__[f"m{index}"] = Part()
        inner.__dict__ = shared
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps(top, protocol=2))
        archive.writestr("bomb/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("bomb/code/__torch__.py", "class Part(Module):\n  __parameters__ = []\n")
    started = time.process_time()
    done = run("keys", tmp_path / "bomb.pt")
    assert done.code == 3
    assert "modules that repeat each other without end" in done.err
    assert time.process_time() - started < 3
