"""The callbacks are written into, and read from, a configuration file of ``LightningCLI``."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lrp_prune.callbacks import RelevanceCollector, RelevancePruning

pytest.importorskip("jsonargparse")

PRUNING = {
    "class_path": "lrp_prune.callbacks.RelevancePruning",
    "init_args": {
        "sparsity": {"net.0": 0.5, "net.4": 0.25},
        "rounds": 2,
        "schedule": [0.5, 1.0],
        "method": {"class_path": "lrp_prune.Gradient", "init_args": {"skip_first": 1}},
        "scope": "layer",
        "include": ["net.*"],
        "exclude": ["net.6"],
    },
}
COLLECTOR = {
    "class_path": "lrp_prune.callbacks.RelevanceCollector",
    "init_args": {
        "method": {
            "class_path": "lrp_prune.LRP",
            "init_args": {"composite": "cp_lrp", "statistic": "signed", "target": "class"},
        },
        "max_batches": 3,
    },
}


def test_configuration_round_trip(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    def cli(callbacks: Any) -> LightningCLI:
        trainer = {"callbacks": callbacks, "logger": False, "accelerator": "cpu", "max_epochs": 3}
        return LightningCLI(
            type(make_module()),
            run=False,
            args={"trainer": {**trainer, "enable_progress_bar": False, "enable_checkpointing": False}},
            save_config_callback=None,
        )

    first = cli([PRUNING, COLLECTOR])
    text = first.parser.dump(first.config, skip_none=False)
    (tmp_path / "config.yaml").write_text(text)
    second = cli(yaml.safe_load(text)["trainer"]["callbacks"])
    assert second.parser.dump(second.config, skip_none=False) == text
    for made in (first, second):
        pruning, collector = made.trainer.callbacks[:2]
        assert isinstance(pruning, RelevancePruning)
        assert isinstance(collector, RelevanceCollector)
        made.trainer.fit(made.model, make_loader(), make_loader(seed=2))
        assert pruning.masks.sparsity_of("net.0.weight") == 0.5
        assert pruning.masks.sparsity_of("net.4.weight") == 0.25
        assert (collector.relevance.composite, collector.relevance.num_samples) == ("cp_lrp", 48)
