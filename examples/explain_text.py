"""Explains what a language model says next: by which tokens, through which layers and heads, and rather than what else.

By default SmolLM2-135M, which a package ships, completes a sentence about Rome with a city, and it is shown what speaks for
" Rome" and what for " Rome" rather than " Paris". Written are pages that need no other file, and figures.
"""

import argparse
from pathlib import Path

from language_model import PACKAGED_MODEL, load_model
from presenting import quiet, stage
from torch.nn import ModuleList

import lrp_prune
from lrp_prune.metrics import perturbation_curve
from lrp_prune.targets import LogitDifference
from lrp_prune.visualization import plot_heads

TEXT = "The Eiffel Tower is in the city of Paris. The Colosseum is in the city of"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--text", default=TEXT, help="the beginning of a text")
    add(
        "--answer", default=None, help="the answer that is explained, of which the first token counts; else the model's"
    )
    add("--other", default=" Paris", help="the answer that it is compared with")
    add("--model", default=PACKAGED_MODEL, help="the packaged model, or a causal model's hub name or folder")
    add("--composite", default="attnlrp", help="the rules")
    add("--output", type=Path, default=Path("outputs/explain_text"), help="folder for pages and figures")
    return parser.parse_args()


def main() -> None:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    stage(f"loading {options.model}")
    model, tokenizer = load_model(options.model)
    batch = dict(tokenizer(options.text, return_tensors="pt"))
    answer = int(model(**batch).logits[0, -1].argmax()) if options.answer is None else first(tokenizer, options.answer)
    rules = {"composite": options.composite, "tokenizer": tokenizer}

    stage(f"what speaks for {tokenizer.decode([answer])!r}")
    latent = layers(model)
    explanation = lrp_prune.explain(model, batch, target=answer, latent=latent, **rules)
    print(explanation.joined())
    explanation.html(options.output / "answer.html")
    explanation.plot(options.output / "answer.png")
    explanation.plot_layers(options.output / "layers.png")
    explanation.save(options.output / "answer.safetensors")

    stage(f"and rather than for {options.other!r}")
    other = first(tokenizer, options.other)
    difference = explanation - lrp_prune.explain(model, batch, target=other, latent=latent, **rules)
    print(difference.joined())
    difference.html(options.output / "difference.html")
    difference.plot(options.output / "difference.png")

    stage("which heads")
    target = LogitDifference(answer, other)
    heads = lrp_prune.attribute(
        model, [batch], target=target, granularity="head", statistic="signed", composite=options.composite
    )
    plot_heads(heads, options.output / "heads.png")
    best = max(
        ((name, index, float(value)) for name, row in heads.items() for index, value in enumerate(row)), key=size
    )
    print(f"most by head {best[1]} of {best[0]}: {best[2]:+.3g}")

    stage("how faithful that is: embeddings replaced by zero, the most and the least relevant first")
    curve = perturbation_curve(model, [batch], options.composite, target=answer, progress=False)
    print(curve)
    curve.plot(options.output / "faithfulness.png")
    print(f"\npages and figures are in {options.output}")


def layers(model, most: int = 10) -> list[str]:
    """The model's layers, or some of them at equal distances, the first and the last included."""
    number = model.config.num_hidden_layers
    listed = (
        name for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module) == number
    )
    name, count = next(listed), min(most, number)
    return [f"{name}.{round(place * (number - 1) / max(count - 1, 1))}" for place in range(count)]


def first(tokenizer, text: str) -> int:
    """The first token of an answer."""
    return int(tokenizer(text, add_special_tokens=False).input_ids[0])


def size(entry: tuple[str, int, float]) -> float:
    """How much a head has, whatever its sign."""
    return abs(entry[2])


if __name__ == "__main__":
    main()
