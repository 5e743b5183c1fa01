"""A correction in Lightning that is chosen, and refused, by the worst of several sets."""

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


def test_several_general_sets_make_the_patch_that_their_relevances_make(make_trainer) -> None:
    model = build("llama")
    sets = {"text": collected(model, 0), "copying": collected(model, 1)}
    wanted = Patch.from_contrast(model, sets, collected(model, 2), 50)
    correction, _, _ = corrected_by(make_trainer, general={"text": 0, "copying": loader(1)})
    assert correction.patch == wanted
    assert set(correction.general) == {"text", "copying"}
    assert set(correction.patch.provenance["references"]["sets"]) == {"text", "copying"}
    assert wanted != Patch.from_contrast(model, sets["text"], collected(model, 2), 50)


def test_a_guard_in_another_statistic_is_by_the_largest_over_the_sets(make_trainer) -> None:
    model = build("llama")
    sets = {"text": collected(model, 0), "copying": collected(model, 1)}
    by = {"text": collected(model, 0, "squared_token"), "copying": collected(model, 1, "squared_token")}
    wanted = Patch.from_contrast(model, sets, collected(model, 2), 50, guard=Guard(0.5, by))
    guard = Guard(0.5, "squared_token")
    correction, _, _ = corrected_by(make_trainer, general={"text": 0, "copying": loader(1)}, guard=guard)
    assert correction.patch == wanted


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
