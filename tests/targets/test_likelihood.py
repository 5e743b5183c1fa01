"""The log-likelihood against torch's cross entropy, value and gradient, in blocks of every size."""

import pytest
import torch
import torch.nn.functional as F

from lrp_prune.models import IGNORED
from lrp_prune.targets import likelihood, log_likelihood


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


def test_positions_without_label_get_no_gradient():
    logits, labels = _case(torch.float32)
    (gradient,) = torch.autograd.grad(log_likelihood(logits, labels), logits)
    assert torch.equal(gradient[labels == IGNORED], torch.zeros(3, 20))
    assert bool((gradient[labels != IGNORED] != 0).all())


def test_logits_are_left_as_they_are():
    logits, labels = _case(torch.float32)
    before = logits.detach().clone()
    log_likelihood(logits, labels).backward()
    assert torch.equal(logits.detach(), before)
