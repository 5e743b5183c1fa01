"""The callbacks are written into, and read from, a configuration file of ``LightningCLI``."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrp_prune import Composite, Random, Scope
from lrp_prune.callbacks import CircuitDiscovery, ContrastiveCorrection, RelevanceCollector, RelevancePruning
from lrp_prune.pruning import LeastSquares, OptimalBrainSurgeon

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

OTHERS = [
    {
        "class_path": "lrp_prune.callbacks.RelevancePruning",
        "init_args": {
            "rounds": {"count": 2, "every_n_steps": 3},
            "scope": {"compared": "global", "floor": 0.25, "order": "signed"},
            "method": {"class_path": "lrp_prune.Random", "init_args": {"seed": 3}},
            "reference": "all",
            "name": "other",
        },
    },
    {
        "class_path": "lrp_prune.callbacks.ContrastiveCorrection",
        "init_args": {
            "amount": 0.01,
            "method": {"class_path": "lrp_prune.LRP", "init_args": {"composite": {"matmul": "stop"}}},
            "guard": {"share": 0.5, "by": "squared_token"},
        },
    },
]


@pytest.mark.slow
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


@pytest.mark.slow
def test_values_that_belong_together_are_written_and_read_as_mappings(make_module) -> None:
    from lightning.pytorch.cli import LightningCLI

    def cli(callbacks: Any) -> LightningCLI:
        trainer = {"callbacks": callbacks, "logger": False, "accelerator": "cpu"}
        return LightningCLI(type(make_module()), run=False, args={"trainer": trainer}, save_config_callback=None)

    first = cli(OTHERS)
    text = first.parser.dump(first.config, skip_none=False)
    second = cli(yaml.safe_load(text)["trainer"]["callbacks"])
    assert second.parser.dump(second.config, skip_none=False) == text
    for made in (first, second):
        pruning, correction = made.trainer.callbacks[:2]
        assert pruning._pruner._scope == Scope("global", floor=0.25, order="signed")
        assert (pruning._times.count, pruning._times.every, pruning._times.by_steps) == (2, 3, True)
        assert pruning._collection.method == Random(seed=3) and pruning._collection.loader is None
        general, _, guard = (collection.method for collection in correction._sets._collections)
        assert (general.statistic, guard.statistic, general.composite) == (
            "signed",
            "squared_token",
            {"matmul": "stop"},
        )


@pytest.mark.slow
@pytest.mark.parametrize("given", ["file", "values"])
def test_a_composite_is_a_file_or_stands_in_the_configuration(given, make_module, make_loader, tmp_path) -> None:
    from lightning.pytorch.cli import LightningCLI

    values = {"name": "mine", "base": "epsilon", "rules": [{"kind": "linear", "depth": 0, "rule": "gamma(0.5)"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    composite = str(tmp_path / "mine.yaml") if given == "file" else values
    collector = {"class_path": "lrp_prune.LRP", "init_args": {"composite": composite, "target": "class"}}
    callback = {"class_path": "lrp_prune.callbacks.RelevanceCollector", "init_args": {"method": collector}}
    trainer = {"callbacks": [callback], "logger": False, "accelerator": "cpu", "max_epochs": 1}
    trainer |= {"enable_progress_bar": False, "enable_checkpointing": False}
    made = LightningCLI(type(make_module()), run=False, args={"trainer": trainer}, save_config_callback=None)
    made.trainer.fit(made.model, make_loader(), make_loader(seed=2))
    relevance = made.trainer.callbacks[0].relevance
    assert relevance.composite == "mine" and Composite.from_yaml(relevance.rules) == Composite.from_yaml(values)


@pytest.mark.parametrize("callback", [RelevancePruning, RelevanceCollector, ContrastiveCorrection, CircuitDiscovery])
def test_only_two_arguments_are_positional_and_few_are_needed(callback: Any) -> None:
    parameters = list(inspect.signature(callback).parameters.values())
    positional = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
    assert len(positional) == 2 and len(parameters) <= 20
    assert sum(one.default is one.empty for one in parameters) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("obs", OptimalBrainSurgeon()),
        (
            {"class_path": "lrp_prune.pruning.LeastSquares", "init_args": {"dense": 0.25, "steps": 50}},
            LeastSquares(dense=0.25, steps=50),
        ),
        ({"class_path": "lrp_prune.pruning.OptimalBrainSurgeon"}, OptimalBrainSurgeon()),
        (None, None),
    ],
    ids=str,
)
def test_a_compensation_is_a_name_or_a_class(given, expected, make_module) -> None:
    from lightning.pytorch.cli import LightningCLI

    def cli(compensation: Any) -> LightningCLI:
        pruning = {
            "class_path": "lrp_prune.callbacks.RelevancePruning",
            "init_args": {"sparsity": 0.5, "compensation": compensation},
        }
        trainer = {"callbacks": [pruning], "logger": False, "accelerator": "cpu"}
        return LightningCLI(type(make_module()), run=False, args={"trainer": trainer}, save_config_callback=None)

    first = cli(given)
    text = first.parser.dump(first.config, skip_none=False)
    (written,) = yaml.safe_load(text)["trainer"]["callbacks"]
    second = cli(written["init_args"]["compensation"])
    assert second.parser.dump(second.config, skip_none=False) == text
    for made in (first, second):
        assert made.trainer.callbacks[0]._round._compensation == expected
