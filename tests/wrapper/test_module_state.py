"""What a corrected module stores and loads: uncorrected weights, with its patches beside them."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lrp_prune.correction import Patch
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.patches import LAST, entries, patch_of, tensors, wrapped


def test_the_state_dict_holds_uncorrected_weights_and_the_patches(everything) -> None:
    module = everything()
    plain = tensors(module)
    corrected = wrapped(module)
    state = corrected.state_dict()
    for name, value in plain.items():
        assert torch.equal(state[f"module.{name}"], value)
    assert not entries(module).any()
    assert state["module.net.0.weight"].data_ptr() == module.net[0].weight.data_ptr()
    other = everything(width=8)
    other.load_state_dict(
        {name.removeprefix("module."): value for name, value in state.items() if name != "_extra_state"}
    )
    assert torch.equal(other.net[4].weight, plain[LAST])


def test_loading_a_state_dict_brings_its_patches(everything, tmp_path: Path) -> None:
    module = everything()
    corrected = wrapped(module)
    corrected.add("second", patch_of(module, torch.tensor([1, 2])), 0.5, strict=False)
    torch.save(corrected.state_dict(), tmp_path / "state.pt")
    originals = tensors(module)
    fresh = everything()
    nn.init.normal_(fresh.net[4].weight)
    again = CorrectedModule(fresh)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.strengths == {"example": 1.0, "second": 0.5}
    assert all(torch.equal(value, originals[name]) for name, value in tensors(fresh).items())
    corrected.disable("example")
    again.disable("example")
    assert torch.equal(fresh.net[4].weight, module.net[4].weight)


def test_uncorrected_weights_are_stored_of_checkpointed_layers_too() -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4, bias=False)), nn.ReLU())

    module = made()
    weight = next(module.parameters())
    original = weight.detach().clone()
    corrected = CorrectedModule(module, {"example": Patch.from_positions(module, {"0.weight": torch.tensor([0, 5])})})
    state = corrected.state_dict()
    assert not weight.view(-1)[[0, 5]].any() and torch.equal(state["module.0.weight"], original)
    again = CorrectedModule(made())
    again.load_state_dict(state)
    again.disable("example")
    assert torch.equal(next(again.parameters()), original)


def test_a_state_of_another_version_changes_nothing(everything) -> None:
    module = everything()
    corrected = wrapped(module)
    before, state = tensors(module), corrected.state_dict()
    state["_extra_state"] = {**state["_extra_state"], "version": 2}
    with pytest.raises(ValueError, match="version 2"):
        corrected.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in tensors(module).items())
    assert corrected.strengths == {"example": 1.0}


def test_loading_weights_without_patches_keeps_those_there_are(everything) -> None:
    module = everything()
    corrected = wrapped(module)
    source = everything()
    nn.init.normal_(source.net[4].weight)
    corrected.load_state_dict({f"module.{name}": value for name, value in source.state_dict().items()})
    assert not entries(module).any()
    corrected.disable("example")
    assert torch.equal(module.net[4].weight, source.net[4].weight)
    corrected.enable("example")
    corrected.load_state_dict({}, strict=False)
    corrected.disable("example")
    assert torch.equal(module.net[4].weight, source.net[4].weight)


def test_weights_loaded_while_uncorrected_are_corrected_afterwards(everything) -> None:
    module = everything()
    corrected = wrapped(module)
    source = everything()
    nn.init.normal_(source.net[4].weight)
    with corrected.uncorrected():
        corrected.load_state_dict({f"module.{name}": value for name, value in source.state_dict().items()})
        assert torch.equal(module.net[4].weight, source.net[4].weight)
        assert torch.equal(corrected.state_dict()[f"module.{LAST}"], source.net[4].weight)
    assert not entries(module).any()
    corrected.disable("example")
    assert torch.equal(module.net[4].weight, source.net[4].weight)


def test_load_from_checkpoint(everything, trainer, tmp_path) -> None:
    corrected = wrapped(everything())
    run = trainer(max_epochs=1)
    run.fit(corrected)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = CorrectedModule.load_from_checkpoint(tmp_path / "last.ckpt", module=everything())
    assert again.hparams == corrected.hparams == corrected.module.hparams
    assert not entries(again.module).any()
    for name, value in tensors(corrected).items():
        assert torch.equal(tensors(again)[name], value)


def test_copies_and_pickles_stand_on_their_own(everything, trainer) -> None:
    module = everything()
    originals = entries(module)
    corrected = wrapped(module)
    for other in (copy.deepcopy(corrected), pickle.loads(pickle.dumps(corrected))):
        assert other.delegate is other.module is not module
        assert not entries(other.module).any()
        trainer(max_epochs=1).fit(other)
        assert not entries(other.module).any()
        other.disable("example")
        assert torch.equal(entries(other.module), originals)
    assert not entries(module).any()
