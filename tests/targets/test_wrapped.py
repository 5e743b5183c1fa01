"""What is around a model changes nothing about what is explained: relevance and masks are those of the bare model."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lrp_prune
from lrp_prune.models import counted_tokens
from tests.support.labelled_models import CASES, HandsOn, Lightning, Logits

EXACT: dict[str, Any] = {"statistic": "abs_token", "matmul_dtype": None, "unruled": "ignore"}


class Around(nn.Module):
    """A plain wrapper with the parameters of its model by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


class Loss(Lightning):
    """Only the loss comes back."""

    def forward(self, **batch: Tensor) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


class Pair(Lightning):
    """Loss first, then logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return output.loss, output.logits


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def corrected(model: nn.Module) -> nn.Module:
    return lrp_prune.CorrectedModule(model)


class Passing(nn.Module):
    """Takes anything."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def several(model: nn.Module) -> nn.Module:
    return HandsOn(Passing(compiled(model)))


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    Around,
    Lightning,
    Logits,
    HandsOn,
    Loss,
    Pair,
    compiled,
    corrected,
    several,
]
TEXTS = [name for name, case in CASES.items() if {"labels", "input_ids"} <= set(case.batch(torch.Generator()))]
# Their training has nothing for the decoder either, which is given what its labels are.
IMPOSSIBLE = [(name, wrap) for name in ("t5", "bart") for wrap in (Around, Logits)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrap"),
    [pair for pair in itertools.product(TEXTS, WRAPPERS) if pair not in IMPOSSIBLE],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_relevance_and_masks_are_those_of_the_bare_model(name: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    case = CASES[name]
    model, batch = case.made()
    bare = lrp_prune.attribute(model, [batch], **EXACT)
    around = wrap(case.made()[0])
    wrapped = lrp_prune.attribute(around, [batch], **EXACT)
    assert wrapped.target == bare.target == case.target
    prefix = next(iter(wrapped)).removesuffix(next(iter(bare)))
    assert [name.removeprefix(prefix) for name in wrapped] == list(bare)
    for weight in bare:
        size = float(bare[weight].max())
        torch.testing.assert_close(wrapped[prefix + weight], bare[weight], rtol=1e-4, atol=1e-6 * size)
    one, other = (lrp_prune.select(each, sparsity=0.5) for each in (bare, wrapped))
    different = sum(int((one[weight] != other[prefix + weight]).sum()) for weight in one)
    assert different <= 2  # ties within rounding


@pytest.mark.parametrize(
    ("name", "layers", "task"),
    [
        ("bert token classification", ["query"], None),
        ("bert masked", ["query", "value"], None),
        ("bert classes", ["query"], "SEQ_CLS"),
        ("gpt2", ["c_attn"], "CAUSAL_LM"),
        ("gpt2", ["c_attn"], None),
        ("t5", ["q", "v"], "SEQ_2_SEQ_LM"),
        ("t5", ["q"], None),
        ("bart", ["q_proj"], "SEQ_2_SEQ_LM"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda model: model, HandsOn], ids=["peft", "lightning"])
def test_adapters_change_nothing_about_what_is_explained(
    name: str, layers: list[str], task: str | None, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    case = CASES[name]
    model, batch = case.made()
    bare = lrp_prune.attribute(model, [batch], composite="gradient", **EXACT)
    adapted = get_peft_model(case.made()[0], LoraConfig(target_modules=layers, task_type=task)).eval()
    wrapped = lrp_prune.attribute(wrap(adapted), [batch], composite="gradient", **EXACT)  # adapters begin as nothing
    assert wrapped.target == bare.target == case.target
    prefix = next(iter(wrapped)).removesuffix(next(iter(bare)))
    common = [weight for weight in bare if prefix + weight in wrapped]
    assert len(common) >= len(bare) - 1  # PEFT trains a copy of a classifier's head
    for weight in common:
        size = float(bare[weight].max())
        torch.testing.assert_close(wrapped[prefix + weight], bare[weight], rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("wrap", [HandsOn, lambda model: get_peft_model(model, LoraConfig(target_modules=["c_attn"]))])
def test_first_tokens_of_a_language_model_are_left_out_through_what_is_around_it(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    case = CASES["gpt2"]
    _, batch = case.made()
    skipped = counted_tokens(wrap(case.made()[0]), batch, 2)
    assert skipped is not None
    expected = batch["attention_mask"].bool()
    expected[:, :2] = False
    assert torch.equal(skipped, expected)
    assert counted_tokens(CASES["bert masked"].made()[0], {"input_ids": batch["input_ids"]}, 2) is None
