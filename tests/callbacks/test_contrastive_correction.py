"""The callback that makes a patch from two validation loaders, or two sets of data."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lrp_prune import LRP, Relevance, attribute
from lrp_prune.callbacks import Guard
from lrp_prune.callbacks.contrastive_correction import ContrastiveCorrection
from lrp_prune.correction import Automatic, Patch
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.small_models import batch_for, build

OPTIONS: dict[str, Any] = {"amount": 20, "method": LRP(target="class")}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def zeros(module: nn.Module, patch: Patch) -> int:
    parameters = dict(module.named_parameters())
    return sum(int((parameters[name].view(-1)[patch[name].positions] == 0).sum()) for name in patch)


def expected(module, loaders, **options) -> Patch:
    module.eval()
    general, undesired = (attribute(module, loader, target="class", statistic="signed") for loader in loaders)
    return Patch.from_contrast(module, general, undesired, 20, **options)


def test_validate_makes_the_patch_that_two_relevances_make(make_module, make_loader, make_trainer) -> None:
    module, loaders = make_module(), [make_loader(seed=1), make_loader(seed=2)]
    wanted, before = expected(module, loaders), tensors(module)
    correction = ContrastiveCorrection(**OPTIONS)
    with pytest.raises(RuntimeError, match="no patch was made yet"):
        _ = correction.patch
    trainer = make_trainer(callbacks=[correction])
    results = trainer.validate(module, loaders, verbose=False)
    assert correction.patch == wanted
    assert results[0]["correction/entries"] == 20
    assert same(tensors(module), before)


def test_a_corrected_module_gets_it_and_other_options_reach_the_contrast(
    make_module, make_loader, make_trainer
) -> None:
    module, loaders = make_module(), [make_loader(seed=1), make_loader(seed=2)]
    options = {"normalize": "mean", "reverse": True}
    wanted = expected(module, loaders[::-1], **options, guard=Guard(0.4, scope="layer"))
    guard = Guard(0.4, scope="layer")
    correction = ContrastiveCorrection(
        **OPTIONS, **options, guard=guard, general=1, undesired=0, behaviour="bad", strength=0.5
    )
    corrected = CorrectedModule(module)
    make_trainer(callbacks=[correction]).validate(corrected, loaders, verbose=False)
    assert correction.patch == wanted
    assert correction.patch.behaviour == "bad"
    assert corrected.strengths == {"bad": 0.5}
    assert wanted.strength_in(module) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("fitting", [False, True])
def test_a_second_patch_has_other_weights(make_module, make_loader, make_trainer, fitting) -> None:
    corrected, loaders = CorrectedModule(make_module()), [make_loader(seed=1), make_loader(seed=2)]
    for behaviour in ("first", "second"):
        correction = ContrastiveCorrection(**OPTIONS, behaviour=behaviour, strength=0.5)
        if fitting:
            make_trainer(callbacks=[correction], max_epochs=1).fit(corrected, make_loader(), loaders)
        else:
            make_trainer(callbacks=[correction]).validate(corrected, loaders, verbose=False)
    assert corrected.strengths == {"first": 0.5, "second": 0.5}
    assert not corrected.patches["first"].overlap(corrected.patches["second"])
    assert corrected.patches["second"].num_entries == 20


def test_reference_data_stand_in_for_loaders(make_module, make_loader, make_trainer) -> None:
    module, general, undesired = make_module(), make_loader(seed=1), make_loader(seed=2)
    wanted = expected(module, [general, undesired])
    both = ContrastiveCorrection(**OPTIONS, general=list(general), undesired=list(undesired))
    mixed = ContrastiveCorrection(**OPTIONS, undesired=undesired, behaviour="mixed")
    make_trainer(callbacks=[both, mixed]).validate(module, general, verbose=False)
    assert both.patch == wanted
    assert mixed.patch == wanted


@pytest.mark.slow
def test_in_fit_it_is_handed_over_at_the_next_epoch_after_the_checkpoint(
    make_module, make_loader, make_trainer, tmp_path
) -> None:
    def module_without_dropout() -> LightningModule:  # whose random state Lightning does not resume
        made = make_module()
        made.net[3].p = 0.0
        return made

    module, loaders = module_without_dropout(), [make_loader(seed=1), make_loader(seed=2)]
    correction = ContrastiveCorrection(**OPTIONS)
    seen: list[dict[str, float]] = []

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            seen.append(pl_module.strengths)

    corrected = CorrectedModule(module)
    trainer = make_trainer(
        callbacks=[correction, Watch(), ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")],
        enable_checkpointing=True,
        max_epochs=2,
    )
    trainer.fit(corrected, make_loader(), loaders)
    assert seen == [{}, {}, {"undesired": 1.0}]
    assert zeros(module, correction.patch) == 20
    first = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert first["state_dict"]["_extra_state"]["patches"] == {}

    again, resumed = CorrectedModule(module_without_dropout()), ContrastiveCorrection(**OPTIONS)
    trainer = make_trainer(callbacks=[resumed], max_epochs=2)
    trainer.fit(again, make_loader(), loaders, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.patch == correction.patch
    assert again.strengths == {"undesired": 1.0}
    assert same(tensors(again), tensors(corrected))


def test_a_patch_made_in_the_last_validation_is_handed_over_at_the_end(make_module, make_loader, make_trainer) -> None:
    corrected, correction = CorrectedModule(make_module()), ContrastiveCorrection(**OPTIONS)
    loaders = [make_loader(seed=1), make_loader(seed=2)]
    make_trainer(callbacks=[correction], max_epochs=1).fit(corrected, make_loader(), loaders)
    assert corrected.strengths == {"undesired": 1.0}


def test_a_patch_made_within_an_epoch_is_handed_over_with_the_values_that_training_went_on_to(
    make_module, make_loader, make_trainer
) -> None:
    made: list[Patch] = []
    entries: list[dict[str, Tensor]] = []

    def now(model: nn.Module, patch: Patch) -> dict[str, Tensor]:
        return {name: model.get_parameter(name).detach().view(-1)[patch[name].positions].clone() for name in patch}

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if not made:
                made.append(correction.patch)

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 0:
                entries.append(now(module, correction.patch))

    module, correction = make_module(), ContrastiveCorrection(**OPTIONS, behaviour="late")
    corrected = CorrectedModule(module)
    corrected.add("other", Patch.from_positions(module, {"net.6.weight": torch.tensor([0, 5])}))
    trainer = make_trainer(
        callbacks=[Watch(), correction], max_epochs=2, val_check_interval=0.5, num_sanity_val_steps=0
    )
    trainer.fit(corrected, make_loader(), [make_loader(seed=1), make_loader(seed=2)])
    patch = correction.patch
    assert patch == corrected.patches["late"] != made[0]
    assert {name: entry.positions.tolist() for name, entry in patch.items()} == {
        name: entry.positions.tolist() for name, entry in made[0].items()
    }
    assert patch.provenance == made[0].provenance
    assert corrected.strengths == {"other": 1.0, "late": 1.0}
    assert zeros(module, patch) == 20
    corrected.disable("late")
    assert all(torch.equal(values, entries[0][name]) for name, values in now(module, patch).items())
    assert all(torch.equal(patch[name].originals, entries[0][name]) for name in patch)


@pytest.mark.slow
def test_effects_are_logged_before_and_after(make_module, make_loader, make_trainer) -> None:
    def size(model: nn.Module) -> float:
        return float(sum(parameter.detach().abs().sum() for parameter in model.parameters()))

    corrected = CorrectedModule(make_module())
    correction = ContrastiveCorrection(
        **OPTIONS, undesired_metric=size, general_metric="val_loss/dataloader_idx_0", guard=Guard(by="abs_token")
    )
    trainer = make_trainer(callbacks=[correction])
    loaders = [make_loader(seed=1), make_loader(seed=2)]
    results = trainer.validate(corrected, loaders, verbose=False)[0]
    assert results["correction/undesired"] < results["correction/undesired_before"]
    assert results["correction/general_before"] == pytest.approx(results["val_loss/dataloader_idx_0"])
    assert correction.general is not None
    assert correction.patch.provenance["references"]["guard_by"]["statistic"] == "abs_token"
    again = trainer.validate(corrected, loaders, verbose=False)[0]
    assert again["val_loss/dataloader_idx_0"] != results["val_loss/dataloader_idx_0"]

    missing = ContrastiveCorrection(**OPTIONS, general_metric="nothing")
    with pytest.raises(MisconfigurationException, match="general_metric 'nothing' was not logged"):
        make_trainer(callbacks=[missing]).validate(make_module(), loaders, verbose=False)


@pytest.mark.slow
def test_before_and_after_are_measured_in_one_mode_and_training_goes_on_undisturbed(
    make_module, make_loader, make_trainer
) -> None:
    seen: list[tuple[bool, bool]] = []

    def output(model: nn.Module) -> float:
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(5)
        return float(model(torch.ones(4, 8)).square().mean())

    def fit(**options: Any) -> tuple[CorrectedModule, dict[str, float]]:
        torch.manual_seed(0)
        corrected = CorrectedModule(make_module())
        correction = ContrastiveCorrection(**OPTIONS, strength=0.0, **options)
        trainer = make_trainer(callbacks=[correction], max_epochs=2, num_sanity_val_steps=0)
        trainer.fit(corrected, make_loader(), [make_loader(seed=1), make_loader(seed=2)])
        assert corrected.training
        return corrected, {name: float(value) for name, value in trainer.callback_metrics.items()}

    measured, logged = fit(undesired_metric=output)
    assert seen == [(False, False)] * 2
    assert logged["correction/undesired"] == logged["correction/undesired_before"]
    plain, _ = fit()
    assert same(tensors(measured), tensors(plain))


@pytest.mark.slow
def test_auto_takes_the_smallest_amount_and_reports_the_curve(make_module, make_loader, make_trainer, capsys) -> None:
    module, loaders = make_module(), [make_loader(seed=1), make_loader(seed=2)]
    before = tensors(module)

    def logit(model: nn.Module) -> float:
        return float(sum((parameter.detach() != 0).sum() for parameter in model.parameters() if parameter.dim() > 1))

    correction = ContrastiveCorrection(
        amount=Automatic(amounts=[10, 100, 200], reduction=0.1, refine=2),
        method=LRP(target="class"),
        undesired_metric=logit,
        general_metric=lambda model: 1.0,
    )
    make_trainer(callbacks=[correction]).validate(module, loaders, verbose=False)
    assert correction.search is not None
    assert correction.patch.num_entries == min(t.entries for t in correction.search.curve if t.accepted)
    assert [trial.amount for trial in correction.search.curve] == [10, 32, 57, 100, 200]
    assert same(tensors(module), before)

    never = ContrastiveCorrection(
        amount=Automatic(amounts=[10]),
        method=LRP(target="class"),
        undesired_metric=logit,
        general_metric=lambda m: -logit(m),
    )
    with pytest.warns(UserWarning, match="nothing is corrected"):
        make_trainer(callbacks=[never]).validate(module, loaders, verbose=False)
    with pytest.raises(RuntimeError, match=r"see \.search\.curve"):
        _ = never.patch


def test_a_hugging_face_model_in_a_corrected_module(make_trainer) -> None:
    model = build("llama")
    loaders = [
        DataLoader([{"input_ids": batch_for("llama")["input_ids"] + shift}], batch_size=None) for shift in (0, 2)
    ]
    general, undesired = (
        attribute(
            model, loader, target="next_token", composite="attnlrp", statistic="signed", include=["*.mlp"], skip_first=1
        )
        for loader in loaders
    )
    corrected = CorrectedModule(model)
    correction = ContrastiveCorrection(
        amount=0.01, method=LRP(composite="attnlrp", target="next_token", skip_first=1), include=["*.mlp"]
    )
    make_trainer(callbacks=[correction]).validate(corrected, loaders, verbose=False)
    corrected.disable("undesired")
    assert correction.patch == Patch.from_contrast(model, general, undesired, 0.01)
    assert all(name.startswith("model.layers.") for name in correction.patch)


def test_wrong_use_is_refused_without_touching_the_module(make_module, make_loader, make_trainer) -> None:
    for wrong, message in (
        ({"amount": 0}, "amount must be"),
        ({"amount": 1.5}, "amount must be"),
        ({"amount": True}, "amount must be"),
        ({"amount": "all"}, "amount must be"),
        ({"amount": "auto"}, "pass undesired_metric and general_metric"),
        ({"strength": 2}, r"strength must be in \[0, 1\]"),
        ({"undesired": 0}, "both validation loader 0"),
        ({"normalize": "median"}, "normalize must be"),
        ({"guard": 0.0}, "guard must be"),
        ({"method": "wanda"}, "explains nothing"),
        ({"undesired_target": "tokens"}, "target must be one of"),
        ({"granularity": "letter"}, "granularity must be"),
        ({"include": "mlp"}, "list of name patterns"),
        ({"behaviour": ""}, "behaviour must be"),
        ({"general": iter([])}, "iterated over only once"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            ContrastiveCorrection(**wrong)
    for wrong, message in (
        ({"guard": Guard(by=Relevance({"a": torch.ones(2)}))}, "pass the name of a statistic"),
        ({"general": []}, "general is an empty list"),
        ({"undesired": []}, "undesired is an empty list"),
        ({"general": "all"}, "general must be the index of a validation loader, batches .* got 'all'"),
        ({"undesired": "all"}, "undesired must be the index of a validation loader, batches .* got 'all'"),
        ({"undesired": -1}, "undesired must be an integer of at least 0, got -1"),
        ({"general": torch.zeros(2, 8)}, "general must be an iterable of batches, got a tensor"),
        ({"general": 2.5}, "general must be the index"),
        ({"reverse": "yes"}, "reverse must be True or False, got 'yes'"),
        ({"allow_untested": 1}, "allow_untested must be True or False, got 1"),
        ({"undesired_metric": 3}, "undesired_metric must be a function of the model .* got 3"),
        ({"general_metric": ["loss"]}, r"general_metric must be a function of the model .* got \['loss'\]"),
        ({"general_metric": ""}, "general_metric must be a function"),
        ({"amount": "some"}, "amount must be .* got 'some'"),
        ({"amount": float("nan")}, "amount must be .* got nan"),
        ({"strength": float("nan")}, "strength must be .* got nan"),
        ({"strength": "full"}, "strength must be .* got 'full'"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            ContrastiveCorrection(**wrong)
    module = make_module()
    before = tensors(module)
    loaders = [make_loader(seed=1), make_loader(seed=2)]
    for options, data, message in (
        ({}, loaders[:1], "validation loader 1 is a reference set, but there are 1"),
        ({"include": ["nothing"]}, loaders, "matches no parameter"),
        ({"amount": 500}, loaders, "may be removed"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(callbacks=[ContrastiveCorrection(**{**OPTIONS, **options})]).validate(
                CorrectedModule(module), data, verbose=False
            )
        assert same(tensors(module), before)
    assert isinstance(module, LightningModule)
