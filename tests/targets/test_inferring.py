"""The inferred target of Hugging Face models is the right one, also where another is as easily taken for it."""

import copy
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from lrp_prune.targets import Inferred, in_words
from tests.support.labelled_models import CASES, HandsOn, Logits
from tests.support.likelihood import how_likely

EXACT: dict[str, Any] = {"composite": "gradient", "statistic": "signed", "matmul_dtype": None}


class Told:
    """What the library's logger says."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == "lrp_prune"]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    with caplog.at_level(logging.INFO, "lrp_prune"):
        yield Told(caplog)


def assert_same(one: Any, other: Any) -> None:
    """Relevance of the same value: equal to rounding, and not nothing."""
    assert list(one) == list(other)
    size = max(float(other[name].abs().max()) for name in other)
    assert size > 0
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("name", CASES)
def test_what_is_explained_is_what_the_model_is_trained_for(name: str, told: Told) -> None:
    case = CASES[name]
    model, batch = case.made()
    problem = getattr(model.config, "problem_type", None)
    relevance = lrp_prune.attribute(model, [batch, batch], **EXACT)
    assert relevance.target == case.target
    (message,) = told.messages
    assert message.startswith(f"explains: {in_words(case.target)} (target={case.target!r}, by ")
    assert ("own loss" in message) == ("labels" in batch)
    assert getattr(model.config, "problem_type", None) == problem  # transformers writes down what it guesses
    assert_same(relevance, lrp_prune.attribute(model, [batch, batch], case.expected, **EXACT))
    inferred = Inferred().decide(model, batch)(model, batch)
    torch.testing.assert_close(inferred, case.expected(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_without_its_own_loss_a_model_is_known_by_what_it_was_made_for(
    name: str, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    case = CASES[name]
    monkeypatch.setattr("lrp_prune.targets.reading.readings_by_loss", lambda *given: [])
    # A decoder that continues text is one that predicts the next token, as far as its class tells.
    expected = {"bart decoder": "next_token"}.get(name, case.target)
    model, batch = case.made()
    assert lrp_prune.attribute(model, [batch], **EXACT).target == expected
    assert type(model).__name__ in told.messages[0] or "positions in the batch" in told.messages[0]


def shifted(ids: Tensor, mask: Tensor) -> Tensor:
    """The next token of each, as a data loader makes labels."""
    following = torch.cat([ids[:, 1:], torch.full((len(ids), 1), 9)], 1)
    return following.masked_fill(mask == 0, -100)


ADAPTED = [
    lambda model: model,
    HandsOn,
    Logits,
    lambda model: get_peft_model(model, LoraConfig(target_modules=["c_attn"])),
]


@pytest.mark.parametrize("wrap", ADAPTED)
def test_labels_that_are_shifted_already_are_not_shifted_again(wrap: Any, told: Told) -> None:
    model, batch = CASES["gpt2"].made()
    labels = shifted(batch["input_ids"], batch["attention_mask"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    batch = {**batch, "labels": labels}
    around = wrap(model).eval()
    assert lrp_prune.attribute(around, [batch], **EXACT, unruled="ignore").target == "token"
    assert "shifted by one already" in told.messages[0]
    subject = lrp_prune.models.subject_of(around).module
    value = Inferred().decide(subject, batch)(subject, batch)
    torch.testing.assert_close(value, how_likely(logits, labels))


@pytest.mark.slow
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_problem_type_that_transformers_only_guesses_does_not_decide(num_labels: int) -> None:
    config = CASES["bert classes"].build().config
    config.num_labels = num_labels
    inputs = {name: value for name, value in CASES["bert classes"].made()[1].items() if name != "labels"}
    labels = torch.eye(3)[[0, 1, 2, 1]] if num_labels == 3 else torch.tensor([0.0, 1.0, 1.0, 0.0])
    other = "class" if num_labels == 3 else "regression"
    batch = {**inputs, "labels": labels}
    model = tf.BertForSequenceClassification(config).eval()
    for around in (model, HandsOn(model), Logits(model)):
        with pytest.raises(
            ValueError, match=rf"(?s)config.problem_type is not set, so that both.*target='{other}'.*pass target="
        ):
            lrp_prune.attribute(around, [batch], unruled="ignore")
        for target in ("multi_label", other):
            assert lrp_prune.attribute(around, [batch], target, unruled="ignore").target == target
    model.config.problem_type = "multi_label_classification"
    assert lrp_prune.attribute(model, [batch]).target == "multi_label"


class Smoothed(nn.Module):
    """A loss of one's own beside the logits."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **self.options), logits


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 2, 1, 3, 1])}, {"reduction": "sum"}], ids=str
)
def test_a_loss_that_is_none_of_the_known_leaves_it_to_the_task(options: dict[str, Any], told: Told) -> None:
    model, batch = CASES["bert token classification"].made()
    assert lrp_prune.attribute(Smoothed(model, **options), [batch], unruled="ignore").target == "token"
    assert "BertForTokenClassification in Smoothed is a token classifier" in told.messages[0]


def test_a_loss_of_ones_own_decides_against_the_task() -> None:
    """A masked language model that someone trains to continue text, and the other way round."""

    class Continuing(nn.Module):
        def __init__(self, model: nn.Module, shift: int) -> None:
            super().__init__()
            self.model, self.shift = model, shift

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(input_ids=input_ids).logits
            kept = logits[:, : logits.shape[1] - self.shift]
            return {"loss": F.cross_entropy(kept.flatten(0, 1), labels[:, self.shift :].flatten()), "logits": logits}

    for name, shift, expected in (("bert masked", 1, "next_token"), ("gpt2", 0, "token")):
        model, batch = CASES[name].made()
        given = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
        assert lrp_prune.attribute(Continuing(model, shift), [given], unruled="ignore").target == expected


