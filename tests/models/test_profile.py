"""What a model is, and what of it is run, whatever is around it."""

import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torchmetrics import Accuracy

import lrp_prune
from lrp_prune.models import profile_of, subject_of
from lrp_prune.targets import check_suits, checked
from tests.support.labelled_models import CASES
from tests.support.small_models import build


class Holding(pl.LightningModule):
    """A module without a forward that holds what it is given."""

    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    ("name", "task", "encoder_decoder", "causal", "left_to_right"),
    [
        ("bert token classification", "token classifier", False, False, False),
        ("bert masked", "masked language model", False, False, False),
        ("gpt2", "language model", False, True, True),
        ("gpt2 classes", "sequence classifier", False, False, True),
        ("bart decoder", "language model", False, True, True),
        ("bart", "language model", True, False, False),
        ("t5", "language model", True, False, False),
        ("t5 token classification", "token classifier", False, False, False),  # its encoder alone
        ("t5 classes", "sequence classifier", True, False, False),
        ("segformer", "segmentation model", False, False, False),
        ("bert questions", "question answering model", False, False, False),
    ],
)
def test_a_model_is_known_through_what_is_around_it(
    name: str, task: str, encoder_decoder: bool, causal: bool, left_to_right: bool
) -> None:
    model, _ = CASES[name].made()
    for around in (model, Holding(model=model), nn.ModuleDict({"model": Holding(inner=model)}), torch.compile(model)):
        profile = profile_of(around)
        assert profile.inner is model and profile.decides_alone and profile.kind is not None
        assert profile.kind.task == task
        assert (profile.encoder_decoder, profile.causal, profile.left_to_right) == (
            encoder_decoder,
            causal,
            left_to_right,
        )


def test_a_model_that_transformers_lists_twice_is_what_it_is_trained_for() -> None:
    model = tf.XLMWithLMHeadModel(tf.XLMConfig(emb_dim=32, n_layers=1, n_heads=4, vocab_size=50, n_langs=1))
    assert profile_of(model).kind.task == "masked language model"


def test_a_subclass_is_what_its_base_is_and_a_class_of_ones_own_is_nothing_known() -> None:
    class Mine(tf.BertForTokenClassification):
        pass

    class Own(tf.BertPreTrainedModel):
        def __init__(self, config: tf.BertConfig) -> None:
            super().__init__(config)
            self.bert, self.head = tf.BertModel(config), nn.Linear(32, 5)

    config = CASES["bert token classification"].build().config
    assert profile_of(Mine(config)).kind.task == "token classifier"
    assert profile_of(Own(config)).kind is None


def test_a_head_beside_a_model_may_be_about_something_else() -> None:
    masked, _ = CASES["bert masked"].made()
    profile = profile_of(nn.ModuleDict({"model": masked, "head": nn.Linear(32, 3)}))
    assert profile.inner is masked and not profile.decides_alone
    two = profile_of(nn.ModuleDict({"student": masked, "teacher": CASES["bert masked"].build()}))
    assert (two.inner, two.kind, two.causal, two.encoder_decoder) == (None, None, False, False)


@pytest.mark.slow
def test_plain_models_are_known_without_importing_transformers() -> None:
    code = (
        "import sys, torch, lrp_prune\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "relevance = lrp_prune.attribute(model, [(torch.randn(2, 4), torch.tensor([0, 2]))])\n"
        "assert relevance.target == 'class' and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "bert token classification",
            "next_token",
            "BertForTokenClassification is a token classifier: pass target='token'",
        ),
        ("bert masked", "next_token", "BertForMaskedLM is a masked language model: pass target='token'"),
        ("bert classes", "next_token", "is a sequence classifier: pass target='class'"),
        ("bert classes", "token", "is a sequence classifier: pass target='class'"),
        ("vit", "next_token", "is an image classifier: pass target='class'"),
        ("segformer", "class", "is a segmentation model: pass target='token'"),
        ("gpt2", "class", "is a language model: pass target='next_token'"),
        ("bert questions", "token", "is a question answering model: pass target='span'"),
    ],
)
def test_a_target_for_another_kind_of_model_is_refused_before_anything_is_run(
    name: str, target: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = CASES[name].made()
    monkeypatch.setattr(type(model), "forward", None)
    for around in (model, Holding(model=model)):
        for given in (target, checked(target)):
            with pytest.raises(ValueError, match=message):
                lrp_prune.attribute(around, [batch], given)
    beside = nn.ModuleDict({"model": model, "head": nn.Linear(2, 2)})
    check_suits(checked(target), beside)  # the head may make it what was asked for


@pytest.mark.parametrize("name", CASES)
def test_the_target_that_is_inferred_may_be_asked_for(name: str) -> None:
    case = CASES[name]
    model, batch = case.made()
    value = checked(case.target)(model, batch)
    torch.testing.assert_close(value, case.expected(model, batch), rtol=1e-5, atol=1e-5)
    check_suits(checked(case.target), model)


def test_a_module_without_a_forward_runs_the_only_model_that_it_holds() -> None:
    model = build("llama")
    for module in (
        Holding(model=model),
        Holding(model=model, loss=nn.CrossEntropyLoss(), accuracy=Accuracy("multiclass", num_classes=3)),
        Holding(model=model, backbone=model.model, head=model.lm_head),  # second names of its parts
        Holding(model=torch.compile(model)),
    ):
        assert subject_of(module).module is model


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"student": build("llama"), "teacher": build("llama")}, "several models .student, teacher."),
        ({"encoder": build("bert"), "head": nn.Linear(2, 2)}, "several models .encoder, head."),
        ({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)}, "several models .one, two."),
        ({"loss": nn.CrossEntropyLoss()}, "it holds no model yet"),
    ],
)
def test_a_module_that_does_not_say_what_to_run_is_refused(held: dict[str, nn.Module], message: str) -> None:
    refused = f"(?s)Holding does not say what to run for relevance.*{message}.*pass the model itself .*relevance_target"
    with pytest.raises(ValueError, match=refused):
        subject_of(Holding(**held))
    with pytest.raises(ValueError, match=refused):
        lrp_prune.prune(Holding(**held), [{"input_ids": torch.ones(1, 3, dtype=torch.long)}])


def test_any_module_may_say_what_is_explained() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def relevance_target(self, batch: Tensor) -> Tensor:
            total: Tensor = self.layer(batch).sum()
            return total

    relevance = lrp_prune.attribute(Own(), [torch.ones(1, 2)])
    assert list(relevance) == ["layer.weight"] and relevance.target.endswith("relevance_target")
