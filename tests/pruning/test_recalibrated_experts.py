"""Experts of a mixture are recalibrated on the tokens that the dense model sends to them, whoever gets them when it is pruned."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import scorer
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.recalibration import recalibrate

EXPERTS, WIDTH = 4, 8


class Mixture(nn.Module):
    """Two of four experts for each token, in the forms that models write them in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.router = form, nn.Linear(WIDTH, EXPERTS, bias=False)
        stack = torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5
        if form == "modules":
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))
        else:
            self.experts = nn.Parameter(stack)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "argmax":
            weights, chosen = torch.ones(len(x), 1), self.router(x).argmax(-1, keepdim=True)
        else:
            weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(x)
        if self.form == "every token":
            made = torch.bmm(x.expand(EXPERTS, -1, -1), self.experts)
            return (made.transpose(0, 1).gather(1, chosen[..., None].expand(-1, -1, WIDTH)) * weights[..., None]).sum(1)
        if self.form == "grouped":
            order = chosen.flatten().argsort(stable=True)
            ends = chosen.flatten().bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
            token = torch.arange(len(x)).repeat_interleave(2)[order]
            made = torch._grouped_mm(x[token], self.experts, offs=ends)
            return result.index_add(0, token, made * weights.flatten()[order][:, None])
        for index in range(EXPERTS):
            token, place = (chosen == index).nonzero(as_tuple=True)
            expert = self.experts[index]
            made = expert(x[token]) if isinstance(expert, nn.Module) else F.linear(x[token], expert.T)
            result = result.index_add(0, token, made * weights[token, place][:, None])
        return result


def weight_of(model: nn.Module, index: int) -> Tensor:
    """``[in, out]``."""
    expert = model.experts[index]
    return (expert.weight.T if isinstance(expert, nn.Linear) else expert).detach()


@pytest.mark.parametrize("form", ["modules", "slices", "argmax", "every token", "grouped"])
def test_each_expert_is_fitted_on_the_tokens_of_the_dense_model(form: str) -> None:
    torch.manual_seed(0)
    model = Mixture(form).eval()
    with torch.no_grad():
        model.router.weight.mul_(4)
    scores = scorer("magnitude", model, include=["router", "experts"]).compute()
    masks = lrp_prune.select(scores, {"router": 0.3, "experts": 0.7}, scope="layer")
    # Of signals that have something in common, pruning takes scale.
    batches = [(torch.randn(256, WIDTH) + 2 * torch.randn(256, 1),) for _ in range(4)]
    found = recalibrate(model, masks, batches, "regression", strengths=(1.0,))
    assert found.strength == 1
    x = torch.cat([batch[0] for batch in batches[:3]])
    sparse = copy.deepcopy(model)
    masks.apply_(sparse)
    with torch.no_grad():
        dense_choice, pruned_choice = (
            entry.router(x).topk(1 if form == "argmax" else 2)[1] for entry in (model, sparse)
        )
        assert (dense_choice != pruned_choice).float().mean() > 0.03  # the router sends tokens elsewhere
        scales = [scale for place, scale in found.scales.items() if place.name.startswith("experts")]
        assert len(scales) == EXPERTS
        for index, scale in enumerate(scales):
            token = slice(None) if form == "every token" else (dense_choice == index).any(-1)
            dense, pruned = x[token] @ weight_of(model, index), x[token] @ weight_of(sparse, index)
            expected = (dense * pruned).sum(0).double() / pruned.square().sum(0).double()
            known = pruned.square().sum(0) > 0
            torch.testing.assert_close(scale[known], expected[known].clamp(0.05, 5.0), rtol=1e-3, atol=1e-4)
        found.apply_(sparse)
        given, asked = sparse(batches[-1][0]), model(batches[-1][0])  # judged as it chooses itself
    off = float((given - asked).square().mean() / asked.var(correction=0))
    assert off == pytest.approx(found.divergences[1.0], rel=1e-3) and off < found.divergences[0.0]


def test_experts_that_few_tokens_reach_keep_their_scale() -> None:
    torch.manual_seed(0)
    model = Mixture("slices").eval()
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.weight[0, 0] = model.router.weight[1, 0] = model.router.weight[2, 1] = 9.0
    x = torch.randn(64, WIDTH)
    x[:, 0], x[:, 1] = 1.0, -1.0
    x[:3, 1] = 5.0
    masks = lrp_prune.select(scorer("random", model, include=["experts"]).compute(), 0.5, scope="layer")
    found = recalibrate(model, masks, [(x,)], "regression", strengths=(1.0,))
    assert len(found.scales) == 2
    assert sorted(place.layout.offset for place in found.scales) == [0, WIDTH * WIDTH]


def test_choices_are_made_again_as_long_as_they_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 7, generator=generator) for _ in range(2))

    def chosen(x: Tensor) -> list[Any]:
        ids = (x * 10).long()
        return [torch.topk(x, 2), x.topk(3, 0), x.argmax(1), torch.argmax(x), ids.argmax(1), torch.topk(input=x, k=2)]

    with Choices() as noted:
        plain = chosen(first)
    with Choices(noted.made):
        again = chosen(second)
    for index, dim in ((0, -1), (1, 0), (5, -1)):
        assert torch.equal(again[index].indices, plain[index].indices)
        assert torch.equal(again[index].values, second.gather(dim, plain[index].indices))
    assert all(torch.equal(again[index], plain[index]) for index in (2, 3))
    assert torch.equal(again[4], (second * 10).long().argmax(1))  # of no activation
    with Choices(noted.made):
        assert torch.equal(second[:4].topk(2)[1], torch.topk(second[:4], 2)[1])
        assert torch.equal(second.topk(3, 0)[1], torch.topk(second, 3, 0)[1])  # it is another forward from there on
