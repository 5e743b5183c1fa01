"""Whether a pruned model recovers better by distillation than by plain training, at equal time: evidence for the pages.

    python tests/benchmarks/recovery.py                            # four models of the panel, three seeds; a quarter of an hour
    python tests/benchmarks/recovery.py --batches 4                # with little data to recover on
    python tests/benchmarks/recovery.py --cases llama --seeds 2    # a small language model
    python tests/benchmarks/recovery.py --cases smollm2-speeches --seeds 1 --sparsities 0.5 --steps 64 --rate 1e-5

A trained model is pruned once, at the start of a training on the same data that has a quarter of its first one's epochs, and is
judged on data that nothing else has seen: the share of the dense model's advantage over chance. The teacher's forward costs a
third of a step, so that with it there are three quarters as many steps as without.
"""

import argparse
import copy
import logging
import math
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lrp_prune.callbacks import Distillation, RelevancePruning, Rounds

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.panel import trained_model
from tests.benchmarks.panel_data import Data
from tests.benchmarks.panel_models import cases
from tests.benchmarks.panel_training import Case, score_of

WAYS: dict[str, dict[str, Any] | None] = {
    "plain training": None,
    "share 0.5, T = 1": {"temperature": 1.0},
    "share 0.5, T = 2": {},
    "share 0.5, T = 4": {"temperature": 4.0},
    "share 0.9, T = 2": {"share": 0.9},
    "share 1, T = 2 (no labels)": {"share": 1.0},
}
"""Name -> arguments of Distillation."""
CASES = ("mlp", "cnn", "encoder", "regression")
SPARSITIES = (0.8, 0.9, 0.95)


class Training(LightningModule):
    """A case's own training: AdamW, the rate rising for a tenth of the time and then falling to zero."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.case, self.model = case, model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.case.loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        trained = [entry for entry in self.parameters() if entry.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.case.rate / 2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def recovered(
    case: Case, model: nn.Module, data: Data, sparsity: float, way: dict[str, Any] | None, share: float, seed: int,
    batches: int | None = None, steps: int | None = None,
) -> nn.Module:  # fmt: skip
    """A copy that was pruned and trained in that way."""
    training = Training(case, copy.deepcopy(model))
    callbacks: list[Any] = [
        RelevancePruning(sparsity, Rounds(1, start=0), reference=data.reference, summary=False),
    ]
    if way is not None:
        matched = {"match": "values"} if case.name == "regression" else {}
        callbacks.append(Distillation(**{**way, **matched}))
    passes = (steps or share * case.epochs * len(data.train)) * (1 if way is None else 0.75)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_steps=max(round(passes), 1), max_epochs=-1, callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1, gradient_clip_val=1.0,
            default_root_dir=folder,
        ).fit(training, DataLoader(data.train[:batches], batch_size=None, shuffle=True))  # fmt: skip
    return training.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="models of the panel")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, of data and models")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="which ways")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), help="shares that are pruned")
    parser.add_argument("--share", type=float, default=0.25, help="of the first training's epochs")
    parser.add_argument("--steps", type=int, help="of plain training, in place of a share of the epochs")
    parser.add_argument("--rate", type=float, help="largest learning rate; half of the first training's by default")
    parser.add_argument("--batches", type=int, help="to train on, the first so many; all by default")
    parser.add_argument("--models", type=Path, default=Path("outputs/panel/models"), help="folder of trained models")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lrp_prune", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    by_name = {case.name: case for case in cases()}
    for case_name in given.cases:
        found: dict[tuple[str, float], list[float]] = {}
        case = by_name[case_name]
        if given.rate is not None:
            case = replace(case, rate=2 * given.rate)
        for seed in tqdm(range(given.seeds), desc=case_name, dynamic_ncols=True):
            model, data = trained_model(case, seed, given.models)
            chance = case.chance() if callable(case.chance) else case.chance
            dense = score_of(case, model, data.held_out) - chance
            for name in given.ways:
                for sparsity in given.sparsities:
                    made = recovered(
                        case, model, data, sparsity, WAYS[name], given.share, seed, given.batches, given.steps
                    )
                    kept = (score_of(case, made, data.held_out) - chance) / dense
                    found.setdefault((name, sparsity), []).append(max(kept, 0.0))
        print(f"\n| {case_name} | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in given.sparsities) + " |")
        print("|---|" + "---|" * len(given.sparsities))
        for name in given.ways:
            cells = [f"{np.mean(found[name, s]):.3f} ({min(found[name, s]):.3f})" for s in given.sparsities]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
