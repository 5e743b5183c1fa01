"""What is logged, shown and kept is of everything that was asked for, and known before the training where it can be."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from lrp_prune.pruning import METHODS
from lrp_prune.relevance.unscored import UNUSED, UnscoredWeightsWarning
from tests.support.recurrent_layers import LastStep


class Module(LightningModule):
    """Any model that makes logits of three classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.before: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)

    def on_train_start(self) -> None:
        self.before = copy.deepcopy(self.state_dict())


class Halves(nn.Module):
    """A body and a head, and a layer beside them that is never used."""

    def __init__(self, unused: int) -> None:
        super().__init__()
        self.body, self.o, self.other = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, unused)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.o(self.body(x[:, -1]).relu())
        return result


def _loader(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 5, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, -1, :3].argmax(1)), 8)


def _fit(make_trainer: Any, module: Module, *callbacks: Any, **arguments: Any) -> Any:
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 3, **arguments})
    trainer.fit(module, _loader(), _loader(1))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_the_sparsity_that_a_recurrent_model_has(method: str, make_trainer: Any) -> None:
    torch.manual_seed(0)
    module = Module(LastStep())
    pruning = RelevancePruning(sparsity=0.5, rounds=2, schedule="linear", method=method)
    trainer = _fit(make_trainer, module, pruning)
    zeros = sum(int((value == 0).sum()) for name, value in module.named_parameters() if "weight" in name)
    assert zeros == pruning.masks.num_pruned == 129 and pruning.masks.num_entries == 258
    assert trainer.callback_metrics["pruning/sparsity"] == 0.5
    moved = [name for name, value in module.named_parameters() if not torch.equal(value, module.before[name])]
    assert len(moved) == len(list(module.parameters()))  # it was trained on


def test_what_is_not_scored_is_in_the_metric_the_table_and_one_warning(make_trainer: Any, capsys: Any) -> None:
    torch.manual_seed(0)
    module = Module(Halves(4))  # 64 + 48 weights, and 64 that are not used
    pruning = RelevancePruning(sparsity=0.5, rounds=2, schedule="linear")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = _fit(make_trainer, module, pruning, enable_progress_bar=True)
    told = [entry for entry in caught if issubclass(entry.category, UnscoredWeightsWarning)]
    assert len(told) == 1
    assert "64 of 176 weights (36.4 %) are not scored and stay dense: model.other.weight" in str(told[0].message)
    assert pruning.masks.num_pruned == 88 and pruning.masks.unscored == {"model.other.weight": UNUSED}
    assert trainer.callback_metrics["pruning/sparsity"] == 0.5
    assert trainer.callback_metrics["pruning/sparsity/model.other"] == 0.0
    shown = " ".join(capsys.readouterr().out.split())
    assert "88 of 176 weights pruned" in shown
    assert "not scored and kept: 64 of 176 weights (36.4 %): model.other.weight" in shown


