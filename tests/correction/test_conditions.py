"""Conditions: what is learned from sets, what is saved, and that one's own are objects like any."""

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.correction import ActivationAbove, Condition
from lrp_prune.correction.conditions import restored
from lrp_prune.correction.conditions.discriminant import discriminant, strictest
from lrp_prune.correction.conditions.states import module_at, states_before
from tests.support.conditions import TokenIs
from tests.support.patches import unchanged, weights
from tests.support.small_models import build

LAYER = "model.layers.0"


def texts(seed: int, low: int, high: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(low, high, (2, 4, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :, :4] = -100
    return [{"input_ids": each, "labels": label} for each, label in zip(ids, labels, strict=True)]


@pytest.mark.slow
def test_what_is_learned_holds_at_the_undesired_and_hardly_elsewhere() -> None:
    model = build("llama")
    before = weights(model)
    general = {"first": texts(1, 3, 20), "second": texts(2, 20, 35)}
    learned = ActivationAbove.learned(model, LAYER, texts(3, 35, 50), general, allowed=0.05)
    assert learned.shares["undesired"] > 0.5
    assert max(learned.shares["first"], learned.shares["second"]) <= 0.05
    assert unchanged(model, before)
    assert not any(module._forward_hooks for module in model.modules())
    states = states_before(model, LAYER, texts(3, 35, 50), "undesired")
    assert float(learned.holds((), states).float().mean()) == pytest.approx(learned.shares["undesired"])
    looser = ActivationAbove.learned(model, LAYER, texts(3, 35, 50), general, allowed=0.2)
    assert looser.threshold < learned.threshold


def test_states_are_those_that_labelled_tokens_are_predicted_from() -> None:
    model, (batch, _) = build("llama"), texts(1, 3, 50)
    hidden = model.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(states_before(model, LAYER, [batch], "any"), hidden[:, 3:-1].reshape(-1, 32))


def test_a_direction_is_fishers_and_sets_count_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 1.0, 0.2])
    wanted, small, large = (
        torch.randn(count, 3, generator=generator) * spread + torch.tensor(shift)
        for count, shift in ((400, [1.0, 1.0, 0.0]), (50, [0.0, 0.0, 0.0]), (5000, [0.0, 0.0, 0.0]))
    )
    groups = [wanted, small, large]
    covariance = torch.stack([group.double().T.cov(correction=0) for group in groups]).mean(0)
    mixed = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(3)
    expected = torch.linalg.solve(
        mixed, wanted.double().mean(0) - (small.double().mean(0) + large.double().mean(0)) / 2
    )
    torch.testing.assert_close(discriminant(wanted, [small, large]), (expected / expected.norm()).float())
    with pytest.raises(ValueError, match="no direction parts them"):
        discriminant(small, [small])
    with pytest.raises(ValueError, match="at least one general set"):
        discriminant(small, [])


@pytest.mark.parametrize("allowed", [0.0, 0.1, 0.34])
def test_a_threshold_is_the_lowest_that_keeps_to_the_share_in_each_set(allowed: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"one": torch.randn(50, generator=generator), "two": torch.randn(31, generator=generator) + 1}
    threshold = strictest(scores, allowed)
    shares = {name: float((values > threshold).float().mean()) for name, values in scores.items()}
    assert max(shares.values()) <= allowed
    lower = max(float(values[values < threshold].max()) for values in scores.values())
    assert any(float((values > lower).float().mean()) > allowed for values in scores.values())


def test_each_set_has_the_share_that_its_name_is_allowed() -> None:
    scores = {"text": torch.arange(10.0), "copying": torch.arange(10.0) - 5, "facts": torch.arange(10.0) + 50}
    assert strictest(scores, {"text": 0.2}) == 7
    assert strictest(scores, {"text": 0.2, "copying": 0.0}) == 7
    assert strictest(scores, {"*": 0.9, "copying": 0.0}) == 50
    with pytest.raises(ValueError, match="lists"):
        strictest(scores, {"lists": 0.1})


def test_nothing_to_learn_from_is_said() -> None:
    model, (batch, _) = build("llama"), texts(1, 3, 50)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match="'second' has no labelled token"):
        ActivationAbove.learned(model, LAYER, [batch], {"first": [batch], "second": [empty]})
    with pytest.raises(KeyError, match=r"no module 'model\.layers\.7'"):
        ActivationAbove.learned(model, "model.layers.7", [batch], {"first": [batch]})
    with pytest.raises(ValueError, match=r"allowed of 'first' must be a number in \[0, 1\), got 1"):
        ActivationAbove.learned(model, LAYER, [batch], {"first": texts(2, 3, 9)}, allowed=1)


def test_modules_are_found_at_another_depth() -> None:
    model = build("llama")
    inner = model.model.layers[0]
    assert module_at(nn.Sequential(model), LAYER) is inner
    assert module_at(model.model, LAYER) is inner
    assert module_at(model, "embed_tokens") is model.model.embed_tokens
    with pytest.raises(KeyError, match="several modules 'mlp'"):
        module_at(model, "mlp")


def test_conditions_are_equal_and_restored_by_value() -> None:
    first = ActivationAbove("a", 0.5, torch.tensor([1.0, 2.0]), {"text": 0.01})
    assert restored(first.state()) == first
    assert first != ActivationAbove("a", 0.5, torch.tensor([1.0, 2.5]), {"text": 0.01})
    assert first != ActivationAbove("b", 0.5, torch.tensor([1.0, 2.0]), {"text": 0.01})
    assert restored(TokenIs("a", [1]).state()) == TokenIs("a", [1])
    assert TokenIs("a", [1]) != first


def test_a_condition_has_a_name_of_its_own_and_its_class_must_be_there() -> None:
    with pytest.raises(TypeError, match="needs a name of its own"):

        class Nameless(Condition):
            pass

    with pytest.raises(TypeError, match="there is a condition 'activation above' already"):

        class Taken(Condition):
            name = "activation above"

    with pytest.raises(ValueError, match=r"'nowhere', which is none of .*: import the module that defines it first"):
        restored({"name": "nowhere", "options": {}, "tensors": {}})
    with pytest.raises(ValueError, match="cannot be made again"):
        restored({"name": "test: token is", "options": {}, "tensors": {}})


def test_a_direction_fits_its_states() -> None:
    with pytest.raises(ValueError, match=r"vector of finite numbers \[width\], got shape \(1, 2\)"):
        ActivationAbove("a", 0.0, torch.ones(1, 2))
    with pytest.raises(ValueError, match="on states of 3 numbers"):
        ActivationAbove("a", 0.0, torch.ones(3)).holds((), torch.ones(2, 4))
    held = ActivationAbove("a", 0.0, torch.ones(2)).holds((), (torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), None))
    assert held.tolist() == [True, False]
