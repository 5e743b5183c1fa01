"""The steps that a plain model gets: its own loss, or the cross-entropy of what it returns."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_prune.wrapper.delegation import PlainSteps
from tests.support.labelled_models import CASES
from tests.support.small_models import batch_for, build

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x).unsqueeze(2).expand(-1, -1, 6)
        return scores


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (nn.Linear(4, 5), torch.tensor([0, 4, 2])),
        (nn.Linear(4, 5), torch.tensor([0, 4, 2], dtype=torch.int32)),
        (nn.Linear(4, 5), torch.softmax(torch.randn(3, 5), 1)),
        (Channels(), torch.randint(0, 5, (3, 6))),
    ],
)
def test_pairs_are_trained_by_cross_entropy(model: nn.Module, labels: Tensor) -> None:
    given = labels if labels.is_floating_point() else labels.long()
    torch.testing.assert_close(PlainSteps(model)._loss((X, labels)), F.cross_entropy(model(X), given))


def test_tokens_are_trained_where_they_are() -> None:
    model = build("llama")
    ids, labels = batch_for("llama")["input_ids"], torch.randint(0, 50, (2, 7))
    expected = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(PlainSteps(model)._loss((ids, labels)), expected)


@pytest.mark.parametrize("labels", [torch.randn(3, 5), torch.randn(3), torch.randint(0, 5, (3, 2)), {"boxes": X}])
def test_labels_for_another_loss_are_refused(labels: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Linear gives no loss for this batch: .*LightningModule with a training_step"
    ):
        PlainSteps(nn.Linear(4, 5))._loss((X, labels))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_language_model_is_trained_on_its_text_also_with_adapters(adapted: bool) -> None:
    model, batch = CASES["gpt2"].made()
    expected = model(**batch).loss
    del batch["labels"]
    trained = get_peft_model(model, LoraConfig(target_modules=["c_attn"])).eval() if adapted else model
    torch.testing.assert_close(PlainSteps(trained)._loss(batch), expected)
    torch.testing.assert_close(PlainSteps(trained).predict_step(batch, 0), model(**batch).logits)
