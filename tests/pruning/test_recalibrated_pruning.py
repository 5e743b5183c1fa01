"""What a pruning recalibrates: which weights, when, how often, and what it tells."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares
from lrp_prune.pruning.moments import PairedMoments
from lrp_prune.pruning.recalibration import enough, recalibrate
from lrp_prune.targets import TokenLabel
from tests.support.recalibrated import MODELS, applied, masks_of
from tests.support.small_models import batch_for, build, mixture, padded_text


def test_padding_is_not_fitted_to() -> None:
    model = build("bert").eval()
    batch = {key: value.repeat(8, 1) for key, value in batch_for("bert").items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, -3:] = 0
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -3:] = 1
    masks = masks_of(model, 0.5)
    one, two = (recalibrate(model, masks, [each], "token", strengths=(1.0,)) for each in (batch, other))
    assert one.scales.keys() == two.scales.keys() and one.scales
    # The tokens there are not attended to, and do not count themselves.
    for place in one.scales:
        torch.testing.assert_close(one.scales[place], two.scales[place], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"compensation": LeastSquares(damping=0.1)}], ids=["scales", "least squares"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral"])
def test_padding_changes_no_weight_where_layers_see_rows(name: str, options: dict) -> None:
    """Conv1D and OPT lay tokens out as rows, and experts get some of them."""
    dense = mixture("mixtral") if name == "mixtral" else build(name)
    if name == "mixtral":
        dense.set_experts_implementation("eager")
    found, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    lrp_prune.prune(found, [padded_text(32, samples=4)], 0.5, **options)
    lrp_prune.prune(expected, [padded_text(0, samples=4)], 0.5, **options)
    assert any(not torch.equal(entry, dense.get_parameter(key)) for key, entry in expected.named_parameters())
    for key, entry in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(key), entry, rtol=1e-3, atol=1e-4)


def test_prune_recalibrates_and_leaves_kept_weights_alone_if_told_so() -> None:
    torch.manual_seed(0)
    model, batches = MODELS["mlp"]()
    batches = [(x[0], torch.randint(5, (64,))) for x in batches]
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    masks = lrp_prune.prune(one, batches, sparsity=0.6)
    same = lrp_prune.prune(other, batches, sparsity=0.6, recalibrate=False)
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    expected = applied(model, masks, recalibrate(model, masks, batches, "class"))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in one.state_dict().items())
    for key, mask in same.items():
        assert torch.equal(other.get_parameter(key)[mask], model.get_parameter(key)[mask])
    assert not torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.6, 1), ({"0": 0.3, "2": 0.7}, 2), (0.8, 2)])
def test_beyond_sixty_percent_it_is_scored_twice(sparsity: Any, rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, batches = MODELS["mlp"]()
    batches = [(x[0], torch.randint(5, (64,))) for x in batches]
    alone, other = copy.deepcopy(model), copy.deepcopy(model)
    with caplog.at_level("INFO", "lrp_prune"):
        masks = lrp_prune.prune(model, batches, sparsity=sparsity)
    assert sum("recalibrated" in record.message or "strength" in record.message for record in caplog.records) == rounds
    expected = lrp_prune.prune(other, batches, sparsity=sparsity, rounds=rounds)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    caplog.clear()
    with caplog.at_level("INFO", "lrp_prune"):
        lrp_prune.prune(alone, batches, sparsity=sparsity, recalibrate=False)
    assert not any(record.message.startswith("round") for record in caplog.records)


def test_rounds_begin_with_the_dense_weights_and_errors_leave_them() -> None:
    torch.manual_seed(0)
    model, batches = MODELS["mlp"]()
    batches = [(x[0], torch.randint(5, (64,))) for x in batches]
    sparse = copy.deepcopy(model)
    masks = lrp_prune.prune(sparse, batches, sparsity=0.8, rounds=2)
    expected = applied(model, masks, recalibrate(model, masks, batches, "class"))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in sparse.state_dict().items())

    calls: list[int] = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("out of luck")
        return F.cross_entropy(model(batch[0]), batch[1]).neg()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of luck"):
        lrp_prune.prune(model, batches, sparsity=0.8, rounds=3, method=lrp_prune.LRP(target=failing))
    assert len(calls) == 21
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_progress_is_that_of_all_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = MODELS["mlp"]()
    masks = masks_of(model, 0.6)
    steps: list[int] = []

    @contextmanager
    def shown(what: str, total: float) -> Iterator[Callable[[int], None]]:
        assert (what, total) == ("Recalibrating", 3 * (1 + 2) + 1 * (1 + 3))
        yield steps.append
        steps.append(0)

    recalibrate(model, masks, batches, "regression", progress=shown)
    assert steps == [3, 3, 3, 1, 1, 1, 1, 0]
    labelled = [(x[0], torch.randint(5, (64,))) for x in batches]
    for progress, expected in ((True, ["Collecting relevance", "Recalibrating"]), (False, [])):
        capsys.readouterr()
        lrp_prune.prune(copy.deepcopy(model), labelled, sparsity=0.5, progress=progress)
        found = capsys.readouterr().err
        assert [what for what in ("Collecting relevance", "Recalibrating") if what in found] == expected
        assert bool(found) == progress


def test_without_batches_nothing_is_recalibrated() -> None:
    model, _ = MODELS["mlp"]()
    before = model[0].weight.clone()
    masks = lrp_prune.prune(model, method="magnitude", sparsity=0.5)
    assert torch.equal(model[0].weight, before * masks["0.weight"])
    with pytest.raises(ValueError, match="recalibrate=True needs batches"):
        lrp_prune.prune(model, method="magnitude", recalibrate=True)


@pytest.mark.slow
def test_a_saturated_classifier_does_not_collapse() -> None:
    """A small BERT that is sure of itself: half of it, and 80 % of it, can go in one shot."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    generator = torch.Generator().manual_seed(0)

    def drawn(number: int) -> dict[str, Tensor]:
        ids = torch.randint(2, 64, (number, 24), generator=generator)
        labels = torch.randint(2, (number,), generator=generator)
        ids[torch.arange(number), torch.randint(24, (number,), generator=generator)] = torch.where(labels == 1, 1, 0)
        return {"input_ids": ids, "labels": labels}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(150):
        loss = model(**drawn(64)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out, batches = drawn(512), [drawn(32) for _ in range(4)]

    def accuracy(entry: nn.Module) -> float:
        with torch.no_grad():
            logits = entry(input_ids=held_out["input_ids"]).logits
        return float((logits.argmax(-1) == held_out["labels"]).float().mean())

    assert accuracy(model) == 1.0
    for sparsity in (0.5, 0.8):
        sparse = copy.deepcopy(model)
        lrp_prune.prune(sparse, batches, sparsity=sparsity)
        assert accuracy(sparse) > 0.97


@pytest.mark.slow
def test_batches_that_can_be_gone_through_once_are_enough() -> None:
    torch.manual_seed(0)
    model, _ = MODELS["mlp"]()
    batches = [(torch.randn(20, 12), torch.randint(5, (20,))) for _ in range(20)]
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    masks = lrp_prune.prune(one, iter(batches), sparsity=0.7)
    expected = lrp_prune.prune(other, batches, sparsity=0.7)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert len(enough(iter(batches))) == 16
    assert len(enough(iter([(x[:2], y[:2]) for x, y in batches]))) == 20


def test_what_nothing_could_be_fitted_to_is_told_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    masks = masks_of(model, 0.5)
    few = recalibrate(model, masks, [(torch.randn(4, 8), torch.randint(4, (4,)))])
    assert not few.strength and str(few).startswith("not recalibrated (divergence ")
    assert str(few).endswith("; not fitted: *.weight (is reached by fewer than 16 samples or tokens)")
    enough_of_them = recalibrate(model, masks, [(torch.randn(32, 8), torch.randint(4, (32,)))])
    assert not enough_of_them.left_out and str(enough_of_them).endswith(")")


def _units() -> dict[str, tuple[nn.Module, list[Any]]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 4))
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return {
        "mlp": (mlp, [(torch.randn(64, 16), torch.randint(4, (64,))) for _ in range(4)]),
        "cnn": (cnn, [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(4)]),
        "gpt2": (build("gpt2"), [batch_for("gpt2", 4, 12) for _ in range(3)]),
        "bert": (build("bert"), [batch_for("bert", 4, 12) for _ in range(3)]),
    }


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("mlp", "neuron"), ("cnn", "neuron"), ("gpt2", "neuron"), ("bert", "neuron"), ("gpt2", "block")],
)
def test_biases_of_units_that_are_gone_stay_nothing(name: str, granularity: Any) -> None:
    model, batches = _units()[name]
    method = "magnitude" if granularity == "neuron" else "lrp"
    masks = lrp_prune.prune(model, batches, 0.5, method, granularity=granularity, recalibrate=True)
    parameters = dict(model.named_parameters())
    biases = [each for each in masks if parameters[each].dim() == 1 and masks.pruned_in(each)]
    assert biases
    for each in masks:
        assert not parameters[each].detach()[~masks[each]].any(), each
    before = {each: weight.detach().clone() for each, weight in parameters.items()}
    masks.apply_(model)
    assert all(torch.equal(before[each], weight) for each, weight in parameters.items())


