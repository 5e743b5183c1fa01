"""What is explained of models that say nothing about themselves: by shapes, by values, by what labels have to do with inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from lrp_prune.targets import ClassLabel, Inferred, MultiLabel, PredictedValues, TokenLabel
from tests.support.likelihood import how_likely, how_likely_in_channels

EXACT: dict[str, Any] = {"composite": "gradient", "statistic": "signed", "matmul_dtype": None}
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 20, (3, 8), generator=GENERATOR)
TAGS = torch.randint(0, 5, (3, 8), generator=GENERATOR)
FOLLOWING = torch.cat([IDS[:, 1:], torch.tensor([[3], [4], [5]])], 1)


class Tagger(nn.Module):
    """A recurrent layer over tokens, in one direction or both, with a score for each of some classes at each token."""

    def __init__(self, classes: int, bidirectional: bool, ids: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6) if ids else nn.Linear(4, 6)
        self.layer = nn.LSTM(6, 5, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(10 if bidirectional else 5, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.embedding(x))[0])
        return scores


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make()
    return model


def inferred(model: nn.Module, batch: Any) -> tuple[str, Tensor]:
    """The name of what is inferred, and its value."""
    relevance = lrp_prune.attribute(model, [batch], unruled="ignore", **EXACT)
    return relevance.target, Inferred().decide(model, batch)(model, batch)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("ids", [True, False])
def test_a_tagger_explains_its_tags_where_they_are(bidirectional: bool, ids: bool) -> None:
    model = seeded(lambda: Tagger(5, bidirectional, ids))
    x = IDS if ids else torch.randn(3, 8, 4, generator=GENERATOR)
    target, value = inferred(model, (x, TAGS))
    assert target == "token"
    torch.testing.assert_close(value, how_likely(model(x), TAGS))


@pytest.mark.parametrize(
    ("labels", "bidirectional", "expected"),
    [
        (IDS, False, "next_token"),
        (IDS.masked_fill(torch.arange(8) < 3, -100), False, "next_token"),
        (IDS, True, "token"),  # it sees the answer: a reconstruction
        (IDS.masked_fill(torch.arange(8) % 3 > 0, -100), True, "token"),
        (FOLLOWING, False, "token"),
        (FOLLOWING, True, "token"),
        (FOLLOWING.masked_fill(torch.arange(8) < 3, -100), False, "token"),
    ],
)
def test_labels_that_are_input_ids_are_predicted_from_where_the_model_can(
    labels: Tensor, bidirectional: bool, expected: str
) -> None:
    model = seeded(lambda: Tagger(20, bidirectional))
    for batch in ((IDS, labels), {"x": IDS, "labels": labels}):
        target, value = inferred(model, batch)
        assert target == expected
        logits = model(IDS)
        shifted = how_likely(logits[:, :-1], labels[:, 1:])
        torch.testing.assert_close(value, shifted if expected == "next_token" else how_likely(logits, labels))


class Channels(Tagger):
    """The same scores with their classes before the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


@pytest.mark.parametrize(("bidirectional", "expected"), [(False, "next_token"), (True, "token")])
def test_classes_before_tokens_are_read_alike(bidirectional: bool, expected: str) -> None:
    model = seeded(lambda: Channels(20, bidirectional))
    target, value = inferred(model, (IDS, IDS))
    assert target == expected
    logits = model(IDS).transpose(1, 2)
    shifted = how_likely(logits[:, :-1], IDS[:, 1:])
    torch.testing.assert_close(value, shifted if expected == "next_token" else how_likely(logits, IDS))


def test_text_alone_is_explained_by_what_follows_if_the_model_reads_it_so() -> None:
    class Named(Tagger):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)

    model, batch = seeded(lambda: Named(20, False)), {"input_ids": IDS}
    target, value = inferred(model, batch)
    assert target == "next_token"
    torch.testing.assert_close(value, how_likely(model(IDS)[:, :-1], IDS[:, 1:]))
    with pytest.raises(ValueError, match=r"no labels.*tokens see those after them"):
        inferred(seeded(lambda: Named(20, True)), batch)


