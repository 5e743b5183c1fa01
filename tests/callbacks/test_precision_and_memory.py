"""Half precision, recomputed layers and compiled modules inside a Lightning run: the same relevance, an undisturbed training."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lrp_prune.pruning.scorers as scorers
from lrp_prune import LRP
from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from tests.support.small_models import llama

ENTRIES = 8 * 24 + 24 * 16 + 16 * 4

METHOD = LRP(composite="attnlrp", statistic="abs_token")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("inside_fit", [False, True], ids=["validate", "fit"])
def test_relevance_in_half_precision_is_that_of_the_forward_under_it(
    make_module, make_loader, make_trainer, precision, inside_fit
) -> None:
    mixed = precision == "bf16-mixed"
    seen = [make_module() if mixed else make_module().bfloat16()]

    class Before(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if inside_fit:
                seen.append(copy.deepcopy(pl_module))

    collector = RelevanceCollector(METHOD)
    trainer = make_trainer(callbacks=[collector, Before()], precision=precision, max_epochs=1)
    if inside_fit:
        trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    else:
        trainer.validate(make_module(), make_loader(seed=2), verbose=False)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if mixed else nullcontext
    scorer = scorers.scorer(METHOD, seen[-1], forward_context=context)
    for inputs, labels in make_loader(seed=2):
        scorer.update((inputs if mixed else inputs.bfloat16(), labels))
    expected = scorer.compute()
    exact = scorers.scorer(METHOD, seen[-1].float())
    for batch in make_loader(seed=2):
        exact.update(batch)
    full = exact.compute()
    for name, tensor in collector.relevance.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name])
        assert torch.cosine_similarity(tensor.flatten(), full[name].flatten(), dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_half_precision_training_is_bit_for_bit_the_same(
    make_module, make_loader, make_trainer, same_weights, precision
) -> None:
    modules = []
    for callbacks in ([], [RelevanceCollector()]):
        torch.manual_seed(3)
        modules.append(module := make_module())
        arguments = {"precision": precision, "accumulate_grad_batches": 3, "val_check_interval": 2, "max_epochs": 2}
        make_trainer(callbacks=callbacks, **arguments).fit(module, make_loader(), make_loader(seed=2))
    assert same_weights(*modules)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["the module", "a part"])
def test_compiled_modules_are_pruned_under_their_own_names(make_module, make_loader, make_trainer, whole) -> None:
    plain, module = make_module(), make_module()
    runs = []
    for subject, compiled in ((plain, False), (module, True)):
        if compiled and not whole:
            subject.net = torch.compile(subject.net, backend="eager")
        torch.manual_seed(0)
        pruning = RelevancePruning(sparsity=0.5, scope="global", summary=False)
        fitted = torch.compile(subject, backend="eager") if compiled and whole else subject
        make_trainer(callbacks=[pruning], max_epochs=2).fit(fitted, make_loader(), make_loader(seed=2))
        runs.append(pruning.masks)
    assert list(runs[0]) == list(runs[1]) == ["net.0.weight", "net.4.weight", "net.6.weight"]
    assert runs[0] == runs[1]
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 4


class Recomputed(nn.Module):
    def __init__(self, layers: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_()  # without it, reentrant checkpoints train nothing
        for layer in self.layers:
            inputs = checkpoint(layer, inputs, use_reentrant=self.reentrant)
        return inputs


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_inside_a_training(make_module, make_loader, make_trainer, reentrant) -> None:
    module = make_module()
    module.net = Recomputed(module.net, reentrant)
    pruning = RelevancePruning(sparsity=0.5, scope="global", summary=False)
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert module.zeros_after_step == [0] * 4 + [ENTRIES // 2] * 4


@pytest.mark.slow
def test_hugging_face_checkpointing_inside_a_training(make_trainer, same_weights) -> None:
    """Recomputed in the validation's collection, and trained as without the callback."""
    pytest.importorskip("transformers")

    class LanguageModel(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = llama(vocab_size=50, intermediate_size=32, num_key_value_heads=2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # renamed in newer versions
                self.model.gradient_checkpointing_enable()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    tokens = torch.randint(50, (16, 12))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], 4)
    modules = []
    for callbacks in ([], [RelevanceCollector()]):
        modules.append(module := LanguageModel())
        make_trainer(callbacks=callbacks, max_epochs=1).fit(module, loader, loader)
    assert same_weights(*modules)
