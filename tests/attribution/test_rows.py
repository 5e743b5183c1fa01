"""Rows of activations are told apart by token and by sample in whatever order they are, or it is said that they are not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

import lrp_prune
from tests.support.small_models import mixture, padded_text

LENGTHS = (3, 5, 7)
ORDER = torch.randperm(21, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2])


class Encoding(nn.Module):
    """Attention that puts time first, and leaves padding out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embedding = nn.Embedding(20, 8)
        self.encoder, self.last = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.bool()
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=~mask)
        result: Tensor = self.last((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return result


class Dispatched(nn.Module):
    """Layers that get all tokens as rows in some order, and a mean over all of them, padding included."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.there, self.back = there, back

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        rows = self.second(torch.relu(self.first(self.there(hidden.view(-1, 8)))))
        result: Tensor = self.last((hidden + self.back(rows).view_as(hidden)).mean(1))
        return result


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.attention(x, x, x)[0].mean(1))
        return result


def _padded() -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": LABELS}


def _dispatched(there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Dispatched:
    torch.manual_seed(0)
    return Dispatched(there, back)


PLAIN = (lambda rows: rows, lambda rows: rows)
PERMUTED = (lambda rows: rows[ORDER], lambda rows: rows[ORDER.argsort()])
TIME_FIRST = (
    lambda rows: rows.view(3, 7, 8).transpose(0, 1).reshape(21, 8),
    lambda rows: rows.view(7, 3, 8).transpose(0, 1),
)
SORTED = (lambda rows: rows.sort(0).values, lambda rows: rows)


@pytest.mark.parametrize("statistic", ["abs_token", "signed", "geometric"])
def test_padding_changes_nothing_where_attention_puts_time_first(statistic: str) -> None:
    torch.manual_seed(0)
    model, batch = Encoding().eval(), _padded()
    single = [{key: value[index : index + 1] for key, value in batch.items()} for index in range(3)]
    single = [
        {key: value if key == "labels" else value[:, :length] for key, value in each.items()}
        for each, length in zip(single, LENGTHS, strict=True)
    ]
    options = {"target": "class", "statistic": statistic, "matmul_dtype": None}
    together, apart = lrp_prune.attribute(model, [batch], **options), lrp_prune.attribute(model, single, **options)
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistic", ["abs_token", "input_norm"])  # which nothing is propagated for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [PERMUTED, TIME_FIRST], ids=["permuted", "time first"])
def test_rows_in_another_order_are_left_out_alike(order: tuple, dtype: torch.dtype, statistic: str) -> None:
    options = {"target": "class", "statistic": statistic, "matmul_dtype": None}
    found = lrp_prune.attribute(_dispatched(*order).to(dtype), [_padded()], **options)
    expected = lrp_prune.attribute(_dispatched(*PLAIN).to(dtype), [_padded()], **options)
    every = lrp_prune.attribute(
        _dispatched(*PLAIN), [{**_padded(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}], **options
    )
    for name in ("first.weight", "second.weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-3)
        assert not torch.allclose(found[name], every[name], rtol=0.1)


def test_rows_that_cannot_be_told_all_count_and_are_named() -> None:
    options = {"target": "class", "statistic": "abs_token", "matmul_dtype": None}
    model, batch = _dispatched(*SORTED), _padded()
    with pytest.warns(UserWarning, match="what enters first is cannot be told: all of its rows count") as told:
        found = lrp_prune.attribute(model, [batch, batch], **options)
    assert sum("enters first" in str(warning.message) for warning in told) == 1
    full = {**batch, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    every = lrp_prune.attribute(model, [full, full], **options)
    torch.testing.assert_close(found["first.weight"], every["first.weight"])


@pytest.mark.parametrize("tokens", [5, 3])
@pytest.mark.parametrize("granularity", ["head", "weight"])
def test_samples_are_summed_each_by_itself_where_time_is_first(granularity: str, tokens: int) -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(3, tokens, 8)
    options = {"target": "class", "granularity": granularity, "statistic": "abs_sample", "matmul_dtype": None}
    together = lrp_prune.attribute(model, [(x, LABELS)], **options)
    apart = lrp_prune.attribute(model, [(x[i : i + 1], LABELS[i : i + 1]) for i in range(3)], **options)
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-6)


def test_samples_that_cannot_be_told_apart_are_refused() -> None:
    model, batch = _dispatched(*SORTED), {**_padded(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"needs to tell samples apart, but second\.weight is used with 21 rows"):
        lrp_prune.attribute(model, [batch], target="class", statistic="abs_sample")


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "options", [{}, {"statistic": "input_norm"}, {"statistic": "input_norm", "granularity": "neuron"}]
)
def test_padding_changes_nothing_for_the_tokens_that_experts_get(options: dict, name: str, experts: str) -> None:
    model = mixture(name)
    model.set_experts_implementation(experts)
    found, expected = (lrp_prune.attribute(model, [batch], **options) for batch in (padded_text(32), padded_text(0)))
    assert any("experts" in key for key in expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-3 * float(expected[key].abs().max()))


class Poured(nn.Module):
    """Tokens that are written into two bins of their own, some at each place, before a layer sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids).flatten(0, 1)
        bins = hidden.new_zeros(12, 8).index_add(0, torch.arange(len(hidden)) % 12, hidden)
        result: Tensor = self.last(self.layer(bins).view(3, 4, 8).mean(1))
        return result


def test_more_or_fewer_rows_than_tokens_that_cannot_be_told_are_named() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="what enters layer is cannot be told: all of its rows count"):
        lrp_prune.attribute(Poured(), [_padded()], target="class", statistic="abs_token")


def test_convolutions_over_tokens_leave_padding_out() -> None:
    torch.manual_seed(0)
    config = SqueezeBertConfig(
        hidden_size=16,
        embedding_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
    )
    model = SqueezeBertForMaskedLM(config).eval()
    found, expected = (
        lrp_prune.attribute(model, [batch], statistic="input_norm") for batch in (padded_text(32), padded_text(0))
    )
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
