"""Whole models: the state_dict that `model.state_dict()` gives, read without the model's code.

The judge is the live model. What ckptool makes of its file is made in a process in which neither
torch nor torchvision can be imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import FIXTURES, Outcome, environment, sampled

from ckptool import containers
from ckptool.errors import LimitExceeded
from ckptool.pickles.tree import Dict, Global, Object
from ckptool.state import checkpoint as places, modules, walk

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
judge = pytest.importorskip("judge")
nn = torch.nn

Run = Callable[..., Outcome]
LEGACY = {"_use_new_zipfile_serialization": False}
LABELS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.qint8: "qint8",
    torch.complex64: "C64",
}
ARCHITECTURES = torchvision.models.list_models(module=torchvision.models)

# Lists and unwraps every file of a folder, without torch.
READER = """
import json, os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "numpy"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import ckptool

folder = sys.argv[1]
found = {}
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    listing = ckptool.keys(path)
    rows = [(key, info.dtype.label, info.shape) for key, info in listing.entries]
    found[name] = [listing.state.module, rows]
    ckptool.unwrap(path, f"{folder}/{name}.state", sync=False)
print(json.dumps(found))
"""


def read_without_torch(folder: Path) -> dict[str, Any]:
    """Give what ckptool says of each file of a folder; each is unwrapped into `NAME.state`."""
    done = subprocess.run(
        [sys.executable, "-c", READER, folder],
        capture_output=True,
        env=environment({"PYTHONPATH": str(Path(containers.__file__).parent.parent.parent)}),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows(state: Any) -> list[list[Any]]:
    return [[key, LABELS[tensor.dtype], [*tensor.shape]] for key, tensor in state.items()]


def assert_same_state(out: Path, state: Any) -> None:
    """A file holds a state_dict: tensors, no Parameters, in this order, shared as they are."""
    found = judge.load(out)
    assert type(found) is OrderedDict
    assert judge.same(state, found, metadata=False) == []


@contextmanager
def quick_init() -> Iterator[None]:
    """Leave weights as memory gives them: those of the largest models take minutes to draw."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}):
        yield


def shrunk(model: Any) -> Any:
    """Make each tensor of a model one number of its own, seen in the tensor's shape."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and id(value) not in made:
                    number = torch.full((1,) * value.dim(), len(made) + 1, dtype=value.dtype)
                    small = number.expand(value.shape)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(small) if is_parameter else small
                    made[-id(value)] = value  # alive: the id of a dead tensor is soon another's
                if value is not None:
                    store[name] = made[id(value)]
    return model


def test_every_torchvision_classifier(tmp_path: Path) -> None:
    """With `--all`; else one in sixteen of them."""
    states, classes = {}, {}
    chosen = sampled(ARCHITECTURES, 16)
    for number, name in enumerate(chosen):
        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with quick_init():
            model = shrunk(torchvision.models.get_model(name, weights=None, **more))
        # The legacy format looks up the source of every class, which takes its time.
        torch.save(model, tmp_path / name, **(LEGACY if number % 4 == 0 else {}))
        states[name] = model.state_dict()
        classes[name] = f"{type(model).__module__}.{type(model).__qualname__}"
    found = read_without_torch(tmp_path)
    assert len(found) == len(chosen)
    assert len(ARCHITECTURES) >= 80
    for name, state in states.items():
        assert found[name] == [classes[name], rows(state)]
        assert_same_state(tmp_path / f"{name}.state", state)


# Smaller models, with all that torch.nn knows.


class Old(nn.Module):
    """A module whose file lacks what came later, as those of torch before 1.4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_non_persistent_buffers_set"], state["_state_dict_pre_hooks"]
        return state


class Slotted(nn.Module):
    """A module with __slots__, pickled as torch before 2.0 did: its state is a pair."""

    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = 3

    def __getstate__(self) -> Any:
        return object.__getstate__(self)  # type: ignore[attr-defined]  # of Python 3.11


class Exotic(nn.Module):
    """Tensors of which torch keeps more than their place, and what a graph would need."""

    def __init__(self) -> None:
        super().__init__()
        quantized = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8)
        quantized.note = "an attribute of a quantized tensor"
        self.register_buffer("quantized", quantized)
        self.register_buffer("conj", torch.complex(torch.ones(2), torch.ones(2)).conj())
        self.register_buffer("sparse", torch.eye(2).to_sparse().coalesce())
        self.weight = nn.Parameter(torch.complex(torch.ones(2), torch.ones(2)).conj())


