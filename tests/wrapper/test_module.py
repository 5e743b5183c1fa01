"""The wrapper: a trainer sees the module inside, and patches go wherever it goes."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from lrp_prune.correction import Patch, load_patches
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.patches import POSITIONS, entries, patch_of, tensors, wrapped
from tests.support.small_models import batch_for, build


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_without_an_enabled_patch_a_run_is_that_of_the_module_inside(everything, loader, trainer, manual) -> None:
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        module = everything(manual=manual)
        model = CorrectedModule(module, {"example": patch_of(module)}, {"example": 0}) if wrap else module
        run = trainer(max_epochs=2)
        run.fit(model, val_dataloaders=loader(seed=2))
        logged = {name: float(value) for name, value in run.logged_metrics.items()}
        validated = run.validate(model, loader(seed=3), verbose=False)
        tested = run.test(model, loader(seed=4), verbose=False)
        predicted = torch.cat(run.predict(model, loader(seed=5)))
        results.append((logged, validated, tested, predicted, tensors(module), module.called))
    plain, corrected = results
    assert corrected[0] == plain[0]
    assert {"train_loss_step", "train_loss_epoch", "mean_loss_epoch", "accuracy"} <= set(corrected[0])
    assert corrected[1:3] == plain[1:3]
    assert torch.equal(corrected[3], plain[3])
    assert all(torch.equal(corrected[4][name], plain[4][name]) for name in plain[4])
    assert corrected[5] == plain[5]
    assert {"on_after_backward", "optimizer_step", "configure_callbacks", "on_predict_end"} - set(plain[5]) <= (
        {"optimizer_step", "on_after_backward"} if manual else set()
    )


def test_what_is_overridden_is_what_the_module_inside_overrides(everything) -> None:
    module = everything()
    corrected = wrapped(module)
    for name in ("training_step", "setup", "on_train_start", "configure_model", "val_dataloader", "train_dataloader"):
        assert is_overridden(name, corrected) == is_overridden(name, module), name

    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*[nn.Identity()] * 4, nn.Linear(4, 3))

    bare = Bare()
    for name in ("training_step", "setup", "on_train_start", "on_train_end", "configure_model", "validation_step"):
        assert not is_overridden(name, wrapped(bare)), name


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_training_keeps_patched_entries_and_undo_brings_back_the_originals(
    everything, trainer, manual, strength
) -> None:
    module = everything(manual=manual)
    originals = entries(module)
    before = module.net[4].weight.detach().clone()
    corrected = CorrectedModule(module, {"example": patch_of(module)}, {"example": strength})
    trainer(gradient_clip_val=None if manual else 0.1).fit(corrected)
    assert torch.equal(entries(module), originals * (1 - strength))
    assert not torch.equal(module.net[4].weight, before)
    corrected.disable("example")
    assert torch.equal(entries(module), originals)


def test_patches_are_switched_while_it_trains(everything, trainer) -> None:
    module = everything()
    originals = entries(module)
    corrected = wrapped(module)
    seen = []

    class Switching(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            strength = (1.0, 0.25, 0.0)[trainer.current_epoch]
            pl_module.enable("example", strength)

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            seen.append(entries(module))

    trainer(max_epochs=3, callbacks=[Switching()]).fit(corrected)
    assert all(not value.any() for value in seen[:4])
    assert all(torch.equal(value, originals * 0.75) for value in seen[4:8])
    assert bool((seen[8] != originals).all())


def test_metrics_logged_inside_go_by_the_names_that_lightning_restores_them_by(everything, trainer) -> None:
    module = everything()
    corrected = wrapped(module)
    names = set()

    class Reading(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            names.update(result.meta.metric_attribute for result in trainer._results.values())

    trainer(max_epochs=1, callbacks=[Reading()]).fit(corrected)
    assert names == {None, "module.mean_loss"}
    assert dict(corrected.named_modules())["module.mean_loss"] is module.mean_loss


def test_a_resumed_run_is_the_uninterrupted_one(everything, trainer, tmp_path) -> None:
    def run(corrected: CorrectedModule, **arguments) -> CorrectedModule:
        torch.manual_seed(4)
        trainer(**arguments).fit(corrected, ckpt_path=arguments.pop("ckpt", None))
        return corrected

    def make() -> CorrectedModule:
        module = everything()
        module.net[3].p = 0.0
        return wrapped(module)

    whole = run(make(), max_epochs=3)
    part = make()
    first = trainer(max_epochs=2)
    torch.manual_seed(4)
    first.fit(part)
    first.save_checkpoint(tmp_path / "two.ckpt")
    rest = make()
    trainer(max_epochs=3).fit(rest, ckpt_path=tmp_path / "two.ckpt")
    for name, value in tensors(whole).items():
        assert torch.equal(tensors(rest)[name], value), name
    assert rest.strengths == {"example": 1.0}
    assert not entries(rest.module).any()


def test_wrong_use_leaves_the_module_as_it_was(everything) -> None:
    module = everything()
    module.__class__ = type(
        "Early", (everything,), {"configure_model": LightningModule.configure_model, "setup": LightningModule.setup}
    )
    before = tensors(module)
    other = everything()
    other.net[4].weight.data.add_(1)
    for arguments, error, message in (
        ({"patches": {"a": patch_of(module), "b": patch_of(module)}}, ValueError, "'b' and 'a' overlap in 3 entries"),
        ({"patches": {"a": patch_of(other)}}, ValueError, "other values than the patch was made for"),
        ({"patches": {"a": patch_of(module)}, "strengths": {"a": 1.5}}, ValueError, r"strength must be in \[0, 1\]"),
        ({"patches": {"a": patch_of(module)}, "strengths": {"b": 1.0}}, KeyError, "'b' that is not given"),
        ({"patches": {"a": 3}}, ValueError, "must be a Patch"),
        ({"make_optimizer": torch.optim.SGD}, ValueError, "configures its own"),
    ):
        with pytest.raises(error, match=message):
            CorrectedModule(module, **arguments)
        assert all(torch.equal(value, before[name]) for name, value in tensors(module).items())
    with pytest.raises(TypeError, match="got str"):
        CorrectedModule("model")
    corrected = wrapped(module)
    with pytest.raises(TypeError, match="CorrectedModule already"):
        CorrectedModule(corrected)
    with pytest.raises(ValueError, match="overlap"):
        corrected.add("more", corrected.patches["example"])
    with pytest.raises(KeyError, match="no patch 'nothing'"):
        corrected.enable("nothing")
    assert list(corrected.patches) == ["example"]


def test_attributes_are_those_of_the_module_inside(everything) -> None:
    module = everything()
    corrected = wrapped(module)
    assert corrected.accuracy is module.accuracy
    corrected.rate = 0.7
    assert module.rate == 0.7
    corrected.automatic_optimization = False
    assert not module.automatic_optimization
    with pytest.raises(AttributeError, match="nothing"):
        _ = corrected.nothing
    inputs = torch.randn(3, 4)
    assert torch.equal(corrected.eval()(inputs), module(inputs))


def test_loggers_schedulers_and_averages_work_through_it(everything, trainer, tmp_path) -> None:
    module = everything()
    logger = CSVLogger(tmp_path)
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # Lightning 2.6
    callbacks = [LearningRateMonitor(), averaging.WeightAveraging()]
    run = trainer(logger=logger, callbacks=callbacks, max_epochs=2)
    run.fit(wrapped(module))
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "lr-AdamW" in text
    assert "width: 8" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert not entries(module).any()


def test_a_hugging_face_model_trains_validates_and_generates(trainer, tmp_path) -> None:
    model = build("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    patch = Patch.from_positions(model, {name: POSITIONS})
    plain = model(**batch_for("llama")).logits
    corrected = CorrectedModule(model, {"example": patch}, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    padded = {**batch_for("llama"), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batches = DataLoader([batch_for("llama"), padded], batch_size=None)
    run = trainer(max_epochs=1)
    run.fit(corrected, batches, batches)
    assert float(run.callback_metrics["val_loss"]) > 0
    assert set(run.test(corrected, batches, verbose=False)[0]) == {"test_loss"}
    assert run.predict(corrected, batches)[0].shape == plain.shape
    assert not model.get_parameter(name).view(-1)[POSITIONS].any()
    assert corrected.generate(batch_for("llama")["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 9)
    assert corrected.config is model.config
    assert torch.equal(corrected(**batch_for("llama")).logits, model(**batch_for("llama")).logits)

    from transformers import AutoModelForCausalLM

    corrected.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.get_parameter(name), model.get_parameter(name))
    corrected.save_pretrained(tmp_path / "base", merged=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(base.get_parameter(name).view(-1)[POSITIONS], patch[name].originals)
    patches, strengths = load_patches(tmp_path / "base")
    again = CorrectedModule(base, patches, strengths)
    assert torch.equal(again(**batch_for("llama")).logits, corrected(**batch_for("llama")).logits)


def test_save_pretrained_needs_a_hugging_face_model(everything, tmp_path) -> None:
    with pytest.raises(ValueError, match="Everything has no save_pretrained"):
        wrapped(everything()).save_pretrained(tmp_path)


def test_the_hugging_face_model_is_saved_from_beside_a_head_and_behind_a_forward(tmp_path) -> None:
    class Headed(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = build("llama"), torch.nn.Linear(2, 2)

    class Behind(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama")

        def forward(self, batch):
            return self.model(**batch)

    for number, module in enumerate((Headed(), Behind())):
        CorrectedModule(module).save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "model.safetensors").exists()


def test_a_plain_model_without_a_loss_says_what_to_do(trainer) -> None:
    with pytest.raises(ValueError, match="gives no loss for this batch"):
        trainer(max_epochs=1).fit(CorrectedModule(build("vit")), [batch_for("vit")])
