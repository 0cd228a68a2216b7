from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ghost_net import ghost_net

from ckptool.errors import BadInput, DoesNotLoad, NoDevice, OutOfMemory
from ckptool.model import devices, inputs, native, runner, subject, verify
from ckptool.model.verify import Options, Verification

torch = pytest.importorskip("torch")
HERE = Path(__file__).parent
GOOD = HERE.parent.parent / "fixtures" / "good"
GHOST = f"{HERE / 'ghost_net.py'}:ghost_net"
ARGS = {"num_classes": 10, "width": 8}
SMALL = inputs.Options(shapes=["2,3,32,32"])
CPU = Options(devices=["cpu"], inputs=SMALL)
Files = Callable[[str, Any], str]


def read_source(path: str | Path) -> native.Source:
    with native.opened(path) as source:
        return source


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def file(tmp_path: Path) -> Files:
    def write(name: str, value: Any) -> str:
        torch.save(value, tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def weights() -> dict[str, Any]:
    torch.manual_seed(3)
    return dict(ghost_net(**ARGS).state_dict())


@pytest.fixture
def training(weights: dict[str, Any], file: Files) -> str:
    """What a DataParallel training run leaves behind."""
    wrapped = OrderedDict((f"module.{key}", value) for key, value in weights.items())
    return file("model_best.pth.tar", {"epoch": 9, "state_dict": wrapped, "best_acc1": 71.0})


@pytest.fixture
def net(tmp_path: Path) -> Callable[[str], str]:
    """Write a model of two layers whose forward is given; `first` and `second` are its layers."""

    def write(forward: str) -> str:
        path = tmp_path / "net.py"
        path.write_text(
            "import collections, dataclasses, torch\n"
            "from torch import nn\n"
            "@dataclasses.dataclass\n"
            "class Result:\n    logits: object\n    more: object = None\n"
            "Pair = collections.namedtuple('Pair', 'one two')\n"
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)\n"
            f"    def forward(self, x):\n{forward}\n"
        )
        return f"{path}:Net"

    return write