class Buffers(nn.Module):
    """Every way to hold a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("none", None)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)
        self.register_buffer("nothing", None)
        self.made = nn.Buffer(torch.ones(4))
        self.attribute = torch.ones(5)
        self.tagged = nn.Parameter(torch.ones(3), requires_grad=False)
        self.tagged.note = "an attribute of a Parameter"
        self.small = nn.Parameter(torch.ones(3).half())


class Tied(nn.Module):
    """A language model: the head is the embedding; the layers are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.layers = nn.ModuleList([layer, layer])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.rows = nn.ParameterList([nn.Parameter(self.embedding.weight.data[2:4])])
        self.turned = nn.ParameterDict({"t": nn.Parameter(torch.arange(6.0).view(2, 3).t())})


def main_module() -> Any:
    """Make a module whose class is of `__main__`."""
    kind = type("Net", (nn.Module,), {"__module__": "__main__"})
    sys.modules["__main__"].Net = kind  # type: ignore[attr-defined]
    model = kind()
    model.fc = nn.Linear(2, 2)
    return model


def pruned() -> Any:
    import torch.nn.utils.prune

    return torch.nn.utils.prune.random_unstructured(nn.Linear(4, 3), "weight", amount=3)


def faked() -> Any:
    """Observe and fake quantization: classes that name their entries themselves, as they are."""
    import torch.ao.quantization as ao

    return nn.Sequential(nn.Linear(2, 2), ao.FakeQuantize(), ao.HistogramObserver(bins=4))


def meeting(model: Any) -> Any:
    """Give a lazy model its first input."""
    model(torch.ones(2, 4))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(4, 3),
    "half": lambda: nn.Linear(4, 3).half(),
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(2, affine=False)),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=2),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, add_bias_kv=True),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16),
    "parallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(2, 2))),
    "compiled": lambda: torch.compile(nn.Linear(2, 2)),
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "containers": lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.PReLU()}),
    "buffers": Buffers,
    "tied": Tied,
    "slotted": Slotted,
    "exotic": Exotic,
    "old": Old,
    "main": main_module,
    "lazy": lambda: meeting(nn.Sequential(nn.LazyLinear(3))),
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "pruned": pruned,
    "faked": faked,
    "channels_last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
}
WAYS: dict[str, dict[str, Any]] = {
    "zip": {},
    "legacy": LEGACY,
    "protocol1": {"pickle_protocol": 1},
    "protocol3": {"pickle_protocol": 3},
    "protocol4": {"pickle_protocol": 4},
    "protocol5_legacy": {"pickle_protocol": 5, **LEGACY},
}


def test_models_of_every_kind(tmp_path: Path) -> None:
    states, classes = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in MODELS.items():
            torch.manual_seed(1)
            model = make()
            for way, how in WAYS.items():
                if (name, way) == ("slotted", "protocol1"):
                    continue  # Python refuses to write it
                torch.save(model, tmp_path / f"{name}.{way}", **how)
                states[f"{name}.{way}"] = model.state_dict()
                classes[f"{name}.{way}"] = type(model)
    found = read_without_torch(tmp_path)
    for name, state in states.items():
        if not name.startswith("traced"):  # its class is made when it is loaded
            kind = classes[name]
            assert found[name][0] == f"{kind.__module__}.{kind.__qualname__}"
        others = [key for key, value in state.items() if not torch.is_tensor(value)]
        assert others == [], name
        assert found[name][1] == rows(state), name
        assert_same_state(tmp_path / f"{name}.state", state)


# What the command line says and does.

GOOD = FIXTURES / "good"
HOSTILE = FIXTURES / "hostile"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(content: Any, name: str = "model.pth", **how: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, name, **how)
    return name


def test_keys_name_the_class_and_the_place(run: Run, here: Path) -> None:
    saved({"model": nn.Linear(2, 3), "epoch": 3})
    outcome = run("keys", "model.pth")
    assert outcome.out == "weight\tF32\t[3, 2]\t24\nbias\tF32\t[3]\t12\n"
    assert outcome.err == (
        "model.pth: torch zip, state_dict of the whole model `Linear` at `model`, 2 tensors, 36 B; "
        "also contains: epoch\n"
    )
    document = run("keys", "--json", "model.pth").document
    assert (document["at"], document["module"]) == (["model"], "torch.nn.modules.linear.Linear")
    assert document["beside"] == ["epoch"]


