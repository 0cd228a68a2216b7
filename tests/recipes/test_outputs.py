"""Models of two libraries that recipes convert give the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import step
from journeys import Run, answer, close, convert, resized, there_and_back
from test_shipped import LISTS, LLAMA
from torch import nn


def loaded(model: Any, run: Run, path: Path, folder: Path) -> Any:
    """Load a converted file as users of transformers do, and check that no key was left over."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    convert(run, path, folder / "model.safetensors")
    anew, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return anew


def filled(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def vit_three_times(run: Run, tmp_path: Path, *models: Any) -> None:
    """Convert torchvision's model to timm's to transformers', and compare what all three say."""
    ours, timms, hugging = models
    size = ours.image_size
    given = torch.randn(2, 3, size, size)
    state = tiny.shaken(ours).state_dict()
    recipes = "torchvision-vit-to-timm", "timm-vit-to-hf"
    there_and_back(run, tmp_path, state, *recipes)
    first = answer(ours, given)
    close(answer(filled(timms, tmp_path / "1.pth"), given), first)
    close(answer(loaded(hugging, run, tmp_path / "2.pth", tmp_path / "hf"), given), first)


def test_vit_of_timm(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    ours = tiny.shaken(tiny.torchvision_vit())
    path = there_and_back(run, tmp_path, ours.state_dict(), "torchvision-vit-to-timm")
    given = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE)
    close(answer(filled(tiny.timm_vit(), path), given), answer(ours, given))


def test_vit(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    models = tiny.torchvision_vit(), tiny.timm_vit(), tiny.hf_vit()
    vit_three_times(run, tmp_path, *models)


def test_vit_b_16(run: Run, tmp_path: Path) -> None:
    """Run the model that people have: 86 million parameters."""
    if step(2) > 1:
        pytest.skip("a large model: with --all")
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    torchvision = pytest.importorskip("torchvision")
    config = transformers.ViTConfig(layer_norm_eps=1e-6, num_labels=1000)
    vit_three_times(
        run,
        tmp_path,
        torchvision.models.vit_b_16(),
        timm.create_model("vit_base_patch16_224"),
        transformers.ViTForImageClassification(config),
    )


def test_convnext(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    timms = tiny.shaken(tiny.timm_convnext())
    given = torch.randn(2, 3, 64, 64)
    path = there_and_back(run, tmp_path, timms.state_dict(), "timm-convnext-to-hf")
    hugging = loaded(tiny.hf_convnext(), run, path, tmp_path / "hf")
    close(answer(hugging, given), answer(timms, given))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnet(run: Run, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    ours = tiny.shaken(tiny.torchvision_resnet(kind))
    given = torch.randn(2, 3, 64, 64)
    path = there_and_back(run, tmp_path, ours.state_dict(), "torchvision-resnet-to-hf")
    hugging = loaded(tiny.hf_resnet(kind), run, path, tmp_path / "hf")
    close(answer(hugging, given), answer(ours, given))


@pytest.mark.parametrize("recipe", LLAMA)
def test_llama(run: Run, tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("transformers")
    groups = tiny.HEADS if "2-7b" in recipe else tiny.GROUPS
    metas = tiny.shaken(tiny.meta_llama(groups))
    given = torch.randint(tiny.WORDS, (2, tiny.LENGTH))
    copy = resized(recipe, tmp_path, LLAMA[recipe])
    path = there_and_back(run, tmp_path, metas.state_dict(), copy)
    hugging = loaded(tiny.hf_llama(groups), run, path, tmp_path / "hf")
    close(answer(hugging, given), answer(metas, given))


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2(run: Run, tmp_path: Path, tied: bool) -> None:
    """Convert what `save_pretrained` writes, without the tied head, and what `torch.save` does."""
    pytest.importorskip("transformers")
    hugging = tiny.shaken(tiny.hf_gpt2())
    recipe: object = "gpt2-hf-to-linear"
    source, out = tiny.saved(hugging, tmp_path), tmp_path / "out.pth"
    if tied:
        source = tmp_path / "state.pth"
        torch.save(hugging.state_dict(), source)
    else:
        recipe = resized("gpt2-hf-to-linear", tmp_path, {})
        more = "\n[[step]]\ntie = {from = 'transformer.wte.weight', to = 'lm_head.weight'}\n"
        recipe.write_text(recipe.read_text(encoding="utf-8") + more, encoding="utf-8")
    convert(run, source, out, "--recipe", recipe)
    given = torch.randint(tiny.WORDS, (2, tiny.LENGTH))
    close(answer(filled(tiny.linear_gpt(), out), given), answer(hugging, given))


def test_lightning(run: Run, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "in.ckpt", weights_only=True)
    out = tmp_path / "out.safetensors"
    convert(run, tmp_path / "in.ckpt", out, "--recipe", "lightning-to-plain")
    convert(run, out, tmp_path / "out.pth")
    given = torch.randn(4, 3)
    close(answer(filled(nn.Linear(3, 2), tmp_path / "out.pth"), given), answer(module.net, given))


@pytest.mark.parametrize("name", tiny.LISTED)
def test_lists_are_those_of_the_libraries(name: str) -> None:
    pytest.importorskip("timm" if name.startswith("timm") else "transformers")
    assert tiny.shapes_of(name) == LISTS[name]
