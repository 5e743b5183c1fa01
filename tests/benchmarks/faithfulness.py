"""Which relevance of the input is faithful: the area between perturbation curves, of a ViT and a T5 trained here, and SmolLM2.

    python tests/benchmarks/faithfulness.py --models vit t5 smollm2 --seeds 3
    python tests/benchmarks/faithfulness.py --models vit --baselines zero mean

The ViT tells handwritten digits apart; the T5 says which of twenty words is marked; SmolLM2
continues speeches. What is replaced: patches, or embeddings of tokens (the encoder's), by zero or their mean. Integrated
gradients take 20 passes; what LRP gains by as many is told by its rules along the same way from zero to the image.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import Gamma, Where
from lrp_prune.attribution.inputs import input_relevance
from lrp_prune.effects.intervals import intervals
from lrp_prune.metrics import PerturbationCurve, perturbation_curve, plot_curves

sys.path.insert(0, str(Path(__file__).parent))
from explainers import Reached, of_class_token, of_decoder, of_last_token

SIDE, PATCH, LENGTH, WORDS, FIRST = 16, 4, 20, 16, 4


class Case(NamedTuple):
    """A model, what it is explained on, where its input is, and rules that only it has."""

    model: nn.Module
    batches: list[dict[str, Tensor]]
    reached: Reached
    composites: dict[str, str | Composite]
    options: dict[str, Any]
    quality: str


def gamma_for_attention(base: str) -> Composite:
    """The paper's best for vision transformers: gamma of 0.25 and 0.05, and epsilon for what makes queries, keys and values."""
    rules = {Where("linear", name="*.attention.*_proj"): "gradient", "convolution": Gamma(0.25), "linear": Gamma(0.05)}
    return Composite(f"{base}, gamma", rules, base=base)


def digits(samples: int, generator: torch.Generator, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Digits, twice as large, under some noise."""
    picked = torch.randint(len(images), (samples,), generator=generator)
    large = images[picked].repeat_interleave(2, 1).repeat_interleave(2, 2)
    return (large + 0.1 * torch.randn(samples, SIDE, SIDE, generator=generator))[:, None], labels[picked]


def vit(seed: int, steps: int, samples: int) -> Case:
    """A vision transformer of three layers on digits."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images, labels = torch.tensor(loaded.images, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1400], order[1400:]
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_labels=10,
        )
    )

    def batch(samples: int) -> tuple[dict[str, Tensor], Tensor]:
        pixels, answers = digits(samples, generator, images[train], labels[train])
        return {"pixel_values": pixels}, answers

    train_(model, batch, steps, 64, 2e-3, lambda output, answers: nn.functional.cross_entropy(output.logits, answers))
    pixels, answers = digits(samples, generator, images[test], labels[test])
    with torch.no_grad():
        right = (model(pixel_values=pixels).logits.argmax(-1) == answers).float().mean()
    return Case(
        model,
        [{"pixel_values": part} for part in pixels.split(50)],
        Reached("pixel_values", None, of_class_token),
        {"attnlrp, gamma": gamma_for_attention("attnlrp"), "cp_lrp, gamma": gamma_for_attention("cp_lrp")},
        {"patch": PATCH},
        f"accuracy {right:.3f}",
    )


