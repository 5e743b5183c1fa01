"""Several patches on one model: switching, training beside them, and what is stored."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import CorrectedModule, Masks
from lrp_prune.correction import Corrections, Patch

FIRST, SECOND = torch.arange(0, 6), torch.arange(6, 20, 2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def corrected() -> tuple[nn.Sequential, Corrections]:
    model = network()
    corrections = Corrections(model)
    corrections.add("first", Patch.from_positions(model, {"0.weight": FIRST, "2.weight": torch.tensor([1])}))
    corrections.add("second", Patch.from_positions(model, {"0.weight": SECOND}))
    return model, corrections


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        inputs = torch.randn(16, 4, generator=generator)

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - inputs[:, :3]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def test_patches_are_switched_and_scaled_in_any_order() -> None:
    model, corrections = corrected()
    before = values(model)
    corrections.enable("first")
    corrections.enable("second", 0.5)
    corrections.enable("first", 0.25)
    weight = model[0].weight.detach().view(-1)
    assert torch.equal(weight[FIRST], before["0.weight"].view(-1)[FIRST] * 0.75)
    assert torch.equal(weight[SECOND], before["0.weight"].view(-1)[SECOND] * 0.5)
    assert corrections.strengths == {"first": 0.25, "second": 0.5}
    corrections.disable("first")
    corrections.disable("first")
    corrections.enable("second", 0)
    assert corrections.strengths == {"first": 0.0, "second": 0.0}
    assert same(model, before)


def test_suspending_shows_the_model_as_it_is_also_after_an_error() -> None:
    model, corrections = corrected()
    before = values(model)
    corrections.enable("first", 0.3)
    patched = values(model)
    with pytest.raises(RuntimeError), corrections.suspended():
        assert same(model, before)
        raise RuntimeError
    assert same(model, patched)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_changed_while_suspended_is_what_disabling_puts_back(strength: float) -> None:
    model, corrections = corrected()
    corrections.enable("first", strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    corrections.attach([optimizer])
    with corrections.suspended(), torch.no_grad():
        model[0].weight.view(-1)[FIRST[:3]] = 0.0
    kept = model[0].weight.detach().view(-1)[FIRST].clone()
    assert not kept[:3].any() and kept[3:].any() == (strength < 1)
    train(model, optimizer)
    assert torch.equal(model[0].weight.view(-1)[FIRST], kept)
    corrections.disable("first")
    back = model[0].weight.view(-1)[FIRST]
    assert not back[:3].any() and torch.equal(back[3:], values(network())["0.weight"].view(-1)[FIRST[3:]])


def test_a_corrected_model_is_pruned_for_good_where_it_is_uncorrected() -> None:
    model = network()
    module = CorrectedModule(model, {"first": Patch.from_positions(model, {"0.weight": FIRST})}, {"first": 0.5})
    kept = torch.arange(32).view(8, 4) % 2 == 0
    with module.uncorrected():
        Masks({"0.weight": kept}).apply_(module)
    module.disable("first")
    assert torch.equal(model[0].weight, values(network())["0.weight"] * kept)


def test_nothing_stays_frozen_once_other_patches_have_come() -> None:
    model, corrections = corrected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    corrections.enable("first")
    corrections.attach([optimizer])
    corrections.suspend()
    corrections.replace({}, {})
    twin = network()
    train(model, optimizer)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert same(model, values(twin))


def test_suspending_may_be_nested_and_ends_with_the_outermost() -> None:
    model, corrections = corrected()
    before = values(model)
    corrections.enable("first", 0.3)
    patched = values(model)
    with corrections.suspended():
        with corrections.suspended():
            assert same(model, before)
        assert same(model, before)
        corrections.add("third", corrections.current("second"))
        assert same(model, before)
    assert same(model, patched)


def test_what_is_switched_while_suspended_is_so_afterwards() -> None:
    model, corrections = corrected()
    before = values(model)
    with corrections.suspended():
        corrections.enable("first")
        corrections.enable("second", 0.5)
        corrections.enable("first", 0.25)
        assert same(model, before)
    weight = model[0].weight.detach().view(-1)
    assert torch.equal(weight[FIRST], before["0.weight"].view(-1)[FIRST] * 0.75)
    assert torch.equal(weight[SECOND], before["0.weight"].view(-1)[SECOND] * 0.5)
    with corrections.suspended():
        corrections.disable("first")
    corrections.disable("second")
    assert same(model, before)


def test_a_copy_made_while_suspended_is_uncorrected_and_can_be_corrected() -> None:
    model, corrections = corrected()
    before = values(model)
    corrections.enable("first")
    patched = values(model)
    with corrections.suspended():
        other_model, other = copy.deepcopy((model, corrections))
    assert same(model, patched)
    assert same(other_model, before)
    assert other.strengths == {"first": 0.0, "second": 0.0}
    other.enable("first")
    assert same(other_model, patched)
    other.disable("first")
    assert same(other_model, before)


def test_overlapping_patches_are_not_enabled_together() -> None:
    model, corrections = corrected()
    corrections.add("third", Patch.from_positions(model, {"0.weight": torch.tensor([0, 1, 30])}))
    corrections.enable("first")
    patched = values(model)
    with pytest.raises(ValueError, match=r"'third' and 'first' overlap in 2 entries \(2 of 0\.weight\)"):
        corrections.enable("third")
    assert same(model, patched)
    corrections.disable("first")
    corrections.enable("third")
    assert corrections.strengths == {"first": 0.0, "second": 0.0, "third": 1.0}


def test_overlaps_are_noticed_whatever_a_parameter_is_called() -> None:
    model = nn.ModuleDict({"net": network()})
    model["net"].append(nn.Linear(4, 8))
    model["net"][3].weight = model["net"][0].weight
    before = values(model)
    corrections = Corrections(model)
    corrections.add("first", Patch.from_positions(model, {"net.0.weight": FIRST}))
    corrections.add("deep", Patch.from_positions(model["net"], {"0.weight": torch.tensor([5, 6])}))
    corrections.add("tied", Patch.from_positions(model, {"net.3.weight": torch.tensor([0, 30])}))
    corrections.add("beside", Patch.from_positions(model["net"], {"0.weight": torch.tensor([7])}))
    corrections.enable("first")
    for name, where in (("deep", r"0\.weight"), ("tied", r"net\.3\.weight")):
        with pytest.raises(ValueError, match=rf"'{name}' and 'first' overlap in 1 entries \(1 of {where}\)"):
            corrections.enable(name)
    corrections.enable("beside")
    for name in ("first", "beside"):
        corrections.disable(name)
    assert same(model, before)


def test_wrong_use_changes_nothing() -> None:
    model, corrections = corrected()
    before = values(model)
    for call, error, message in (
        (lambda: corrections.enable("nothing"), KeyError, "no patch 'nothing'; there is 'first', 'second'"),
        (lambda: corrections.disable("nothing"), KeyError, "no patch 'nothing'"),
        (lambda: corrections.enable("first", 2), ValueError, "strength must be"),
        (lambda: corrections.add("first", corrections.patches["second"]), ValueError, "already"),
        (lambda: corrections.add("", corrections.patches["second"]), ValueError, "needs a name"),
        (lambda: corrections.add("x", "file"), ValueError, "must be a Patch"),
        (
            lambda: corrections.add("x", Patch.from_positions(nn.Sequential(nn.Linear(5, 8)), {"0.weight": FIRST})),
            ValueError,
            "it was made for another model",
        ),
        (
            lambda: corrections.add("x", Patch.from_positions(nn.Linear(4, 8), {"weight": FIRST})),
            KeyError,
            "'weight' may mean '0.weight' or '2.weight'",
        ),
        (lambda: corrections.attach([object()]), TypeError, "register_step_post_hook"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert same(model, before)
    assert corrections.strengths == {"first": 0.0, "second": 0.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda parameters: torch.optim.LBFGS(parameters, max_iter=5, line_search_fn="strong_wolfe"),
        lambda parameters: torch.optim.Rprop(parameters),
    ],
    ids=["adamw", "sgd", "lbfgs", "rprop"],
)
def test_training_keeps_patched_entries_and_undo_restores_what_was_stored(make) -> None:
    model, corrections = corrected()
    optimizer = make(model.parameters())
    corrections.attach([optimizer])
    train(model, optimizer)
    stored = values(model)
    corrections.enable("first", 0.5)
    corrections.enable("second")
    patched = values(model)
    train(model, optimizer)
    after = values(model)
    for positions in (FIRST, SECOND):
        assert torch.equal(after["0.weight"].view(-1)[positions], patched["0.weight"].view(-1)[positions])
        assert not model[0].weight.grad.view(-1)[positions].any()
    free = [i for i in range(32) if i not in (*FIRST.tolist(), *SECOND.tolist())]
    assert bool((after["0.weight"].view(-1)[free] != patched["0.weight"].view(-1)[free]).all())
    corrections.disable("first")
    assert torch.equal(model[0].weight.view(-1)[FIRST], stored["0.weight"].view(-1)[FIRST])
    assert torch.equal(model[2].weight.view(-1)[1], stored["2.weight"].view(-1)[1])
    train(model, optimizer)
    assert bool((model[0].weight.view(-1)[FIRST] != stored["0.weight"].view(-1)[FIRST]).all())
    assert not model[0].weight.view(-1)[SECOND].any()


def test_masked_gradients_are_masked_before_clipping() -> None:
    model, corrections = corrected()
    corrections.enable("first")
    model(torch.ones(2, 4)).sum().backward()
    expected = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert not model[0].weight.grad.view(-1)[FIRST].any()
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(float(expected))


def test_a_frozen_parameter_stays_frozen_and_may_be_unfrozen() -> None:
    model, corrections = corrected()
    model[0].weight.requires_grad_(False)
    corrections.enable("first")
    assert not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    model(torch.ones(2, 4)).sum().backward()
    assert not model[0].weight.grad.view(-1)[FIRST].any()


def test_a_copy_is_independent_and_can_go_on() -> None:
    model, corrections = corrected()
    before = values(model)
    corrections.enable("first")
    other_model, other = copy.deepcopy((model, corrections))
    other.disable("first")
    assert same(other_model, before)
    assert corrections.strengths["first"] == 1.0
    other.enable("second")
    optimizer = torch.optim.SGD(other_model.parameters(), lr=0.1)
    other.attach([optimizer])
    train(other_model, optimizer)
    assert not other_model[0].weight.view(-1)[SECOND].any()


def test_the_current_patch_fits_the_trained_model() -> None:
    model, corrections = corrected()
    corrections.enable("second")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    corrections.attach([optimizer])
    patch = corrections.current("first")
    corrections.disable("second")
    with pytest.raises(ValueError, match="it was made for another model"):
        corrections.patches["first"].apply_(model)
    patch.apply_(model)
    patch.revert_(model)


def test_removing_a_patch_undoes_it() -> None:
    model, corrections = corrected()
    before = values(model)
    corrections.enable("first")
    patch = corrections.remove("first")
    assert same(model, before)
    corrections.add("again", patch)
    assert list(corrections.patches) == ["second", "again"]
