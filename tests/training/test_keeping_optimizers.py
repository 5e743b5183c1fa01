"""Pruned weights stay at exactly zero, and the kept ones train as if the pruned ones did not exist."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lrp_prune.training.keeping import MaskKeeper
from lrp_prune.training.optimizers import KEEPS_ZEROS, SECOND_MOMENTS, keeps_zeros
from tests.support.masked_training import Drifting, Weights, loss_of, make_masks, make_model, pruned_values, train

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
            second = [value for key, value in state.items() if key in SECOND_MOMENTS]
            assert second
            assert not keep_positive or all((value[~mask] > 0).all() for value in second)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_every_allowed_optimizer_is_tested() -> None:
    tested = {type(make(make_model().parameters())) for make in ALLOWED.values()} | {torch.optim.SparseAdam}
    assert tested == KEEPS_ZEROS


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


@pytest.mark.parametrize(
    ("dtype", "make"),
    [
        (torch.float16, lambda p: torch.optim.AdamW(p, lr=0.01)),  # its eps of 1e-8 is 0 in float16
        (torch.float16, lambda p: torch.optim.RMSprop(p, lr=0.01)),
        (torch.float32, lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-60)),
        (torch.float32, lambda p: torch.optim.Adafactor(p, lr=0.01, eps=(0.0, 1e-3))),
    ],
)
def test_zeros_survive_where_nothing_is_added_to_denominators(
    dtype: torch.dtype, make: Callable[[Weights], Optimizer]
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False).to(dtype)
    mask = torch.rand(8, 16) > 0.5
    mask[2] = False  # a whole row, of which Adafactor keeps one average
    optimizer = make(model.parameters())
    MaskKeeper(model, {"weight": mask}, [optimizer])
    assert not keeps_zeros(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 16, dtype=dtype)).square().mean().backward()
        optimizer.step()
        # Kept weights may fail by themselves in float16, where small gradients have a square of 0.
        assert not model.weight[~mask].any()


@pytest.mark.parametrize("make", [torch.optim.SparseAdam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_sparse_gradients(make: Callable[..., Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True)
    masks = {"weight": torch.rand(10, 4) > 0.5}
    optimizer = make(model.parameters(), lr=0.1)
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


class Lion(Optimizer):
    """The sign of a moment: a pruned entry must not turn a tiny gradient into a whole step (arXiv 2302.06675)."""

    def __init__(self, params: Weights) -> None:
        super().__init__(params, {"lr": 0.01, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * (0.9 * moment + 0.1 * parameter.grad).sign())
                moment.lerp_(parameter.grad, 0.01)


def _adafactor(parameters: Weights) -> Optimizer:
    return pytest.importorskip("transformers").Adafactor(
        parameters, lr=0.05, relative_step=False, scale_parameter=False
    )


UNKNOWN: dict[str, Callable[[Weights], Optimizer]] = {
    "lion": Lion,
    "transformers_adafactor": _adafactor,
    "transformers_adafactor_momentum": lambda p: pytest.importorskip("transformers").Adafactor(
        p, lr=0.05, relative_step=False, scale_parameter=False, beta1=0.9
    ),
}


@pytest.mark.parametrize("name", [*ALLOWED, *UNKNOWN])
def test_kept_weights_train_as_if_the_pruned_ones_did_not_exist(name: str) -> None:
    """Bit for bit the training in which gradients, weights and moments are multiplied by the mask by hand."""
    make = {**ALLOWED, **UNKNOWN}[name]
    models = []
    for by_hand in (False, True):
        model = make_model()
        optimizer, masks = make(model.parameters()), make_masks(model)
        for step in range(7):
            if step == 2 and by_hand:
                _mask(model, masks, optimizer)
            elif step == 2:
                MaskKeeper(model, masks, [optimizer])
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if by_hand and step >= 2:
                for parameter_name, mask in masks.items():
                    model.get_parameter(parameter_name).grad.mul_(mask)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            if by_hand and step >= 2:
                _mask(model, masks, optimizer)
            assert step < 2 or pruned_values(model, masks).count_nonzero() == 0
        models.append(model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


@torch.no_grad()
def _mask(model: nn.Module, masks: dict[str, Tensor], optimizer: Optimizer) -> None:
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        parameter.mul_(mask)
        for key in ("exp_avg", "momentum_buffer", "drift", "ax", "exp_inf"):
            if key in optimizer.state[parameter] and optimizer.state[parameter][key] is not None:
                optimizer.state[parameter][key].mul_(mask)


@pytest.mark.parametrize("pruned_gradient", [0.0, float("inf")])
def test_gradient_scaling_skips_no_step_for_pruned_gradients(pruned_gradient: float) -> None:
    """An overflow of a pruned weight is nobody's; one of a kept weight skips the step and halves the scale."""
    model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, masks = torch.optim.AdamW(model.parameters(), lr=0.1), make_masks(model)
    MaskKeeper(model, masks, [optimizer])
    pruned = (~masks["0.weight"]).nonzero()[0]
    for step in range(3):
        optimizer.zero_grad()
        before = model[0].weight.detach().clone()
        hook = model[0].weight.register_hook(lambda grad: grad.index_put(tuple(pruned), torch.tensor(pruned_gradient)))
        scaler.scale(loss_of(model, step)).backward()
        hook.remove()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        assert not torch.equal(model[0].weight, before)
        assert pruned_values(model, masks).count_nonzero() == 0
