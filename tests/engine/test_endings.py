"""Where no relevance comes back, the message names the cause: one for each, with operation, module and way out."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import batch_for, build


class Middle(nn.Module):
    """Two layers with something between, in a module of its own."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.between = Between(between)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.between(self.first(x)))
        return result


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def summed(model: nn.Module, x: Any) -> Tensor:
    result: Tensor = model(x).sum()
    return result


def refused(
    model: nn.Module,
    x: Any,
    expected: str,
    target: Callable[[nn.Module, Any], Tensor] = summed,
    composite: str = "attnlrp",
) -> None:
    """Both by ``attributing`` and by ``attribute``; the whole message is given."""
    pattern = f"^{re.escape(expected)}$"
    with pytest.raises(ValueError, match=pattern), lrp_prune.attributing(model, composite) as propagation:
        propagation.relevance(target(model, x))
    with pytest.raises(ValueError, match=pattern):
        lrp_prune.attribute(model, [x], target, composite, unruled="ignore")


X = torch.ones(2, 4)
NEVER_CALLED = (
    "the Middle was never called inside this context, so that the target does not depend on it: call it in the context, as a "
    "whole, and not a copy of it or a part"
)
WITHOUT_GRADIENTS = (
    "the {model} was called inside this context, but without gradients (torch.no_grad, torch.inference_mode, or a method such as "
    "generate that sets them): call its forward with gradients enabled"
)
SOMETHING_ELSE = (
    "the target does not depend on what the Middle returned: after the call it was detached, or computed without gradients or "
    "from numbers (detach, no_grad, item, argmax), or it comes from something else"
)


def test_a_model_that_was_never_called() -> None:
    refused(Middle(torch.relu), X, NEVER_CALLED, lambda model, x: x.sum())
    refused(Middle(torch.relu), X, NEVER_CALLED, lambda model, x: Middle(torch.relu)(x).sum())
    refused(
        Middle(torch.relu), X, NEVER_CALLED, lambda model, x: model.between.function(x).sum() * model.first.weight.sum()
    )


