"""What is explained, and what is run."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.models import profile_of, subject_of
from lrp_prune.relevance.unscored import UnscoredWeightsWarning
from lrp_prune.targets import ClassLabel, LastToken, Logit, LogitDifference, NextToken, checked, describe, predicted
from lrp_prune.targets.alignment import positions_first
from tests.support.likelihood import how_likely
from tests.support.small_models import batch_for, build, forward


def test_next_token_is_how_likely_the_text_is() -> None:
    model, batch = build("llama"), batch_for("llama")
    output = model(**batch, labels=batch["input_ids"])
    expected = -output.loss * batch["input_ids"][:, 1:].numel()
    torch.testing.assert_close(NextToken(odds=0)(model, batch), expected)
    torch.testing.assert_close(NextToken()(model, batch), how_likely(output.logits[:, :-1], batch["input_ids"][:, 1:]))


def test_last_token_is_the_last_attended_one() -> None:
    model, ids = build("llama"), batch_for("llama")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    value = LastToken()(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(value, logits[0, 3].amax() + logits[1, -1].amax())


def test_an_encoders_padding_says_nothing_of_its_decoder() -> None:
    """The same samples, with as many tokens in the encoder as in the decoder, and with one more that is padding."""
    model = build("t5")
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    ids, labels = torch.randint(3, 50, (2, 7)), torch.randint(3, 50, (2, 7))
    labels[1, 5:] = -100
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    longer = {**batch, **{name: nn.functional.pad(batch[name], (0, 1)) for name in ("input_ids", "attention_mask")}}
    expected = -model(**batch).loss * 12
    for target in (NextToken(), LastToken()):
        torch.testing.assert_close(target(model, batch), target(model, longer))
    around = nn.ModuleDict({"model": model})
    around.config = {"learning_rate": 0.1}  # of another kind
    assert profile_of(around).encoder_decoder and not profile_of(build("llama")).encoder_decoder
    torch.testing.assert_close(NextToken(odds=0)(model, batch), expected)
    last = model(**batch).logits.amax(-1)
    torch.testing.assert_close(LastToken()(model, batch), last[0, 6] + last[1, 4])
    short, long = (
        lrp_prune.attribute(model, [each], "next_token", statistic="abs_token", matmul_dtype=None)
        for each in (batch, longer)
    )
    decoder = [name for name in short if name.startswith("decoder")]
    assert decoder
    for name in decoder:
        torch.testing.assert_close(short[name], long[name])


def test_class_is_the_true_classs_logit() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    expected = model(x)[torch.arange(5), y].sum()
    torch.testing.assert_close(ClassLabel()(model, (x, y)), expected)
    with pytest.raises(ValueError, match="integer labels"):
        ClassLabel()(model, (x, torch.randn(5)))


def test_of_classes_of_pixels_the_logit_is_the_mean_over_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    means = model(x).mean((2, 3))
    torch.testing.assert_close(Logit([3, 1]).values(model, x), means[[0, 1], [3, 1]])
    torch.testing.assert_close(LogitDifference(2, 0).values(model, x), means[:, 2] - means[:, 0])
    assert predicted(model, x).answers.tolist() == means.argmax(-1).tolist()


def test_logit_difference_by_ids_and_by_entries_of_the_batch() -> None:
    model, batch = build("llama"), batch_for("llama")
    logits = forward(model, batch)
    torch.testing.assert_close(
        LogitDifference(5, [7, 9])(model, batch), (logits[:, 5] - logits[:, [7, 9]].mean(1)).sum()
    )
    batch = {**batch, "answer": torch.tensor([3, 4]), "wrong": torch.tensor([[1, 2], [5, 6]])}
    expected = logits[0, 3] - logits[0, [1, 2]].mean() + logits[1, 4] - logits[1, [5, 6]].mean()
    torch.testing.assert_close(LogitDifference("answer", "wrong")(model, batch), expected)
    with pytest.raises(ValueError, match="no entry 'answers'"):
        LogitDifference("answers", 1)(model, batch)
    with pytest.raises(ValueError, match="3 token ids for 2 samples"):
        LogitDifference(torch.tensor([1, 2, 3]), 1)(model, batch)


@pytest.mark.parametrize(
    ("name", "extra", "chosen"),
    [
        ("llama", {}, "next_token"),
        ("llama", {"labels": "ids"}, "next_token"),
        ("bert", {"labels": torch.tensor([0, 1])}, "class"),
        ("vit", {"labels": torch.tensor([0, 1])}, "class"),
    ],
)
def test_the_target_is_inferred(name: str, extra: dict[str, Any], chosen: str) -> None:
    batch: dict[str, Any] = batch_for(name)
    batch |= {key: batch["input_ids"] if isinstance(value, str) else value for key, value in extra.items()}
    assert lrp_prune.attribute(build(name), [batch]).target == chosen


def test_a_target_that_cannot_be_inferred_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"cannot be inferred for BertForSequenceClassification.*pass target="):
        lrp_prune.attribute(build("bert"), [batch_for("bert")])
    with pytest.raises(ValueError, match="target must be one of"):
        checked("logit")
    assert describe(LastToken()) == "last_token"


class _Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")


class OnlyChild(_Base):
    pass


class OwnForward(_Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class OwnTarget(_Base):
    def relevance_target(self, batch: dict[str, Tensor]) -> Tensor:
        return forward(self.model, batch).amax(-1).sum()


class TwoModels(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)


def test_lightning_modules_are_run_by_what_they_define() -> None:
    batch = batch_for("llama")
    child, own, target = OnlyChild(), OwnForward(), OwnTarget()
    bare = lrp_prune.attribute(child.model, [batch], target="last_token", matmul_dtype=None)
    assert subject_of(child).module is child.model
    by_child = lrp_prune.attribute(child, [batch], target="last_token", matmul_dtype=None)
    assert list(by_child) == list(bare)
    by_forward = lrp_prune.attribute(own, [batch], target="last_token", matmul_dtype=None)
    by_target = lrp_prune.attribute(target, [batch], matmul_dtype=None)
    for name in bare:
        for other in (by_child[name], by_forward[f"model.{name}"], by_target[f"model.{name}"]):
            torch.testing.assert_close(other, bare[name])
    with pytest.raises(ValueError, match=r"TwoModels does not say what to run.*relevance_target"):
        subject_of(TwoModels())


def test_masks_of_a_lightning_module_fit_the_bare_model_and_back() -> None:
    own, batch = OwnForward(), batch_for("llama")
    masks = lrp_prune.select(lrp_prune.attribute(own, [batch], target="last_token"), sparsity=0.5)
    bare = build("llama")
    masks.apply_(bare)
    masks.apply_(own)
    for (_, one), (_, two) in zip(bare.named_parameters(), own.model.named_parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_unfitting_batch_is_named() -> None:
    with pytest.raises(ValueError, match="no entry fits"):
        lrp_prune.attribute(
            build("vit"), [{"picture": torch.randn(1, 3, 16, 16), "labels": torch.tensor([1])}], target="class"
        )
    with pytest.raises(ValueError, match="holds no tensor"):
        lrp_prune.attribute(nn.Linear(2, 2), ["text"])


def test_a_single_output_for_each_sample_is_one_class() -> None:
    """Of a model that leaves the dimension of classes out."""

    class Regressing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(x).squeeze(-1)
            return result

    model, x = Regressing(), torch.randn(3, 4)
    found = lrp_prune.explain(model, x)
    torch.testing.assert_close(found.values, model(x).detach())
    torch.testing.assert_close(found.inputs["x"].relevance, x * model.last.weight.detach())


@pytest.mark.parametrize(
    ("outputs", "batch", "expected"),
    [
        ((2, 5, 30), [torch.zeros(2, 3, 30)], (2, 30, 5)),  # a convolution
        ((2, 30, 5), [torch.zeros(2, 30, 3)], (2, 30, 5)),  # a recurrent layer
        ((2, 12, 5), [torch.zeros(2, 12, dtype=torch.long)], (2, 12, 5)),  # a tagger
        ((2, 5, 12), [torch.zeros(2, 12, dtype=torch.long)], (2, 12, 5)),
        ((2, 3, 30), [torch.zeros(2, 3, 30), torch.zeros(2, 30, dtype=torch.long)], (2, 30, 3)),  # labels know better
        ((2, 30, 30), [torch.zeros(2, 30, 30)], (2, 30, 30)),
        ((2, 16, 1), [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1)], (2, 16, 1)),  # one label a sample is no position
        ((2, 4, 7), [torch.zeros(2, 9, 8)], (2, 4, 7)),
    ],
)
def test_positions_are_what_the_batch_has_as_many_of(outputs: Any, batch: list[Tensor], expected: Any) -> None:
    assert tuple(positions_first(torch.zeros(outputs), tuple(batch)).shape) == expected


def test_the_last_step_is_explained() -> None:
    torch.manual_seed(0)
    convolution, signals = nn.Conv1d(3, 5, 3, padding=1), torch.randn(2, 3, 30)
    assert torch.equal(LastToken()(convolution, signals), convolution(signals)[..., -1].amax(-1).sum())
    recurrent = nn.Linear(3, 5)
    assert torch.equal(LastToken()(recurrent, signals.mT), recurrent(signals.mT)[:, -1].amax(-1).sum())


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_batch_in_which_nothing_is_labelled_adds_nothing(first: bool) -> None:
    model, batch = build("llama"), batch_for("llama")
    ids = batch["input_ids"]
    labelled, empty = {**batch, "labels": ids}, {**batch, "labels": torch.full_like(ids, -100)}
    with pytest.warns(
        UserWarning, match="a batch has no labelled, unpadded token: target 'next_token' explains nothing"
    ):
        found = lrp_prune.attribute(model, [empty, labelled] if first else [labelled, empty], statistic="signed")
    alone = lrp_prune.attribute(model, [labelled], statistic="signed")
    assert found.target == "next_token" and all(
        torch.equal(sums, alone.sums[name]) for name, sums in found.sums.items()
    )


@pytest.mark.parametrize("what", ["tokens", "classes"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_relevance_of_nothing_is_told(what: str, granularity: str) -> None:
    model = build("llama") if what == "tokens" else nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch: Any = torch.randn(5, 3), torch.full((5,), -100)
    if what == "tokens":
        batch = {"input_ids": torch.ones(5, 4, dtype=torch.long), "labels": torch.full((5, 4), -100)}
    with pytest.warns(UnscoredWeightsWarning, match="relevance is zero everywhere.* explained nothing of 5 samples"):
        lrp_prune.attribute(model, [batch], granularity=granularity)
