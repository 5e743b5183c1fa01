"""Small networks in the manner of those for images, most with batch normalisation; all of modules, as zennit needs them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MakeSum = Callable[[], nn.Module]
"""Makes a module that sums the last dimension."""

EPS = 1e-12
"""Of normalisations. With torch's 1e-5, zennit's merged ones divide by sqrt(1 + 1e-5) and are no identity."""


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


class Residual(nn.Module):
    """A branch beside a shortcut, in whatever order the modules run: normalisations come right after their layers."""

    def __init__(self, branch: nn.Module, short: nn.Module, make_sum: MakeSum, last: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.short, self.sum = branch, short, make_sum()
        self.last = nn.Identity() if last is None else last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.sum(torch.stack([self.short(x), self.branch(x)], -1)))


class Moved(nn.Module):
    """Channels to the last dimension, or back."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.target)


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def convolution(
    channels: int, out: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution and its normalisation."""
    return [nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=bias), nn.BatchNorm2d(out, EPS)]


def vgg(make_sum: MakeSum = Sum) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def vgg_bn(make_sum: MakeSum = Sum) -> nn.Module:
    return nn.Sequential(
        *convolution(3, 8, bias=True), nn.ReLU(), *convolution(8, 8, bias=True), nn.ReLU(), nn.MaxPool2d(2),
        *convolution(8, 12, bias=True), nn.ReLU(), *convolution(12, 12, groups=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.BatchNorm1d(20, EPS), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def _basic(channels: int, out: int, stride: int, make_sum: MakeSum) -> nn.Module:
    short = nn.Identity() if stride == 1 else nn.Sequential(*convolution(channels, out, 1, stride))
    branch = nn.Sequential(*convolution(channels, out, 3, stride), nn.ReLU(), *convolution(out, out))
    return Residual(branch, short, make_sum, nn.ReLU())


def resnet18(make_sum: MakeSum = Sum) -> nn.Module:
    return nn.Sequential(
        *convolution(3, 8, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        _basic(8, 8, 1, make_sum), _basic(8, 12, 2, make_sum), _basic(12, 12, 1, make_sum),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def _bottleneck(channels: int, width: int, stride: int, make_sum: MakeSum) -> nn.Module:
    out = 2 * width
    short = nn.Identity() if channels == out else nn.Sequential(*convolution(channels, out, 1, stride))
    branch = nn.Sequential(
        *convolution(channels, width, 1),
        nn.ReLU(),
        *convolution(width, width, 3, stride),
        nn.ReLU(),
        *convolution(width, out, 1),
    )
    return Residual(branch, short, make_sum, nn.ReLU())


def resnet50(make_sum: MakeSum = Sum) -> nn.Module:
    return nn.Sequential(
        *convolution(3, 8, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        _bottleneck(8, 6, 1, make_sum), _bottleneck(12, 6, 1, make_sum), _bottleneck(12, 8, 2, make_sum),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def _inverted(channels: int, out: int, stride: int, make_sum: MakeSum) -> nn.Module:
    width = 2 * channels
    branch = nn.Sequential(
        *convolution(channels, width, 1), nn.ReLU6(), *convolution(width, width, 3, stride, groups=width), nn.Hardswish(),
        *convolution(width, out, 1),
    )  # fmt: skip
    return branch if stride > 1 or channels != out else Residual(branch, nn.Identity(), make_sum)


def mobilenet(make_sum: MakeSum = Sum) -> nn.Module:
    return nn.Sequential(
        *convolution(3, 8, 3, 2), nn.ReLU6(), _inverted(8, 8, 1, make_sum), _inverted(8, 10, 2, make_sum),
        _inverted(10, 10, 1, make_sum), *convolution(10, 16, 1), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def _next(channels: int, make_sum: MakeSum) -> nn.Module:
    branch = nn.Sequential(
        nn.Conv2d(channels, channels, 7, 1, 3, groups=channels), Moved(1, -1), nn.LayerNorm(channels),
        nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels), Moved(-1, 1), Scale(channels),
    )  # fmt: skip
    return Residual(branch, nn.Identity(), make_sum)


def convnext(make_sum: MakeSum = Sum) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), _next(8, make_sum), nn.Conv2d(8, 10, 2, 2), _next(10, make_sum),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(10), nn.Linear(10, 5),
    )  # fmt: skip


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, with random weights, and statistics of normalisations as after a training."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.6)  # some are negative
            nn.init.normal_(module.bias, 0.0, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0.0, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.LayerNorm | Scale):
            nn.init.normal_(next(module.parameters()), 1.0, 0.3)
    return model.eval()


def trained(model: nn.Module, steps: int = 15) -> nn.Module:
    """The model after a short training on patterns that can be told apart, in evaluation mode."""
    torch.manual_seed(1)
    patterns = torch.randn(5, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(steps):
        labels = torch.randint(5, (16,))
        loss = nn.functional.cross_entropy(model(patterns[labels] + 0.5 * torch.randn(16, 3, 16, 16)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
