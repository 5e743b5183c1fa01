"""The collector gives the relevance of the validation's batches, and the training does not notice it."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule

import lrp_prune.pruning.scorers as scorers
from lrp_prune import LRP, Method
from lrp_prune.callbacks import RelevanceCollector


def collected_directly(module: torch.nn.Module, batches: Any, method: str | Method = "lrp") -> Any:
    scorer = scorers.scorer(method, module)
    for batch in batches:
        scorer.update(batch)
    return scorer.compute()


def assert_same_relevance(first: Any, second: Any) -> None:
    assert list(first) == list(second)
    assert first.num_samples == second.num_samples
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_validate_collects_under_inference_mode(make_module, make_loader, make_trainer) -> None:
    module, collector = make_module(), RelevanceCollector(LRP(composite="cp_lrp", statistic="signed"))
    make_trainer(callbacks=[collector]).validate(module, make_loader(), verbose=False)
    expected = collected_directly(module, make_loader(), LRP(composite="cp_lrp", statistic="signed"))
    assert_same_relevance(collector.relevance, expected)
    assert not any(tensor.is_inference() for tensor in collector.relevance.values())


def test_fit_collects_the_last_validation(make_module, make_loader, make_trainer) -> None:
    module, collector = make_module(), RelevanceCollector()
    seen = []

    class Before(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(copy.deepcopy(pl_module))

    make_trainer(callbacks=[collector, Before()], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert_same_relevance(collector.relevance, collected_directly(seen[-1], make_loader(seed=2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 3, "val_check_interval": 2}, {"gradient_clip_val": 0.1}],
    ids=["plain", "validation in an accumulation window", "clipping"],
)
def test_training_is_bit_for_bit_the_same(make_module, make_loader, make_trainer, same_weights, arguments) -> None:
    modules = []
    for callbacks in ([], [RelevanceCollector()]):
        torch.manual_seed(3)
        module = make_module()
        make_trainer(callbacks=callbacks, max_epochs=3, **arguments).fit(module, make_loader(), make_loader(seed=2))
        modules.append((module, torch.get_rng_state()))
    assert same_weights(modules[0][0], modules[1][0])
    assert torch.equal(modules[0][1], modules[1][1])


def test_modes_and_gradients_are_untouched(make_module, make_loader, make_trainer) -> None:
    module = make_module()
    module.net[3].eval()
    found = {}

    class Watch(Callback):
        def _state(self, pl_module: Any) -> Any:
            gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
            return [m.training for m in pl_module.modules()], gradients, torch.get_rng_state()

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            found.setdefault("before", self._state(pl_module))

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            found.setdefault("after", self._state(pl_module))

    trainer = make_trainer(
        callbacks=[RelevanceCollector(), Watch()],
        max_epochs=1,
        accumulate_grad_batches=3,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, make_loader(), make_loader())
    (modes, gradients, rng), (modes_after, gradients_after, rng_after) = found["before"], found["after"]
    assert modes == modes_after
    assert torch.equal(rng, rng_after)
    assert any(gradient is not None for gradient in gradients)
    for gradient, after in zip(gradients, gradients_after, strict=True):
        assert (gradient is None) == (after is None)
        assert gradient is None or torch.equal(gradient, after)
    assert not module.net[3].training


def test_sanity_check_is_left_out(make_module, make_loader, make_trainer) -> None:
    """But for its first batch, on which the collection is tried and forgotten."""
    collector = RelevanceCollector(every_n_epochs=2)
    trainer = make_trainer(callbacks=[collector], max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(make_module(), make_loader(), make_loader())
    with pytest.raises(RuntimeError, match=r"trainer\.validate"):
        _ = collector.relevance


def test_every_n_epochs_and_max_batches(make_module, make_loader, make_trainer) -> None:
    collector = RelevanceCollector(every_n_epochs=2, max_batches=2)
    module = make_module()
    make_trainer(callbacks=[collector], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert collector.relevance.num_samples == 32
    first = collector.relevance
    trainer = make_trainer(callbacks=[collector], max_epochs=1)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert collector.relevance is first


@pytest.mark.parametrize(
    ("every", "options", "told"),
    [
        (5, {}, r"after 5 epochs, and the training ends after 3 \(max_epochs=3\)"),
        (2, {"check_val_every_n_epoch": 3}, "with it and check_val_every_n_epoch=3 the first time is after 6 epochs"),
        (3, {"max_steps": 8}, r"ends after 2 \(max_steps=8\)"),
        (3, {}, None),
        (3, {"check_val_every_n_epoch": 3}, None),
    ],
)
def test_epochs_that_never_come_are_warned_about(every, options, told, make_module, make_loader, make_trainer) -> None:
    collector = RelevanceCollector("magnitude", every_n_epochs=every)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[collector], **{"max_epochs": 3, **options}).fit(
            make_module(), make_loader(), make_loader()
        )
    found = [str(entry.message) for entry in caught if "RelevanceCollector(every_n_epochs=" in str(entry.message)]
    assert len(found) == (told is not None) == (collector._relevance is None)
    assert told is None or re.search(f"collects nothing in this training: .*{told}", found[0])


@pytest.mark.parametrize(("reference", "samples"), [(0, 64), (1, 32), ("all", 96)])
def test_several_validation_loaders(make_module, make_loader, make_trainer, reference, samples) -> None:
    collector = RelevanceCollector(reference=reference)
    loaders = [make_loader(), make_loader(samples=32)]
    make_trainer(callbacks=[collector]).validate(make_module(), loaders, verbose=False)
    assert collector.relevance.num_samples == samples


def test_a_loader_that_does_not_exist(make_module, make_loader, make_trainer) -> None:
    with pytest.raises(MisconfigurationException, match="reference=3, but there is one validation loader"):
        make_trainer(callbacks=[RelevanceCollector(reference=3)]).validate(make_module(), make_loader(), verbose=False)


def test_reference_replaces_the_validations_batches(make_module, make_loader, make_trainer, same_weights) -> None:
    class Data(LightningDataModule):
        def val_dataloader(self) -> Any:
            return make_loader(samples=32, seed=5)

    module = make_module()
    expected = collected_directly(module, make_loader(samples=32, seed=5))
    for reference in (make_loader(samples=32, seed=5), list(make_loader(samples=32, seed=5)), Data()):
        collector = RelevanceCollector(reference=reference)
        rng = torch.get_rng_state()
        make_trainer(callbacks=[collector]).validate(module, make_loader(), verbose=False)
        assert_same_relevance(collector.relevance, expected)
        make_trainer().validate(module, make_loader(), verbose=False)
        after = torch.get_rng_state()
        torch.set_rng_state(rng)
        make_trainer().validate(module, make_loader(), verbose=False)
        make_trainer().validate(module, make_loader(), verbose=False)
        assert torch.equal(after, torch.get_rng_state())


def test_progress_bar_counts_the_batches(make_module, make_loader, make_trainer, monkeypatch) -> None:
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    from lrp_prune.callbacks import _progress

    counts: dict[str, int] = {}
    real = _progress.CollectionProgress.advance

    def count(self: Any) -> None:
        counts["rich" if self._rich is not None else "tqdm" if self._tqdm is not None else "none"] = (
            counts.get("rich" if self._rich is not None else "tqdm" if self._tqdm is not None else "none", 0) + 1
        )
        real(self)

    monkeypatch.setattr(_progress.CollectionProgress, "advance", count)
    for bar in (RichProgressBar(), TQDMProgressBar(), None):
        callbacks = [RelevanceCollector()] + ([bar] if bar else [])
        trainer = make_trainer(callbacks=callbacks, enable_progress_bar=bar is not None, max_epochs=1)
        trainer.fit(make_module(), make_loader(), make_loader(samples=48))
    assert counts == {"rich": 3, "tqdm": 3, "none": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lpr"}, "method"),
        ({"method": LRP}, "method must be one of .* or an object"),
        ({"granularity": "layer"}, "granularity"),
        ({"granularity": ["weight", "head"]}, "granularities"),
        ({"include": "*.mlp"}, "include"),
        ({"exclude": [3]}, "exclude"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"max_batches": 0}, "max_batches"),
        ({"max_batches": 1.5}, "max_batches"),
        ({"reference": -1}, "reference"),
        ({"reference": True}, "reference"),
        ({"reference": None}, "reference"),
        ({"trainable_only": "yes"}, "trainable_only"),
        ({"accumulate_on": "nowhere"}, "accumulate_on"),
        ({"reference": "train"}, "reference"),
        ({"reference": iter([1])}, "only once"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        RelevanceCollector(**arguments)


def test_untested_strategies_are_refused(make_module, make_loader, make_trainer) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Own(SingleDeviceStrategy):
        pass

    def trainer(collector: RelevanceCollector) -> Any:
        return make_trainer(callbacks=[collector], strategy=Own(device="cpu"), devices="auto", accelerator="auto")

    with pytest.raises(MisconfigurationException, match="allow_untested"):
        trainer(RelevanceCollector()).validate(make_module(), make_loader(), verbose=False)
    collector = RelevanceCollector(allow_untested=True)
    with pytest.warns(UserWarning, match="not with Own"):
        trainer(collector).validate(make_module(), make_loader(), verbose=False)
    assert collector.relevance.num_samples == 64


def test_a_pattern_that_matches_nothing(make_module, make_loader, make_trainer) -> None:
    with pytest.raises(MisconfigurationException, match="nothing_like_this"):
        make_trainer(callbacks=[RelevanceCollector(include=["nothing_like_this"])]).validate(
            make_module(), make_loader(), verbose=False
        )
