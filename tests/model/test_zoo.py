from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ckptool.errors import BadInput, MissingExtra, NoSuchModel
from ckptool.model import libraries, zoo

torch = pytest.importorskip("torch")
GHOST = str(Path(__file__).parent / "ghost_net.py")


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str, name: str = "net.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=10", 10),
        ("n=1e-3", 1e-3),
        ("n=true", True),
        ("n=null", None),
        ("n=[1, 2]", [1, 2]),
        ('n={"a": 1}', {"a": 1}),
        ("n=relu", "relu"),
        ("n=a=b", "a=b"),
        ("n=", ""),
        ('n="10"', "10"),
    ],
)
def test_arguments_are_json_or_text(text: str, value: Any) -> None:
    assert zoo.arguments([text]) == {"n": value}


@pytest.mark.parametrize("text", ["n", "=1", "a-b=1", ""])
def test_an_argument_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="name=value"):
        zoo.arguments([text])


def test_a_model_of_torchvision_is_made_without_weights() -> None:
    model = zoo.build("resnet18", {"num_classes": 7})
    assert model.fc.out_features == 7
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "ssd300_vgg16", "r3d_18", "raft_small"]
)
def test_detection_segmentation_and_video_download_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a download behind the user's back")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert isinstance(zoo.build(name, {}, "meta"), torch.nn.Module)


def test_the_meta_device_takes_no_memory() -> None:
    model = zoo.build("vit_h_14", {}, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_shapes_are_those_of_the_state_dict_in_order() -> None:
    model = zoo.build("mobilenet_v2", {"num_classes": 3})
    assert list(zoo.shapes("mobilenet_v2", {"num_classes": 3}).items()) == [
        (key, tuple(value.shape)) for key, value in model.state_dict().items()
    ]


def test_a_factory_that_needs_memory_is_made_on_the_cpu(written: Any) -> None:
    path = written(
        "import torch\n"
        "def net():\n"
        "    layer = torch.nn.Linear(2, int(torch.ones(3).sum().item()))\n"
        "    return layer\n"
    )
    assert zoo.shapes(f"{path}:net") == {"weight": (3, 2), "bias": (3,)}


def test_a_factory_in_a_file_takes_arguments() -> None:
    assert zoo.build(f"{GHOST}:ghost_net", {"num_classes": 5}).classifier.out_features == 5


def test_a_class_in_a_file_and_a_model_in_a_file(written: Any) -> None:
    path = written(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.a = nn.Linear(1, 1)\n"
        "made = Net()\n"
    )
    assert type(zoo.build(f"{path}:Net")).__name__ == "Net"
    assert zoo.build(f"{path}:made") is not zoo.build(f"{path}:made")


def test_a_file_may_import_its_neighbours_and_leaves_no_path(written: Any) -> None:
    written("width = 4\n", "neighbour_of_net.py")
    path = written(
        "from torch import nn\n"
        "def net():\n    import neighbour_of_net\n    return nn.Linear(neighbour_of_net.width, 1)\n"
    )
    before = list(sys.path)
    assert zoo.build(f"{path}:net").in_features == 4
    assert sys.path == before


def test_a_factory_of_a_package() -> None:
    model = zoo.build("torchvision.models.resnet:resnet18", {"num_classes": 2})
    assert model.fc.out_features == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet81", "torchvision has no model `resnet81`"),
        ("no_such_package_here:net", "there is no module"),
        ("nowhere/net.py:net", "there is no file nowhere/net.py"),
        (f"{GHOST}:ghost_nets", "no function or class `ghost_nets`"),
        (GHOST, "names no factory"),
        ("json:dumps", "dumps"),
    ],
)
def test_a_spec_that_names_nothing(spec: str, said: str) -> None:
    with pytest.raises((NoSuchModel, BadInput), match=said):
        zoo.build(spec)


def test_close_matches_are_named() -> None:
    with pytest.raises(NoSuchModel) as caught:
        zoo.build("resnet81")
    assert "resnet18" in caught.value.evidence[0]
    with pytest.raises(NoSuchModel) as caught:
        zoo.build(f"{GHOST}:ghost_nets")
    assert "ghost_net" in caught.value.evidence[0]
    with pytest.raises(NoSuchModel) as caught:
        zoo.build(GHOST)
    assert "ghost_net" in caught.value.evidence
    assert caught.value.hint.endswith("ghost_net.py:FACTORY")


def test_what_is_no_module_is_refused(written: Any) -> None:
    path = written("def net():\n    return 3\n")
    with pytest.raises(NoSuchModel, match=r"gives a value of type int, not an nn\.Module"):
        zoo.build(f"{path}:net")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def net():\n    raise KeyError('depth')\n", "KeyError: 'depth'"),
        ("import no_such_package_here\n", "No module named 'no_such_package_here'"),
        ("def net(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("def net(n):\n    return n\n", "missing 1 required positional argument"),
    ],
)
def test_code_that_fails_is_one_line(written: Any, text: str, said: str) -> None:
    path = written(text)
    with pytest.raises(BadInput) as caught:
        zoo.build(f"{path}:net")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_where_a_factory_failed_is_said(written: Any) -> None:
    path = written("def net():\n    raise KeyError('depth')\n")
    with pytest.raises(BadInput) as caught:
        zoo.build(f"{path}:net")
    assert caught.value.evidence == (f"{path}, line 2",)


def test_an_unknown_argument_of_a_builder() -> None:
    with pytest.raises(BadInput, match="num_klasses"):
        zoo.build("resnet18", {"num_klasses": 3})


def test_a_torchvision_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> ModuleType:
        raise MissingExtra("torchvision does not fit the installed torch")

    monkeypatch.setattr(libraries, "torchvision", broken)
    with pytest.raises(MissingExtra):
        zoo.build("resnet18")
    assert zoo.build(f"{GHOST}:ghost_net")  # needs no torchvision


def test_timm_is_asked_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra) as caught:
        zoo.build("timm:resnet18")
    assert caught.value.hint == "pip install timm"
    asked = {}
    fake = ModuleType("timm")
    fake.is_model = lambda name: name == "tiny"  # type: ignore[attr-defined]
    fake.list_models = lambda: ["tiny"]  # type: ignore[attr-defined]

    def create_model(**given: Any) -> Any:
        asked.update(given)
        return torch.nn.Linear(1, 1)

    fake.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    zoo.build("timm:tiny", {"num_classes": 3})
    assert asked == {"model_name": "tiny", "pretrained": False, "num_classes": 3}
    with pytest.raises(NoSuchModel) as caught:
        zoo.build("timm:tinny")
    assert caught.value.evidence == ("did you mean tiny",)
