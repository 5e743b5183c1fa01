"""Measures what relevance by the rules of convolutional networks costs, next to a plain backward pass and to zennit.

    python tests/benchmarks/rules.py
    python tests/benchmarks/rules.py --batch-size 16 --size 96 --pairs 15

The network has the layers of ResNet-18 (batch normalisation, 11 million weights), with random weights and in evaluation mode. All
sides run in turn in one process of one thread, on the same batches of images; given is the median of the ratios of the turns to
the plain side of the same turn, with its 95 % interval. *Forward and backward* is a forward and a backward pass with gradients of
weights; *backward* is what of that comes after the forward. Sides are the relevance of the input (`attributing`), by zennit
(`SequentialMergeBatchNorm`, its composites; left out where it is not installed), and that of all weights (`attribute`'s
accumulator). What is measured of each includes its forward.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Before torch is imported: two processes that each spin one thread per core slow each other down many times over.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cost import median_interval
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LRP, scorer

Step = Callable[[Tensor], Any]
COMPOSITES = {
    "epsilon": "epsilon",
    "epsilon_gamma": "epsilon_gamma",
    "epsilon_plus": "epsilon_plus",
    "epsilon_alpha2_beta1": "epsilon_alpha2_beta1",
}


class Sum(nn.Module):
    """The sum over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int, make_sum: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        plain = stride == 1 and channels == out
        short = [nn.Identity()] if plain else [nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.short, self.sum, self.relu = nn.Sequential(*short), make_sum(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.sum(torch.stack([self.short(x), self.branch(x)], -1)))


def network(make_sum: Callable[[], nn.Module]) -> nn.Module:
    """The layers of ResNet-18."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for channels, out, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        blocks += [Block(channels, out, stride, make_sum), Block(out, out, 1, make_sum)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100),
    )  # fmt: skip
    return model.eval()


def zennit_composites() -> dict[str, Any]:
    """zennit's composites by our names; none where it is not installed."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        models, resnet = ModuleType("torchvision.models"), ModuleType("torchvision.models.resnet")
        resnet.Bottleneck = resnet.BasicBlock = type("Unused", (nn.Module,), {})  # type: ignore[attr-defined]
        for module in (ModuleType("torchvision"), models, resnet):
            sys.modules[module.__name__] = module
    try:
        from zennit import canonizers, composites, rules, types
    except ImportError:
        return {}
    merging = [canonizers.SequentialMergeBatchNorm()]
    gamma = [
        *composites.layer_map_base(),
        (types.Convolution, rules.Gamma(0.25)),
        (nn.Linear, rules.Epsilon()),
    ]
    plain = [*composites.layer_map_base(), (types.Linear, rules.Epsilon())]
    return {
        "epsilon": composites.LayerMapComposite(plain, canonizers=merging),
        "epsilon_gamma": composites.LayerMapComposite(gamma, canonizers=merging),
        "epsilon_plus": composites.EpsilonPlus(canonizers=merging),
        "epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1(canonizers=merging),
    }


def steps(chosen: list[str]) -> dict[str, Step]:
    """The sides that are compared, by name."""
    theirs = zennit_composites()
    model = network(importlib.import_module("zennit.layer").Sum if theirs else Sum)
    sides: dict[str, Step] = {}
    for name in chosen:
        sides[f"{name}, input"] = _of_input(model, name)
        if name in theirs:
            sides[f"{name}, input, zennit"] = _by_zennit(model, theirs[name])
        sides[f"{name}, weights"] = _of_weights(model, name)
    return {"plain": _plain(model), **sides}


def _plain(model: nn.Module) -> Step:
    def step(x: Tensor) -> float:
        value = model(x).amax(1).sum()
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        value.backward()
        took = time.process_time() - start
        model.zero_grad(set_to_none=True)
        return took

    return step


def _of_input(model: nn.Module, composite: str) -> Step:
    def step(x: Tensor) -> None:
        with lrp_prune.attributing(model, composite) as propagation:
            propagation.relevance(model(x).amax(1).sum())

    return step


def _by_zennit(model: nn.Module, composite: Any) -> Step:
    def step(x: Tensor) -> None:
        leaf = x.clone().requires_grad_()
        with composite.context(model) as hooked:
            output = hooked(leaf)
            seed = output.detach() * (output.detach() == output.detach().amax(1, keepdim=True))
            torch.autograd.grad(output, leaf, seed)

    return step


def _of_weights(model: nn.Module, composite: str) -> Step:
    scores = scorer(LRP(composite=composite, statistic="abs_token", target=_largest), model)
    return scores.update


def _largest(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).amax(1).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch-size", type=int, default=8, help="images in a batch")
    add("--size", type=int, default=64, help="height and width of an image")
    add("--pairs", type=int, default=9, help="turns that are timed, at least 2")
    add("--composites", nargs="+", default=list(COMPOSITES), choices=list(COMPOSITES), help="which are measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = steps(options.composites)
    torch.manual_seed(1)
    batches = [torch.randn(options.batch_size, 3, options.size, options.size) for _ in range(options.pairs + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in ("backward", *sides)}
    for index, x in enumerate(batches):
        for name in list(sides) if index % 2 else list(reversed(sides)):
            start = time.process_time()
            backward = sides[name](x)
            took = time.process_time() - start
            if index:  # the first turn is the warm-up
                seconds[name].append(took)
                if name == "plain":
                    seconds["backward"].append(backward)
    print("| | seconds | to forward and backward | to backward |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratios = []
        for base in ("plain", "backward"):
            middle, low, high = median_interval([a / b for a, b in zip(values, seconds[base], strict=True)])
            ratios.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        label = "forward and backward" if name == "plain" else name
        print(f"| {label} | {sorted(values)[len(values) // 2]:.3f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
