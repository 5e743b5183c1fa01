"""Promise 1: after collecting, also after an exception, everything is bit-identical to before."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lrp_prune
from lrp_prune.engine.operations import OPERATIONS
from tests.support.small_models import batch_for, build, forward


def _hooks(model: nn.Module) -> list[Any]:
    names = [name for name in vars(nn.Module()) if "hooks" in name]
    return [
        (type(module), set(vars(module)), *(len(vars(module)[name]) for name in names)) for module in model.modules()
    ]


def _state(model: nn.Module) -> dict[str, Any]:
    """All that could have changed, as far as it can be compared."""
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "modules": _hooks(model),
        "forwards": [type(module).forward for module in model.modules()],
        "functions": (
            F.linear,
            F.softmax,
            F.scaled_dot_product_attention,
            F.dropout,
            torch.matmul,
            nn.LayerNorm.forward,
        ),
        "registry": {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "flash_attention_2")},
        "operations": dict(OPERATIONS),
        "attention": model.config._attn_implementation,
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def _assert_same(before: Any, after: Any, path: str = "") -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for name in before:
            _assert_same(before[name], after[name], f"{path}/{name}")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), path
    else:
        assert before == after, path


def _attribute(model: nn.Module, batch: dict[str, Tensor]) -> None:
    lrp_prune.attribute(
        model, [batch], statistic="abs_token", target="last_token" if "input_ids" in batch else _largest
    )


def _largest(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return forward(model, batch).amax(-1).sum()


def _fail(model: nn.Module, batch: dict[str, Tensor]) -> None:
    def target(inner: nn.Module, data: dict[str, Tensor]) -> Tensor:
        forward(inner, data)
        torch.rand(3)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        lrp_prune.attribute(model, [batch], target=target)


def _fail_in_forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    broken = list(model.modules())[-1]
    handle = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("deep inside")))
    try:
        with pytest.raises(RuntimeError, match="deep inside"), lrp_prune.attributing(model):
            forward(model, batch)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "opt"])
@pytest.mark.parametrize("use", [_attribute, _fail, _fail_in_forward])
def test_nothing_is_different_afterwards(name: str, use: Callable[..., None]) -> None:
    model, batch = build(name).train(), batch_for(name)
    next(iter(model.children())).eval()
    forward(model, batch).sum().backward()
    before = _state(model)
    use(model, batch)
    _assert_same(before, _state(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_training_goes_on_bit_for_bit(name: str) -> None:
    """Outputs, gradients and dropout of a training step are the same with and without an attribution before it."""
    results = []
    for collect in (False, True):
        model, batch = build(name), batch_for(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        model.train()
        torch.manual_seed(3)
        if collect:
            _attribute(model, batch)
        output = forward(model, batch)
        output.square().sum().backward()
        results.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for parameter_name, gradient in results[0][1].items():
        other = results[1][1][parameter_name]
        assert (gradient is None) == (other is None) and (gradient is None or torch.equal(gradient, other)), (
            parameter_name
        )


def test_other_models_in_the_process_are_untouched_inside_the_context() -> None:
    model, other = build("llama"), build("opt")
    batch = batch_for("llama")
    expected = torch.autograd.grad(forward(other, batch).sum(), list(other.parameters()), allow_unused=True)
    with lrp_prune.attributing(model) as propagation:
        value = forward(model, batch).sum()
        inside = torch.autograd.grad(forward(other, batch).sum(), list(other.parameters()), allow_unused=True)
        propagation.relevance(value)
    for one, two in zip(expected, inside, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_a_training_step_between_two_attributions_is_undisturbed() -> None:
    model, batch = build("llama"), batch_for("llama")
    _attribute(model, batch)
    twin = copy.deepcopy(model)
    for candidate in (model, twin):
        forward(candidate, batch).sum().backward()
        if candidate is model:
            _attribute(model, batch)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad) if one.grad is not None else two.grad is None


def test_buffers_and_running_statistics_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).train()
    before = copy.deepcopy(model.state_dict())
    with lrp_prune.attributing(model) as propagation:
        propagation.relevance(model(torch.randn(4, 1, 4, 4)).sum())
    _assert_same(dict(before), dict(model.state_dict()))
    assert model.training


def test_tensors_of_the_model_bear_no_marks() -> None:
    """Neither a constant that a module returns, nor one that an activation is written into."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(3, 4))
            self.cached = torch.randn(3, 4)

        def forward(self, cached: bool) -> Tensor:
            return self.cached if cached else self.table

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.positions = nn.Linear(4, 4), Table()
            self.register_buffer("last", torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x) + self.positions(True) + self.positions(False)
            self.last.copy_(x.detach())
            return x

    model = Model()
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(model(torch.randn(3, 4)).sum())
    assert set(relevance) == {"x", "positions.table", "positions.constant"}
    for tensor in (*model.parameters(), *model.buffers(), model.positions.cached):
        assert not vars(tensor)
    assert not model.last.any()


def test_inputs_and_constants_that_were_made_in_inference_mode_are_roots_like_others() -> None:
    """As batches of a validation are."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.register_buffer("table", torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.table)

    model, x, results = Model(), torch.randn(2, 3, 4), []
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            model.table, batch = model.table.clone(), x.clone()
            with lrp_prune.attributing(model) as propagation:
                results.append(propagation.relevance(model(batch).sum()))
    assert set(results[0]) == {"x", "table"}
    _assert_same(*results)


def test_relevance_is_the_same_in_no_grad_and_inference_mode() -> None:
    model = build("llama")
    results = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            results.append(lrp_prune.attribute(model, [batch_for("llama")]))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]) and torch.equal(results[0][name], results[2][name])


def test_rules_act_inside_the_forward_only() -> None:
    """The target's own softmax and products are plain gradients."""
    model, batch = build("llama"), batch_for("llama")
    results = []
    for outside in (True, False):
        with lrp_prune.attributing(model) as propagation:
            logits = forward(model, batch)
            if outside:
                value = (torch.softmax(logits, -1) * logits).sum()
            else:
                constant = logits.detach().requires_grad_()
                with torch._C.DisableTorchFunction():
                    (seed,) = torch.autograd.grad((torch.softmax(constant, -1) * constant).sum(), constant)
                value = (logits * seed).sum()
            results.append(propagation.relevance(value)["model.embed_tokens"])
    torch.testing.assert_close(results[0], results[1])
