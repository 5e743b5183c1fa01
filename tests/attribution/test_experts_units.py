"""Neurons of experts that are stacked in one weight: each expert's are its own, whichever were reached."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.members import NOBODY
from lrp_prune.relevance.unscored import UnscoredWeightsWarning
from tests.support.small_models import batch_for, build, forward, largest_sum

EXPERTS, WIDTH = 4, 48
READER = "model.layers.{}.mlp.experts.down_proj"


def neurons(model: nn.Module, batch: Any, **options: Any) -> Relevance:
    return lrp_prune.attribute(model, [batch], target=largest_sum, granularity="neuron", **options)


def routed_to(model: nn.Module, experts: list[int]) -> nn.Module:
    """The model with every token routed to these experts."""
    for layer in model.model.layers:
        gate = layer.mlp.gate

        def only(module: nn.Module, args: Any, output: Any) -> Any:
            logits, _, _ = output
            index = torch.tensor(experts).expand(len(logits), -1)
            return logits, torch.full(index.shape, 1 / len(experts)), index

        gate.register_forward_hook(only)
    return model


def removed(relevance: Relevance, group: str, units: list[int]) -> lrp_prune.Masks:
    values = {name: torch.ones_like(tensor) for name, tensor in relevance.items()}
    values[group][units] = 0
    single = Relevance(
        values, granularity="neuron", members=relevance.members, parameter_shapes=relevance.parameter_shapes
    )
    return lrp_prune.select(single, len(units) / sum(map(len, values.values())), scope="global")


def test_each_expert_has_its_own_neurons() -> None:
    model = build("mixtral")
    found = neurons(model, batch_for("mixtral", 3, 9))
    assert list(found) == [READER.format(0), READER.format(1)]
    for name, values in found.items():
        assert values.shape == (EXPERTS * WIDTH,)
        owned = {member.parameter.rpartition(".")[2]: member for member in found.members[name]}
        assert set(owned) == {"gate_up_proj", "down_proj"}
        numbers = torch.arange(EXPERTS * WIDTH).reshape(EXPERTS, WIDTH)
        assert owned["down_proj"].reads and torch.equal(owned["down_proj"].owners.long(), numbers[:, None, :])
        assert torch.equal(owned["gate_up_proj"].owners.long(), torch.cat([numbers, numbers], dim=1)[:, :, None])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_pruned_neuron_is_silent_and_no_other_is(name: str) -> None:
    model, batch = build(name), batch_for(name, 3, 9)
    model.set_experts_implementation("eager")
    found = neurons(model, batch)
    group = next(iter(found))
    width = len(found[group]) // model.config.num_local_experts
    expert, channel = 1, 5
    reads = dict(model.named_modules())[group.rpartition(".")[0]]
    weight = next(parameter for key, parameter in model.named_parameters() if key == group)
    before = weight.detach().clone()
    with torch.no_grad():  # what reads the channel, alone: the same as silencing it
        axis = 1 if name == "gpt_oss" else 2
        weight[expert].select(axis - 1, channel).zero_()
    assert reads is not None
    expected = forward(model, batch)
    with torch.no_grad():
        weight.copy_(before)
    dense = forward(model, batch)
    removed(found, group, [expert * width + channel]).apply_(model)
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(dense, expected, rtol=1e-5, atol=1e-6)


def test_biases_of_experts_go_with_their_neurons() -> None:
    found = neurons(build("gpt_oss"), batch_for("gpt_oss", 3, 9))
    for members in found.members.values():
        owned = {member.parameter.rpartition(".")[2] for member in members}
        assert owned == {"gate_up_proj", "gate_up_proj_bias", "down_proj"}


def test_relevance_is_what_arrives_at_each_experts_channels() -> None:
    """Against the inputs of the experts' second product, by hand."""
    model, batch = build("mixtral"), batch_for("mixtral", 3, 9)
    model.set_experts_implementation("eager")
    found = neurons(model, batch, composite="gradient", statistic="signed")
    experts, linear = model.model.layers[1].mlp.experts, torch.nn.functional.linear
    inputs: dict[int, Tensor] = {}

    def recorded(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        for expert in range(EXPERTS):
            if weight.data_ptr() == experts.down_proj[expert].data_ptr():
                x.retain_grad()
                inputs[expert] = x
        return linear(x, weight, *rest)

    torch.nn.functional.linear = recorded
    try:
        largest_sum(model, batch).backward()
    finally:
        torch.nn.functional.linear = linear
    expected = torch.zeros(EXPERTS, WIDTH)
    for expert, x in inputs.items():
        expected[expert] = (x * x.grad).sum(0).detach()
    torch.testing.assert_close(found[READER.format(1)], expected.flatten() / 3, rtol=1e-3, atol=1e-7)


def test_experts_that_nothing_went_to_have_neurons_without_relevance_and_are_named() -> None:
    batch = batch_for("mixtral", 3, 9)
    whole = neurons(build("mixtral"), batch)
    with pytest.warns(UnscoredWeightsWarning, match=r"4 of 8 experts .*no token went to them"):
        part = neurons(routed_to(build("mixtral"), [1, 3]), batch)
    for name, members in whole.members.items():
        assert part.members[name] == members
        values = part[name].reshape(EXPERTS, WIDTH)
        assert not values[[0, 2]].any() and values[[1, 3]].all()


def test_relevance_of_different_experts_adds_up() -> None:
    """As of processes, whose tokens are routed otherwise."""
    batch = batch_for("mixtral", 3, 9)
    first, second = (
        neurons(routed_to(build("mixtral"), experts), batch, statistic="signed") for experts in ([0, 1], [2, 3])
    )
    together = first + second
    for name, values in together.items():
        parts = [each[name].reshape(EXPERTS, WIDTH) for each in (first, second)]
        expected = torch.cat([parts[0][:2], parts[1][2:]]) / 2
        torch.testing.assert_close(values.reshape(EXPERTS, WIDTH), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_way_that_experts_run_does_not_matter_and_comes_back(implementation: str) -> None:
    batch = batch_for("mixtral", 3, 9)
    model = build("mixtral")
    model.set_experts_implementation(implementation)
    found, expected = neurons(model, batch), neurons(build("mixtral"), batch)
    assert model.config._experts_implementation == implementation
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-7)


def test_it_comes_back_after_an_error() -> None:
    model = build("mixtral")
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RuntimeError, match="on purpose"):
        lrp_prune.attribute(model, [batch_for("mixtral")], target=failing, granularity="neuron")
    assert model.config._experts_implementation == "grouped_mm"


