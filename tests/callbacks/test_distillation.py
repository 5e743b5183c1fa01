"""A pruned model is trained towards what it was: by the loss that is written down, on one process and on two, also resumed."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lrp_prune import CorrectedModule
from lrp_prune.callbacks import Distillation, RelevancePruning, Rounds
from tests.support.resumed import check_resumed_equals_whole
from tests.support.trainers import forked


class Steps(Callback):
    """The module before each batch, each batch, and the gradients that its loss gave."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.batches: list[Any] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)
        self.modules.append(copy.deepcopy(module.net))
        self.batches.append(batch)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.gradients.append({name: entry.grad.clone() for name, entry in module.net.named_parameters()})


def pruning(**options: Any) -> RelevancePruning:
    return RelevancePruning(0.5, Rounds(1, start=1), method="magnitude", **options)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["before", "module"])
@pytest.mark.parametrize("match", ["logits", "values"])
def test_the_gradient_is_that_of_the_loss_that_is_written_down(
    make_module, make_loader, make_trainer, teacher: str, match: str
) -> None:
    """By a copy of the model from before the round, and autograd."""
    module, steps, masks = make_module("sgd"), Steps(), pruning()
    other = make_module(seed=4).eval()
    given: Any = other if teacher == "module" else None
    distillation = Distillation(0.25, 3.0, teacher=given, match=match)
    make_trainer(callbacks=[masks, distillation, steps], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    for index in (4, 6):  # the round is before the fifth batch
        student, (inputs, labels) = steps.modules[index], steps.batches[index]
        own = teacher == "before"
        teaches = before_the_round(make_module, make_loader, make_trainer) if own else other.net
        torch.manual_seed(index)
        outputs = student.train()(inputs)
        soft = teaches.eval()(inputs).detach()
        if match == "logits":
            p, q = (soft / 3).softmax(-1), (outputs / 3).softmax(-1)
            divergence = 9 * (p * (p / q).log()).sum() / len(inputs)
        else:
            divergence = (outputs - soft).square().mean()
        loss = 0.75 * F.cross_entropy(outputs, labels) + 0.25 * divergence
        loss.backward()
        for name, entry in student.named_parameters():
            kept = masks.masks.get(f"net.{name}", torch.ones_like(entry) > 0)
            torch.testing.assert_close(steps.gradients[index][name][kept], entry.grad[kept], rtol=1e-4, atol=1e-6)


def before_the_round(make_module: Any, make_loader: Any, make_trainer: Any) -> nn.Module:
    """The same training, ended before the round."""
    module = make_module("sgd")
    make_trainer(callbacks=[Steps()], max_epochs=1).fit(module, make_loader(), make_loader(seed=2))
    net: nn.Module = module.net
    return net


@pytest.mark.slow
def test_nothing_changes_before_the_first_round_and_nothing_stays_after(
    make_module, make_loader, make_trainer, same_weights
) -> None:
    plain, distilled = make_module(), make_module()
    make_trainer(callbacks=[Steps()], max_epochs=2).fit(plain, make_loader(), make_loader(seed=2))
    callbacks = [RelevancePruning(0.5, Rounds(1, start=2)), Distillation(1.0), Steps()]
    trainer = make_trainer(callbacks=callbacks, max_epochs=3, limit_train_batches=4)
    trainer.fit(distilled, make_loader(), make_loader(seed=2))
    before = callbacks[2].modules[8]
    assert "training_step" not in vars(distilled)
    assert not any(entry._forward_hooks or entry._forward_pre_hooks for entry in distilled.modules())
    again = copy.deepcopy(before)
    pruned = callbacks[0].masks
    for name, value in plain.net.state_dict().items():
        kept = pruned[f"net.{name}"] if f"net.{name}" in pruned else torch.ones_like(value) > 0
        assert torch.equal(again.state_dict()[name][kept], value[kept]), name


@pytest.mark.slow
def test_weights_come_out_of_the_teaching_bit_for_bit(make_module, make_loader, make_trainer) -> None:
    """With a rate of zero nothing moves: neither the weights nor the buffers but those of the student's own forward."""
    module, expected = make_module("none"), make_module("none")
    make_trainer(callbacks=[pruning(), Steps()], max_epochs=3).fit(expected, make_loader(), make_loader(seed=2))
    make_trainer(callbacks=[pruning(), Distillation(), Steps()], max_epochs=3).fit(
        module, make_loader(), make_loader(seed=2)
    )
    assert all(
        torch.equal(one, other)
        for one, other in zip(module.state_dict().values(), expected.state_dict().values(), strict=True)
    )


@pytest.mark.slow
def test_a_resumed_training_equals_the_uninterrupted_one(
    make_module, make_loader, make_trainer, same_weights, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        return [RelevancePruning(0.7, Rounds(2, every_n_epochs=2)), Distillation(), Steps()]

    def loaders() -> Any:
        return make_loader(), make_loader(seed=2)

    check_resumed_equals_whole(make_trainer, make_module, callbacks, loaders, same_weights, tmp_path / "c")


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_equal_one_on_all_samples(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            weights = {name: value.detach() for name, value in module.net.named_parameters()}
            found = (weights, float(trainer.callback_metrics["distillation/divergence"]))
            (tmp_path / f"{trainer.world_size}.{trainer.global_rank}").write_bytes(pickle.dumps(found))

    class Divided(type(make_module())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            here = [entry[self.trainer.global_rank :: self.trainer.world_size] for entry in batch]
            return super().training_step(here, batch_idx)

    for devices in (1, 2):
        module = Divided("sgd")
        module.net[1], module.net[3] = nn.Identity(), nn.Identity()  # what depends on the batch's size
        callbacks = [pruning(), Distillation(0.9), Save()]
        strategy = forked() if devices > 1 else "auto"
        whole = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
        make_trainer(callbacks=callbacks, max_epochs=3, **whole).fit(module, make_loader(), make_loader(seed=2))
    one, first, second = (pickle.loads((tmp_path / name).read_bytes()) for name in ("1.0", "2.0", "2.1"))
    for name, value in one[0].items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[0][name], second[0][name])
    assert one[1] == pytest.approx(first[1], rel=1e-4) and first[1] == second[1] > 0


class Wrapped(LightningModule):
    """Holds a model, and calls it in one of several ways."""

    def __init__(self, step: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.step = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        if self.step == "nothing":
            return F.cross_entropy(F.linear(inputs, self.model[0].weight), labels)
        if self.step == "twice":
            half = len(inputs) // 2
            logits = torch.cat([self.model(inputs[:half]), self.model(inputs[half:])])
        else:
            logits = self.model(inputs)
        with torch.no_grad():
            self.model(inputs.flip(0))  # a metric
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits.detach()} if self.step == "dictionary" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("further", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_whatever_way_the_step_calls_its_model(make_loader, make_trainer, further: dict[str, Any]) -> None:
    """One after the other, as a dictionary, under accumulation: the weights are the same."""
    found = []
    for step in ("once", "twice", "dictionary"):
        module, batches = Wrapped(step), make_loader()
        callbacks = [RelevancePruning(0.5, Rounds(1, start=0), method="magnitude"), Distillation(0.5)]
        make_trainer(callbacks=callbacks, max_epochs=2, **further).fit(module, batches)
        found.append(module)
    for other in found[1:]:
        for one, entry in zip(found[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, entry, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_padding_teaches_nothing(make_trainer) -> None:
    from tests.support.small_models import build

    class Language(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ids = torch.randint(2, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    more = torch.cat([ids, torch.full((2, 3), 1)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=torch.long)], 1)
    padded = {"input_ids": more, "attention_mask": mask, "labels": more.masked_fill(mask == 0, -100)}
    found = []
    for batch in (short, padded):
        module, callbacks = (
            Language(),
            [RelevancePruning(0.5, Rounds(1, start=0), method="magnitude"), Distillation(1.0)],
        )
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, DataLoader([batch], batch_size=None))
        found.append(module)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_it_cannot_do_is_refused_by_name(make_module, make_manual_module, make_loader, make_trainer) -> None:
    def fit(module: Any, *callbacks: Any, data: Any = None) -> None:
        loader = make_loader() if data is None else data
        make_trainer(callbacks=list(callbacks), max_epochs=2).fit(module, loader, make_loader(seed=2))

    early = RelevancePruning(0.5, Rounds(1, start=0), method="magnitude")
    with pytest.raises(MisconfigurationException, match="none of the trainer's callbacks: add it, or pass"):
        fit(make_module(), Distillation())
    with pytest.raises(MisconfigurationException, match="ManualClassifier optimizes manually"):
        fit(make_manual_module(), pruning(), Distillation())
    with pytest.raises(MisconfigurationException, match=r"module='body'.*Classifier has no such module"):
        fit(make_module(), pruning(), Distillation(module="body"))
    with pytest.raises(MisconfigurationException, match=r"\(Wrapped, Sequential were looked at\): pass module="):
        make_trainer(callbacks=[early, Distillation()], max_epochs=1).fit(Wrapped("nothing"), make_loader())
    with pytest.raises(MisconfigurationException, match=r"was compiled as a whole.*compile the model"):
        fit(torch.compile(make_module(), backend="eager"), pruning(), Distillation())
    for options, message in (
        ({"share": 0}, "share must be a number in"),
        ({"share": True}, "share must be a number in"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"match": "labels"}, "match must be one of"),
        ({"teacher": "dense"}, "teacher must be a module, or None"),
        ({"module": ""}, "module must be None or"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            Distillation(**options)


def test_one_output_is_no_choice(make_loader, make_trainer) -> None:
    class Regression(Wrapped):
        def __init__(self) -> None:
            super().__init__("once")
            self.model[2] = nn.Linear(16, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(self.model(batch[0])[:, 0], batch[1].float())

    early = RelevancePruning(0.5, Rounds(1, start=0), method="magnitude")
    with pytest.raises(MisconfigurationException, match=r"Sequential cannot be distilled.*\(16, 1\).*match='values'"):
        make_trainer(callbacks=[early, Distillation()], max_epochs=1).fit(Regression(), make_loader())
    early = RelevancePruning(0.5, Rounds(1, start=0), method="magnitude")
    make_trainer(callbacks=[early, Distillation(match="values")], max_epochs=1).fit(Regression(), make_loader())


def test_a_pruned_model_without_a_past_has_no_teacher(make_module, make_loader, make_trainer, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "c", save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(callbacks=[pruning(), checkpoint], max_epochs=2, enable_checkpointing=True)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    with pytest.raises(MisconfigurationException, match="pruned already and this callback has no state"):
        make_trainer(callbacks=[pruning(), Distillation()], max_epochs=3).fit(
            make_module(), make_loader(), make_loader(seed=2), ckpt_path=tmp_path / "c" / "epoch=1.ckpt"
        )


@pytest.mark.slow
def test_beside_a_correction(make_module, make_loader, make_trainer) -> None:
    """The wrapper's training step is that of the module inside."""
    weights = []
    for wrap in (lambda module: module, CorrectedModule):
        module = make_module("sgd")
        callbacks = (
            [pruning(), Distillation(0.9), Steps()] if wrap is not CorrectedModule else [pruning(), Distillation(0.9)]
        )

        class Seed(Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                torch.manual_seed(trainer.global_step)

        make_trainer(callbacks=[*callbacks[:2], Seed()], max_epochs=3).fit(
            wrap(module), make_loader(), make_loader(seed=2)
        )
        weights.append([entry.detach() for entry in module.parameters()])
        assert "training_step" not in vars(module)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class Unfreezing(BaseFinetuning):
    """Trains the first layer from the third epoch on; takes the model down as it was before the second."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.net[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.dense = copy.deepcopy(module.net.state_dict())
        if epoch == 2:
            self.make_trainable(module.net[0])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_is_unfrozen_later_is_kept_before_it_changes(make_module, make_loader, make_trainer, where: str) -> None:
    """Pruned in part while it was frozen, too."""
    module, unfreezing, distillation = make_module("sgd"), Unfreezing(), Distillation()
    masks = pruning(include=["*.0.weight", "*.4.weight"])
    callbacks = [unfreezing, masks, distillation] if where == "before" else [distillation, unfreezing, masks]
    make_trainer(callbacks=callbacks, max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    assert not torch.equal(module.net[0].bias, unfreezing.dense["0.bias"]) and "net.0.weight" in masks.masks
    with torch.no_grad(), distillation._teaching(module, module.net) as teacher:
        found = teacher.state_dict()
        assert all(torch.equal(found[name], value) for name, value in unfreezing.dense.items() if "num_" not in name)


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_without_labels_there_need_be_no_loss(make_module, make_loader, make_trainer, loss: float | None) -> None:
    class Unlabelled(type(make_module())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            return None if loss is None else loss * logits.sum()

    module, steps = Unlabelled("sgd"), Steps()
    early = RelevancePruning(0.5, Rounds(1, start=0), method="magnitude")
    make_trainer(callbacks=[early, Distillation(1.0), steps], max_epochs=2).fit(module, make_loader())
    assert len(steps.gradients) == 8
    assert all(entry.isfinite().all() and entry.any() for entry in steps.gradients[-1].values())