def test_unwrap_says_what_stays_behind(run: Run, here: Path) -> None:
    model = nn.Linear(2, 3)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    saved(model)
    outcome = run("unwrap", "model.pth", "out.pth")
    assert outcome.code == 0
    assert outcome.err == (
        "took the state_dict of the whole model `Linear`; not written: the class "
        "torch.nn.modules.linear.Linear and its attributes\n"
        "1 tensor of the model not in its state_dict (buffers that are not persistent, other "
        "attributes)\n"
        "out.pth: 2 tensors, 36 B\n"
        "read 2, renamed 0, dropped 0, written 2\n"
    )
    assert_same_state(here / "out.pth", model.state_dict())
    document = run("unwrap", "--json", "--force", "model.pth", "out.pth").document
    assert document["not_carried"] == [
        "the class torch.nn.modules.linear.Linear and its attributes"
    ]
    assert (document["at"], document["module"]) == ([], "torch.nn.modules.linear.Linear")


def test_the_state_dict_of_a_part(run: Run, here: Path) -> None:
    model = nn.Sequential(OrderedDict(base=nn.Linear(2, 3), head=nn.Linear(3, 1)))
    saved([model, None])
    assert run("unwrap", "--at", "0.head", "model.pth", "head.pth").code == 0
    assert_same_state(here / "head.pth", model.head.state_dict())
    assert run("keys", "--names", "--at", "1", "model.pth").code == 2


def test_edits_of_a_module_itself_are_refused(run: Run, here: Path) -> None:
    model = nn.DataParallel(nn.Linear(2, 3))
    saved(model)
    refused = run("strip-prefix", "model.pth", "out.pth")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "error[edit-error]: model.pth holds a whole model, "
        "torch.nn.parallel.data_parallel.DataParallel: its keys are attributes of objects and stay "
        "as they are\n"
        "hint: ckptool strip-prefix model.pth out.pth --tensors-only   writes its state_dict in "
        "its place\n"
    )
    assert not (here / "out.pth").exists()
    assert run("strip-prefix", "model.pth", "out.pth", "--tensors-only").code == 0
    assert_same_state(here / "out.pth", model.module.state_dict())
    command = ("convert", "--unwrap", "--strip-prefix", "module", "model.pth", "again.pth")
    assert run(*command).code == 0
    assert_same_state(here / "again.pth", model.module.state_dict())
    assert run("transfer", "model.pth", "third.pth").code == 0
    assert_same_state(here / "third.pth", model.module.state_dict())


def test_tensors_only_puts_state_dicts_in_the_place_of_models(run: Run, here: Path) -> None:
    one, two = nn.Linear(2, 3), nn.Linear(3, 2)
    saved({"student": one, "teacher": two, "epoch": 3, "name": main_module()})
    assert run("convert", "--tensors-only", "model.pth", "out.pth").code == 0
    found = judge.load(here / "out.pth")
    assert judge.same(found["student"], one.state_dict(), metadata=False) == []
    assert judge.same(found["teacher"], two.state_dict(), metadata=False) == []
    assert (list(found), found["epoch"]) == (["student", "teacher", "epoch", "name"], 3)
    several = run("unwrap", "model.pth", "one.pth")
    assert several.code == 2
    assert "module torch.nn.modules.linear.Linear" in several.err


def test_a_part_is_not_edited_inside_its_model(run: Run, here: Path) -> None:
    saved(nn.Sequential(nn.Linear(2, 3)))
    command = ("add-prefix", "--tensors-only", "--at", "0", "model.pth", "out.pth")
    refused = run(*command)
    assert refused.code == 2
    assert "hint: ckptool convert --unwrap --at 0 model.pth OUT\n" in refused.err


