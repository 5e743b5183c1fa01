"""What counts as one batch, as several, and how many samples are in it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import BatchEncoding

import lrp_prune
from lrp_prune.models import logits_for, samples_in, to_device
from tests.support.recorders import Attributes, Fields, Graph, Named, Record, X, Y


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        (X, r"a tensor of shape \(3, 2\)"),
        ((X, Y), r"a tuple of a tensor of shape \(3, 2\) and a tensor of shape \(3,\)"),
        ([X, Y], "a list of .*no batches of one kind"),
        ([{"x": X}, Y], r"a list of inputs and of a tensor of shape \(3,\)"),
        ({"x": X, "y": Y}, "a mapping of x, y"),
        (BatchEncoding({"x": X}), "a mapping of x"),
        (Fields(X, Y), "one Fields of x, y"),
        (Record(X, Y), "one Record of x, y, name"),
        (Attributes(), "one Attributes of x, y"),
        (Graph(x=X, y=Y), "one Graph of x, y"),
        ("text", "a string"),
        (3, "an int"),
    ],
)
def test_one_batch_is_no_batches(batches: Any, what: str) -> None:
    message = rf"batches must be an iterable of batches, got {what}: pass \[batch\]"
    with pytest.raises(ValueError, match=message):
        lrp_prune.attribute(Named(), batches)
    with pytest.raises(ValueError, match=message):
        lrp_prune.prune(Named(), batches)


@pytest.mark.parametrize(
    "batches",
    [
        [X, X],
        [(X, Y)],
        ((X, Y), (X, Y)),
        iter([(X, Y)]),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 2),
        [{"x": X, "y": Y}],
    ],
)
def test_batches_are_no_single_one(batches: Any) -> None:
    lrp_prune.attribute(Named(), batches, lambda model, batch: model(X).sum())


@pytest.mark.parametrize(
    "batch",
    [BatchEncoding({"x": X, "y": Y}), Fields(X, Y), Record(X, Y), Attributes(), Graph(x=X, y=Y), {"x": [X, {"z": Y}]}],
)
def test_a_batch_keeps_its_type_and_what_was_given_stays_as_it_is(batch: Any) -> None:
    with torch.inference_mode():
        made = to_device(batch, torch.device("meta"))
    assert type(made) is type(batch)
    if isinstance(batch, dict):
        assert made["x"][1]["z"].is_meta and not batch["x"][1]["z"].is_meta
        return
    x = made["x"] if isinstance(batch, BatchEncoding) else made.x
    assert x.is_meta
    assert not (batch["x"] if isinstance(batch, BatchEncoding) else batch.x).is_meta


def test_tensors_of_inference_mode_become_ordinary_ones() -> None:
    with torch.inference_mode():
        batches = [Record(X.clone(), Y.clone()), pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])]
    record, packed = (to_device(batch, torch.device("cpu")) for batch in batches)
    assert not record.x.is_inference() and record.name == "record"
    assert isinstance(packed, PackedSequence)
    assert not packed.data.is_inference() and not packed.batch_sizes.is_inference()


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ((X, Y), 3),
        ({"weight": torch.tensor(2.0), "x": X}, 3),
        ({"position_ids": torch.zeros(1, 5), "input_ids": torch.zeros(4, 5)}, 4),
        (pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), 2),
        (Graph(x=X, y=Y), 3),
    ],
)
def test_samples_are_counted(batch: Any, samples: int) -> None:
    assert samples_in(batch) == samples


def test_types_that_pytree_knows_are_batches() -> None:
    class Registered:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

    torch.utils._pytree.register_pytree_node(
        Registered, lambda batch: ([batch.x, batch.y], None), lambda parts, _: Registered(*parts)
    )
    moved = to_device(Registered(X, Y), torch.device("meta"))
    assert moved.x.is_meta and moved.y.is_meta
    torch.testing.assert_close(logits_for(Named(), Registered(X, Y)).shape, torch.Size([3, 3]))


class Slotted:
    """A batch that keeps its tensors in slots."""

    __slots__ = ("x", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y


@pytest.mark.parametrize("batch", [Slotted(X, Y), SimpleNamespace(x=X, y=Y)])
def test_objects_of_any_class_are_batches_by_name(batch: Any) -> None:
    model = Named()
    found = lrp_prune.attribute(model, [batch], lambda model, batch: model(batch.x).sum())
    expected = lrp_prune.attribute(model, [{"x": X, "y": Y}], lambda model, batch: model(batch["x"]).sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected) and samples_in(batch) == len(X)
    listed = SimpleNamespace(x=[X, X])
    assert samples_in(listed) == len(X) and torch.equal(to_device(listed, torch.device("cpu")).x[1], X)


def test_the_only_prediction_of_an_object_is_its_logits() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(scores=self.layer(x), loss=torch.zeros(3, device=x.device), kind="scores")

    model = Scores()
    assert torch.equal(logits_for(model, X), model(X).scores)
