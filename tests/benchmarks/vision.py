"""Filters and neurons of small vision networks, pruned by rate: what LRP buys over other ways to rank them.

    python tests/benchmarks/vision.py                     # three networks, two sets of images, five seeds; ten minutes of a core
    python tests/benchmarks/vision.py --seeds 1 --data digits

As Pruning by eXplaining judges it (arXiv 2408.12568): units of the whole network in one ranking, ten reference samples of each
class, nothing trained or scaled, accuracy on images that nothing else has seen; A_PR is the mean over rates. Then half of
the units of each layer go, what is kept is scaled, and one epoch follows, in batches of 16: a setting that was chosen by the
held-out accuracy of seed 0. What is done already is read from ``--output``, so that a run goes on where it stopped.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lrp_prune
from lrp_prune import LRP, Activation, Gradient, IntegratedGradients, Magnitude, Method, Random, Taylor

sys.path += [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "examples")]
from tests.benchmarks.vision_models import DATA, NETWORKS, Images, accuracy, train

RATES = tuple(step / 10 for step in range(10))
RATE = 3e-3


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What Taylor's first order is of."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def methods(seed: int) -> dict[str, Method]:
    """All that is compared; what explains a value, explains the true class's logit, but for Taylor's."""
    return {
        "epsilon": LRP("epsilon", "pxp", "class"),
        "attnlrp": LRP("attnlrp", "pxp", "class"),
        "gradient": Gradient("pxp", "class"),
        "integrated gradients": IntegratedGradients(8, "pxp", "class"),
        "taylor": Taylor(loss),
        "activation": Activation(),
        "magnitude": Magnitude(),
        "random": Random(seed),
    }


def measured(data: str, network: str, seed: int) -> dict[str, Any]:
    """One network, trained on one set of images from a seed."""
    make, side, epochs = DATA[data]
    images = make(seed)
    torch.manual_seed(seed)
    model = train(NETWORKS[network](side), images.train, epochs, RATE, seed)
    curve = lrp_prune.pruning_curve(
        model,
        methods(seed),
        lambda model: accuracy(model, images.held_out),
        RATES,
        batches=images.reference,
        granularity="neuron",
        progress=False,
    )
    return {
        "dense": curve.dense,
        "curves": {method: list(row.values()) for method, row in curve.scores.items()},
        "area": {method: curve.area(method) for method in curve.scores},
        "top": {method: curve.top_rate(method) for method in curve.scores},
        "tuned": {name: _tuned(model, images, method, seed) for name, method in _halved(seed).items()},
    }


def _halved(seed: int) -> dict[str, Method]:
    return {name: method for name, method in methods(seed).items() if name in ("epsilon", "magnitude", "random")}


def _tuned(model: nn.Module, images: Images, method: Method, seed: int) -> dict[str, float]:
    """The accuracy with half of the units of each layer, before and after an epoch."""
    model = copy.deepcopy(model)
    options: dict[str, Any] = {"granularity": "neuron", "progress": False}
    masks = lrp_prune.prune(model, images.reference, 0.5, method, "layer", **options)
    before = accuracy(model, images.held_out)
    everything = [torch.cat(column) for column in zip(*images.train, strict=True)]
    batches = list(zip(*(column.split(16) for column in everything), strict=True))
    train(model, batches, 1, RATE, seed, masks)
    return {"pruned": before, "after an epoch": accuracy(model, images.held_out)}


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return " ".join(f"{value:.3f}" for value in values)
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return f"{statistics.mean(values):.3f} ± {quantile * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def report(found: dict[str, dict[str, Any]]) -> str:
    """Tables of everything that is there."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for name, entry in found.items():
        cases.setdefault(name.rpartition(",")[0], []).append(entry)
    names = list(next(iter(cases.values()))[0]["area"])
    lines = ["| A_PR | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    lines.append(
        "| dense | " + " | ".join(interval([e["dense"] for e in entries]) for entries in cases.values()) + " |"
    )
    for method in names:
        cells = [interval([entry["area"][method] for entry in entries]) for entries in cases.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| epsilon minus | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for method in names[1:]:  # of the same network each time
        cells = [interval([e["area"]["epsilon"] - e["area"][method] for e in entries]) for entries in cases.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| top rate at 95 % | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for method in names:
        cells = [interval([entry["top"][method] for entry in entries]) for entries in cases.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "| half of each layer, share kept | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for method in ("epsilon", "magnitude", "random"):
        for stage in ("pruned", "after an epoch"):
            tuned = [[e["tuned"][method][stage] / e["dense"] for e in some if e["tuned"]] for some in cases.values()]
            cells = [interval(values) for values in tuned]
            lines.append(f"| {method}, {stage} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"seeds: {[len(entries) for entries in cases.values()]}"])


def plotted(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy by rate, a panel for each network and set of images, the mean over seeds."""
    from lrp_prune.figures import new_figure, saved

    cases: dict[str, list[dict[str, Any]]] = {}
    for name, entry in found.items():
        cases.setdefault(name.rpartition(",")[0], []).append(entry)
    figure = new_figure(11.0, 6.2)
    axes = figure.subplots(2, -(-len(cases) // 2), sharey=True, squeeze=False)
    for axis, (case, entries) in zip(axes.flat, cases.items(), strict=False):
        for method in entries[0]["curves"]:
            mean = [statistics.mean(values) for values in zip(*(e["curves"][method] for e in entries), strict=True)]
            wide = 2.4 if method == "epsilon" else 1.2
            style = "dashed" if method in ("random", "magnitude", "activation") else "solid"
            axis.plot([100 * rate for rate in RATES], mean, label=method, linewidth=wide, linestyle=style)
        axis.set(title=case.replace(", ", "\n"), xlabel="units pruned (%)", ylim=(0, 1))
        axis.grid(alpha=0.25)
    for row in axes:
        row[0].set_ylabel("accuracy")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    saved(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, of images and networks")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="sets of images")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=Path("outputs/vision"), help="folder of what was measured")
    parser.add_argument("--plot", type=Path, help="a figure of the curves")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lrp_prune").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    todo = [(data, network, seed) for seed in range(given.seeds) for data in given.data for network in given.networks]
    found: dict[str, dict[str, Any]] = {}
    for data, network, seed in tqdm(todo, unit="network", dynamic_ncols=True):
        file = given.output / f"{data} {network} {seed}.json".replace(" ", "_")
        if not file.exists():
            part = file.with_suffix(".part")  # so that a file is whole, whenever the run is stopped
            part.write_text(json.dumps(measured(data, network, seed)))
            part.replace(file)
        found[f"{network}, {data},{seed}"] = json.loads(file.read_text())
    print(report(found))
    if given.plot:
        plotted(found, given.plot)


if __name__ == "__main__":
    main()
