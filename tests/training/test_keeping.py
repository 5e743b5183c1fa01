"""The keeper finds weights, gradients and moments wherever they come from, and leaves nothing behind."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.training.keeping import MaskKeeper
from tests.support.masked_training import Drifting, loss_of, make_masks, make_model, pruned_values, train


def test_clipping_counts_kept_gradients_only() -> None:
    model = make_model()
    masks = make_masks(model)
    MaskKeeper(model, masks)
    loss_of(model, 0).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    twin = make_model()
    with torch.no_grad():
        for name, mask in masks.items():
            twin.get_parameter(name).mul_(mask)
    loss_of(twin, 0).backward()
    expected = [
        twin.get_parameter(name).grad[masks[name]] if name in masks else twin.get_parameter(name).grad
        for name, _ in twin.named_parameters()
    ]
    torch.testing.assert_close(norm, torch.cat([part.flatten() for part in expected]).norm())


def test_gradient_accumulated_before_pruning_is_zeroed() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    masks = make_masks(model)
    MaskKeeper(model, masks, [optimizer])
    loss_of(model, 1).backward()
    optimizer.step()
    assert pruned_values(model, masks).count_nonzero() == 0


def test_assigned_gradients_are_zeroed_before_the_step() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    masks = make_masks(model)
    MaskKeeper(model, masks, [optimizer])
    for step in range(3):
        gradients = torch.autograd.grad(loss_of(model, step), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    assert pruned_values(model, masks).count_nonzero() == 0


def half() -> Tensor:
    return torch.rand(64, 64) > 0.5


def one() -> Tensor:
    return torch.arange(4096).view(64, 64) != 1234


def rows() -> Tensor:
    return (torch.arange(64) > 9)[:, None].expand(64, 64)


@pytest.mark.parametrize("closure", ["none", "positional", "keyword"])
@pytest.mark.parametrize("pruned", [half, one, rows])
@pytest.mark.parametrize("how", ["assigned", "changed in place", "changed by data", "scaled"])
def test_gradients_that_change_after_the_backward_pass_do_not_bring_weights_back(
    how: str, pruned: Callable[[], Tensor], closure: str
) -> None:
    """Also where memory is used again for the next gradient, and where a closure makes it."""
    torch.manual_seed(0)
    model, mask = nn.Linear(64, 64, bias=False), pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    MaskKeeper(model, {"weight": mask}, [optimizer])

    def gradient() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, 64)).square().sum()
        if how == "assigned":
            (model.weight.grad,) = torch.autograd.grad(loss, [model.weight])
            return loss
        loss.backward()
        assert model.weight.grad is not None
        if how == "scaled":
            model.weight.grad.mul_(2.0)
        else:
            (model.weight.grad.data if how == "changed by data" else model.weight.grad).add_(torch.randn(64, 64))
        return loss

    for _ in range(6):
        if closure == "none":
            gradient()
            optimizer.step()
        else:
            assert (optimizer.step(gradient) if closure == "positional" else optimizer.step(closure=gradient)) > 0
        assert not model.weight[~mask].any()
        assert not optimizer.state[model.weight]["exp_avg"][~mask].any()


def test_a_change_of_a_single_gradient_entry_is_undone_in_time() -> None:
    """By each optimizer, also where several take turns."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))
    mask = torch.rand(64, 64) > 0.5
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in layers]
    MaskKeeper(layers, {f"{index}.weight": mask for index in range(2)}, optimizers)
    row, column = (~mask).nonzero()[7].tolist()
    for step in range(110):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            layer(torch.randn(8, 64)).square().sum().backward()
            gradient = layer.weight.grad
            assert gradient is not None
            if step < 3:
                gradient[row, column] += 1.0
            gradient.mul_(0.5)
            optimizer.step()
    for layer, optimizer in zip(layers, optimizers, strict=True):
        assert not layer.weight[~mask].any()
        assert not optimizer.state[layer.weight]["exp_avg"][~mask].any()