def test_readings_that_agree_by_chance_decide_nothing(told: Told) -> None:
    model, batch = CASES["bert token classification"].made()
    with torch.no_grad():
        model.classifier.weight.zero_()  # every loss is the same
        model.classifier.bias.zero_()
    labels = batch["labels"].clamp(min=0)
    assert lrp_prune.attribute(model, [{**batch, "labels": labels}], **EXACT).target == "token"
    assert "is a token classifier" in told.messages[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert token classification", "gpt2", "bert masked", "t5"])
def test_half_precision_is_read_alike(name: str, dtype: torch.dtype) -> None:
    model, batch = CASES[name].made()
    assert lrp_prune.attribute(model.to(dtype), [batch], unruled="ignore").target == CASES[name].target


@pytest.mark.parametrize("name", ["bert token classification", "gpt2", "t5", "bert several labels"])
def test_autocast_is_read_alike(name: str) -> None:
    model, batch = CASES[name].made()
    relevance = lrp_prune.attribute(
        model, [batch], unruled="ignore", forward_context=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert relevance.target == CASES[name].target


def detector() -> nn.Module:
    return tf.YolosForObjectDetection(
        tf.YolosConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=[16, 16],
            patch_size=4,
            num_detection_tokens=4,
            num_labels=3,
        )
    )


def recognizer() -> nn.Module:
    return tf.Wav2Vec2ForCTC(
        tf.Wav2Vec2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=12,
            conv_dim=[8, 8],
            conv_stride=[5, 5],
            conv_kernel=[5, 5],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )


def pretraining() -> nn.Module:
    return tf.BertForPreTraining(CASES["bert masked"].build().config)


def contrasting() -> nn.Module:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
    }
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 4}, projection_dim=16))


PIXELS = torch.randn(2, 3, 16, 16)
IDS = torch.ones(2, 5, dtype=torch.long)
BOXES = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]


@pytest.mark.parametrize(
    ("make", "batch", "message"),
    [
        (detector, {"pixel_values": PIXELS, "labels": BOXES}, "a batch with such labels: the labels are a list"),
        (
            recognizer,
            {"input_values": torch.randn(2, 400), "labels": IDS[:, :3]},
            "a model for ctc, for which no target",
        ),
        (
            contrasting,
            {"input_ids": IDS, "pixel_values": PIXELS},
            "for zero shot image classification, for which no target",
        ),
        (pretraining, {"input_ids": IDS, "labels": IDS}, "is a model for pretraining, for which no target is known"),
        (CASES["bert classes"].build, {"input_ids": IDS}, "no labels: .* is a sequence classifier, which needs labels"),
        (CASES["t5"].build, {"input_ids": IDS}, "T5For.* is a language model, which needs labels"),
        (
            CASES["bert questions"].build,
            {"input_ids": IDS, "labels": IDS[:, 0]},
            "needs start_positions and end_positions",
        ),
        (CASES["gpt2"].build, {"input_ids": IDS, "labels": IDS[:, 0]}, r"labels \(2,\) of torch.int64 fit no target"),
    ],
)
def test_what_is_not_known_is_refused_clearly(make: Any, batch: dict[str, Any], message: str) -> None:
    model = make().eval()
    for around in (model, HandsOn(model)) if "fit no" not in message else (model,):  # whose own loss says it else
        with pytest.raises(ValueError, match=f"(?s)cannot be inferred for .*{message}.*def relevance_target"):
            lrp_prune.attribute(around, [batch], unruled="ignore")


def test_a_value_needs_no_labels() -> None:
    model, batch = CASES["bert one value"].made()
    del batch["labels"]
    relevance = lrp_prune.attribute(model, [batch], **EXACT)
    assert relevance.target == "regression"
    assert_same(
        relevance, lrp_prune.attribute(model, [batch], lambda model, batch: model(**batch).logits.abs().sum(), **EXACT)
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert several labels", "segformer"])
def test_nothing_is_left_of_looking_at_a_model(name: str, fails: bool) -> None:
    model, batch = CASES[name].made()
    with torch.no_grad():
        model(**batch)  # some install hooks of their own
    model.config.problem_type = {"bert several labels": "multi_label_classification"}.get(name)
    model.train()
    around = Logits(model) if "input_ids" in batch else model
    if fails:
        batch = {**batch, "labels": torch.full((4, 10, 3), 2.5)}
    before = copy.deepcopy(model.state_dict())
    config = dict(vars(model.config))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError) if fails else nullcontext():
        lrp_prune.attribute(around, [batch], unruled="ignore")
    assert torch.equal(state, torch.get_rng_state())
    assert vars(model.config) == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.slow
def test_one_look_at_two_samples_decides_for_all_batches_and_rounds(told: Told) -> None:
    model, batch = CASES["bert token classification"].made()
    batch = {name: value.repeat(3, 1) for name, value in batch.items()}
    batch["labels"][:10] = -100  # samples that tell nothing are not looked at
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lrp_prune.prune(model, [batch, batch], sparsity=0.5, rounds=3, recalibrate=False)
    assert sizes == [2, *[12] * 6]
    assert len(told.messages) == 1
    inferred = Inferred()
    assert inferred.words == ""
    inferred.decide(model, batch)
    assert inferred.words == in_words("token")
    classes, labelled = CASES["bert classes"].made()
    inferred.decide(classes, labelled)  # another model is another question
    assert inferred.words == in_words("class")


def test_relevance_of_different_readings_is_not_merged() -> None:
    model, batch = CASES["gpt2"].made()
    one = lrp_prune.attribute(model, [batch])
    other = lrp_prune.attribute(model, [batch], "token")
    with pytest.raises(ValueError, match="cannot merge relevance with target 'next_token' and 'token'"):
        one + other
