"""Explains a vision transformer, prunes it by what its parts contribute, and sees whether it still looks at the same.

A small ViT is trained here on handwritten digits (scikit-learn ships them). Its heads and its neurons are ranked by relevance
and removed; beside the accuracy it is shown what it looks at, before and after, and what a neuron stands for: the digits that it
counts for, and where in them.
"""

import argparse
from pathlib import Path

import torch
from presenting import progress, quiet, stage
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lrp_prune
from lrp_prune.visualization import plot_heads

SEARCHED = 100
"""Digits among which those are looked for that a neuron stands for."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=500, help="of training, with 64 digits each")
    add("--sparsity", type=float, default=0.5, help="the share of neurons that is removed")
    add("--seed", type=int, default=0, help="of the model and the order of digits")
    add("--output", type=Path, default=Path("outputs/explain_and_prune_vit"), help="folder for pages and figures")
    return parser.parse_args()


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images twice as large, and labels: 1,400 for training and 397 held out."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(loaded.target)
    return (images[order[:1400]], labels[order[:1400]]), (images[order[1400:]], labels[order[1400:]])


def trained(images: Tensor, labels: Tensor, steps: int, seed: int) -> ViTForImageClassification:
    """A ViT of three layers with patches of 4 pixels, from nothing."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 10))
    for _ in progress(range(steps), "training"):
        picked = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=images[picked]).logits, labels[picked]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> dict[str, float]:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    train, test = digits(options.seed)
    stage(f"training a ViT for {options.steps} steps")
    model = trained(*train, options.steps, options.seed)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(pixel_values=test[0]).logits.argmax(-1) == test[1]).float().mean())

    found = {"dense": accuracy(model)}
    print(f"accuracy {found['dense']:.3f}")

    stage("what it looks at")
    shown = {"pixel_values": test[0][:3]}
    answers = test[1][:3].tolist()
    before = lrp_prune.explain(model, shown, target=answers)
    print(before)
    before.plot(options.output / "before.png")
    before.html(options.output / "before.html")

    stage("which heads and neurons matter")
    batches = [{"pixel_values": images, "labels": labels} for images, labels in zip(*map(chunks, train), strict=True)][
        :4
    ]
    heads = lrp_prune.attribute(model, batches, granularity="head")
    plot_heads(heads, options.output / "heads.png")
    neurons = lrp_prune.attribute(model, batches, granularity="neuron")
    curve = lrp_prune.pruning_curve(
        model, {"heads": heads, "neurons": neurons}, accuracy, rates=(0.0, 0.25, 0.5, 0.75), progress=False
    )
    print(curve)
    curve.plot(options.output / "curve.png")

    stage("the digits that the most relevant neurons stand for")
    found_samples = lrp_prune.top_samples(
        model, [{"pixel_values": train[0][:SEARCHED]}], neurons, number=6, progress=False
    )
    found_samples.plot(options.output / "samples.png")
    print(found_samples)
    (group, unit), samples = next(iter(found_samples.items()))
    pixels = torch.cat([sample.batch["pixel_values"] for sample in samples])
    concept = lrp_prune.explain(model, {"pixel_values": pixels}, through={group: [unit]})
    concept.plot(options.output / "concept.png", samples=len(samples))

    stage(f"removing {options.sparsity:.0%} of the neurons")
    lrp_prune.select(neurons, options.sparsity).apply_(model)
    found["pruned"] = accuracy(model)
    after = lrp_prune.explain(model, shown, target=answers)
    after.plot(options.output / "after.png")
    maps = [
        torch.stack([each.inputs["pixel_values"].heat[place].flatten() for place in range(3)])
        for each in (before, after)
    ]
    found["alike"] = float(nn.functional.cosine_similarity(*maps).mean())
    print(f"accuracy {found['pruned']:.3f}; what it looks at is the same to a cosine of {found['alike']:.3f}")
    print(f"\npages and figures are in {options.output}")
    return found


def chunks(values: Tensor) -> tuple[Tensor, ...]:
    """Batches of 100."""
    return values.split(100)


if __name__ == "__main__":
    main()