def t5(seed: int, steps: int, samples: int) -> Case:
    """An encoder-decoder that says which word is marked."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=FIRST + 2 * WORDS, dropout_rate=0.0
        )
    )

    def batch(samples: int) -> tuple[dict[str, Tensor], Tensor]:
        ids = torch.randint(FIRST, FIRST + WORDS, (samples, LENGTH), generator=generator)
        places = torch.randint(LENGTH, (samples, 1), generator=generator)
        answers = ids.gather(1, places)[:, 0]
        ids.scatter_(1, places, answers[:, None] + WORDS)  # the same word, marked
        return {"input_ids": ids, "decoder_input_ids": torch.zeros(samples, 1, dtype=torch.long)}, answers

    def loss(output: Any, answers: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits[:, -1], answers)

    train_(model, batch, steps, 32, 3e-3, loss)
    inputs, answers = batch(samples)
    with torch.no_grad():
        right = (model(**inputs).logits[:, -1].argmax(-1) == answers).float().mean()
    batches = [
        {"input_ids": ids, "decoder_input_ids": started}
        for ids, started in zip(inputs["input_ids"].split(50), inputs["decoder_input_ids"].split(50), strict=True)
    ]
    reached = Reached("input_ids", lambda model: model.encoder.embed_tokens, of_decoder)
    return Case(model, batches, reached, {}, {}, f"accuracy {right:.3f}")


def smollm2(seed: int, steps: int, samples: int) -> Case:
    """SmolLM2-135M on windows of speeches: the token that it expects next."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from language_model import load_documents, load_model

    model, tokenizer = load_model()
    texts = iter(load_documents())
    windows = []
    for _ in range(seed * samples):
        next(texts)
    while len(windows) < samples:
        ids = tokenizer(next(texts), return_tensors="pt").input_ids[0]
        if len(ids) >= 200:
            windows.append(ids[100:132])
    reached = Reached("input_ids", lambda model: model.get_input_embeddings(), of_last_token)
    batches = [{"input_ids": part} for part in torch.stack(windows).split(6)]
    return Case(model, batches, reached, {}, {"shares": [0, 0.2, 0.4, 0.6, 0.8, 1]}, "as it is shipped")


CASES: dict[str, Callable[[int, int, int], Case]] = {"vit": vit, "t5": t5, "smollm2": smollm2}
STEPS = {"vit": 400, "t5": 500, "smollm2": 0}
SAMPLES = {"vit": 100, "t5": 100, "smollm2": 12}


