"""Rounds that update what they keep, on each kind of model, mask and number."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import LeastSquares
from tests.support.compensation import check_closed_form
from tests.support.epoch_states import States
from tests.support.small_models import build


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "relevance"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(
    precision: str, weights: Any, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    way = LeastSquares(weights=weights)
    pruning, before, after, loader = RelevancePruning(0.6, compensation=way), States(), States(), make_loader(seed=2)
    trainer = make_trainer(callbacks=[before, pruning, after], max_epochs=2, precision=precision)
    trainer.fit(make_module(), make_loader(), loader)
    dense, pruned, masks = before.modules[1], after.modules[1], pruning.masks
    masked = copy.deepcopy(dense)
    masks.apply_(masked)
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    inputs = next(iter(loader))[0].to(kind)
    errors = []
    for name, mask in masks.items():
        weight = pruned.get_parameter(name)
        assert weight.dtype is kind and not weight[~mask].any() and not torch.equal(weight, masked.get_parameter(name))
    with torch.no_grad():
        for model in (pruned, masked):
            errors.append(float((model.eval()(inputs) - dense.eval()(inputs)).square().mean()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(
    reentrant: bool, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(type(make_module())):  # type: ignore[misc]
        """Parts of its forward are computed again in the backward."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs = self.net[:3](inputs)
            return checkpoint(self.net[3:], inputs, use_reentrant=reentrant)

    plain, module = make_module("none"), Checkpointed("none")
    pruning = [RelevancePruning(sparsity=0.6, compensation="exact") for _ in range(2)]
    for entry, callback in zip((plain, module), pruning, strict=True):
        torch.manual_seed(0)
        make_trainer(callbacks=[callback], max_epochs=2).fit(entry, make_loader(), make_loader(seed=2))
    assert pruning[0].masks == pruning[1].masks
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_target_of_the_modules_own_is_run(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    class Unrunnable(type(make_module())):  # type: ignore[misc]
        """Its forward takes what no loader gives."""

        def forward(self, inputs: torch.Tensor, scale: float) -> torch.Tensor:
            return self.net(inputs) * scale

        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

        def relevance_target(self, batch: Any) -> torch.Tensor:
            return self(batch[0], 1.0).gather(1, batch[1][:, None])[:, 0]

    module, plain = Unrunnable("none"), make_module("none")
    for entry in (module, plain):
        pruning = RelevancePruning(
            sparsity=0.6, compensation="exact", method="magnitude", reference=make_loader(seed=2)
        )
        make_trainer(callbacks=[pruning], max_epochs=2).fit(entry, make_loader(), make_loader(seed=2))
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Images(nn.Sequential):
    """Filters, in groups among them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip


class Language(LightningModule):
    """A transformer, with heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build("llama")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vectors", {"scope": "2:4"}),
        ("vectors", {"granularity": "neuron"}),
        ("images", {"granularity": "neuron"}),
        ("images", {"scope": "row"}),
        ("language", {"granularity": "head"}),
        ("language", {"scope": "2:4"}),
    ],
    ids=str,
)
def test_each_layer_is_its_closed_form_after_every_kind_of_mask(
    kind: str, options: dict[str, Any], make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    way, loader = LeastSquares(damping=0.05, steps=1000, tolerance=1e-12), make_loader(seed=2)
    module = Language() if kind == "language" else make_module()
    if kind == "images":
        module.net = Images()
    if kind == "language":
        ids = torch.randint(2, 50, (24, 12), generator=torch.Generator().manual_seed(0))
        loader = DataLoader([{"input_ids": entry} for entry in ids], 8)
    pruning, before, after = RelevancePruning(0.5, compensation=way, **options), States(), States()
    trainer = make_trainer(callbacks=[before, pruning, after], max_epochs=2, precision="64-true")
    trainer.fit(module, loader if kind == "language" else make_loader(), loader)
    dense, pruned = before.modules[1], after.modules[1]

    if kind == "language":
        dense, pruned = dense.model, pruned.model

    def run(model: nn.Module) -> None:
        model(torch.cat([batch["input_ids"] if kind == "language" else batch[0].double() for batch in loader]))

    checked = check_closed_form(dense, pruned, pruning.masks, run, way, 1e-6)
    masked = {name for name in pruning.masks if pruning.masks.pruned_in(name)}
    assert checked == {name for name in masked if dense.get_parameter(name).dim() > 1} and len(checked) >= 2


@pytest.mark.slow
def test_weights_beside_adapters_are_updated_and_adapters_are_not(make_trainer: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    module = Language()
    module.model = peft.get_peft_model(module.model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(2, 50, (24, 12), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": entry} for entry in ids], 8)
    pruning = RelevancePruning(0.5, compensation="exact", include=["*.q_proj", "*.down_proj"], scope="row")
    before, after = States(), States()
    make_trainer(callbacks=[before, pruning, after], max_epochs=2).fit(module, loader, loader)
    dense, pruned = (dict(state.modules[1].named_parameters()) for state in (before, after))
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert changed == {name for name in dense if "base_layer" in name} and any("lora_B" in name for name in dense)
    assert pruning.masks is not None and pruning.masks.sparsity == 0.5
    masked = copy.deepcopy(before.modules[1])
    pruning.masks.apply_(masked)
    with torch.no_grad():
        whole, errors = before.modules[1].eval().model(input_ids=ids).logits, []
        for entry in (after.modules[1], masked):
            errors.append(float((entry.eval().model(input_ids=ids).logits - whole).square().mean()))
    assert errors[0] < 0.9 * errors[1]
