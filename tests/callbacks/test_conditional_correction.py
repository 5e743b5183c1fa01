"""A correction in Lightning that acts only where a condition holds, which is learned of the same sets."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lrp_prune import LRP, attribute
from lrp_prune.callbacks.contrastive_correction import ContrastiveCorrection
from lrp_prune.correction import ActivationAbove, ConditionalPatch, Learned, Patch
from lrp_prune.correction.gating import later_parameters
from lrp_prune.wrapper.module import CorrectedModule
from tests.support import processes
from tests.support.small_models import build

METHOD = LRP(composite="attnlrp", target="next_token", skip_first=1)
LEARNED = Learned("model.layers.0", allowed=0.2, shrinkage=0.1)


def batches(seed: int, number: int = 2) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 50, (number, 2, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :, :6] = -100
    return [{"input_ids": each, "labels": label} for each, label in zip(ids, labels, strict=True)]


GENERAL, UNDESIRED = batches(1), batches(2)


def loader(found: list[dict[str, Tensor]]) -> DataLoader:
    return DataLoader(found, batch_size=None)


def wanted(general: dict[str, Any], granularity: str = "weight") -> ConditionalPatch:
    """What is found by hand."""
    model = build("llama")
    condition = ActivationAbove.learned(model, LEARNED.at, UNDESIRED, general, 0.2, 0.1)
    later = later_parameters(model, LEARNED.at, UNDESIRED[0])

    def relevance(found: Any) -> Any:
        return attribute(
            model,
            found,
            target="next_token",
            composite="attnlrp",
            statistic="signed",
            granularity=granularity,
            skip_first=1,
        )

    sets = {name: relevance(found) for name, found in general.items()}
    undesired = relevance(UNDESIRED)
    include = [name for name in undesired if name in later]
    if granularity != "weight":
        include = [name for name in undesired if "layers.1" in name]
    patch = Patch.from_contrast(
        model,
        sets if len(sets) > 1 else sets["general"],
        undesired,
        2 if granularity != "weight" else 50,
        include=include,
    )
    return ConditionalPatch(patch, condition)


def corrected_by(make_trainer: Any, **options: Any) -> tuple[ContrastiveCorrection, CorrectedModule]:
    corrected = CorrectedModule(build("llama"))
    options = {"behaviour": "example", "method": METHOD, "amount": 50, "condition": LEARNED, **options}
    correction = ContrastiveCorrection(**options)
    trainer = make_trainer(callbacks=[correction])
    trainer.validate(corrected, [loader(GENERAL), loader(UNDESIRED)], verbose=False)
    return correction, corrected


@pytest.mark.slow
def test_the_condition_and_the_patch_are_those_that_are_found_by_hand(make_trainer) -> None:
    correction, corrected = corrected_by(make_trainer, strength=0.5)
    patch = correction.patch
    assert patch == wanted({"general": GENERAL})
    assert isinstance(patch, ConditionalPatch)
    assert set(patch.condition.shares) == {"undesired", "general"}
    assert corrected.strengths == {"example": 0.5}
    assert not any(
        module._forward_hooks for name, module in corrected.module.named_modules() if name == "model.embed_tokens"
    )


@pytest.mark.slow
def test_sets_may_be_loaders_and_batches_and_have_names(make_trainer) -> None:
    other = batches(3)
    correction, _ = corrected_by(make_trainer, general={"general": 0, "other": other})
    assert correction.patch == wanted({"general": GENERAL, "other": other})
    assert correction.patch != wanted({"general": GENERAL})


@pytest.mark.slow
def test_no_more_batches_are_looked_at_than_relevance_is_collected_on(make_trainer) -> None:
    correction, _ = corrected_by(make_trainer, max_batches=1)
    found = ActivationAbove.learned(build("llama"), LEARNED.at, UNDESIRED[:1], {"general": GENERAL[:1]}, 0.2, 0.1)
    assert correction.patch.condition == found


@pytest.mark.slow
def test_of_neurons_those_that_run_later_are_taken(make_trainer) -> None:
    correction, _ = corrected_by(make_trainer, granularity="neuron", amount=2)
    assert correction.patch == wanted({"general": GENERAL}, "neuron")


@pytest.mark.slow
def test_a_patch_comes_back_from_a_checkpoint(make_trainer) -> None:
    correction, _ = corrected_by(make_trainer)
    other = ContrastiveCorrection(behaviour="example", method=METHOD, amount=50, condition=LEARNED)
    other.load_state_dict(correction.state_dict())
    assert other.patch == correction.patch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "model.layers.0"}, "condition must be a Learned"),
        ({"condition": Learned("model.layers.7")}, "has no module 'model.layers.7'"),
        ({"general": {"undesired": 0}}, "no general set can be called 'undesired'"),
        ({"condition": Learned("model.layers.1")}, "nothing that is scored runs after 'model.layers.1'"),
    ],
)
def test_what_cannot_be_is_refused(make_trainer, options, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        corrected_by(make_trainer, **{"include": ["model.layers.*"], **options})


def test_batches_without_labels_are_refused_before_the_training(make_trainer) -> None:
    bare = [{"input_ids": batch["input_ids"]} for batch in UNDESIRED]
    correction = ContrastiveCorrection(
        behaviour="example", method=METHOD, amount=50, general=GENERAL, undesired=bare, condition=LEARNED
    )
    corrected = CorrectedModule(build("llama"))
    corrected.training_step = lambda batch, _: pytest.fail("a step was trained")
    with pytest.raises(MisconfigurationException, match=r"a batch of 'undesired' has no 'labels' \(it has input_ids\)"):
        make_trainer(callbacks=[correction], max_epochs=1).fit(corrected, loader(GENERAL), loader(GENERAL))


def test_models_that_are_sharded_are_refused(make_trainer) -> None:
    correction = ContrastiveCorrection(condition=LEARNED)
    trainer = make_trainer(callbacks=[correction])
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(MisconfigurationException, match="not with ModelParallelStrategy"):
        correction.setup(trainer, CorrectedModule(build("llama")), "validate")


@pytest.mark.slow
def test_two_processes_learn_of_the_batches_of_both(make_trainer, tmp_path) -> None:
    def validate() -> tuple[Any, Any]:
        corrected = CorrectedModule(build("llama"))
        correction = ContrastiveCorrection(behaviour="example", method=METHOD, amount=50, condition=LEARNED)
        trainer = make_trainer(callbacks=[correction], strategy="ddp", devices=2, use_distributed_sampler=False)
        rank = trainer.global_rank
        mine = [loader(found[rank : rank + 1]) for found in (GENERAL, UNDESIRED)]
        trainer.validate(corrected, mine, verbose=False)
        patch = correction.patch
        return patch.condition.direction, patch.condition.shares, patch.condition.threshold, set(patch)

    first, second = processes.run(validate, 2, tmp_path, limit=120)
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]
    expected = wanted({"general": GENERAL})
    assert first[1] == pytest.approx(expected.condition.shares)
    torch.testing.assert_close(first[0], expected.condition.direction, rtol=1e-4, atol=1e-5)
    assert first[3] == set(expected)


@pytest.mark.slow
def test_what_fails_in_one_process_is_told_in_all(make_trainer, tmp_path) -> None:
    def validate() -> str:
        correction = ContrastiveCorrection(behaviour="example", method=METHOD, amount=50, condition=LEARNED)
        trainer = make_trainer(callbacks=[correction], strategy="ddp", devices=2, use_distributed_sampler=False)
        bare = {"input_ids": UNDESIRED[0]["input_ids"]}
        found = [bare] if trainer.global_rank == 1 else UNDESIRED[:1]
        try:
            trainer.validate(CorrectedModule(build("llama")), [loader(GENERAL[:1]), loader(found)], verbose=False)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    first, second = processes.run(validate, 2, tmp_path, limit=120)
    assert first.startswith("OtherProcessError")
    assert "has no 'labels'" in second
