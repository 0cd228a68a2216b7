"""Small models of libraries, with the sizes that tests/recipes/lists.json was made with.

    python tests/recipes/tiny.py > tests/recipes/lists.json

needs timm and transformers, and writes the keys and shapes of their models for tests without them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from reference import EPS, THETA, LinearGPT, MetaLlama
from torch import nn

CLASSES, IMAGE, PATCH, DIM, DEPTH, HEADS = 5, 32, 8, 24, 2, 3
WORDS, LENGTH, GROUPS = 17, 12, 1
STAGES, WIDTHS = (1, 2, 1, 1), (8, 8, 16, 16)


def shaken(model: nn.Module) -> nn.Module:
    """Give random values to all parameters and statistics, heads that start at zero included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(1 + torch.rand(tensor.shape))
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape), alpha=0.05)
    return model.eval()


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(IMAGE, PATCH, DEPTH, HEADS, DIM, 2 * DIM, num_classes=CLASSES)


def timm_vit() -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(
        IMAGE,
        PATCH,
        num_classes=CLASSES,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
    )


def timm_convnext() -> nn.Module:
    from timm.models import ConvNeXt

    return ConvNeXt(num_classes=CLASSES, depths=STAGES, dims=WIDTHS)


def hf_vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    image = {"image_size": IMAGE, "patch_size": PATCH, "num_labels": CLASSES}
    config = ViTConfig(**sizes, **image, intermediate_size=2 * DIM, layer_norm_eps=1e-6)
    return ViTForImageClassification(config)


def hf_convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        depths=STAGES, hidden_sizes=WIDTHS, num_labels=CLASSES, layer_norm_eps=1e-6
    )
    return ConvNextForImageClassification(config)


def torchvision_resnet(layer_type: str) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    block = BasicBlock if layer_type == "basic" else Bottleneck
    return ResNet(block, list(STAGES), num_classes=CLASSES)


def hf_resnet(layer_type: str) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    wider = 1 if layer_type == "basic" else 4
    config = ResNetConfig(
        depths=STAGES,
        hidden_sizes=[wider * width for width in (64, 128, 256, 512)],
        layer_type=layer_type,
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config)


def meta_llama(groups: int) -> nn.Module:
    return MetaLlama(WORDS, DIM, DEPTH, HEADS, groups)


def hf_llama(groups: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "intermediate_size": 3 * DIM}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": groups, "vocab_size": WORDS}
    rope = {"rope_type": "default", "rope_theta": THETA}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, rms_norm_eps=EPS, rope_parameters=rope))


def linear_gpt() -> nn.Module:
    return LinearGPT(WORDS, LENGTH, DIM, DEPTH, HEADS)


def hf_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": DIM, "n_layer": DEPTH, "n_head": HEADS, "n_positions": LENGTH}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **sizes))


def saved(model: Any, folder: Path) -> Path:
    """Write a model of transformers as its users do, and return the file of tensors."""
    model.save_pretrained(folder)
    return folder / "model.safetensors"


LISTED: Mapping[str, Callable[[], nn.Module]] = {
    "timm vit": timm_vit,
    "hf vit": hf_vit,
    "timm convnext": timm_convnext,
    "hf convnext": hf_convnext,
    "hf resnet basic": lambda: hf_resnet("basic"),
    "hf resnet bottleneck": lambda: hf_resnet("bottleneck"),
    "hf llama": lambda: hf_llama(GROUPS),
    "hf gpt2": hf_gpt2,
}


def shapes_of(name: str) -> dict[str, list[int]]:
    """Return the keys of a model's checkpoint with their shapes: transformers saves other names."""
    import safetensors.torch

    model = LISTED[name]()
    tensors = model.state_dict()
    if name.startswith("hf"):
        with tempfile.TemporaryDirectory() as folder:
            tensors = safetensors.torch.load_file(saved(model, Path(folder)))
    return {key: list(tensor.shape) for key, tensor in sorted(tensors.items())}


def main() -> None:
    lists = {name: shapes_of(name) for name in LISTED}
    lines = (f"{json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in lists.items())
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