def test_channels_without_a_shift_have_the_least_squares_without_one() -> None:
    torch.manual_seed(0)
    pruned, dense, moments = torch.randn(50, 3) + 1, torch.randn(50, 3), PairedMoments(3)
    moments.add(pruned, dense)
    shifted = torch.tensor([True, False, True])
    scale, shift = moments.fit(1.0, shifted)
    for channel, (with_shift, x, y) in enumerate(
        zip(shifted.tolist(), pruned.T.double(), dense.T.double(), strict=True)
    ):
        matrix = torch.stack([x, torch.ones(50).double()], dim=1) if with_shift else x[:, None]
        expected = torch.linalg.lstsq(matrix, y).solution.clamp(min=float(scale.min()))
        assert abs(float(scale[channel] - expected[0])) < 1e-5 or float(scale[channel]) == float(scale.min())
        assert with_shift or float(shift[channel]) == 0


class _Counting(nn.Module):
    """A small language model of one layer, written with torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(16, 24), nn.Embedding(24, 24), nn.Linear(24, 16)
        self.layer = nn.TransformerEncoderLayer(24, 2, 48, 0.0, batch_first=True, norm_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: Tensor = self.head(
            self.layer(self.tokens(ids) + self.places.weight[: ids.shape[1]], src_mask=mask, is_causal=True)
        )
        return logits


@pytest.mark.slow
def test_a_language_model_that_is_sure_of_all_but_a_token_does_not_collapse() -> None:
    """It counts in steps that the first two tokens tell: of log-probabilities nearly all relevance is that of the second."""
    torch.manual_seed(0)
    model, generator = _Counting(), torch.Generator().manual_seed(0)

    def drawn(number: int) -> tuple[Tensor, Tensor]:
        start, step = (torch.randint(low, high, (number, 1), generator=generator) for low, high in ((0, 16), (1, 4)))
        ids = (start + step * torch.arange(19)) % 16
        return ids[:, :-1], ids[:, 1:]

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(700):
        ids, following = drawn(16)
        loss = F.cross_entropy(model(ids).flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out, batches = drawn(256), [drawn(16) for _ in range(8)]

    def accuracy(**options: Any) -> float:
        sparse = copy.deepcopy(model)
        if options:
            lrp_prune.prune(sparse, batches, progress=False, **options)
        with torch.no_grad():
            right = sparse(held_out[0]).argmax(-1) == held_out[1]
        return float(right[:, 1:].float().mean())

    assert accuracy() > 0.99
    by_default = accuracy(sparsity=0.5)
    assert by_default > 0.93 and by_default > accuracy(sparsity=0.5, method="magnitude") - 0.03
    assert accuracy(sparsity=0.5, method=lrp_prune.LRP(target=TokenLabel(odds=0))) < by_default - 0.1
