"""What would be pruned is shown, and the training goes on as if nobody had asked."""

import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lrp_prune.callbacks import RelevancePruning, Rounds, _round

pytestmark = pytest.mark.slow

WEIGHTS = 192 + 384 + 64


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(_round, "show", lambda trainer, text: texts.append(text))
    return texts


@pytest.mark.parametrize(
    ("callback", "trainer_arguments"),
    [
        ({}, {}),
        ({"rounds": Rounds(3, every_n_steps=2), "scope": "layer"}, {"val_check_interval": 2}),
        ({"rounds": Rounds(start=0), "reference": True}, {"accumulate_grad_batches": 3}),
        ({"rounds": Rounds(start=0), "method": "magnitude", "granularity": "weight"}, {}),
        ({"granularity": "neuron", "rounds": 2}, {"limit_val_batches": 2}),
    ],
)
def test_the_training_is_dense_and_bit_for_bit_the_same(
    make_module, make_loader, make_trainer, same_weights, shown, callback, trainer_arguments
) -> None:
    if "reference" in callback:
        callback = {**callback, "reference": make_loader(seed=5)}
    states = []
    previews = RelevancePruning(sparsity=0.75, schedule="linear", preview=True, **callback)
    for callbacks in ([], [previews]):
        torch.manual_seed(3)
        module = make_module()
        trainer = make_trainer(callbacks=callbacks, max_epochs=3, **trainer_arguments)
        trainer.fit(module, make_loader(), make_loader(seed=2))
        states.append((module, trainer.optimizers[0].state_dict(), torch.get_rng_state()))
    (plain, moments, rng), (previewed, its_moments, its_rng) = states
    assert same_weights(plain, previewed) and torch.equal(rng, its_rng)
    for index, state in moments["state"].items():
        assert all(
            torch.equal(torch.as_tensor(state[key]), torch.as_tensor(its_moments["state"][index][key])) for key in state
        )
    assert previews.masks is None and previews.round == 0 and previews.state_dict()["pending"] is None
    assert len(shown) == 1 and previews.previewed.report() in shown[0]
    assert re.match(rf"Preview of pruning by {callback.get('method', 'lrp')}.*: no weight is changed", shown[0])


def test_weights_that_are_computed_by_what_changes_are_left_alone(make_loader, make_trainer, make_module) -> None:
    states = []
    for callbacks in ([], [RelevancePruning(0.5, 1, preview=True)]):
        torch.manual_seed(3)
        module = make_module()
        module.net[0] = torch.nn.utils.parametrizations.spectral_norm(module.net[0])
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
        states.append(module.state_dict())
    assert any("parametrizations" in name for name in states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_is_shown_is_what_one_round_would_prune(make_module, make_loader, make_trainer, shown) -> None:
    found = []
    for arguments in ({"rounds": 1}, {"rounds": 3, "schedule": "linear", "preview": True}):
        torch.manual_seed(3)
        pruning = RelevancePruning(sparsity=0.75, **arguments)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))
        found.append(pruning)
    pruned, previews = found
    assert previews.previewed == pruned.masks and pruned.previewed is None
    assert previews.previewed.num_pruned == round(0.75 * WEIGHTS)
    # One epoch is enough, although three rounds would not fit.
    again = RelevancePruning(sparsity=0.75, rounds=3, preview=True)
    torch.manual_seed(3)
    make_trainer(callbacks=[again], max_epochs=1).fit(make_module(), make_loader(), make_loader(seed=2))
    assert again.previewed == pruned.masks


def test_a_preview_that_cannot_come_is_said(make_module, make_loader, make_trainer, shown) -> None:
    with pytest.warns(UserWarning, match="there is no preview"):
        pruning = RelevancePruning(rounds=Rounds(start=5), preview=True)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))
    assert not shown and pruning.previewed is None
    with pytest.raises(MisconfigurationException, match="this training has none"):
        make_trainer(callbacks=[RelevancePruning(preview=True)], max_epochs=2).fit(make_module(), make_loader())
    with pytest.raises(MisconfigurationException, match="preview must be True or False"):
        RelevancePruning(preview="yes")


def test_what_an_earlier_training_pruned_stays_pruned(make_module, make_loader, make_trainer, shown, tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    rounds = {"sparsity": 0.75, "rounds": Rounds(2, every_n_epochs=2), "schedule": [0.25, 0.75]}
    first, previews = RelevancePruning(**rounds), RelevancePruning(**rounds, preview=True)
    trainer = make_trainer(callbacks=[first, keep], max_epochs=4, enable_checkpointing=True)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    shown.clear()
    trainer = make_trainer(callbacks=[previews], max_epochs=5)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert previews.round == 1 and previews.masks.sparsity == 0.25 and len(shown) == 1
    assert previews.previewed.sparsity == 0.75 and previews.previewed & previews.masks == previews.previewed
    parameters = dict(trainer.lightning_module.named_parameters())
    assert sum(int((parameters[name] == 0).sum()) for name in previews.masks) == WEIGHTS // 4