def test_frozen_parameters_are_kept_when_unfrozen_later() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    masks = make_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    MaskKeeper(model, masks, [optimizer])
    assert not model[0].weight.requires_grad
    train(model, optimizer, range(2))
    model[0].requires_grad_(True)
    train(model, optimizer, range(2, 4))
    assert pruned_values(model, masks).count_nonzero() == 0


def test_replaced_parameters_are_found_again() -> None:
    model = make_model()
    masks = make_masks(model)
    keeper = MaskKeeper(model, masks)
    model[0].weight = nn.Parameter(torch.randn(8, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    keeper.attach([optimizer])
    assert pruned_values(model, masks).count_nonzero() == 0
    train(model, optimizer, range(3))
    assert pruned_values(model, masks).count_nonzero() == 0


def test_a_parameter_that_was_replaced_by_one_of_another_shape_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    keeper = MaskKeeper(model, {"0.weight": torch.tensor([[True, False, False]] * 2)})
    model[0] = nn.Linear(3, 5)
    for ask in (lambda: keeper.attach([]), keeper.brought_back):
        with pytest.raises(ValueError, match=r"0.weight has shape \(5, 3\) now, and its mask \(2, 3\)"):
            ask()


def test_remove_leaves_nothing_behind() -> None:
    model, twin = make_model(), make_model()
    optimizer = Drifting(model.parameters())
    masks = make_masks(model)
    keeper = MaskKeeper(model, masks, [optimizer])
    keeper.update(make_masks(model, seed=2))
    keeper.remove()
    twin.load_state_dict(model.state_dict())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_load_state_dict_post_hooks")
    assert all(not getattr(optimizer, name) for name in hooks)
    train(model, optimizer, range(2))
    train(twin, Drifting(twin.parameters()), range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_update_replaces_the_masks() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    first = make_masks(model)
    keeper = MaskKeeper(model, first, [optimizer])
    train(model, optimizer, range(2))
    second = {
        name: mask & other for (name, mask), other in zip(first.items(), make_masks(model, 2).values(), strict=True)
    }
    keeper.update(second)
    assert pruned_values(model, second).count_nonzero() == 0
    train(model, optimizer, range(2, 4))
    assert pruned_values(model, second).count_nonzero() == 0


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (
            {"0.weight": torch.zeros(8, 6, dtype=torch.bool), "2.weight": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            "2.weight",
        ),
        ({"0.weight": torch.zeros(8, 6)}, ValueError, "bool"),
        (
            {"0.weight": torch.zeros(8, 6, dtype=torch.bool), "7.weight": torch.zeros(1, dtype=torch.bool)},
            KeyError,
            "7.weight",
        ),
    ],
)
def test_no_weight_changes_when_a_mask_does_not_fit(
    masks: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        MaskKeeper(model, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_objects_without_step_hooks_are_refused_before_anything_changes() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="register_step_post_hook"):
        MaskKeeper(model, make_masks(model), [object()])  # type: ignore[list-item]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_after_being_removed_it_can_be_attached_again() -> None:
    model = make_model()
    masks = make_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    keeper = MaskKeeper(model, masks, [optimizer])
    keeper.remove()
    train(model, optimizer, range(2))
    keeper.attach([optimizer])
    loss_of(model, 2).backward()
    for name, mask in masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None and not gradient[~mask].any()
    train(model, optimizer, range(2, 6))
    assert pruned_values(model, masks).count_nonzero() == 0


def test_weights_that_take_no_gradients_are_zeroed() -> None:
    model = nn.Module()
    model.register_parameter("codes", nn.Parameter(torch.arange(1, 7, dtype=torch.int8), requires_grad=False))
    keeper = MaskKeeper(model, {"codes": torch.tensor([True, False] * 3)})
    assert model.codes.tolist() == [1, 0, 3, 0, 5, 0]
    keeper.remove()


def test_one_byte_a_weight_and_state_dict_unchanged() -> None:
    model = make_model()
    keys = list(model.state_dict())
    masks = make_masks(model)
    keeper = MaskKeeper(model, masks)
    assert keeper.nbytes == sum(mask.numel() for mask in masks.values())
    assert list(model.state_dict()) == keys
    copy.deepcopy(model)