def test_labels_that_are_half_the_input_ids_are_refused_where_both_readings_are_possible() -> None:
    labels = torch.where(torch.arange(8) % 4 > 0, IDS, IDS - 1)
    with pytest.raises(
        ValueError, match=r"both target='next_token' \(.*\) and target='token' \(.*\) are possible: pass target="
    ):
        inferred(seeded(lambda: Tagger(20, False)), (IDS, labels))
    target, _ = inferred(seeded(lambda: Tagger(20, True)), (IDS, labels))
    assert target == "token"
    same = torch.full((3, 8), 4)  # the same token everywhere
    with pytest.raises(ValueError, match=r"next_token.* and .*token"):
        inferred(seeded(lambda: Tagger(20, False)), (same, same))


def test_labels_and_inputs_that_are_one_tensor() -> None:
    assert inferred(seeded(lambda: Tagger(20, False)), {"x": IDS, "labels": IDS})[0] == "next_token"


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 7), (2, 3, 2, 4, 5)])
def test_classes_before_positions_are_explained_for_each_pixel(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=GENERATOR)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=GENERATOR)
    model = seeded(lambda: nn.Sequential({3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](shape[1], shape[1], 1)))
    target, value = inferred(model, (x, labels))
    assert target == "token"
    torch.testing.assert_close(value, how_likely_in_channels(model(x), labels))


def test_classes_that_may_lie_along_two_dimensions_are_refused_unless_told() -> None:
    x, labels = torch.randn(2, 4, 4, generator=GENERATOR), torch.randint(0, 4, (2, 4), generator=GENERATOR)
    model = seeded(lambda: nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"along dimension 1 or along the last one.*TokenLabel\(class_dim=1\)"):
        inferred(model, (x, labels))
    with pytest.raises(ValueError, match="TokenLabel"):
        lrp_prune.attribute(model, [(x, labels)], "token")
    for dim, logits in ((1, model(x).transpose(1, 2)), (-1, model(x))):
        relevance = lrp_prune.attribute(model, [(x, labels)], TokenLabel(class_dim=dim), **EXACT)
        assert relevance.target == f"TokenLabel(class_dim={dim})"
        torch.testing.assert_close(TokenLabel(dim)(model, (x, labels)), how_likely(logits, labels))


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (1, torch.randn(6), "regression"),
        (1, torch.randn(6, 1), "regression"),
        (3, torch.randn(6, 3), "regression"),
        (1, torch.tensor([31, 22, 5, 64, 18, 40]), "regression"),
        (1, torch.tensor([0.0, 1, 1, 0, 0, 1]), "multi_label"),
        (1, torch.tensor([0, 1, 1, 0, 0, 1]), "multi_label"),
        (1, torch.ones(6, 1), "multi_label"),
        (3, torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]]), "multi_label"),
        (3, torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]]), "multi_label"),
        (3, torch.tensor([0, 1, 2, 1, 0, 2]), "class"),
        (3, torch.tensor([[0], [1], [2], [1], [0], [2]]), "class"),
        (3, torch.tensor([0, 1, 2, 1, -100, 2]), "class"),
        (2, torch.tensor([0, 1, 1, 1, 0, 0], dtype=torch.int32), "class"),
    ],
)
def test_one_label_a_sample_or_an_output(outputs: int, labels: Tensor, expected: str) -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(4, outputs))), torch.randn(6, 4, generator=GENERATOR)
    target, value = inferred(model, (x, labels))
    assert target == expected
    out = model(x)
    if expected == "regression":
        by_hand = sum(abs(number) for number in out.flatten())
    elif expected == "class":
        by_hand = sum(row[int(label)] for row, label in zip(out, labels, strict=True) if label >= 0)
    else:
        signs = zip(out.flatten(), labels.flatten(), strict=True)
        by_hand = sum(number if label else -number for number, label in signs)
    torch.testing.assert_close(value, by_hand)


