"""How likely labels are, against torch's own functions, value and gradient, in blocks of every size, and at both ends."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrp_prune.models import IGNORED
from lrp_prune.targets import ClassLabel, NextToken, TokenLabel, log_likelihood

likelihood = importlib.import_module("lrp_prune.targets.likelihood")


def _case(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 7, 20, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 20, (3, 7), generator=generator)
    labels[0, :3] = IGNORED
    return logits, labels


@pytest.mark.parametrize("block", [1, 50, 60, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_cross_entropy(monkeypatch, dtype, block):
    monkeypatch.setattr(likelihood, "_BLOCK", block)
    logits, labels = _case(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    value = log_likelihood(logits, labels)
    expected = -F.cross_entropy(
        logits.reshape(-1, 20).to(wide), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    assert value.dtype == wide
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(3 * value, logits)
    (wanted,) = torch.autograd.grad(3 * expected, logits)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("block", [1, 50, 2**20])
@pytest.mark.parametrize("odds", [0.0, 0.3, 1.0])
def test_log_odds_are_those_of_the_softmax(monkeypatch, block, odds):
    monkeypatch.setattr(likelihood, "_BLOCK", block)
    logits, labels = _case(torch.float64)
    counted = labels != IGNORED
    chosen = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted]
    value, expected = likelihood.likelihood(logits, labels, odds), (chosen.log() - odds * (1 - chosen).log()).sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * value, logits), torch.autograd.grad(3 * expected, logits))


@pytest.mark.parametrize(("odds", "expected"), [(0, -300.0), (1, 180 - math.log(2) - 300)])
def test_what_is_certain_or_impossible_stays_finite(odds, expected):
    logits = torch.tensor([[90.0, -90.0, -90.0], [-200.0, 0.0, 100.0]], requires_grad=True)
    value = likelihood.likelihood(logits, torch.tensor([0, 0]), odds)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(expected))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("odds", [0, 0.5, 1])
def test_a_label_without_a_rival_says_nothing(odds):
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [1.0, 0.0, 0.0]], requires_grad=True)
    value = likelihood.likelihood(logits, torch.tensor([0, 0]), odds)
    torch.testing.assert_close(value, likelihood.likelihood(logits[1:], torch.tensor([0]), odds))
    value.backward()
    assert torch.equal(logits.grad[0], torch.zeros(3)) and bool((logits.grad[1] != 0).all())


def test_log_odds_count_alike_however_sure_a_model_is():
    logits = torch.tensor(
        [[30.0, 0.0], [0.5, 0.0], [-9.0, 0.0]], requires_grad=True
    )  # 1 - p of the first is 0 in float32
    (gradient,) = torch.autograd.grad(likelihood.likelihood(logits, torch.tensor([0, 0, 0]), 1), logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]] * 3))


@pytest.mark.parametrize("odds", [0, 0.5, 1])
def test_shares_of_classes_are_their_mean(odds):
    logits, labels = _case(torch.float64)
    logits, labels = logits.flatten(0, 1), labels.flatten().clamp(min=0)
    once = F.one_hot(labels, 20)
    value = likelihood.soft_likelihood(logits, once, odds)
    expected = likelihood.likelihood(logits, labels, odds)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits))
    mixed = 0.25 * once + 0.75 * once.roll(1, 1)
    value = likelihood.soft_likelihood(logits, mixed, odds)
    other = likelihood.likelihood(logits, (labels + 1) % 20, odds)
    torch.testing.assert_close(value, 0.25 * expected + 0.75 * other)


def test_shares_of_log_odds_in_targets():
    logits, labels = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 3, IGNORED])
    p = logits.softmax(-1)[[0, 1], [1, 3]]
    of = {1: p.logit().sum(), 0.0: p.log().sum(), 0.5: (p.log() + p.logit()).sum() / 2}
    of[None] = logits[[0, 1], [1, 3]].sum()
    for odds, expected in of.items():
        torch.testing.assert_close(ClassLabel(odds)(nn.Identity(), (logits, labels)), expected)
        shares = F.one_hot(labels.clamp(min=0), 4)[:2].float()
        torch.testing.assert_close(ClassLabel(odds)(nn.Identity(), (logits[:2], shares)), expected)
        assert repr(ClassLabel(odds)) == ("ClassLabel()" if odds is None else f"ClassLabel(odds={odds:g})")
    for target in (NextToken, TokenLabel, ClassLabel):
        for wrong in (-0.1, 1.5, "log", True):
            with pytest.raises(ValueError, match=r"share of log-odds, must be a number between 0 and 1, got"):
                target(odds=wrong)


@pytest.mark.parametrize("size", [1, 50])
def test_positions_without_label_get_no_gradient(size):
    logits, labels = _case(torch.float32)
    logits = (size * logits).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.likelihood(logits, labels, 0.5), logits)
    assert bool(gradient.isfinite().all())
    assert torch.equal(gradient[labels == IGNORED], torch.zeros(3, 20))
    assert bool((gradient[labels != IGNORED] != 0).any(-1).all())


def test_logits_are_left_as_they_are():
    logits, labels = _case(torch.float32)
    before = logits.detach().clone()
    log_likelihood(logits, labels).backward()
    assert torch.equal(logits.detach(), before)
