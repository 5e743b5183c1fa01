"""What kept masks cost in a training: time of the operations against a step, and bytes per weight.

A causal transformer of a few layers is trained by AdamW on random tokens, with and without half of its weights pruned,
the two interleaved. The difference of the steps drowns in noise, so the time inside the keeper's own functions is
printed as well. Run it alone, one thread per process::

    OMP_NUM_THREADS=1 python tests/benchmarks/keeping.py
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.training import keeping
from lrp_prune.training.keeping import MaskKeeper


class Model(nn.Module):
    """A decoder-only transformer, without its token embedding's share of the weights."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True))


class Stopwatch:
    """Seconds spent in a function, however often it is called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """One training step with clipping; returns its seconds."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    logits = model(tokens)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - begin


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return float(middle), float(low), float(high)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=576, help="model width")
    parser.add_argument("--layers", type=int, default=8, help="transformer layers")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in the batch's one sequence")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each kind")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    plain, masked = (Model(arguments.width, arguments.layers) for _ in range(2))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (plain, masked)]
    masks = {name: torch.rand_like(p) > 0.5 for name, p in masked.named_parameters() if p.dim() == 2}
    weights = sum(mask.numel() for mask in masks.values())
    watch = Stopwatch(keeping.zero_pruned_)
    keeping.zero_pruned_ = watch
    keeper = MaskKeeper(masked, masks, [optimizers[1]])
    own: list[float] = []
    hook = Stopwatch(keeper._before_step)
    keeper._before_step = hook  # type: ignore[method-assign]
    keeper.attach([optimizers[1]])
    look = Stopwatch(keeper.look)

    tokens = torch.randint(256, (1, arguments.tokens))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(arguments.steps + 2):
        for model, optimizer, seconds in zip((plain, masked), optimizers, times, strict=True):
            watch.seconds = hook.seconds = look.seconds = 0.0
            taken = step(model, optimizer, tokens)
            if model is masked:
                look(False), look()  # as the callback does, after a batch and before the next
            if number >= 2:
                seconds.append(taken)
                if model is masked:
                    own.append((watch.seconds + hook.seconds + look.seconds) / taken)
    share, low, high = quartiles(own)
    difference = quartiles([b / a - 1 for a, b in zip(*times, strict=True)])
    print(f"{weights / 1e6:.1f} M masked weights, {arguments.tokens} tokens, AdamW, clipping, one thread")
    print(f"a plain step:                    {quartiles(times[0])[0]:.3f} s")
    print(f"own operations, share of a step: {share:.2%} (quartiles {low:.2%} to {high:.2%})")
    print(f"step with masks against plain:   {difference[0]:+.2%} ({difference[1]:+.2%} to {difference[2]:+.2%})")
    print(f"bytes held per weight:           {keeper.nbytes / weights:.3f}")


if __name__ == "__main__":
    main()