def test_outputs_without_a_dimension_of_their_own() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))), torch.randn(6, 4, generator=GENERATOR)
    for labels, expected in ((torch.randn(6), "regression"), (torch.tensor([0.0, 1, 1, 0, 0, 1]), "multi_label")):
        assert inferred(model, (x, labels))[0] == expected
    torch.testing.assert_close(PredictedValues()(model, (x, torch.randn(6, 1))), model(x).abs().sum())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(3)[[0, 1, 2, 1, 0, 2]], "both target='class' .* and target='multi_label' .* are possible"),
        (torch.eye(3, dtype=torch.long)[[0, 1, 2, 1, 0, 2]], "both target='class' .* and target='multi_label'"),
        (torch.softmax(torch.randn(6, 3), 1), "both target='class' .* and target='regression'"),
        (torch.tensor([0, 1, 2, 3, 0, 1]), "between 0 and 3 are no classes of 3 outputs"),
        (torch.tensor([0, 1, 2, -1, 0, 1]), "between -1 and 2 are no classes of 3 outputs"),
        (torch.randn(6, 2), r"neither of the shape of the outputs \[samples, 3\]"),
        (torch.randn(6), "neither of the shape of the outputs"),
        (torch.randint(0, 3, (6, 2)), "fit no target"),
        (None, "there are none to read"),
        ({"boxes": torch.randn(6, 4)}, "labels are a dict"),
        ([torch.tensor([1, 2])] * 6, "labels are a list"),
    ],
)
def test_what_is_unclear_is_refused_with_the_way_out(labels: Any, message: str) -> None:
    model, x = seeded(lambda: nn.Linear(4, 3)), torch.randn(6, 4, generator=GENERATOR)
    with pytest.raises(
        ValueError, match=f"(?s)cannot be inferred for Linear.*{message}.*pass target=.*relevance_target"
    ):
        lrp_prune.attribute(model, [(x, labels) if labels is not None else x])


def test_rows_that_sum_to_one_are_explained_as_told() -> None:
    model, x = seeded(lambda: nn.Linear(4, 3)), torch.randn(6, 4, generator=GENERATOR)
    labels = torch.eye(3)[[0, 1, 2, 1, 0, 2]]
    logits = model(x)
    torch.testing.assert_close(ClassLabel()(model, (x, labels)), (logits * labels).sum())
    torch.testing.assert_close(ClassLabel()(model, (x, labels)), ClassLabel()(model, (x, labels.argmax(1))))
    torch.testing.assert_close(MultiLabel()(model, (x, labels)), (logits * (2 * labels - 1)).sum())
    soft = torch.softmax(torch.randn(6, 3, generator=GENERATOR), 1)
    torch.testing.assert_close(ClassLabel()(model, (x, soft)), (logits * soft).sum())
    with pytest.raises(ValueError, match="rows sum to one"):
        ClassLabel()(model, (x, soft * 2))


class WithLoss(nn.Module):
    """Computes its own loss, by which the same labels are meant in one way or another."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(4, 3), loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        loss = {"class": F.cross_entropy, "multi_label": F.binary_cross_entropy_with_logits, "regression": F.mse_loss}
        return {"loss": loss[self.loss](logits, labels), "logits": logits}


@pytest.mark.parametrize("loss", ["class", "multi_label", "regression"])
def test_a_module_with_a_loss_of_its_own_says_what_its_labels_are(loss: str) -> None:
    model, x = seeded(lambda: WithLoss(loss)), torch.randn(6, 4, generator=GENERATOR)
    labels = torch.eye(3)[[0, 1, 2, 1, 0, 2]]
    for batch in ({"x": x, "labels": labels}, (x, labels)):
        target, value = inferred(model, batch)
        assert target == loss
        logits = model.layer(x)
        expected = {"class": logits * labels, "multi_label": logits * (2 * labels - 1), "regression": logits.abs()}
        torch.testing.assert_close(value, expected[loss].sum())


def test_several_answers_of_which_none_is_the_logits_are_refused() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"colour": self.one(x), "shape": self.two(x)}

    x, y = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="nothing that is known to be its predictions"):
        lrp_prune.attribute(Heads(), [(x, y)])
    with pytest.raises(ValueError, match="Heads returned dict with colour, shape, in which no logits are found"):
        lrp_prune.attribute(Heads(), [(x, y)], "class")


@pytest.mark.parametrize("loss_first", [True, False])
def test_logits_beside_a_loss_or_nothing_are_found(loss_first: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            logits = self.layer(x)
            loss = None if y is None else F.cross_entropy(logits, y)
            return (loss, logits) if loss_first else (logits, loss)

    x, y = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    model = Both()
    for batch in ((x, y), {"x": x, "y": y}):
        torch.testing.assert_close(ClassLabel()(model, batch), model.layer(x)[torch.arange(6), y].sum())
