"""Names of torchvision's registry, and what is said where torchvision is not to be had."""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

import pytest
from server import Reply, serving

from ckptool.errors import HashMismatch, MissingExtra, NoSuchModel
from ckptool.files.download import download
from ckptool.model import libraries, weights

BODY = random.Random(3).randbytes(1000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def models() -> object:
    return pytest.importorskip("torchvision").models


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet18", "resnet18:IMAGENET1K_V1"),
        ("ResNet18", "resnet18:IMAGENET1K_V1"),
        ("resnet50", "resnet50:IMAGENET1K_V2"),
        ("resnet50:IMAGENET1K_V1", "resnet50:IMAGENET1K_V1"),
        ("resnet50:DEFAULT", "resnet50:IMAGENET1K_V2"),
        ("ResNet50_Weights.IMAGENET1K_V1", "resnet50:IMAGENET1K_V1"),
        ("ResNet50_Weights.DEFAULT", "resnet50:IMAGENET1K_V2"),
    ],
)
def test_names_are_found(models: object, name: str, found: str) -> None:
    assert weights.resolve(name).name == found


def test_every_entry_has_a_hash_and_is_found_by_all_its_names(models: object) -> None:
    entries = weights.listing()
    assert len(entries) > 100
    assert [each.name for each in entries if each.sha256_prefix is None] == []
    by_name = {name: each for each in entries for name in each.names}
    assert len(by_name) == sum(len(each.names) for each in entries)
    assert weights.resolve(entries[-1].names[-1]) == entries[-1]


def test_an_entry_says_what_the_registry_knows(models: object) -> None:
    found = weights.resolve("ResNet50_Weights.IMAGENET1K_V1")
    assert found.member == "ResNet50_Weights.IMAGENET1K_V1"
    assert found.url == "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert (found.file, found.sha256_prefix) == ("resnet50-0676ba61.pth", "0676ba61")
    assert found.parameters == 25_557_032
    assert found.nbytes is not None
    assert abs(found.nbytes - 102_530_333) < 1 << 20
    assert found.top1 == 76.13
    assert not found.default


def test_a_hash_of_digits_alone_binds_in_the_registry(models: object) -> None:
    assert weights.resolve("vgg13").sha256_prefix == "19584684"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet17", "resnet18"),
        ("resnet50:IMAGENET1K_V9", "resnet50:IMAGENET1K_V"),
        ("example.org/a/b.pth", "https://"),
        ("zzz", "--list"),
        ("", "--list"),
    ],
)
def test_unknown_names_get_close_ones(models: object, name: str, hint: str) -> None:
    with pytest.raises(NoSuchModel) as caught:
        weights.resolve(name)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_the_list_can_be_narrowed(models: object) -> None:
    assert {each.model for each in weights.listing("vgg13*")} == {"vgg13", "vgg13_bn"}
    assert {each.model for each in weights.listing("VGG13")} == {"vgg13", "vgg13_bn"}
    assert {each.member for each in weights.listing("ResNet18_W*")} == {
        "ResNet18_Weights.IMAGENET1K_V1"
    }
    assert weights.listing("zzz") == []


def test_a_name_leads_to_a_download(
    models: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import ResNet18_Weights

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        for prefix, right in ((SHA[:8], True), ("12345678", False)):
            url = server.on(f"/resnet18-{prefix}.pth", Reply(BODY))
            monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
            found = weights.resolve("resnet18")
            if right:
                done = download(found.url, tmp_path, expected_prefix=found.sha256_prefix)
                assert done.checked == "registry"
            else:
                with pytest.raises(HashMismatch):
                    download(found.url, tmp_path, expected_prefix=found.sha256_prefix)
    assert [path.name for path in tmp_path.iterdir()] == [f"resnet18-{SHA[:8]}.pth"]


@pytest.mark.parametrize("load", [libraries.torch, libraries.torchvision, libraries.safetensors])
def test_a_missing_library_is_told(load: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(libraries, "import_module", missing)
    assert importlib.import_module is not missing
    with pytest.raises(MissingExtra) as caught:
        load()  # type: ignore[operator]
    assert caught.value.hint == "pip install torch torchvision safetensors numpy"
    assert caught.value.exit_code == 7


def test_a_torchvision_of_another_build_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")'
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra) as caught:
        weights.resolve("resnet18")
    assert "does not fit" in caught.value.message
    assert caught.value.evidence == ("operator torchvision::nms does not exist",)
    assert caught.value.hint == "pip install --force-reinstall torch torchvision"