def test_without_edits_a_model_is_carried_whole(run: Run, here: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    saved(model, **LEGACY)
    assert run("convert", "model.pth", "out.pth").code == 0
    again = judge.load("out.pth", weights_only=False)
    assert judge.same(model.state_dict(), again.state_dict()) == []
    assert type(again[1]) is nn.BatchNorm1d


def test_what_would_run_stays_behind(run: Run, here: Path) -> None:
    source = HOSTILE / "module_os_system.pth"
    assert run("convert", source, "out.pth").code == 4
    outcome = run("unwrap", source, "out.pth")
    assert outcome.code == 0
    assert "would run code when loaded; the output does not carry it" in outcome.err
    assert list(judge.load("out.pth")) == ["weight", "bias"]
    assert not (here / "ckptool-was-executed").exists()


def test_a_learner_that_holds_its_model(run: Run, here: Path) -> None:
    """fastai pickles an object with the module in an attribute."""
    learner = argparse.Namespace(model=nn.Linear(2, 3), lr=0.5)
    saved({"learner": learner})
    outcome = run("unwrap", "model.pth", "out.pth")
    assert outcome.err.startswith(
        "took the state_dict of the whole model `Linear` at `learner.model`; not written: the "
        "class torch.nn.modules.linear.Linear and its attributes, learner.lr\n"
    )
    assert_same_state(here / "out.pth", learner.model.state_dict())


def test_a_model_among_hyper_parameters_is_no_candidate(run: Run, here: Path) -> None:
    model = nn.Linear(2, 3)
    saved({"state_dict": model.state_dict(), "hyper_parameters": {"net": nn.Linear(4, 4)}})
    assert run("keys", "--json", "model.pth").document["at"] == ["state_dict"]
    assert run("keys", "--json", "--at", "hyper_parameters.net", "model.pth").code == 0


# What only the code could tell.


def test_packed_weights_are_named_as_missing(run: Run, here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 3), nn.PReLU()))
    saved(model)
    outcome = run("unwrap", "-q", "model.pth", "out.pth")
    assert outcome.code == 0
    assert outcome.err.splitlines()[:2] == [
        "warning: 0 (torch.ao.nn.quantized.dynamic.modules.linear.Linear) packs its entries: not "
        "all are listed",
        "warning: 0._packed_params (torch.ao.nn.quantized.modules.linear.LinearPackedParams) packs "
        "its entries: not all are listed",
    ]
    assert list(judge.load("out.pth")) == ["1.weight"]
    assert "what its modules pack" in run("unwrap", "model.pth", "again.pth").err
    assert "a part of the state_dict of the model" in run("info", "model.pth").out


def test_hooks_that_may_change_keys_are_named(run: Run, here: Path) -> None:
    model = nn.Linear(2, 3)
    model._register_state_dict_hook(max)
    saved(model)
    outcome = run("keys", "model.pth")
    assert (
        "the model (torch.nn.modules.linear.Linear) runs code on its state_dict, which may change "
        "keys\n" in outcome.err
    )
    saved(nn.utils.spectral_norm(nn.Linear(2, 3)))
    assert "runs code" not in run("keys", "model.pth").err


def test_a_lazy_parameter_is_an_entry_without_a_tensor(run: Run, here: Path) -> None:
    saved(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
    assert run("convert", "model.pth", "out.safetensors").code == 5
    assert run("unwrap", "model.pth", "out.pth").code == 0
    found = judge.load("out.pth", weights_only=False)
    assert type(found["0.weight"]).__name__ == "UninitializedParameter"


# Without end.


def module_of(parts: dict[str, Any]) -> Object:
    filled = {"_parameters": {}, "_buffers": {}, "_modules": {}, **parts}
    state = Dict([(name, Dict(list(held.items()))) for name, held in filled.items()])
    return Object(Global("models", "Net"), (), steps=[("build", state)])


def test_repeats_are_bounded_by_what_is_there() -> None:
    tensors = {f"p{n}": 0 for n in range(1000)}
    shared = module_of({"_parameters": tensors})
    few = module_of({"_modules": {f"m{n}": shared for n in range(20)}})
    assert len(modules.state_of(few).entries) == 20_000
    many = module_of({"_modules": {f"m{n}": shared for n in range(1000)}})
    with pytest.raises(LimitExceeded):
        modules.state_of(many)


def test_long_names_do_not_multiply() -> None:
    node = module_of({"_parameters": {f"p{n}": 0 for n in range(1000)}})
    long = module_of({"_modules": {"n" * 1_000_000: node}})
    with pytest.raises(LimitExceeded):
        modules.state_of(long)


def test_one_state_for_many_objects_is_read_in_time() -> None:
    """Each object alone is small; together they would be read a million million times."""
    state = Dict([(f"a{n}", n) for n in range(10_000)])
    objects = [Object(Global("m", "C"), (), steps=[("build", state)]) for _ in range(10_000)]
    assert places.candidates(objects) == []


def test_a_chain_of_shared_modules_is_not_followed_for_ever() -> None:
    node = module_of({})
    for _ in range(300):
        node = module_of({"_modules": {"m": node}})
    with pytest.raises(LimitExceeded):
        modules.state_of(node)


def test_backward_hooks_of_a_tensor_stay_behind() -> None:
    tree = containers.read(HOSTILE / "in_hooks.pth").tree
    hooked = [info for _, info in walk.tensors(tree) if info.origin is not None]
    assert hooked
    assert all(modules.detached(info).origin is None for info in hooked)
