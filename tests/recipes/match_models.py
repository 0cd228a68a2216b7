"""Pairs of models that are one architecture under two naming schemes, of three libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torchvision
import transformers
from torch import nn

Factory = Callable[[], Any]
CLASSES = 1000


def tv(name: str, **given: Any) -> Factory:
    return lambda: getattr(torchvision.models, name)(**given)


def tm(name: str, **given: Any) -> Factory:
    return lambda: timm.create_model(name, **given)


def hf(name: str, **given: Any) -> Factory:
    """Return what makes a classifier of transformers, by the first part of its classes' names."""

    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **given)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return make


def symmetric(make: Factory) -> Factory:
    """Pad strided convolutions as torchvision does: TensorFlow has one row less before."""

    def padded() -> Any:
        model = make()
        for module in model.modules():
            if isinstance(module, nn.ZeroPad2d):
                module.padding = (max(module.padding),) * 4
        return model

    return padded


BASIC = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
Y4 = {
    "depths": [1, 3, 6, 6],
    "hidden_sizes": [48, 104, 208, 440],
    "embedding_size": 32,
    "groups_width": 8,
    "layer_type": "y",
}
PAIRS: Mapping[str, tuple[Factory, Factory]] = {
    "vit tv-timm": (tv("vit_b_16"), tm("vit_base_patch16_224")),
    "vit timm-hf": (tm("vit_base_patch16_224"), hf("ViT", layer_norm_eps=1e-6)),
    "vit tv-hf": (tv("vit_b_16"), hf("ViT", layer_norm_eps=1e-6)),
    "resnet50 tv-hf": (tv("resnet50"), hf("ResNet")),
    "resnet18 timm-hf": (tm("resnet18"), hf("ResNet", **BASIC)),
    "convnext tv-timm": (tv("convnext_tiny"), tm("convnext_tiny")),
    "convnext timm-hf": (tm("convnext_tiny"), hf("ConvNext", layer_norm_eps=1e-6)),
    "convnext tv-hf": (tv("convnext_tiny"), hf("ConvNext", layer_norm_eps=1e-6)),
    "efficientnet tv-timm": (tv("efficientnet_b0"), tm("efficientnet_b0")),
    "efficientnet tv-hf": (tv("efficientnet_b0"), symmetric(hf("EfficientNet", **B0))),
    "efficientnet timm-hf": (tm("tf_efficientnet_b0"), hf("EfficientNet", **B0)),
    "mobilenetv2 tv-timm": (tv("mobilenet_v2"), tm("mobilenetv2_100")),
    "mobilenetv2 timm-hf": (tm("mobilenetv2_100"), hf("MobileNetV2", tf_padding=False)),
    "mobilenetv3 tv-timm": (tv("mobilenet_v3_large"), tm("mobilenetv3_large_100")),
    "densenet tv-timm": (tv("densenet121"), tm("densenet121")),
    "vgg16_bn tv-timm": (tv("vgg16_bn"), tm("vgg16_bn")),
    "mnasnet tv-timm": (tv("mnasnet1_0"), tm("mnasnet_100")),
    "regnet tv-timm": (tv("regnet_y_400mf"), tm("regnety_004")),
    "regnet timm-hf": (tm("regnety_004"), hf("RegNet", **Y4)),
    "swin tv-timm": (tv("swin_t"), tm("swin_tiny_patch4_window7_224")),
    "swin timm-hf": (tm("swin_tiny_patch4_window7_224"), hf("Swin")),
}


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
