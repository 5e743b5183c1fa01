"""Recurrent layers and cells in models: masked tokens, methods, precision, what is known of gates."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune.pruning import METHODS, scorer
from lrp_prune.relevance.unscored import GATES
from tests.support.recurrent_layers import LastStep
from tests.support.recurrent_models import KINDS, Model, inputs_for, recurrent_layer


class Tagger(nn.Module):
    """Tokens, an LSTM, a linear head; with a mask as tokenizers make it."""

    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.embedding, self.r, self.o = nn.Embedding(20, 4), kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.o(self.r(self.embedding(input_ids))[0])
        return result


@pytest.mark.parametrize("statistic", ["abs_token", "abs_sample", "geometric"])
def test_masked_tokens_do_not_count(statistic: str) -> None:
    torch.manual_seed(0)
    model = Tagger().double().eval()
    short, long = torch.randint(1, 20, (1, 3)), torch.randint(1, 20, (1, 5))
    ids = torch.cat([nn.functional.pad(short, (0, 2)), long])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def target(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = (model(**batch)[..., 0] * batch["attention_mask"]).sum()
        return value

    options = {"target": target, "statistic": statistic}
    together = lrp_prune.attribute(model, [{"input_ids": ids, "attention_mask": mask}], **options)
    apart = lrp_prune.attribute(
        model, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in (short, long)], **options
    )
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-7)


def _small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return LastStep(), (torch.randn(16, 7, 4), torch.randint(3, (16,)))


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_half_of_an_lstm_with_a_head(method: str, scope: str) -> None:
    model, batch = _small()
    masks = lrp_prune.prune(model, [batch], sparsity=0.5, method=method, scope=scope)
    assert (masks.num_pruned, masks.num_entries, masks.sparsity) == (129, 258, 0.5)
    assert sum(int((parameter == 0).sum()) for name, parameter in model.named_parameters() if "weight" in name) == 129
    for name, kept in masks.items():
        assert not model.get_parameter(name)[~kept].any()
    assert torch.isfinite(model(batch[0])).all()


def test_a_recurrent_weight_can_be_named() -> None:
    model, batch = _small()
    masks = lrp_prune.prune(model, [batch], sparsity=0.5, include=["r.weight_hh_l0", "o"], scope="layer")
    assert {name: masks.pruned_in(name) for name in masks} == {"r.weight_hh_l0": 72, "o.weight": 9}


def test_lrp_knows_which_recurrent_weights_matter() -> None:
    """Of two inputs that are as large, the output depends on one: the other's weights go first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(2, 8, batch_first=True))
    layer, x = model[0], torch.randn(32, 6, 2)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(layer, name).view(4, 8, -1)[:, 4:] *= 1.0
        layer.weight_ih_l0.view(4, 8, 2)[:, :4, 1] = 0.0
        layer.weight_hh_l0.view(4, 8, 8)[:, :4, 4:] = 0.0
    relevance = lrp_prune.attribute(model, [x], target=lambda model, x: model(x)[0][:, -1, :4].sum())
    scores = relevance["0.weight_ih_l0"].view(4, 8, 2)
    assert not scores[:, 4:].any() and (scores[:, :4, 0] > 0).all()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_stopped_gates_leave_weights_unknown_not_irrelevant(kind: str) -> None:
    torch.manual_seed(0)
    model = Tagger(KINDS[kind])
    batch = {"input_ids": torch.randint(1, 20, (2, 5))}
    options = {"target": lambda model, batch: model(**batch)[..., 0].sum()}
    relevance = lrp_prune.attribute(model, [batch], composite="cp_lrp", **options)
    assert relevance.unscored == {"r.weight_ih_l0": GATES, "r.weight_hh_l0": GATES}
    assert list(relevance) == ["o.weight"]
    with pytest.raises(ValueError, match=r"only 18 of them are scored.*belongs to gates"):
        lrp_prune.select(relevance, 0.5, scope="global")
    simple = lrp_prune.attribute(Tagger(nn.RNN), [batch], composite="cp_lrp", **options)
    assert set(simple) == {"r.weight_ih_l0", "r.weight_hh_l0", "o.weight"}