def train_(
    model: nn.Module,
    batch: Callable[[int], tuple[dict[str, Tensor], Tensor]],
    steps: int,
    size: int,
    rate: float,
    loss: Callable[..., Tensor],
) -> None:
    """Train with AdamW and a rate that rises and falls, then evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 10))
    for _ in range(steps):
        inputs, answers = batch(size)
        optimizer.zero_grad()
        loss(model(**inputs), answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


SHARED = Composite("shared", {"attention": "attention_uniform"}, base="epsilon")
"""LRP-epsilon with queries, keys and values in shares, as AttnLRP has them, and normalisations by their plain gradient."""


def along(composite: str | Composite, argument: str, steps: int = 20) -> Callable[..., dict[str, Tensor]]:
    """Relevance of inputs in numbers by rules, as integrated gradients take the gradient: at the middles of steps from zero."""

    def explained(model: nn.Module, batch: Any, target: Any) -> dict[str, Tensor]:
        total = torch.zeros_like(batch[argument])
        for step in range(steps):
            share = (step + 0.5) / steps
            with lrp_prune.attributing(model, composite) as propagation:
                value = target(model, {**batch, argument: share * batch[argument]})
                total += propagation.relevance(value)[argument] / share
        return {argument: total / steps}

    return explained


def under_noise(
    composite: str, reached: Reached, draws: int = 20, noise: float = 0.1
) -> Callable[..., dict[str, Tensor]]:
    """Relevance of tokens by rules, as SmoothGrad takes the gradient: in the mean under noise, of a share of their range."""

    def explained(model: nn.Module, batch: Any, target: Any) -> dict[str, Tensor]:
        generator, total = torch.Generator().manual_seed(0), torch.zeros(batch[reached.argument].shape)
        for _ in range(draws):
            calls: list[Tensor] = []

            def noisy(module: nn.Module, args: Any, output: Tensor, calls: list[Tensor] = calls) -> Tensor:
                calls.append(output.detach())
                scale = noise * (calls[0].amax() - calls[0].amin())
                return output + scale * torch.randn(output.shape, generator=generator) if len(calls) == 1 else output

            handle = reached.embedding(model).register_forward_hook(noisy)
            try:
                total += input_relevance(model, batch, target, composite).inputs[reached.argument]
            finally:
                handle.remove()
        return {reached.argument: total / draws}

    return explained


def curves_of(case: Case, baseline: str, wanted: list[str] | None = None) -> Iterator[tuple[str, PerturbationCurve]]:
    """A curve for each kind of relevance, or of each that is wanted."""
    reached = case.reached
    ways = {
        f"{label}, along the way": along(composite, reached.argument)
        for label, composite in (("attnlrp", "attnlrp"), ("epsilon, attention shared", SHARED))
    }
    kinds: dict[str, Any] = {
        "attnlrp": "attnlrp",
        "cp_lrp": "cp_lrp",
        "epsilon": "epsilon",
        **case.composites,
        "gradient x input": "gradient",
        **(ways if reached.embedding is None else {"attnlrp, under noise": under_noise("attnlrp", reached)}),
        "integrated gradients": reached.integrated_gradients,
        "SmoothGrad x input": reached.smoothgrad,
        "attention rollout": reached.attention_rollout,
        "random": reached.random,
    }
    for name, kind in kinds.items():
        if wanted is not None and name not in wanted:
            continue
        yield (
            name,
            perturbation_curve(case.model, case.batches, kind, progress=False, baseline=baseline, **case.options),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the ViT and the T5")
    parser.add_argument(
        "--baselines", nargs="+", choices=["zero", "mean"], default=["zero"], help="what patches or embeddings become"
    )
    parser.add_argument("--kinds", nargs="+", help="some kinds of relevance, by the names in the table; all by default")
    parser.add_argument("--output", type=Path, help="a folder for the figures and the values")
    parser.add_argument("--quick", action="store_true", help="few steps and samples: the figures mean nothing")
    arguments = parser.parse_args()
    for name in arguments.models:
        found: dict[str, dict[str, list[PerturbationCurve]]] = {baseline: {} for baseline in arguments.baselines}
        began = time.monotonic()
        for seed in range(1 if name == "smollm2" else arguments.seeds):
            steps, samples = (10, 4) if arguments.quick else (STEPS[name], SAMPLES[name])
            case = CASES[name](seed, steps, samples)
            print(f"{name}, seed {seed}: {case.quality}", flush=True)
            for baseline, curves in found.items():
                for kind, curve in curves_of(case, baseline, arguments.kinds):
                    curves.setdefault(kind, []).append(curve)
                    print(f"  {baseline}, {kind}: {curve.area:.3f}", flush=True)
        print(f"\n{name} ({time.monotonic() - began:.0f} s)")
        for baseline, curves in found.items():
            report(f"{name}, {baseline}", curves, arguments.output)


def report(label: str, found: dict[str, list[PerturbationCurve]], folder: Path | None) -> None:
    """Print a table; in a folder, keep a figure and the values."""
    of_each = {kind: torch.cat([curve.areas for curve in curves]) for kind, curves in found.items()}
    against = "integrated gradients" if "integrated gradients" in of_each else next(iter(of_each))
    print(f"\n| {label} | area (95 %) | above {against}, of the same inputs |\n|---|---|---|")
    for kind, areas in sorted(of_each.items(), key=lambda entry: -float(entry[1].mean())):
        cells = []
        for values in (areas, areas - of_each[against]):
            value, low, high = intervals([(values, torch.ones_like(values))], lambda mean: mean)
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {kind} | {' | '.join(cells)} |")
    print(flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        together = {
            kind: PerturbationCurve(
                curves[0].shares,
                torch.cat([curve.most for curve in curves]),
                torch.cat([curve.least for curve in curves]),
                kind,
            )
            for kind, curves in found.items()
        }
        path = folder / label.replace(", ", " ")
        plot_curves(together, path.with_suffix(".png"))
        text = json.dumps({kind: curve.to_dict() for kind, curve in together.items()}, indent=1)
        path.with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