@pytest.fixture
def two_layers(file: Files) -> str:
    torch.manual_seed(4)
    layers = {"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 3)}
    return file("layers.pth", torch.nn.ModuleDict(layers).state_dict())


def flipped(weights: dict[str, Any], key: str, bit: int = 20) -> dict[str, Any]:
    changed = copy.deepcopy(weights)
    changed[key].view(-1)[0:1].view(torch.int32).bitwise_xor_(1 << bit)
    return changed


def largest_negated(weights: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the weights with the sign of the largest of a tensor flipped: float16 sees it too."""
    changed = copy.deepcopy(weights)
    flat = changed[key].view(-1)
    flat[flat.abs().argmax()].neg_()
    return changed


def normalised(name: str) -> dict[str, Any]:
    """Return seeded weights of a model of torchvision whose outputs depend on its inputs.

    With BatchNorm as it is built, signals of MobileNet V2 fade: its output is constant in float16.
    """
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of one batch, whole
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 96, 96))
    return dict(model.state_dict())


def check(reference: str, candidate: str, spec: str, options: Options = CPU, **args: Any) -> Any:
    return verify.verify(reference, candidate, spec, args, options)


def vector(**more: Any) -> Options:
    return Options(devices=["cpu"], inputs=inputs.Options(shapes=["2,4"]), **more)


# Equal and not.


def test_a_stripped_file_gives_the_same_outputs(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    found = check(training, file("clean.pth", weights), GHOST, **ARGS)
    (run,) = found.runs
    assert found.identical
    assert (run.identical, run.deterministic, run.bitwise) == (True, True, True)
    assert (run.max_abs_diff, run.max_ulp, run.first_difference) == (0.0, 0, None)
    assert (run.device, run.top1_agreement) == ("cpu", 1.0)
    assert (found.torch, found.dtype) == (str(torch.__version__), "float32")
    assert run.device_name
    assert found.notes == ()


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("features.0.primary.0.weight", "features.0.primary.0"),
        ("features.1.cheap.1.running_var", "features.1.cheap.1"),
        ("classifier.bias", "classifier"),
    ],
)
def test_one_flipped_bit_names_the_module(
    training: str, weights: dict[str, Any], file: Files, key: str, module: str
) -> None:
    found = check(training, file("other.pth", flipped(weights, key)), GHOST, **ARGS)
    (run,) = found.runs
    assert not found.identical
    assert (run.identical, run.deterministic) == (False, True)
    assert run.first_difference == module
    assert run.parameters == (key,)
    assert run.max_abs_diff is not None
    assert run.max_abs_diff > 0
    assert run.max_ulp is not None
    assert run.max_ulp > 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_models_of_torchvision(name: str, file: Files) -> None:
    models = pytest.importorskip("torchvision").models
    state = models.get_model(name, weights=None).state_dict()
    reference = file("reference.pth", {f"module.{key}": value for key, value in state.items()})
    assert check(reference, file("same.pth", state), name).identical
    key = next(key for key in reversed(state) if key.endswith(".weight"))
    found = check(reference, file("other.pth", flipped(state, key)), name)
    assert found.runs[0].first_difference == key.removesuffix(".weight")


def test_a_safetensors_candidate(training: str, weights: dict[str, Any], tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    path = str(tmp_path / "clean.safetensors")
    library.save_file(weights, path)
    assert check(training, path, GHOST, **ARGS).identical
    assert check(path, path, GHOST, **ARGS).identical
    assert native.load(read_source(path)).loader == "safetensors"
    assert native.load(read_source(training)).loader == "torch.load"


def test_tied_weights_left_out_of_safetensors(tmp_path: Path, file: Files) -> None:
    library = pytest.importorskip("safetensors.torch")
    net = tmp_path / "tied.py"
    net.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(100, 4)\n"
        "        self.head = nn.Linear(4, 100, bias=False)\n"
        "        self.head.weight = self.embedding.weight\n"
        "    def forward(self, x):\n        return self.head(self.embedding(x))\n"
    )
    weight = torch.randn(100, 4)
    reference = file("tied.pth", {"embedding.weight": weight, "head.weight": weight})
    candidate = str(tmp_path / "tied.safetensors")
    library.save_file({"embedding.weight": weight}, candidate)
    options = Options(devices=["cpu"], inputs=inputs.Options(shapes=["2,5:int64"]))
    assert check(reference, candidate, f"{net}:Net", options).identical
    assert check(
        reference,
        candidate,
        f"{net}:Net",
        Options(devices=["cpu"], inputs=options.inputs, partial=True),
    ).identical


def test_nan_equals_the_same_nan(net: Any, two_layers: str, file: Files) -> None:
    spec = net("        return self.second(self.first(x))")
    state = dict(torch.load(two_layers))
    state["second.bias"] = torch.tensor([math.nan, 0.0, 1.0])
    nan = file("nan.pth", state)
    assert check(nan, nan, spec, vector()).identical
    found = check(nan, two_layers, spec, vector()).runs[0]
    assert (found.identical, found.nan_differs, found.first_difference) == (False, 4, "second")


def test_minus_zero_is_not_zero(net: Any, two_layers: str, file: Files) -> None:
    spec = net("        return self.first.weight * 0 + self.second.bias.sum() * 0")
    state = {key: -value.abs() for key, value in torch.load(two_layers).items()}
    other = {key: value.abs() for key, value in state.items()}
    run = check(file("a.pth", state), file("b.pth", other), spec, vector()).runs[0]
    assert (run.identical, run.max_abs_diff) == (False, 0.0)
    assert run.first_difference == ""  # the model itself: no module of it was called


def test_a_tolerance_loosens_on_purpose(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    other = file("near.pth", flipped(weights, "classifier.bias", bit=2))
    strict = check(training, other, GHOST, **ARGS).runs[0]
    assert strict.identical is False
    loose = Options(devices=["cpu"], inputs=SMALL, atol=1e-4)
    found = check(training, other, GHOST, loose, **ARGS)
    assert found.identical
    assert found.runs[0].bitwise is False
    assert found.runs[0].max_abs_diff == strict.max_abs_diff
    tight = Options(devices=["cpu"], inputs=SMALL, rtol=1e-12)
    assert not check(training, other, GHOST, tight, **ARGS).identical
    with pytest.raises(BadInput):
        check(training, other, GHOST, Options(devices=["cpu"], atol=-1.0))


@pytest.mark.parametrize(
    "output",
    [
        "Result(y, more=[y + 1, None, 'text', 3])",
        "Pair(y, (y, {'a': y}))",
        "{'logits': y, 'hidden': (self.first.weight, 2.5)}",
        "[y, [y, [y]]]",
        "collections.OrderedDict(out=y)",
        "torch.complex(y, y)",
        "(y > 0, y.long(), y.half(), y.bfloat16(), y[:0], y.sum())",
        "y.to_sparse()",
        "y.t()",
    ],
)
def test_outputs_of_any_nesting(net: Any, two_layers: str, file: Files, output: str) -> None:
    spec = net(f"        y = self.second(self.first(x))\n        return {output}")
    assert check(two_layers, two_layers, spec, vector()).identical
    other = file("other.pth", flipped(torch.load(two_layers), "second.bias", bit=23))
    run = check(two_layers, other, spec, vector()).runs[0]
    assert (run.identical, run.first_difference) == (False, "second")


def test_places_in_an_output_are_named(net: Any, two_layers: str, file: Files) -> None:
    spec = net(
        "        y = self.first(x)\n        return Result(y, {'k': Pair(1, [self.second(y)])})"
    )
    other = file("other.pth", flipped(torch.load(two_layers), "second.weight", bit=22))
    run = check(two_layers, other, spec, vector()).runs[0]
    assert [each.path for each in run.differences] == [".more['k'].two[0]"]


def test_an_output_that_cannot_be_compared(net: Any, two_layers: str) -> None:
    spec = net("        return iter([x])")
    with pytest.raises(BadInput, match="list_iterator"):
        check(two_layers, two_layers, spec, vector())


# Repeatable or not.


def test_a_model_that_differs_from_itself(net: Any, two_layers: str) -> None:
    spec = net("        return self.second(self.first(x) * (torch.rand(4) > 0.5))")
    found = check(two_layers, two_layers, spec, vector())
    assert not found.identical
    (run,) = found.runs
    assert (run.identical, run.deterministic, run.max_abs_diff) == (None, False, None)
    assert "two outputs for one input" in found.notes[0]


def test_settings_are_as_before(training: str, weights: dict[str, Any], file: Files) -> None:
    import random

    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before = _settings()
    clean = file("clean.pth", weights)
    check(training, clean, GHOST, **ARGS)
    assert _settings() == before
    wrong = Options(devices=["cpu"], inputs=inputs.Options(shapes=["1,4,32,32"]))
    with pytest.raises(BadInput):
        check(training, clean, GHOST, wrong, **ARGS)
    assert _settings() == before


def _settings() -> list[Any]:
    import os
    import random

    backends = torch.backends
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


def test_within_the_block_settings_are_fixed() -> None:
    with devices.repeatable(0):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    with devices.repeatable(0, allow_tf32=True):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no fp32_precision (2.9)"
)
def test_a_program_that_uses_the_newer_precisions() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    was = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
    try:
        matmul.fp32_precision = "tf32"
        with devices.repeatable(0):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]


def test_a_model_is_run_in_eval_and_inference_mode(net: Any, two_layers: str) -> None:
    spec = net(
        "        assert not self.training and torch.is_inference_mode_enabled()\n"
        "        return self.second(self.first(x))"
    )
    assert check(two_layers, two_layers, spec, vector()).identical


def living_nets() -> int:
    return sum(type(each).__name__ == "Net" for each in gc.get_objects())


def test_only_one_model_is_in_memory(net: Any, two_layers: str, file: Files) -> None:
    spec = net("        return self.second(self.first(x))")
    alive: list[int] = []
    make = subject.make

    def counting(*given: Any, **more: Any) -> Any:
        alive.append(living_nets() - before)
        return make(*given, **more)

    other = file("other.pth", flipped(torch.load(two_layers), "second.weight"))
    gc.collect()
    before = living_nets()  # of other tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "make", counting)
        check(two_layers, other, spec, vector())
    assert alive == [0, 0, 0]


def test_a_model_in_a_cycle_is_given_back(net: Any, two_layers: str) -> None:
    spec = net("        self.__dict__['me'] = self\n        return self.second(self.first(x))")
    alive: list[int] = []
    make = subject.make

    def counting(*given: Any, **more: Any) -> Any:
        alive.append(living_nets() - before)
        return make(*given, **more)

    gc.collect()
    before = living_nets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "make", counting)
        check(two_layers, two_layers, spec, vector())
    assert alive == [0, 0]


# How the reference is loaded.


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"best_acc1": np.float64(71.3)}, "numpy"),
    ],
)
def test_a_reference_that_torch_refuses(
    weights: dict[str, Any], file: Files, beside: dict[str, Any], said: str
) -> None:
    reference = file("reference.pth", {"state_dict": weights, **beside})
    found = check(reference, file("clean.pth", weights), GHOST, **ARGS)
    assert found.identical
    assert "ckptool's own reader" in found.notes[0]
    assert said in found.notes[0]


def test_a_plain_reference_that_torch_refuses(
    training: str, weights: dict[str, Any], file: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unsupported operand 73\nand advice to turn safety off")

    clean = file("clean.pth", weights)
    monkeypatch.setattr(torch, "load", refuse)
    found = check(training, clean, GHOST, **ARGS)
    assert found.identical
    assert "Unsupported operand 73" in found.notes[0]
    assert "advice" not in found.notes[0]


def test_torchs_advice_is_not_passed_on() -> None:
    for name in ("protocol4.pth", "protocol4_legacy.pth", "python2_training.pth"):
        (note,) = native.load(read_source(GOOD / name)).notes
        assert "torch.load refuses it" in note
        assert "weights_only" not in note
        assert "Unsupported operand" in note


def test_only_weights_are_ever_unpickled(
    training: str, weights: dict[str, Any], file: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = torch.load

    def watching(path: Any, **given: Any) -> Any:
        asked.append(given)
        return load(path, **given)

    clean = file("clean.pth", weights)
    monkeypatch.setattr(torch, "load", watching)
    check(training, clean, GHOST, **ARGS)
    assert asked
    assert all(each["weights_only"] is True and each["mmap"] is True for each in asked)


def test_a_parallel_reference_runs_in_its_wrapper(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    recipe = subject.Recipe(GHOST, ARGS)
    made = subject.make(recipe, read_source(training), torch.device("cpu"), reference=True)
    assert isinstance(made.module, torch.nn.DataParallel)
    assert made.module.module is made.bare
    assert not made.module.training
    other = {f"_orig_mod.{key}": value for key, value in weights.items()}
    compiled = read_source(file("compiled.pth", other))
    made = subject.make(recipe, compiled, torch.device("cpu"), reference=True)
    assert made.module is made.bare
    assert "_orig_mod." in made.notes[0]


def test_a_state_dict_is_chosen(weights: dict[str, Any], file: Files) -> None:
    other = flipped(weights, "classifier.bias")
    both = file("both.pth", {"model": weights, "model_ema": other})
    clean = file("clean.pth", weights)
    wanted = Options(devices=["cpu"], inputs=SMALL, at="model", candidate_at="model")
    assert check(both, both, GHOST, wanted, **ARGS).identical
    wanted = Options(devices=["cpu"], inputs=SMALL, at="model_ema")
    assert not check(both, clean, GHOST, wanted, **ARGS).identical


def test_half_weights_and_half_arithmetic(weights: dict[str, Any], file: Files) -> None:
    for name in ("float16", "bfloat16"):
        dtype = getattr(torch, name)
        state = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in weights.items()
        }
        path = file("half.pth", state)
        options = Options(devices=["cpu"], inputs=SMALL, dtype=name)
        found = check(path, path, GHOST, options, **ARGS)
        assert found.identical
        assert found.dtype == name
        other = file("other.pth", weights)
        run = check(path, other, GHOST, **ARGS).runs[0]  # in float32, rounding shows
        assert run.identical is False
        assert "classifier.bias" in run.parameters
        assert check(path, other, GHOST, options, **ARGS).identical


def test_channels_last(training: str, weights: dict[str, Any], file: Files) -> None:
    last = {
        key: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        for key, value in weights.items()
    }
    options = Options(devices=["cpu"], inputs=SMALL, channels_last=True)
    path = file("last.pth", last)
    assert check(training, path, GHOST, options, **ARGS).identical
    assert check(path, file("clean.pth", weights), GHOST, **ARGS).identical


# What does not load.


def test_a_candidate_with_its_prefix(training: str) -> None:
    with pytest.raises(DoesNotLoad) as caught:
        check(training, training, GHOST, **ARGS)
    assert caught.value.hint == f"ckptool strip-prefix {training} OUT"
    assert "candidate" in caught.value.message
    assert any(line.startswith("missing: features.0") for line in caught.value.evidence)
    assert any(line.startswith("unexpected: module.") for line in caught.value.evidence)


def test_a_candidate_without_its_head(training: str, weights: dict[str, Any], file: Files) -> None:
    bare = {key: value for key, value in weights.items() if not key.startswith("classifier")}
    candidate = file("bare.pth", bare)
    with pytest.raises(DoesNotLoad) as caught:
        check(training, candidate, GHOST, **ARGS)
    assert caught.value.evidence == ("missing: classifier.weight", "missing: classifier.bias")
    assert f"ckptool transfer {candidate} OUT --model" in caught.value.hint
    assert "--model-arg num_classes=10" in caught.value.hint


def test_a_candidate_with_another_head(training: str, weights: dict[str, Any], file: Files) -> None:
    other = {**weights, "classifier.bias": torch.zeros(4), "classifier.weight": torch.zeros(4, 8)}
    with pytest.raises(DoesNotLoad) as caught:
        check(training, file("other.pth", other), GHOST, **ARGS)
    assert "shape differs: classifier.bias: file [4], model [10]" in caught.value.evidence


def test_a_reference_with_other_classes(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    with pytest.raises(DoesNotLoad) as caught:
        check(training, file("clean.pth", weights), GHOST, width=8)
    assert "reference" in caught.value.message
    assert caught.value.option == "--model-arg num_classes=10"


def test_a_reference_of_before_torch_0_4(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    """Batch norm had no counter then; torch itself fills it in."""
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert check(training, file("old.pth", old), GHOST, **ARGS).identical


# Partly.


@pytest.fixture
def tenfold(file: Files) -> str:
    """A ghost net with the head of 1000 classes, trained in DataParallel."""
    torch.manual_seed(5)
    state = ghost_net(1000, 8).state_dict()
    return file("trained.pth", {f"module.{key}": value for key, value in state.items()})


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("head", [True, False])
def test_partial_compares_all_but_the_head(
    tenfold: str, file: Files, classes: int, head: bool
) -> None:
    state = {key.removeprefix("module."): value for key, value in torch.load(tenfold).items()}
    state["classifier.weight"], state["classifier.bias"] = torch.ones(10, 8), torch.ones(10)
    if not head:
        del state["classifier.weight"], state["classifier.bias"]
    options = Options(devices=["cpu"], inputs=SMALL, partial=True)
    found = check(tenfold, file("ten.pth", state), GHOST, options, num_classes=classes, width=8)
    assert found.identical
    assert found.left_out == ("classifier",)
    assert found.runs[0].modules > 20
    other = file("other.pth", flipped(state, "features.1.primary.0.weight"))
    found = check(tenfold, other, GHOST, options, num_classes=classes, width=8)
    assert not found.identical
    assert found.runs[0].first_difference == "features.1.primary.0"


def test_partial_sees_what_a_head_of_zeros_hides(net: Any, two_layers: str, file: Files) -> None:
    spec = net("        return self.second(self.first(x)) * 0")
    other = file("other.pth", flipped(torch.load(two_layers), "first.weight", bit=22))
    same = check(two_layers, two_layers, spec, vector(partial=True))
    assert (same.verdict, same.runs[0].why, same.same_digests) == ("inconclusive", "constant", True)
    for options in (vector(), vector(partial=True)):
        found = check(two_layers, other, spec, options).runs[0]
        assert (found.identical, found.first_difference) == (False, "first")


def test_nothing_in_common(training: str, file: Files) -> None:
    other = file("other.pth", {"weight": torch.zeros(3)})
    with pytest.raises(DoesNotLoad, match="no tensor in common"):
        check(training, other, GHOST, Options(devices=["cpu"], partial=True), **ARGS)


# Inputs.


@pytest.mark.parametrize(
    ("shape", "said"),
    [("1,4,32,32", r"\[1, 4, 32, 32\].*4 channels"), ("32", "shape"), ("1,3,0,32", "shape")],
)
def test_a_shape_that_does_not_fit(
    training: str, weights: dict[str, Any], file: Files, shape: str, said: str
) -> None:
    options = Options(devices=["cpu"], inputs=inputs.Options(shapes=[shape]))
    with pytest.raises(BadInput, match=said) as caught:
        check(training, file("clean.pth", weights), GHOST, options, **ARGS)
    assert "\n" not in caught.value.message
    assert "in features.0.primary.0 (Conv2d)" in caught.value.evidence
    assert "--input-shape" in caught.value.hint


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1,3", "1,3:Tensor", "1.5"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(BadInput):
        inputs.make(GHOST, inputs.Options(shapes=[text]))


def test_random_inputs_are_the_same_each_time_and_of_the_size_asked() -> None:
    made = inputs.make(GHOST, inputs.Options(shapes=["1,3,8,8", "1,5:int64"], batch_size=4, seed=7))
    one, other = made.first().arguments
    assert (one.shape, other.shape) == ((4, 3, 8, 8), (4, 5))
    assert other.dtype is torch.int64
    again = inputs.make(GHOST, inputs.Options(shapes=["4,3,8,8", "4,5:int64"], seed=7)).first()
    assert torch.equal(one, again.arguments[0])
    different = inputs.make(GHOST, inputs.Options(shapes=["4,3,8,8"], seed=8)).first()
    assert not torch.equal(one, different.arguments[0])


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("resnet18", (1, 3, 224, 224)),
        ("inception_v3", (1, 3, 299, 299)),
        ("r3d_18", (1, 3, 16, 112, 112)),
        ("fcn_resnet50", (1, 3, 224, 224)),
        (GHOST, (1, 3, 224, 224)),
    ],
)
def test_the_default_shape_is_that_of_training(spec: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("torchvision")
    assert inputs.default_shape(spec) == shape


@pytest.mark.parametrize(
    ("spec", "args", "size"),
    [
        ("vit_h_14", {}, (224, 224)),  # its weights are of 518
        ("vit_b_16", {"image_size": 64}, (64, 64)),
        ("timm:vit_tiny_patch16_384", {}, (384, 384)),
        ("timm:vit_tiny_patch16_224", {"img_size": (64, 96)}, (64, 96)),
        ("timm:inception_v3", {}, (299, 299)),
    ],
)
def test_the_default_shape_is_what_the_model_takes(
    spec: str, args: dict[str, Any], size: tuple[int, int]
) -> None:
    if spec.startswith("timm:"):
        pytest.importorskip("timm")
    assert inputs.default_shape(spec, args) == (1, 3, *size)


@pytest.mark.parametrize(
    ("said", "size"),
    [(32, (32, 32)), ((32, 48), (32, 48)), ("32", (224, 224)), (None, (224, 224))],
    ids=str,
)
def test_a_model_in_memory_says_its_size(said: object, size: tuple[int, int]) -> None:
    model = torch.nn.Identity()
    model.image_size = said
    assert inputs.default_shape(model) == (1, 3, *size)


def test_a_model_of_another_size_than_its_weights_is_verified(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    models = pytest.importorskip("torchvision").models
    model = models.vit_b_16(image_size=32)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    files = [tmp_path / "vit.pth"] * 2
    done = run("verify", *files, "--model", "vit_b_16", "--model-arg", "image_size=32")
    assert done.code == 1, done.err
    assert done.out.startswith("inconclusive")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(1).integers(0, 255, (50, 70, 3), np.uint8)
    image.fromarray(noise).save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


def test_a_picture_gives_classes_and_times(picture: str, file: Files) -> None:
    models = pytest.importorskip("torchvision").models
    state = models.resnet18().state_dict()
    path = file("resnet18.pth", state)
    options = Options(devices=["cpu"], inputs=inputs.Options(picture=picture))
    run = check(path, path, "resnet18", options).runs[0]
    assert len(run.top_reference) == 5
    assert run.top_reference == run.top_candidate
    names = models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert all(each.name == names[each.index] for each in run.top_reference)
    chances = [each.probability for each in run.top_reference]
    assert chances == sorted(chances, reverse=True)
    assert all(seconds > 0 for seconds in (*run.seconds_reference, *run.seconds_candidate))


def test_a_picture_goes_through_imagenets_transforms(picture: str) -> None:
    transforms = pytest.importorskip("torchvision").models.ResNet18_Weights.DEFAULT.transforms()
    ours = inputs.make(GHOST, inputs.Options(picture=picture, batch_size=2)).first().arguments[0]
    from PIL import Image

    theirs = transforms(Image.open(picture).convert("RGB"))
    assert ours.shape == (2, 3, 224, 224)
    assert torch.allclose(ours[1], theirs, atol=1e-2)


def test_what_is_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "page.jpg").write_text("<html>")
    for name in ("page.jpg", "absent.jpg", "."):
        with pytest.raises(BadInput, match="cannot be read as a picture"):
            inputs.make(GHOST, inputs.Options(picture=str(tmp_path / name)))


def test_only_the_same_weights_are_spared_the_last_pass(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    """The times of the candidate are those of its passes after the first."""
    same = check(training, file("clean.pth", weights), GHOST, **ARGS).runs[0]
    assert same.verdict == "identical"
    assert (len(same.seconds_reference), len(same.seconds_candidate)) == (1, 0)
    key = next(key for key in weights if key.endswith("num_batches_tracked"))  # of no effect
    other = file("other.pth", {**weights, key: weights[key] + 1})
    run = check(training, other, GHOST, **ARGS).runs[0]
    assert list(run.parameters) == [key]
    assert len(run.seconds_candidate) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(2)
    for name, index in itertools.product(("ant", "bee", "cat"), range(3)):
        place = tmp_path / "pictures" / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (40, 40, 3), np.uint8)
        image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path / "pictures"


def test_a_folder_gives_accuracy(
    training: str, weights: dict[str, Any], file: Files, folder: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    options = Options(devices=["cpu"], inputs=inputs.Options(folder=str(folder), batch_size=4))
    clean = file("clean.pth", weights)
    found = verify.verify(training, clean, GHOST, ARGS, options, lambda *given: told.append(given))
    (run,) = found.runs
    assert found.identical
    assert run.accuracy is not None
    assert run.accuracy.count == 9
    assert run.accuracy.reference == run.accuracy.candidate
    assert [(done, total) for _, done, total in told] == [(each, 8) for each in range(1, 9)]
    right = weights["classifier.bias"].clone()
    right[1] += 1000.0  # every picture is a bee
    other = file("bees.pth", {**weights, "classifier.bias": right})
    run = verify.verify(training, other, GHOST, ARGS, options).runs[0]
    assert run.accuracy is not None
    assert run.accuracy.candidate == pytest.approx(1 / 3)
    assert run.first_difference == "classifier"


def test_outputs_too_large_to_keep_are_compared_by_digest(
    training: str,
    weights: dict[str, Any],
    file: Files,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "MAX_KEPT", 0)
    options = Options(devices=["cpu"], inputs=inputs.Options(folder=str(folder), batch_size=4))
    assert check(training, file("clean.pth", weights), GHOST, options, **ARGS).identical
    other = file("other.pth", flipped(weights, "classifier.bias"))
    run = check(training, other, GHOST, options, **ARGS).runs[0]
    assert (run.identical, run.max_abs_diff, run.first_difference) == (False, None, "classifier")


def test_what_is_no_folder_of_pictures(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    for name in (".", "absent"):
        with pytest.raises(BadInput, match="no pictures by class"):
            inputs.make(GHOST, inputs.Options(folder=str(tmp_path / name)))


def test_inputs_exclude_each_other(picture: str) -> None:
    with pytest.raises(BadInput, match="exclude"):
        inputs.make(GHOST, inputs.Options(shapes=["1"], picture=picture))
    with pytest.raises(BadInput):
        inputs.make(GHOST, inputs.Options(batch_size=0))
    with pytest.raises(BadInput):
        inputs.dtype("int8")


# Devices and memory.


def test_a_device_that_is_not_here_is_never_replaced(training: str) -> None:
    absent = ["cuda:99", "mps"] if torch.cuda.is_available() else ["cuda", "cuda:0", "mps"]
    for name in absent:
        if name == "mps" and torch.backends.mps.is_available():
            continue
        with pytest.raises(NoDevice, match=name):
            check(training, training, GHOST, Options(devices=[name]))
    with pytest.raises(BadInput, match="`tpu` is not a device"):
        check(training, training, GHOST, Options(devices=["tpu"]))


def test_the_same_device_twice_runs_once(
    training: str, weights: dict[str, Any], file: Files
) -> None:
    options = Options(devices=["cpu", "cpu"], inputs=SMALL)
    assert len(check(training, file("clean.pth", weights), GHOST, options, **ARGS).runs) == 1


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')",
        "MemoryError()",
        'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9")',
        "RuntimeError('MPS backend out of memory (MPS allocated: 9 GB)')",
    ],
)
def test_out_of_memory(net: Any, two_layers: str, error: str) -> None:
    spec = net(f"        raise {error}")
    with pytest.raises(OutOfMemory) as caught:
        check(two_layers, two_layers, spec, vector())
    assert "--batch-size" in caught.value.hint
    assert "cpu" in caught.value.message


def test_a_device_that_fails(net: Any, two_layers: str) -> None:
    spec = net("        raise RuntimeError('CUDA error: no kernel image is available')")
    with pytest.raises(NoDevice, match="no kernel image"):
        check(two_layers, two_layers, spec, vector())


@pytest.fixture
def gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    yield "cuda"
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("reference", ["plain", "channels_last", "parallel"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_matrix_on_cuda(gpu: str, name: str, reference: str, dtype: str, file: Files) -> None:
    state = normalised(name)
    changed = state
    if reference == "channels_last":
        changed = {
            key: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
            for key, value in state.items()
        }
    if reference == "parallel":
        changed = {f"module.{key}": value for key, value in state.items()}
    options = Options(
        devices=["cpu", gpu] if dtype == "float32" else [gpu],
        inputs=inputs.Options(shapes=["4,3,96,96"]),
        dtype=dtype,
        channels_last=reference == "channels_last",
    )
    left, clean = file("reference.pth", changed), file("clean.pth", state)
    found = check(left, clean, name, options, num_classes=10)
    _print(name, reference, found)
    assert found.identical
    key = next(key for key in state if key.endswith("0.weight") and state[key].dim() == 4)
    other = file("other.pth", largest_negated(state, key))
    run = check(left, other, name, options, num_classes=10).runs[-1]
    assert (run.identical, run.first_difference) == (False, key.removesuffix(".weight"))


def _print(name: str, reference: str, found: Verification) -> None:
    for run in found.runs:
        device = f"{run.device} ({run.device_name})"
        print(f"{name} {reference} {found.dtype} {device} torch {found.torch}: {run.identical}")


@pytest.mark.gpu
def test_memory_of_the_gpu_is_given_back(
    gpu: str, training: str, weights: dict[str, Any], file: Files
) -> None:
    options, clean = Options(devices=[gpu], inputs=SMALL), file("clean.pth", weights)
    check(training, clean, GHOST, options, **ARGS)  # what CUDA's libraries keep for themselves
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert check(training, clean, GHOST, options, **ARGS).identical
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_a_full_gpu(gpu: str, net: Any, two_layers: str) -> None:
    spec = net("        return torch.empty(1 << 50, device=x.device)")
    options = Options(devices=[gpu], inputs=inputs.Options(shapes=["2,4"]))
    with pytest.raises(OutOfMemory):
        check(two_layers, two_layers, spec, options)
