"""Hooks that hold entries of parameters: put on and taken off together."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.training.hooks import Hooks, check_optimizers, owned_by


def _zero(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def _backward(layer: nn.Linear) -> None:
    layer.zero_grad()
    layer(torch.ones(1, 2)).sum().backward()


def test_a_frozen_parameter_is_hooked_for_when_it_is_unfrozen():
    layer, hooks = nn.Linear(2, 1), Hooks()
    layer.weight.requires_grad_(False)
    hooks.on_gradient(layer.weight, _zero)
    assert not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    _backward(layer)
    assert layer.weight.grad is not None and not layer.weight.grad.any()
    hooks.clear()
    _backward(layer)
    assert layer.weight.grad.all() and len(hooks) == 0


def test_what_can_have_no_gradient_is_left_out():
    hooks = Hooks()
    hooks.on_gradient(nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False), _zero)
    assert len(hooks) == 0


def test_steps_and_loads_are_seen_in_order_until_cleared():
    layer, hooks, seen = nn.Linear(2, 1), Hooks(), list[str]()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    hooks.on_step(
        optimizer,
        after=lambda *_: seen.append("after"),
        before=lambda *_: seen.append("before"),
        loaded=lambda _: seen.append("loaded"),
    )
    for _ in range(2):
        _backward(layer)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        hooks.clear()
    assert seen == ["before", "after", "loaded"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda hooks: pickle.loads(pickle.dumps(hooks))])
def test_a_copy_has_none(copied):
    layer, hooks = nn.Linear(2, 1), Hooks()
    hooks.on_gradient(layer.weight, _zero)
    assert len(copied(hooks)) == 0 and len(hooks) == 1


def test_what_has_no_hooks_for_its_steps_is_refused():
    with pytest.raises(TypeError, match="object has no register_step_post_hook, so nothing is held through its steps"):
        check_optimizers([object()], "nothing is held")  # type: ignore[list-item]


def test_an_optimizer_owns_the_parameters_of_all_its_groups():
    first, second, third = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [third]}], lr=0.1)
    assert list(owned_by(optimizer, [first, second, third])) == [True, False, True]
