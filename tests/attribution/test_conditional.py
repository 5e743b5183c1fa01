"""Relevance on condition of units: by way of them alone, and as much as they have."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Explanation
from lrp_prune.targets import Logit
from tests.support.convolutional import convolution, randomized
from tests.support.small_models import batch_for, build


def given(explanation: Explanation) -> Tensor:
    return next(iter(explanation.inputs.values())).relevance


def total(explanation: Explanation) -> float:
    """Of inputs and of everything else that relevance ends at."""
    of_inputs = sum(float(part.relevance.double().sum()) for part in explanation.inputs.values())
    return of_inputs + sum(explanation.elsewhere.values())


def mlp() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, torch.randn(3, 4)


def test_it_is_what_goes_through_the_unit_written_out() -> None:
    model, x = mlp()
    first, second, last = (model[place].weight for place in (0, 2, 4))
    hidden = model[0](x).clamp(min=0)
    later = model[2](hidden) > 0
    for unit in range(6):
        found = lrp_prune.explain(model, x, target=1, through={"2": [unit]})
        slope = (later * last[1]) @ second[:, unit] * (hidden[:, unit] > 0)
        torch.testing.assert_close(given(found), (x * first[unit] * slope[:, None]).detach())
        torch.testing.assert_close(found.values, (hidden[:, unit] * slope).detach())
        assert found.target == f"the logit of 1 by way of 2[{unit}]"


def test_the_units_of_a_layer_that_all_paths_lead_through_add_up_to_the_whole() -> None:
    model, x = mlp()
    whole = lrp_prune.explain(model, x, target=1)
    together = lrp_prune.explain(model, x, target=1, through={"4": range(5)})
    torch.testing.assert_close(given(together), given(whole))
    parts = [given(lrp_prune.explain(model, x, target=1, through={"4": [unit]})) for unit in range(5)]
    torch.testing.assert_close(torch.stack(parts).sum(0), given(whole))


class Added(nn.Module):
    """A branch on top of what it reads."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual() -> tuple[nn.Module, dict[str, Tensor]]:
    """Some channels are those of a stream that a block adds to: its shortcut is no path through the units of the block; and a
    convolution of one filter a channel hands units on, and does not read them."""
    branch = nn.Sequential(*convolution(6, 6), nn.ReLU(), *convolution(6, 6, groups=2))
    layers = [*convolution(3, 6), *convolution(6, 6, groups=6), nn.ReLU(), Added(branch), nn.ReLU()]
    model = randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))
    for module in model.modules():  # biases keep relevance
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
            module.running_mean.zero_()
        elif getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return model, {"input": torch.randn(2, 3, 8, 8)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "granularity", "composite"),
    [
        ("residual", "neuron", "cp_lrp"),
        ("residual", "neuron", {"convolution": "gamma(0.3)", "linear": "epsilon"}),
        *((name, kind, "cp_lrp") for name in ("llama", "gpt2", "t5") for kind in ("neuron", "head")),
        ("mixtral", "neuron", "cp_lrp"),
    ],
)
def test_the_input_has_what_the_unit_has(name: str, granularity: str, composite: Any) -> None:
    """The unit's relevance as :func:`attribute` knows it, all of which arrives in models without biases."""
    model, batch = residual() if name == "residual" else (build(name), batch_for(name))
    if name == "gpt2":
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                nn.init.zeros_(parameter)
    target, options = Logit((1, 2)), {"granularity": granularity, "composite": composite}
    known = lrp_prune.attribute(model, [batch], target=target, statistic="signed", matmul_dtype=None, **options)
    samples = len(next(iter(batch.values())))
    for group, values in known.items():
        unit = int(values.abs().argmax())
        found = lrp_prune.explain(model, batch, target=(1, 2), through={group: [unit]}, **options)
        wanted = samples * float(values[unit])
        assert float(found.values.sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-7), group
        assert total(found) == pytest.approx(wanted, rel=1e-3, abs=1e-6), group


class Joined(nn.Module):
    """Two layers that one layer reads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 3)
        self.aside = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x).relu(), self.other(x).relu()
        return self.last(torch.cat([one, other], -1)) + self.aside(other)


def test_units_of_several_groups_are_added() -> None:
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(3, 4)
    groups = list(lrp_prune.attribute(model, [x], target=Logit(1), granularity="neuron"))
    assert len(groups) == 2
    both = lrp_prune.explain(model, x, target=1, through={group: [0, 1] for group in groups})
    alone = [given(lrp_prune.explain(model, x, target=1, through={group: [0, 1]})) for group in groups]
    torch.testing.assert_close(given(both), alone[0] + alone[1])


@pytest.mark.parametrize(
    ("through", "granularity", "error", "said"),
    [
        ({"3": [0]}, "neuron", KeyError, "there is no group of units '3', there are 2, 4"),
        ({"2": [6]}, "neuron", KeyError, "'2' has 6 units, got 6"),
        ({"2": []}, "neuron", ValueError, "through names no unit"),
        (
            {"2": [0]},
            "block",
            ValueError,
            r"through= is for units of the granularities \('neuron', 'head'\), got 'block'",
        ),
    ],
)
def test_what_there_is_not_is_refused(through: Any, granularity: str, error: type[Exception], said: str) -> None:
    model, x = mlp()
    with pytest.raises(error, match=said):
        lrp_prune.explain(model, x, target=1, through=through, granularity=granularity)


def test_units_that_nothing_depends_on_are_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.made, self.read = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside = self.read(self.made(x).relu())
            return self.used(x)

    with pytest.raises(ValueError, match="no relevance reaches the units of read"):
        lrp_prune.explain(Aside(), torch.randn(2, 4), target=1, through={"read": [0]})


def test_the_first_of_the_samples_that_a_unit_is_found_in_has_the_relevance_that_was_found() -> None:
    model, x = mlp()
    found = lrp_prune.top_samples(model, [x], {"2": [4]}, number=2, target=1, progress=False)
    best = found["2", 4][0]
    again = lrp_prune.explain(model, best.batch, target=1, through={"2": [4]})
    assert float(again.values.sum()) == pytest.approx(best.relevance, rel=1e-5)