def test_a_model_that_was_called_without_gradients() -> None:
    def without(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return summed(model, x)

    refused(Middle(torch.relu), X, WITHOUT_GRADIENTS.format(model="Middle"), without)
    refused(
        Middle(torch.relu), X, WITHOUT_GRADIENTS.format(model="Middle"), lambda m, x: torch.inference_mode()(m)(x).sum()
    )

    def generated(model: Any, batch: Any) -> Tensor:
        output = model.generate(**batch, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        return output.logits[0].sum()

    refused(build("llama"), batch_for("llama"), WITHOUT_GRADIENTS.format(model="LlamaForCausalLM"), generated)


CUT_OFF = "what the Middle returned does not depend on what entered it: "


@pytest.mark.parametrize(
    ("between", "told"),
    [
        (
            torch.Tensor.detach,
            "the model cuts it off by detach in between (Between): explain what comes before, or leave that out",
        ),
        (
            lambda h: h.data * 2,
            "the model cuts it off by data in between (Between): explain what comes before, or leave that out",
        ),
        (
            lambda h: torch.from_numpy(h.detach().numpy()),
            "the model cuts it off by detach in between (Between): explain what comes before, or leave that out",
        ),
        (
            lambda h: F.one_hot(h.argmax(-1), 6).float(),
            "the model goes on with whole numbers or truth values after argmax in between (Between), which carry no relevance: "
            "explain what comes before",
        ),
        (
            lambda h: (h > 0).float(),
            "the model goes on with whole numbers or truth values after gt in between (Between), which carry no relevance: "
            "explain what comes before",
        ),
        (
            lambda h: torch.tensor(h.tolist()),
            "the model goes on with Python numbers after tolist in between (Between): explain what comes before, or keep tensors",
        ),
        (
            torch.no_grad()(torch.sigmoid),
            "sigmoid in between (Between) ran without gradients (torch.no_grad inside the model): enable them there, or explain "
            "what comes before; what is frozen by requires_grad_(False) in place of it is not trained either, and relevance goes "
            "through",
        ),
    ],
)
def test_a_model_that_cuts_its_output_off(between: Callable[[Tensor], Tensor], told: str) -> None:
    refused(Middle(between), X, CUT_OFF + told)


def test_rules_that_stop_everything() -> None:
    probabilities = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    refused(
        probabilities,
        X,
        "what the Sequential returned does not depend on what entered it: the composite 'cp_lrp' stops all relevance at softmax "
        "in 1 (Softmax): explain what comes before (logits, not probabilities), or take another composite",
        composite="cp_lrp",
    )
    with lrp_prune.register_rule(torch.digamma, "stop"):
        refused(
            Middle(torch.digamma),
            X,
            CUT_OFF
            + "the rule registered for digamma in between (Between) stops all relevance: register another one, or explain what "
            "comes before",
        )


@pytest.mark.parametrize(
    "target",
    [
        lambda model, x: model(x).detach().sum(),
        lambda model, x: torch.tensor(model(x).sum().item()),
        lambda model, x: model(x).argmax(-1).float().sum(),
        lambda model, x: model.first.weight.sum() + 0 * model(x).detach().sum(),
    ],
)
def test_a_target_that_does_not_depend_on_the_output(target: Callable[[nn.Module, Any], Tensor]) -> None:
    refused(Middle(torch.relu), X, SOMETHING_ELSE, target)


def test_a_target_of_the_part_of_the_output_that_carries_no_relevance() -> None:
    class Both(Middle):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return logits, logits.argmax(-1)

    expected = SOMETHING_ELSE.replace("Middle", "Both") + (
        ". Some of what it returned carries no relevance: the model goes on with whole numbers or truth values after argmax in "
        "<model> (Both), which carry no relevance: explain what comes before"
    )
    refused(Both(torch.relu), X, expected, lambda model, x: model(x)[1].float().sum())


def test_what_was_cut_off_and_then_added_to_is_no_reason() -> None:
    class Again(Middle):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).detach()
            hidden += self.first(x)
            return hidden

    refused(Again(torch.relu), X, SOMETHING_ELSE.replace("Middle", "Again"), lambda m, x: m(x).detach().sum())


def test_a_later_batch_names_no_module_that_it_does_not_know() -> None:
    """Modules are followed in the first batch of a collection only."""
    model = Middle(torch.relu)

    def target(model: Any, x: Tensor) -> Tensor:
        model.between.function = torch.relu if len(x) == 2 else torch.no_grad()(torch.relu)
        return summed(model, x)

    with pytest.raises(ValueError, match="relu in a module of Middle ran without gradients"):
        lrp_prune.attribute(model, [X, X[:1]], target)


def test_inputs_that_carry_no_relevance() -> None:
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.layer(F.one_hot(ids, 5).float())
            return result

    refused(
        OneHot(),
        torch.tensor([1, 2]),
        "nothing that carries relevance enters the OneHot: its inputs are no floats, and it looks up no embedding. Give it "
        "floats, such as inputs_embeds or one-hot vectors",
    )


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_quantized_throughout() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), {nn.Linear})
    with (
        pytest.raises(
            ValueError, match=r"quantized\.linear_dynamic in 0 \(Linear\) has no gradient .*floating-point type"
        ),
        lrp_prune.attributing(model) as propagation,
    ):
        propagation.relevance(model(X).sum())


def test_what_only_has_the_shape_of_an_activation_is_no_reason() -> None:
    """Zeros like an activation are a constant; the model is cut off elsewhere."""
    expected = (
        CUT_OFF + "the model cuts it off by detach in between (Between): explain what comes before, or leave that out"
    )
    refused(Middle(lambda h: torch.zeros_like(h) + h.new_ones(6) + h.detach()), X, expected)


def test_relevance_is_given_once_for_each_forward() -> None:
    model = Middle(torch.relu)
    with lrp_prune.attributing(model) as propagation:
        first = propagation.relevance((output := model(X)).sum())
        with pytest.raises(
            ValueError, match="once for each forward, and that of the last one was given: call the model again"
        ):
            propagation.relevance(output.sum())
        again = propagation.relevance(model(X).sum())
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_units_that_exist_but_are_cut_off_are_not_said_to_be_missing() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.skip = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + self.last(torch.relu(self.first(x))).detach()

    with pytest.raises(
        ValueError, match="no neuron received relevance in Beside: the explained value does not depend on last"
    ):
        lrp_prune.attribute(Beside(), [X], summed, granularity="neuron")
