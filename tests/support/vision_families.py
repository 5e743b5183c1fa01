"""A small model of every family of classifiers that timm and torchvision have, with random weights."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.support.torchvision_import import torchvision

CLASSES = 5
_LARGE = 12_000_000
_DEPTHS: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {})
"""What a large variant is made smaller by, tried in turn: families have other names for it, or none."""
_SIDES = (64, 96, 128, 224, 256, 299)

_SMALLEST = """
    beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
    deit_tiny_patch16_224 densenet121 dla102x dpn68 edgenext_x_small efficientformer_l1 efficientformerv2_s0
    test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m_enc ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet caformer_s18 mixer_s16_224 lcnet_050
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small
    test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_416m rdnet_tiny regnety_002 repghostnet_050 repvit_m1
    res2net50d resnest14d test_resnet resnetv2_50 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
    skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
    legacy_xception xception41 xcit_nano_12_p8_224
"""
"""Of each family of timm a small variant, as few have one that is tiny. Families that are not here have their first by name."""


def families() -> list[tuple[str, str]]:
    """Library and family, which is a module of the library's."""
    found = [("timm", family) for family in _timm().list_modules()]
    return found + [("torchvision", name) for name in _torchvision_variants()]


def variant(library: str, family: str) -> str:
    """The model that stands for a family."""
    if library == "torchvision":
        return _torchvision_variants()[family]
    names: list[str] = _timm().list_models(module=family)
    return next((name for name in names if name in _SMALLEST.split()), names[0])


def built(library: str, family: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in evaluation mode, and an image for it, both in float64.

    Raises:
        ValueError: if no size of images is accepted.
    """
    name, errors = variant(library, family), ["no image is accepted"]
    for model, sides in _attempts(library, name):
        for side in sides:
            images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))
            try:
                with torch.no_grad():
                    model(images)
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                errors.append(str(error))
                continue
            return _randomized(model).double(), images.double()
    raise ValueError(f"{name}: {errors[-1][:200]}")


def _attempts(library: str, name: str) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Models, and the sides of images to be tried with them: what can be made small first."""
    for options, sides in _options(library, name):
        torch.manual_seed(0)
        try:
            yield _made(library, name, **options).eval(), sides
        except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError):
            continue


def _options(library: str, name: str) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    if library == "torchvision":
        fixed = name.startswith(("vit_", "maxvit"))
        yield {}, (224,) if fixed else _SIDES
        return
    settings = _timm().get_pretrained_cfg(name)
    own = settings.input_size[-1]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in _made(library, name).parameters())
    smaller = _DEPTHS if size > _LARGE else ({},)
    if settings.fixed_input_size:
        for side in _SIDES[:3]:
            yield from (({**less, "img_size": side}, (side,)) for less in smaller)
    yield from ((dict(less), (own,) if settings.fixed_input_size else (*_SIDES, own)) for less in smaller)


def _made(library: str, name: str, **options: Any) -> nn.Module:
    if library == "timm":
        model: nn.Module = _timm().create_model(name, num_classes=CLASSES, **options)
        return model
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = torchvision().models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return model


def _randomized(model: nn.Module) -> nn.Module:
    """Scales and biases that are neither one nor zero, and no layer that begins as nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def without_biases(model: nn.Module) -> nn.Module:
    """The model, whose biases absorb nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].startswith("bias") or name.endswith("bias"):
                parameter.zero_()
    return model


def _timm() -> Any:
    torchvision()  # which timm imports
    return importlib.import_module("timm")


def _torchvision_variants() -> dict[str, str]:
    """Family -> the variant with the shortest name, which is the oldest and smallest; further families within one module."""
    models = torchvision().models
    found: dict[str, str] = {}
    for name in sorted(models.list_models(module=models), key=lambda name: (_rank(name), name)):
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        if name in ("swin_v2_t", "vgg11_bn", "resnext50_32x4d", "efficientnet_v2_s"):
            family = name
        found.setdefault(family, name)
    return found


_SMALL = "resnet18 regnet_y_400mf mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 swin_t densenet121 mnasnet0_5 vgg11".split()


def _rank(name: str) -> int:
    return 0 if name in _SMALL or name.endswith(("_tiny", "_b0", "_b_16")) else 1
