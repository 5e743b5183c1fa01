"""A correction in Lightning that is chosen, and refused, by the worst of several sets."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lrp_prune import LRP, attribute
from lrp_prune.callbacks import Guard
from lrp_prune.callbacks.contrastive_correction import ContrastiveCorrection
from lrp_prune.correction import Automatic, Patch
from lrp_prune.metrics import SideEffects, Suite
from lrp_prune.wrapper.module import CorrectedModule
from tests.support import processes
from tests.support.small_models import batch_for, build

METHOD = LRP(composite="attnlrp", target="next_token", skip_first=1)
TOKENS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))
SUITE = {"first": TOKENS[:2], "second": TOKENS[2:]}


def loader(shift: int) -> DataLoader:
    return DataLoader([{"input_ids": batch_for("llama")["input_ids"] + shift}], batch_size=None)


def collected(model: nn.Module, shift: int, statistic: str = "signed") -> Any:
    return attribute(model, loader(shift), target="next_token", composite="attnlrp", statistic=statistic, skip_first=1)


def size(model: nn.Module) -> float:
    return float(sum(parameter.detach().abs().sum() for parameter in model.parameters()))


def corrected_by(make_trainer, **options: Any) -> tuple[ContrastiveCorrection, CorrectedModule, dict[str, float]]:
    corrected = CorrectedModule(build("llama"))
    correction = ContrastiveCorrection(**{"behaviour": "example", "method": METHOD, "amount": 50, **options})
    results = make_trainer(callbacks=[correction]).validate(corrected, [loader(0), loader(2)], verbose=False)
    return correction, corrected, results[0]


@pytest.mark.slow
def test_several_general_sets_make_the_patch_that_their_relevances_make(make_trainer) -> None:
    model = build("llama")
    sets = {"text": collected(model, 0), "copying": collected(model, 1)}
    wanted = Patch.from_contrast(model, sets, collected(model, 2), 50)
    correction, _, _ = corrected_by(make_trainer, general={"text": 0, "copying": loader(1)})
    assert correction.patch == wanted
    assert set(correction.general) == {"text", "copying"}
    assert set(correction.patch.provenance["references"]["sets"]) == {"text", "copying"}
    assert wanted != Patch.from_contrast(model, sets["text"], collected(model, 2), 50)


@pytest.mark.slow
def test_a_guard_in_another_statistic_is_by_the_largest_over_the_sets(make_trainer) -> None:
    model = build("llama")
    sets = {"text": collected(model, 0), "copying": collected(model, 1)}
    by = {"text": collected(model, 0, "squared_token"), "copying": collected(model, 1, "squared_token")}
    wanted = Patch.from_contrast(model, sets, collected(model, 2), 50, guard=Guard(0.5, by))
    guard = Guard(0.5, "squared_token")
    correction, _, _ = corrected_by(make_trainer, general={"text": 0, "copying": loader(1)}, guard=guard)
    assert correction.patch == wanted


@pytest.mark.slow
def test_the_search_holds_every_measure_and_hands_over_the_chosen_strength(make_trainer) -> None:
    metrics = {"text": lambda model: 1.0, "copying": lambda model: -size(model)}
    automatic = Automatic(1e-6, {"*": 0.0, "copying": 1.0}, amounts=[20, 50], strengths=[0.25, 0.5])
    correction, corrected, logged = corrected_by(
        make_trainer, amount=automatic, undesired_metric=size, general_metric=metrics
    )
    assert correction.search is not None
    assert correction.search.chosen is not None
    assert correction.search.chosen.strength == 0.25
    assert corrected.strengths == {"example": 0.25}
    assert correction.patch.num_entries == 20
    assert {"correction/general/text", "correction/general/copying", "correction/undesired"} <= set(logged)
    strict = Automatic(1e-6, {"*": 0.0}, amounts=[20, 50], strengths=[0.25, 0.5])
    with pytest.warns(UserWarning, match="nothing is corrected.*of 'copying', where"):
        correction, corrected, _ = corrected_by(
            make_trainer, amount=strict, undesired_metric=size, general_metric=metrics
        )
    assert corrected.strengths == {}


def test_a_suite_is_a_metric_of_each_entry(make_trainer) -> None:
    automatic = Automatic(1e-6, 10.0, amounts=[20])
    correction, _, logged = corrected_by(
        make_trainer, amount=automatic, undesired_metric=size, general_metric=Suite(SUITE)
    )
    assert correction.search is not None
    assert set(correction.search.general) == {"first", "second"}
    assert logged["correction/general/first_before"] == pytest.approx(correction.search.general["first"])
    assert logged["correction/general/first"] == pytest.approx(correction.search.chosen.general["first"])


def test_what_the_search_has_measured_is_not_measured_again(make_trainer) -> None:
    """Before it, and with the chosen patch: a suite takes longer than anything else here."""
    calls: list[float] = []

    def counted(model: nn.Module) -> float:
        calls.append(size(model))
        return calls[-1]

    automatic = Automatic(1e-6, 10.0, amounts=[20, 50])
    correction, _, logged = corrected_by(
        make_trainer, amount=automatic, undesired_metric=counted, general_metric=lambda model: 1.0
    )
    assert correction.search is not None
    assert correction.search.chosen is not None
    assert len(calls) == 1 + len(correction.search.curve) == 3
    assert logged["correction/undesired_before"] == pytest.approx(calls[0])
    assert logged["correction/undesired"] == pytest.approx(correction.search.chosen.undesired)


def test_what_the_patch_does_besides_is_measured_and_kept_and_the_patch_applied(make_trainer, tmp_path) -> None:
    correction, corrected, _ = corrected_by(make_trainer, suite=Suite(SUITE, allowed=10.0), strength=0.5)
    assert corrected.strengths == {"example": 0.5}
    assert correction.side_effects is not None
    assert {effect.name for effect in correction.side_effects.effects} == {"first", "second"}
    correction.patch.save(tmp_path / "patch.safetensors")
    kept = Patch.load(tmp_path / "patch.safetensors").provenance["side_effects"]
    assert str(SideEffects.from_dict(kept)) == str(correction.side_effects)
    assert (kept["within"], kept["strength"], kept["allowed"]) == (True, 0.5, {"*": 10.0})


def test_a_patch_that_harms_something_is_refused_with_its_name(make_trainer) -> None:
    suite = {**SUITE, "needs weights": lambda model: torch.full((2,), -size(model))}
    with pytest.warns(
        UserWarning, match=r"refused and not applied.*the patch against 'example' changes 'needs weights' by \+"
    ):
        correction, corrected, _ = corrected_by(make_trainer, suite=suite)
    assert corrected.strengths == {}
    assert correction.patch.num_entries == 50
    assert not correction.patch.provenance["side_effects"]["within"]
    model, untouched = corrected.module, build("llama")
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_patch_whose_examination_fails_is_kept_but_never_applied(make_trainer) -> None:
    def failing(model: nn.Module) -> torch.Tensor:
        raise KeyError("no images")

    corrected = CorrectedModule(build("llama"))
    corrected.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    correction = ContrastiveCorrection(behaviour="example", method=METHOD, amount=50, suite={"images": failing})
    with pytest.raises(KeyError, match="the suite's 'images': 'no images'"):
        make_trainer(callbacks=[correction]).validate(corrected, [loader(0), loader(2)], verbose=False)
    assert correction.patch.num_entries == 50
    labelled = DataLoader([{**(batch := batch_for("llama")), "labels": batch["input_ids"]}], batch_size=None)
    make_trainer(callbacks=[correction], max_epochs=2).fit(corrected, labelled, [loader(0), loader(2)])
    assert corrected.strengths == {}


@pytest.mark.slow
def test_what_a_search_chose_and_what_was_measured_outlive_a_checkpoint(make_trainer) -> None:
    automatic = Automatic(1e-6, amounts=[20], strengths=[0.25, 0.5])
    options = {"amount": automatic, "undesired_metric": size, "general_metric": lambda _: 1.0}
    correction, corrected, _ = corrected_by(make_trainer, **options, suite=Suite(SUITE, allowed=10.0))
    assert correction.patch.provenance["strength"] == 0.25
    state = correction.state_dict()
    state["waiting"] = True  # as in a checkpoint of the validation that made it
    resumed = ContrastiveCorrection(behaviour="example", **options)
    resumed.load_state_dict(state)
    assert str(resumed.side_effects) == str(correction.side_effects)
    again = CorrectedModule(build("llama"))
    resumed._hand_over(again, log=False)
    assert again.strengths == corrected.strengths == {"example": 0.25}
    fixed, _, _ = corrected_by(make_trainer, strength=0.5)
    assert fixed.patch.provenance["strength"] == 0.5


@pytest.mark.slow
def test_in_reverse_the_guard_is_measured_on_the_undesired_set(make_trainer) -> None:
    model = build("llama")
    sets = {"text": collected(model, 0), "copying": collected(model, 1)}
    by = collected(model, 2, "squared_token")
    wanted = Patch.from_contrast(model, sets, collected(model, 2), 50, guard=Guard(0.5, by), reverse=True)
    general = {"text": 0, "copying": loader(1)}
    correction, _, _ = corrected_by(make_trainer, general=general, guard=Guard(0.5, "squared_token"), reverse=True)
    assert correction.patch == wanted


@pytest.mark.processes
def test_all_processes_come_to_the_verdict_of_the_first(make_trainer, tmp_path) -> None:
    def verdict(harmed: int) -> Any:
        def cost(model: nn.Module) -> torch.Tensor:
            return torch.full((2,), -size(model) if torch.distributed.get_rank() == harmed else 1.0)

        made = partial(make_trainer, strategy="ddp", devices=2)
        correction, corrected, _ = corrected_by(made, suite={**SUITE, "cost": cost})
        return corrected.strengths, str(correction.side_effects), correction.patch.provenance["side_effects"]["within"]

    for harmed, strengths in ((0, {}), (1, {"example": 1.0})):
        first, second = processes.run(partial(verdict, harmed), 2, tmp_path / str(harmed), limit=120)
        assert first == second
        assert (first[0], first[2]) == (strengths, bool(strengths))


@pytest.mark.processes
def test_a_suite_that_fails_in_one_process_stops_all_of_them(make_trainer, tmp_path) -> None:
    def failing(model: nn.Module) -> torch.Tensor:
        if torch.distributed.get_rank() == 1:
            raise ValueError("no images here")
        return torch.ones(2)

    def validate() -> Any:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            corrected_by(partial(make_trainer, strategy="ddp", devices=2), suite={"images": failing})
        return type(caught.value).__name__, str(caught.value)

    first, second = processes.run(validate, 2, tmp_path / "failing", limit=120)
    assert second == ("ValueError", "the suite's 'images': no images here")
    assert first[0] == "OtherProcessError"
    assert "no images here" in first[1]


def test_limits_of_what_is_measured_are_those_of_the_search() -> None:
    suite = Suite(SUITE, allowed={"*": 0.03, "second": 0.5})

    def limits(allowed: Any, general: Any) -> Any:
        made = ContrastiveCorrection(amount=Automatic(allowed=allowed), undesired_metric=size, general_metric=general)
        return made._automatic.allowed

    assert limits(None, suite) == {"*": 0.03, "second": 0.5}
    assert limits(0.2, suite) == {"*": 0.2}
    assert limits(None, size) == {"*": 0.01}
    with pytest.raises(MisconfigurationException, match=r"'copying'.* matches none of first, second"):
        limits({"copying": 0.1}, suite)


def test_wrong_sets_metrics_and_limits_are_refused() -> None:
    for wrong, message in (
        ({"general": {}}, "general names no set"),
        ({"general": {"text": 0, "copying": 1}}, "copying and undesired are both validation loader 1"),
        ({"general_metric": {}}, "general_metric must be"),
        ({"general_metric": {"text": "val_loss"}}, "general_metric must be"),
        ({"suite": {}}, "suite is empty"),
        ({"suite": {"text": ["a text"]}}, "'text': texts need the model's tokenizer"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            ContrastiveCorrection(**wrong)