def failing(model: nn.Module, batch: Any) -> Tensor:
    largest_sum(model, batch)
    raise RuntimeError("on purpose")


class Sequence(nn.Module):
    """Layers that are stacked in one weight, and run one after the other."""

    def __init__(self, used: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack, self.head, self.used = nn.Parameter(torch.randn(3, 6, 6)), nn.Linear(6, 2), used

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.used):
            x = (x @ self.stack[index].T).relu()
        found: Tensor = self.head(x)
        return found


def test_layers_of_a_stack_that_follow_each_other_own_each_others_channels() -> None:
    model, x = Sequence(), torch.randn(5, 6)
    found = lrp_prune.attribute(model, [(x, torch.zeros(5, dtype=torch.long))], "class", granularity="neuron")
    (group,) = found
    assert len(found[group]) == 18
    for unit in (0, 7, 17):
        layer, channel = divmod(unit, 6)
        copy = Sequence()
        with torch.no_grad():
            copy.stack[layer, channel].zero_()
        removed(found, group, [unit]).apply_(model)
        torch.testing.assert_close(model(x), copy(x))
        model.load_state_dict(Sequence().state_dict())


def test_a_layer_of_such_a_stack_that_never_runs_gets_no_neurons_by_analogy() -> None:
    model, x = Sequence(used=2), torch.randn(5, 6)
    found = lrp_prune.attribute(model, [(x, torch.zeros(5, dtype=torch.long))], "class", granularity="neuron")
    for members in found.members.values():
        for member in members:
            if member.parameter == "stack" and member.owners.shape[0] == 3:
                assert (member.owners[2] == NOBODY).all()


class Shared(nn.Module):
    """Experts whose hidden channels get one shift."""

    def __init__(self, used: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 3, 5))
        self.shift, self.used = nn.Parameter(torch.randn(5)), used

    def forward(self, x: Tensor) -> Tensor:
        parts = enumerate(x.chunk(self.used))
        return torch.cat([(part @ self.up[i].T + self.shift).relu() @ self.down[i].T for i, part in parts])


@pytest.mark.parametrize("used", [2, 3])
def test_neurons_that_share_a_shift_go_together(used: int) -> None:
    """Also those of an expert that nothing went to."""
    batch = (torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    found = lrp_prune.attribute(Shared(used), [batch], "class", granularity="neuron")
    (group,) = found
    assert len(found[group]) == 5
    owned = {(member.parameter, member.reads): member.owners for member in found.members[group]}
    assert torch.equal(owned["shift", False], torch.arange(5, dtype=torch.int32))
    assert torch.equal(owned["up", False].expand(3, 5, 1), torch.arange(5, dtype=torch.int32)[:, None].expand(3, 5, 1))


def test_filters_that_are_dead_are_no_experts() -> None:
    """Whose owners have as many dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    with torch.no_grad():
        model[0].weight[1].zero_()
        model[0].bias[1] = -1
    batch = (torch.randn(3, 2, 2, 2), torch.zeros(3, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lrp_prune.attribute(model, [batch], "class", granularity="neuron")
    assert any(not values.all() for values in found.values())


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_that_look_at_no_tokens_say_nothing_of_them(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnscoredWeightsWarning)
        lrp_prune.prune(
            build("mixtral"), [batch_for("mixtral", 3, 9)], 0.3, method, granularity="neuron", recalibrate=False
        )
