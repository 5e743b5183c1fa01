"""Each metric against an independent computation, in batches, and as two processes would merge them."""

import math

import pytest
import torch
import torchmetrics
from scipy.special import rel_entr
from torch import Tensor
from torchmetrics import Metric

from lrp_prune.metrics import (
    GreedyAgreement,
    KLToBase,
    Perplexity,
    ResponseUniquenessRatio,
    Toxicity,
    greedy_agreement,
    kl_to_base,
    perplexity,
    response_uniqueness_ratio,
    toxicity,
)
from lrp_prune.tasks.metrics import kl_divergence


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(samples: int, tokens: int, vocabulary: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (samples, tokens), generator=generator(seed))


def lengths_mask(samples: int, tokens: int, seed: int = 3) -> Tensor:
    lengths = torch.randint(0, tokens + 1, (samples,), generator=generator(seed))
    return (torch.arange(tokens) < lengths[:, None]).long()


def merged(first: Metric, second: Metric) -> Tensor:
    """What two processes compute together: their states summed."""
    total = first.clone()
    for name, reduction in first._reductions.items():
        assert reduction is torchmetrics.utilities.dim_zero_sum
        setattr(total, name, getattr(first, name) + getattr(second, name))
    total._update_count = 2
    return total.compute()


def test_uniqueness_is_distinct_over_generated_tokens() -> None:
    tokens, mask = ids(50, 12), lengths_mask(50, 12)
    expected = []
    for row, keep in zip(tokens.tolist(), mask.tolist(), strict=True):
        kept = [token for token, flag in zip(row, keep, strict=True) if flag]
        expected.append(len(set(kept)) / len(kept) if kept else 0.0)
    assert 0.0 in expected
    torch.testing.assert_close(response_uniqueness_ratio(tokens, mask), torch.tensor(expected))
    metric = ResponseUniquenessRatio()
    metric.update(tokens[:20], mask[:20])
    metric.update(tokens[20:], mask[20:])
    assert metric.compute().item() == pytest.approx(sum(expected) / 50)
    repetitive = ResponseUniquenessRatio(threshold=0.5)
    repetitive.update(tokens, mask)
    assert repetitive.compute().item() == pytest.approx(sum(value <= 0.5 for value in expected) / 50)
    first, second = ResponseUniquenessRatio(), ResponseUniquenessRatio()
    first.update(tokens[:7], mask[:7])
    second.update(tokens[7:], mask[7:])
    assert merged(first, second).item() == pytest.approx(metric.compute().item())
    assert response_uniqueness_ratio(torch.zeros(2, 0, dtype=torch.long)).tolist() == [0, 0]


def test_perplexity_equals_torchmetrics_and_the_formula() -> None:
    tokens = ids(6, 9, 20)
    logits = 3 * torch.randn(6, 9, 20, generator=generator(1))
    reference = torchmetrics.text.Perplexity(ignore_index=-100)
    mask = torch.ones_like(tokens)
    mask[0, 5:], mask[1, :4] = 0, 0
    labels = tokens[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
    reference.update(logits[:, :-1], labels)
    torch.testing.assert_close(perplexity(logits, tokens, mask), reference.compute())
    metric, other = Perplexity(), Perplexity()
    metric.update(logits[:2], tokens[:2], mask[:2])
    other.update(logits[2:], tokens[2:], mask[2:])
    torch.testing.assert_close(merged(metric, other), reference.compute())
    ignored = tokens.masked_fill(torch.rand(6, 9, generator=generator(2)) < 0.3, -100)
    terms = [
        -logits[i, j - 1].log_softmax(-1)[ignored[i, j]].item()
        for i in range(6)
        for j in range(1, 9)
        if ignored[i, j] >= 0
    ]
    assert perplexity(logits, ignored).item() == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)
    assert perplexity(logits.bfloat16(), tokens).dtype == torch.float32


def test_divergence_equals_the_sum_of_relative_entropies() -> None:
    base, logits = (2 * torch.randn(4, 5, 11, generator=generator(seed)) for seed in (1, 2))
    mask = lengths_mask(4, 5)
    entropies = rel_entr(base.double().softmax(-1).numpy(), logits.double().softmax(-1).numpy()).sum(-1)
    expected = float((entropies * mask.numpy()).sum() / mask.sum().item())
    assert kl_to_base(logits, base, mask).item() == pytest.approx(expected, rel=1e-5)
    assert kl_to_base(logits, base).item() == pytest.approx(float(entropies.mean()), rel=1e-5)
    assert kl_to_base(base, base).item() == 0
    first, second = KLToBase(), KLToBase()
    first.update(logits[:1], base[:1], mask[:1])
    second.update(logits[1:], base[1:], mask[1:])
    assert merged(first, second).item() == pytest.approx(expected, rel=1e-5)