@pytest.mark.slow
def test_all_methods_of_a_comparison_prune_as_many(make_trainer: Any) -> None:
    found = {}
    for method in METHODS:
        torch.manual_seed(0)
        pruning = RelevancePruning(sparsity=0.4, method=method, scope="global")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnscoredWeightsWarning)
            _fit(make_trainer, Module(Halves(4)), pruning, max_epochs=2)
        found[method] = (pruning.masks.num_pruned, pruning.masks.num_entries, tuple(pruning.masks))
    assert set(found.values()) == {(70, 176, ("model.body.weight", "model.o.weight", "model.other.weight"))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.7}, r"sparsity 0\.7 of 176 weights is 123, and only 112.*exclude=\['model\.other\.weight'\]"),
        ({"sparsity": 0.7, "rounds": 2, "schedule": [0.3, 0.7]}, r"sparsity 0\.7 of 176 weights"),
        ({"scope": "row"}, "cannot be reached"),
        ({"include": ["model.body", "*.other"]}, r"'\*\.other' names only weights that are not scored"),
        (
            {"sparsity": {"*.o": 0.5, "*.other": 0.5}},
            r"sparsity\['\*\.other'\] = 0\.5 is of weights that are not scored",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_pruned(
    arguments: dict[str, Any], message: str, make_trainer: Any
) -> None:
    torch.manual_seed(0)
    module = Module(Halves(4))
    pruning = RelevancePruning(**arguments)
    with pytest.raises(MisconfigurationException, match=message):
        _fit(make_trainer, module, pruning)
    assert pruning.masks is None and not any((value == 0).any() for value in module.parameters())


def test_left_out_by_name_it_is_met(make_trainer: Any) -> None:
    module = Module(Halves(4))
    pruning = RelevancePruning(sparsity=0.7, exclude=["*.other"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnscoredWeightsWarning)
        _fit(make_trainer, module, pruning, max_epochs=2)
    assert pruning.masks.num_entries == 112 and pruning.masks.num_pruned == 78


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["orthogonal", "weight_norm", "weight_norm, old"])
def test_weights_whose_zeros_would_be_none_are_refused_before_the_training(
    kind: str, method: str, make_trainer: Any
) -> None:
    model = Halves(1)
    change = {
        "orthogonal": nn.utils.parametrizations.orthogonal,
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "weight_norm, old": nn.utils.weight_norm,
    }[kind]
    change(model.body)
    module = Module(model)
    with pytest.raises(MisconfigurationException, match=r"cannot prune model\.body\..*exclude=\['model\.body\."):
        _fit(make_trainer, module, RelevancePruning(method=method, scope="global"))
    assert not module.before  # not a step was made


@pytest.mark.parametrize("method", ["lrp", "magnitude"])
def test_a_spectral_norm_is_trained_with_its_zeros(method: str, make_trainer: Any) -> None:
    torch.manual_seed(0)
    model = Halves(1)
    nn.utils.parametrizations.spectral_norm(model.body)
    module, pruning = Module(model), RelevancePruning(sparsity=0.5, method=method, exclude=["*.other"], scope="global")
    _fit(make_trainer, module, pruning)
    kept = pruning.masks["model.body.parametrizations.weight.original"]
    assert pruning.masks.sparsity == 0.5 and not model.eval().body.weight[~kept].any()


def test_masks_of_an_earlier_checkpoint_are_resumed_with_what_they_do_not_know(
    make_trainer: Any, tmp_path: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnscoredWeightsWarning)
        first = RelevancePruning(sparsity=0.5, rounds=2, schedule="linear")
        trainer = _fit(make_trainer, Module(Halves(4)), first, max_epochs=3)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        second = RelevancePruning(sparsity=0.5, rounds=2, schedule="linear")
        resumed = make_trainer(callbacks=[second], max_epochs=4)
        resumed.fit(Module(Halves(4)), _loader(), _loader(1), ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.masks == first.masks and second.masks.unscored == {"model.other.weight": UNUSED}


def test_a_collector_collects_what_cannot_be_pruned(make_trainer: Any) -> None:
    model = Halves(1)
    nn.utils.parametrizations.orthogonal(model.body)
    collector = RelevanceCollector()
    make_trainer(callbacks=[collector]).validate(Module(model), _loader(), verbose=False)
    assert set(collector.relevance.unscored) == {"model.body.parametrizations.weight.original", "model.other.weight"}


def _adapted() -> Module:
    torch.manual_seed(0)
    return Module(peft.get_peft_model(Halves(1), peft.LoraConfig(r=2, target_modules=["body", "o"])))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_alone_are_not_pruned_by_default(method: str, make_trainer: Any) -> None:
    module = _adapted()
    with pytest.raises(
        MisconfigurationException, match=r"has adapters.*include=\['\*\.body', '\*\.o'\].*\['\*\.lora_\*'\]"
    ):
        _fit(make_trainer, module, RelevancePruning(method=method))
    assert not module.before


@pytest.mark.parametrize("method", METHODS)
def test_weights_beside_adapters_stay_zero_until_they_are_merged(method: str, make_trainer: Any) -> None:
    module, pruning = _adapted(), RelevancePruning(method=method, include=["*.body", "*.o"], scope="global")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have adapters.*")  # they are masked
        _fit(make_trainer, module, pruning)
    assert set(pruning.masks) == {"model.body.weight", "model.o.weight"} and pruning.masks.sparsity == 0.5
    trained = [name for name, value in module.named_parameters() if not torch.equal(value, module.before[name])]
    assert any("lora_B" in name for name in trained)
    inputs = next(iter(_loader()))[0]
    trained_outputs = module.eval()(inputs)
    merged = module.model.merge_and_unload()  # what was trained is what is merged
    torch.testing.assert_close(merged(inputs), trained_outputs)
    assert isinstance(merged, Halves)
    assert int((merged.body.weight == 0).sum() + (merged.o.weight == 0).sum()) == 56
    kept = pruning.masks["model.body.weight"]
    assert not torch.equal(
        merged.body.weight[kept], module.before["model.base_model.model.body.base_layer.weight"][kept]
    )


def test_adapters_are_pruned_where_they_are_named(make_trainer: Any) -> None:
    module, pruning = _adapted(), RelevancePruning(include=["*.lora_*"], scope="layer")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*merge_adapters.*")
        _fit(make_trainer, module, pruning)
    assert len(pruning.masks) == 4 and pruning.masks.sparsity == 0.5
