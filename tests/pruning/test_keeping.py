"""Pruned weights stay at exactly zero, and the kept ones train as if the pruned ones did not exist."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrp_prune.pruning import keeping
from lrp_prune.pruning.keeping import MaskKeeper, keeps_zeros, zero_pruned_

Weights = Iterable[nn.Parameter]

ALLOWED: dict[str, Callable[[Weights], Optimizer]] = {
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_amsgrad_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd_maximize": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.1, maximize=True),
}


class Drifting(Optimizer):
    """An optimizer as users write them: its update does not vanish with the gradient."""

    def __init__(self, params: Weights) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("drift", torch.zeros_like(parameter))
                moment.add_(0.1)
                parameter.add_(moment)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def make_masks(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) > 0.5
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    }


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return model(torch.randn(16, 6, generator=generator)).square().sum()


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)


def pruned_values(model: nn.Module, masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([model.get_parameter(name)[~mask] for name, mask in masks.items()])


@pytest.mark.parametrize("name", ALLOWED)
def test_zeros_survive_without_touching_the_weights_after_a_step(name: str) -> None:
    model = make_model()
    optimizer = ALLOWED[name](model.parameters())
    train(model, optimizer, range(3))
    masks = make_masks(model)
    MaskKeeper(model, masks, [optimizer])
    assert keeps_zeros(optimizer)  # so that after a step nothing is zeroed: the update itself must be zero
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 8))
    assert pruned_values(model, masks).count_nonzero() == 0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("name", ["adam", "adamw", "adamw_amsgrad_foreach", "rmsprop", "adagrad", "nadam", "radam"])
def test_no_square_root_of_zero(name: str) -> None:
    """MKL takes ten times as long for it; and what second moments are where the rest is zero changes no weight."""
    models = []
    for keep_positive in (True, False):
        model = make_model()
        optimizer = ALLOWED[name](model.parameters())
        masks = make_masks(model)
        keeper = MaskKeeper(model, masks)
        if not keep_positive:
            keeper._keep_second_moments_positive = lambda _: None  # type: ignore[method-assign]
        keeper.attach([optimizer])
        train(model, optimizer, range(6))
        for parameter_name, mask in masks.items():
            state = optimizer.state[model.get_parameter(parameter_name)]
            second = [value for key, value in state.items() if key in keeping._SECOND_MOMENTS]
            assert second
            assert not keep_positive or all((value[~mask] > 0).all() for value in second)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_every_allowed_optimizer_is_tested() -> None:
    tested = {type(make(make_model().parameters())) for make in ALLOWED.values()} | {torch.optim.SparseAdam}
    assert tested == keeping.KEEPS_ZEROS


@pytest.mark.parametrize("make", [Drifting, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)])
def test_zeros_survive_optimizers_that_are_not_known(make: Callable[[Weights], Optimizer]) -> None:
    model = make_model()
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    masks = make_masks(model)
    MaskKeeper(model, masks, [optimizer])
    assert not keeps_zeros(optimizer)
    for step in range(3, 8):
        train(model, optimizer, [step])
        assert pruned_values(model, masks).count_nonzero() == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_zeros_survive_muon_and_pruned_gradients_do_not_reach_kept_weights() -> None:
    """Muon mixes the entries of a gradient, so the pruned ones must be out of it before the step."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8))
    model = nn.ParameterDict({"weight": weight})
    masks = {"weight": torch.rand(6, 8) > 0.5}
    optimizer = torch.optim.Muon([weight], lr=0.1, weight_decay=0.0)
    MaskKeeper(model, masks, [optimizer])
    reference = nn.Parameter(weight.detach().clone())
    reference_optimizer = torch.optim.Muon([reference], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        gradient = torch.randn(6, 8)
        optimizer.zero_grad()
        (weight * gradient).sum().backward()
        optimizer.step()
        reference.grad = gradient * masks["weight"]
        reference_optimizer.step()
        with torch.no_grad():
            reference *= masks["weight"]
        for state in reference_optimizer.state.values():
            state["momentum_buffer"] *= masks["weight"]
        assert weight[~masks["weight"]].count_nonzero() == 0
    torch.testing.assert_close(weight, reference)


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


def test_loaded_moments_are_zeroed() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(3))
    dense_state = copy.deepcopy(optimizer.state_dict())
    masks = make_masks(model)
    MaskKeeper(model, masks, [optimizer])
    optimizer.load_state_dict(dense_state)
    train(model, optimizer, range(3, 6))
    assert pruned_values(model, masks).count_nonzero() == 0


def test_optimizer_made_after_pruning_and_several_optimizers() -> None:
    model = make_model()
    masks = make_masks(model)
    keeper = MaskKeeper(model, masks)
    first = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    second = Drifting(model[2].parameters())
    keeper.attach([first, second])
    for step in range(3):
        loss_of(model, step).backward()
        first.step()
        second.step()
    assert pruned_values(model, masks).count_nonzero() == 0
    assert model[2].weight[masks["2.weight"]].count_nonzero() == masks["2.weight"].sum()


def test_sparse_gradients() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    masks = {"weight": torch.rand(10, 4) > 0.5}
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    MaskKeeper(model, masks, [optimizer])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([1, 1, 5])).square().sum().backward()
        optimizer.step()
    assert model.weight[~masks["weight"]].count_nonzero() == 0
    assert torch.equal(model.weight[0][masks["weight"][0]], before[0][masks["weight"][0]])
    assert not torch.equal(model.weight[1][masks["weight"][1]], before[1][masks["weight"][1]])


def test_scalar_parameters_keep_their_optimizers_counters() -> None:
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model["scale"].square().backward()
        optimizer.step()
    MaskKeeper(model, {"scale": torch.tensor(False)}, [optimizer])
    assert optimizer.state[model["scale"]]["step"] == 3
    model["scale"].square().backward()
    optimizer.step()
    assert model["scale"] == 0


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


def test_objects_without_step_hooks_are_refused() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="register_step_post_hook"):
        MaskKeeper(model, make_masks(model), [object()])  # type: ignore[list-item]


def test_one_byte_a_weight_and_state_dict_unchanged() -> None:
    model = make_model()
    keys = list(model.state_dict())
    masks = make_masks(model)
    keeper = MaskKeeper(model, masks)
    assert keeper.nbytes == sum(mask.numel() for mask in masks.values())
    assert list(model.state_dict()) == keys
    copy.deepcopy(model)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "channels_last", "large"])
def test_zeroing_equals_indexing(dtype: torch.dtype, layout: str) -> None:
    tensor = {
        "contiguous": lambda: torch.randn(7, 5),
        "transposed": lambda: torch.randn(5, 7).t(),
        "strided": lambda: torch.randn(7, 10)[:, ::2],
        "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "large": lambda: torch.randn(300, 301),
    }[layout]().to(dtype)
    tensor.reshape(-1)[0] = float("nan")
    mask = torch.rand(tensor.shape) > 0.5
    mask.view(-1)[0] = False
    expected = tensor.clone()
    expected[~mask] = 0
    for kept in (keeping._as_bits(mask, tensor), -mask.to(torch.int8)):
        changed = tensor.as_strided(tensor.shape, tensor.stride())
        changed = (
            changed.clone(memory_format=torch.preserve_format)
            if layout != "strided"
            else torch.randn(7, 10).to(dtype)[:, ::2]
        )
        changed.copy_(tensor)
        zero_pruned_(changed, kept)
        assert torch.equal(
            changed.nan_to_num(99.0) if not dtype.is_complex else torch.view_as_real(changed),
            expected.nan_to_num(99.0) if not dtype.is_complex else torch.view_as_real(expected),
        )