def test_tokens_that_both_exclude_are_no_divergence() -> None:
    base = torch.tensor([[[0.0, 1.0, -torch.inf], [2.0, -torch.inf, 0.0]]])
    assert kl_to_base(base, base) == 0
    assert kl_to_base(base + 1, base).abs() < 1e-6
    torch.testing.assert_close(
        kl_to_base(base[..., :2][:, :1] * 2, base[..., :2][:, :1]), kl_to_base(base[:, :1] * 2, base[:, :1])
    )
    assert kl_to_base(base.masked_fill(base == 1.0, -torch.inf), base) == torch.inf
    assert torch.equal(kl_divergence(base[0], base[0]), torch.zeros(2))


@pytest.mark.parametrize("count", ["prefix", "position", "exact"])
def test_agreement_counts_as_written(count: str) -> None:
    tokens, base = ids(80, 5, 2, 1), ids(80, 7, 2, 2)
    tokens[:20], base[:20, :5] = base[:20, :5], base[:20, :5]
    mask, base_mask = lengths_mask(80, 5, 4), lengths_mask(80, 7, 5)
    base_mask[:10, :5], base_mask[:10, 5:] = mask[:10], 0
    expected = []
    for row, keep, base_row, base_keep in zip(tokens, mask, base, base_mask, strict=True):
        mine, theirs = row[keep.bool()].tolist(), base_row[base_keep.bool()].tolist()
        equal = [a == b for a, b in zip(mine, theirs, strict=False)]
        prefix = equal.index(False) if False in equal else len(equal)
        longest = max(len(mine), len(theirs))
        share = {"prefix": prefix, "position": sum(equal)}.get(count, 0) / longest if longest else 1.0
        expected.append(float(mine == theirs) if count == "exact" else share)
    torch.testing.assert_close(greedy_agreement(tokens, base, mask, base_mask, count), torch.tensor(expected))
    first, second = GreedyAgreement(count), GreedyAgreement(count)
    first.update(tokens[:30], base[:30], mask[:30], base_mask[:30])
    second.update(tokens[30:], base[30:], mask[30:], base_mask[30:])
    assert merged(first, second).item() == pytest.approx(sum(expected) / 80)


def test_toxicity_takes_any_scorer() -> None:
    import numpy as np

    def scorer(texts):
        return np.array([text.count("x") / max(len(text), 1) for text in texts])

    texts = ["xx", "ab", "xa", ""]
    assert toxicity(texts, scorer).tolist() == [1.0, 0.0, 0.5, 0.0]
    mean, share = Toxicity(scorer), Toxicity(scorer, threshold=0.5)
    for metric in (mean, share):
        metric.update(texts[:1])
        metric.update(texts[1:])
        metric.update([])
    assert (mean.compute().item(), share.compute().item()) == (0.375, 0.5)


def test_wrong_input_is_refused() -> None:
    tokens = ids(2, 3)
    for call, error, message in (
        (lambda: response_uniqueness_ratio(tokens.float()), ValueError, "must be ids"),
        (lambda: response_uniqueness_ratio(tokens, tokens[:1]), ValueError, "the mask has shape"),
        (lambda: perplexity(torch.zeros(2, 3), tokens), ValueError, "must fit"),
        (lambda: kl_to_base(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), ValueError, "preds and target must be"),
        (lambda: greedy_agreement(tokens, tokens[:1]), ValueError, "equally many"),
        (lambda: greedy_agreement(tokens, tokens, count="all"), ValueError, "count must be"),
        (lambda: greedy_agreement(tokens, tokens, torch.tensor([[0, 1, 1], [1, 1, 1]])), ValueError, "padding must"),
        (lambda: GreedyAgreement("all"), ValueError, "count must be"),
        (lambda: toxicity("text", len), TypeError, "one string"),
        (lambda: toxicity(["a", "b"], lambda texts: [0.5]), ValueError, "one finite number for each of 2"),
        (lambda: toxicity(["a"], lambda texts: [float("nan")]), ValueError, "one finite number"),
        (lambda: Toxicity("scorer"), TypeError, "must be a function"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_sums_keep_what_float32_would_lose() -> None:
    """Small terms beside a large sum, and counts beyond 2^24."""
    metric = KLToBase()
    metric.add(torch.tensor(1e8, dtype=torch.float64), 2**24)
    for _ in range(4):
        metric.add(torch.tensor(1.0), 1)
    assert (int(metric.count), float(metric.total)) == (2**24 + 4, 1e8 + 4)
    metric.add(torch.tensor(float("nan")), 1)
    assert math.isnan(float(metric.compute()))
    assert math.isnan(float(KLToBase().compute()))
