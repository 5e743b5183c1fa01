"""Patches that wait for parameters which are made, or get their values, in setup or configure_model."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lrp_prune.correction import Patch
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.patches import POSITIONS, entries, patch_of, tensors


def test_layers_made_in_configure_model_get_their_patches(everything, trainer) -> None:
    patch = patch_of(everything())
    module = everything(late=True)
    corrected = CorrectedModule(module, {"example": patch})
    assert (corrected.strengths, corrected.pending) == ({"example": 0.0}, {"example": 1.0})
    trainer(max_epochs=1).fit(corrected)
    assert (corrected.strengths, corrected.pending) == ({"example": 1.0}, {})
    assert not entries(module).any()
    other = nn.ModuleDict({"absent": nn.Linear(2, 2)})
    with pytest.raises(KeyError, match="has no parameter"):
        patches = {"x": Patch.from_positions(other, {"absent.weight": torch.tensor([0])})}
        trainer(max_epochs=1).fit(CorrectedModule(everything(late=True), patches))


def test_pending_patches_can_be_switched_and_removed(everything, loader, trainer) -> None:
    made = everything()
    names = ("half", "off", "gone", "later")
    patches = {name: patch_of(made, torch.tensor([index])) for index, name in enumerate(names)}
    originals = entries(made, torch.arange(4))
    module = everything(late=True)
    corrected = CorrectedModule(module, patches, {"later": 0})
    corrected.enable("half", 0.5)
    corrected.disable("off")
    corrected.enable("later")
    assert corrected.remove("gone") is patches["gone"]
    with pytest.raises(ValueError, match="strength must be"):
        corrected.enable("half", 2)
    with pytest.raises(ValueError, match="there is a patch 'half' already"):
        corrected.add("half", patches["half"])
    with pytest.raises(KeyError, match="no patch 'gone'"):
        corrected.disable("gone")
    assert list(corrected.patches) == ["half", "off", "later"]
    assert set(corrected.strengths.values()) == {0.0}
    wanted = {"half": 0.5, "off": 0.0, "later": 1.0}
    assert corrected.pending == corrected.state_dict()["_extra_state"]["strengths"] == wanted
    trainer(max_epochs=1).validate(corrected, loader(seed=2), verbose=False)
    assert (corrected.strengths, corrected.pending) == (wanted, {})
    assert torch.equal(entries(module, torch.arange(4)), originals * torch.tensor([0.5, 1, 1, 0]))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_patch_of_another_model_is_refused_at_once_also_where_layers_may_come_late(everything, hook) -> None:
    def own(self: nn.Module, *_) -> None:
        """Makes no layers."""

    kept = {name: getattr(LightningModule, name) for name in ("setup", "configure_model")}
    module = everything()
    module.__class__ = type("Prepared", (everything,), {**kept, hook: own})
    before = tensors(module)
    other = everything()
    other.net[4].weight.data.view(-1)[20] += 1
    for patch, message in (
        (patch_of(other), "differs elsewhere"),
        (patch_of(other, torch.tensor([20, 21])), "other values than the patch was made for"),
        (patch_of(everything(width=5)), "it was made for another model"),
    ):
        with pytest.raises(ValueError, match=message):
            CorrectedModule(module, {"fits": patch_of(module), "other": patch})
        assert all(torch.equal(value, before[name]) for name, value in tensors(module).items())
    corrected = CorrectedModule(module, {"example": patch_of(module)})
    assert (corrected.strengths, corrected.pending) == ({"example": 1.0}, {})


def test_layers_without_values_get_their_patches_when_they_have_them(everything, loader, trainer) -> None:
    class Meta(everything):
        def configure_model(self) -> None:
            if self.net[4].weight.is_meta:
                self._make()

    made = everything()
    first, last = Patch.from_positions(made, {"net.0.weight": POSITIONS}), patch_of(made)
    module = Meta()
    module.net[4].to("meta")
    with pytest.raises(ValueError, match="it was made for another model"):
        CorrectedModule(module, {"other": patch_of(everything(width=5))})
    corrected = CorrectedModule(module, {"first": first, "last": last})
    assert (corrected.strengths, corrected.pending) == ({"first": 1.0, "last": 0.0}, {"last": 1.0})
    corrected.disable("first")
    trainer(max_epochs=1).validate(corrected, loader(seed=2), verbose=False)
    assert (corrected.strengths, corrected.pending) == ({"first": 0.0, "last": 1.0}, {})
    assert not entries(module).any()
