"""Vision models of torchvision, timm and transformers with random weights: their own classes, at their smallest."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from torch import nn

from tests.support.torchvision_import import is_installed, torchvision


class Vision(NamedTuple):
    """How a model is made, the side of its images, and the groups of neurons and heads that it has.

    Args:
        make: the model.
        side: of its images, in pixels.
        neurons: groups of neurons.
        heads: groups of heads.
        left: of the convolutions without units, one, and the function by which its channels cannot be told apart.
    """

    make: Callable[[], nn.Module]
    side: int
    neurons: int
    heads: int = 0
    left: tuple[str, str] | None = None


def _torchvision(name: str) -> Any:
    return importlib.import_module(f"{torchvision().__name__}.models.{name}")


def _timm_module(name: str) -> Any:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    torchvision()  # which timm imports
    return importlib.import_module(f"timm.models.{name}")


def _timm(name: str, **options: Any) -> nn.Module:
    return _timm_module("_factory").create_model(name, num_classes=5, **options)


def _timm_vgg() -> nn.Module:
    models = _timm_module("vgg")
    model = models.VGG([8, "M", 12, "M"], 5, mlp_ratio=1 / 256, norm_layer=nn.BatchNorm2d)
    model.pre_logits = models.ConvMlp(12, 24, 7, 1.0)
    model.head = models.ClassifierHead(24, 5)
    return model


def _timm_regnet() -> nn.Module:
    models = _timm_module("regnet")
    return models.RegNet(models.RegNetCfg(depth=6, w0=8, wa=8.0, wm=1.5, group_size=4, se_ratio=0.25), num_classes=5)


def _timm_maxvit() -> nn.Module:
    models = _timm_module("maxxvit")
    attention = models.MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2), grid_size=(2, 2))
    sizes = {"embed_dim": (8, 16), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8}
    return models.MaxxVit(models.MaxxVitCfg(**sizes, transformer_cfg=attention), img_size=32, num_classes=5)


def _resnet(block: str, **options: int) -> nn.Module:
    models = _torchvision("resnet")
    return models.ResNet(getattr(models, block), [1, 1, 1, 1], num_classes=5, **options)


def _vgg(batch_norm: bool) -> nn.Module:
    models = _torchvision("vgg")
    with torch.device("meta"):
        model = models.VGG(nn.Identity(), init_weights=False)  # whose classifier has 120 million weights
    model.features = models.make_layers([8, "M", 12, 16, "M"], batch_norm)
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 5))
    return model


def _efficientnet() -> nn.Module:
    models = _torchvision("efficientnet")
    blocks = [models.FusedMBConvConfig(2, 3, 2, 8, 8, 2), models.MBConvConfig(3, 3, 2, 8, 12, 2)]
    return models.EfficientNet(blocks, 0.0, num_classes=5, last_channel=24)


def _convnext() -> nn.Module:
    models = _torchvision("convnext")
    return models.ConvNeXt([models.CNBlockConfig(8, 16, 1), models.CNBlockConfig(16, None, 1)], num_classes=5)


def _regnet(se_ratio: float | None) -> nn.Module:
    models = _torchvision("regnet")
    blocks = models.BlockParams.from_init_params(depth=4, w_0=8, w_a=8, w_m=2.0, group_width=4, se_ratio=se_ratio)
    return models.RegNet(blocks, num_classes=5, stem_width=8)


def _swin(version: int) -> nn.Module:
    models = _torchvision("swin_transformer")
    parts = (models.SwinTransformerBlock, models.PatchMerging)
    if version == 2:
        parts = (models.SwinTransformerBlockV2, models.PatchMergingV2)
    sizes = ([4, 4], 16, [1, 1], [2, 4], [4, 4])
    return models.SwinTransformer(*sizes, num_classes=5, block=parts[0], downsample_layer=parts[1])


def _maxvit() -> nn.Module:
    models = _torchvision("maxvit")
    return models.MaxVit((32, 32), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=5)


def _vit(family: str) -> nn.Module:
    if is_installed():
        torchvision()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = getattr(tf, f"{family}Config")(image_size=32, patch_size=8, num_labels=5, **sizes)
    return getattr(tf, f"{family}ForImageClassification")(config)


_TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}

VISION_MODELS: dict[str, Vision] = {
    "torchvision resnet": Vision(partial(_resnet, "BasicBlock"), 32, 8),
    "torchvision resnext": Vision(partial(_resnet, "Bottleneck", groups=2, width_per_group=8), 32, 13),
    "torchvision vgg": Vision(partial(_vgg, False), 16, 4),
    "torchvision vgg_bn": Vision(partial(_vgg, True), 16, 4),
    "torchvision mobilenet_v3": Vision(
        lambda: _torchvision("mobilenetv3").mobilenet_v3_small(num_classes=5, width_mult=0.25), 32, 26
    ),
    "torchvision efficientnet": Vision(_efficientnet, 32, 10),
    "torchvision convnext": Vision(_convnext, 32, 2, left=("features.0.0", "layer_norm")),
    "torchvision densenet": Vision(lambda: _torchvision("densenet").DenseNet(4, (2, 2), 8, num_classes=5), 32, 10),
    "torchvision regnet_x": Vision(partial(_regnet, None), 32, 12),
    "torchvision regnet_y": Vision(partial(_regnet, 0.25), 32, 16),
    "torchvision vit": Vision(
        lambda: _torchvision("vision_transformer").VisionTransformer(32, 8, 2, 4, 16, 24, num_classes=5),
        32,
        2,
        2,
        ("conv_proj", "layer_norm"),
    ),
    "torchvision swin": Vision(partial(_swin, 1), 32, 2, 2, ("features.0.0", "layer_norm")),
    "torchvision swin_v2": Vision(partial(_swin, 2), 32, 2, 2, ("features.0.0", "layer_norm")),
    "torchvision maxvit": Vision(_maxvit, 32, 11, 4, ("blocks.1.layers.0.layers.MBconv.proj.1", "layer_norm")),
    "timm resnet": Vision(partial(_timm, "resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)), 32, 9),
    "timm vgg": Vision(_timm_vgg, 32, 4),
    "timm mobilenetv3": Vision(partial(_timm, "mobilenetv3_small_050"), 32, 26),
    "timm efficientnet": Vision(partial(_timm, "test_efficientnet"), 32, 13),
    "timm convnext": Vision(partial(_timm, "test_convnext"), 32, 9, left=("stem.0", "layer_norm")),
    "timm densenet": Vision(partial(_timm, "densenet121", block_config=(2, 2), growth_rate=4), 32, 10),
    "timm regnet": Vision(_timm_regnet, 32, 23),
    "timm vit": Vision(
        partial(_timm, "vit_tiny_patch16_224", **_TRANSFORMER), 32, 2, 2, ("patch_embed.proj", "layer_norm")
    ),
    "timm deit": Vision(
        partial(_timm, "deit_tiny_distilled_patch16_224", **_TRANSFORMER), 32, 2, 2, ("patch_embed.proj", "layer_norm")
    ),
    "timm swin": Vision(
        partial(
            _timm,
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=8,
            depths=(1, 2),
            num_heads=(2, 4),
        ),
        32,
        3,
        3,
        ("patch_embed.proj", "layer_norm"),
    ),
    "timm maxvit": Vision(_timm_maxvit, 32, 9, 4, ("stages.1.blocks.0.conv.shortcut.expand", "layer_norm")),
    "transformers vit": Vision(
        partial(_vit, "ViT"), 32, 2, 2, ("vit.embeddings.patch_embeddings.projection", "layer_norm")
    ),
    "transformers deit": Vision(
        partial(_vit, "DeiT"), 32, 2, 2, ("deit.embeddings.patch_embeddings.projection", "layer_norm")
    ),
}