def test_only_projections_are_scored_where_gates_are_stopped() -> None:
    model = Model(recurrent_layer("lstm", "projections"))
    relevance = lrp_prune.attribute(
        model, [inputs_for(model.r)], composite="cp_lrp", target=lambda model, batch: model(batch)
    )
    assert list(relevance) == ["r.weight_hr_l0"] and set(relevance.unscored) == {"r.weight_ih_l0", "r.weight_hh_l0"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_values_are_those_of_torch_in_every_precision(kind: str, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](8, 16, 2, batch_first=True, bidirectional=True).to(dtype).train(training)
    x = torch.randn(4, 9, 8).to(dtype)
    plain = layer(x.clone().requires_grad_())[0]
    with lrp_prune.attributing(layer, "attnlrp") as propagation:
        found = layer(x)[0]
        relevance = propagation.relevance(found.float().square().mean())["input"]
    assert torch.equal(found, plain) and relevance.dtype == dtype and torch.isfinite(relevance).all()


def test_dropout_between_layers_is_off_and_nothing_leaks() -> None:
    layer = nn.LSTM(4, 6, 2, dropout=0.5, batch_first=True).double().train()
    quiet = nn.LSTM(4, 6, 2, batch_first=True).double().train()
    quiet.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    before, state = copy.deepcopy(layer.state_dict()), torch.random.get_rng_state()
    with lrp_prune.attributing(layer, "attnlrp") as propagation:
        output = layer(x)[0]
        propagation.relevance(output.sum())
    assert torch.equal(output, quiet(x)[0]) and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters()) and layer.dropout == 0.5
    assert not torch.equal(layer(x)[0], layer(x)[0])  # on again


def test_a_checkpointed_layer_is_scored_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.first, self.r, self.on = nn.Linear(4, 4), nn.GRU(4, 6, batch_first=True), on

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return checkpoint(self.r, x, use_reentrant=False)[0] if self.on else self.r(x)[0]

    models = [Checkpointed(on) for on in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 5, 4)
    found = [lrp_prune.attribute(model, [x], target=lambda m, b: m(b).square().sum()) for model in models]
    norms = [scorer("wanda", model) for model in models]
    for scores in norms:
        scores.update(x)
    for one, two in (found, [scores.compute() for scores in norms]):
        assert list(one) == ["first.weight", "r.weight_ih_l0", "r.weight_hh_l0"]
        for name in one:
            torch.testing.assert_close(one[name], two[name])


def test_a_weight_norm_in_a_recurrent_layer_is_refused_and_a_mask_is_not() -> None:
    model, batch = _small()
    nn.utils.weight_norm(model.r, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"cannot prune r\.weight_hh_l0_v"):
        lrp_prune.prune(model, [batch])
    model, batch = _small()
    torch.nn.utils.prune.l1_unstructured(model.r, "weight_hh_l0", 0.3)
    masks = lrp_prune.prune(model, [batch], sparsity=0.5)
    assert "r.weight_hh_l0_orig" in masks and masks.sparsity == 0.5
    model(batch[0])
    assert not model.r.weight_hh_l0[~masks["r.weight_hh_l0_orig"]].any()


def test_a_model_of_transformers_with_an_lstm() -> None:
    config = tf.EncodecConfig(
        num_filters=2, hidden_size=8, codebook_size=8, codebook_dim=8, upsampling_ratios=[2, 2], num_lstm_layers=2,
        norm_type="time_group_norm", target_bandwidths=[1.5],
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = tf.EncodecModel(config).eval().encoder
    relevance = lrp_prune.attribute(
        encoder, [torch.randn(2, 1, 64)], target=lambda model, batch: model(batch).square().sum(), unruled="ignore"
    )
    weights = {name for name in dict(encoder.named_parameters()) if ".lstm.weight" in name}
    assert len(weights) == 4 and weights <= set(relevance)
    assert all(bool((relevance[name] > 0).any()) for name in weights)
