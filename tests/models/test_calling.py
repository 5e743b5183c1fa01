"""Batches reach a model's forward as its own steps pass them, and what does not fit is refused before it is run."""

from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import lrp_prune
from lrp_prune.models import call_of, labels_of, logits_for, run
from tests.support.recorders import Attributes, Fields, Graph, Named, Record, Recorder, X, Y
from tests.support.small_models import batch_for, build

LENGTHS = torch.tensor([2, 1, 2])


class NamedWithLengths(Recorder):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.say(x, lengths)


class NamedWithMask(Recorder):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.say(x, mask)


class OtherName(Recorder):
    def forward(self, features: Tensor) -> Tensor:
        return self.say(features)


class WholeMapping(Recorder):
    def forward(self, batch):
        return self.say(batch["x"], batch)


class WholePair(Recorder):
    def forward(self, batch):
        x, y = batch
        return self.say(x, y)


class Unpacking(Recorder):
    def forward(self, data: Any) -> Tensor:
        x, _ = data
        return self.say(x, data)


class AnnotatedMapping(Recorder):
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.say(inputs["x"], inputs)


class WholeObject(Recorder):
    def forward(self, data):
        return self.say(data.x, data)


class Open(Recorder):
    def forward(self, **batch: Any) -> Tensor:
        return self.say(batch["x"], batch)


class Positional(Recorder):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.say(inputs[0], *inputs[1:])


class KeywordOnly(Recorder):
    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.say(x, scale)


class WithLabels(Recorder):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.say(x, y)


class MaybeLabels(Recorder):
    """As nanoGPT's: with labels, logits and a loss."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.say(x, targets)
        return logits[:1] if targets is None else (logits, nn.functional.cross_entropy(logits, targets))


class LossAlone(Recorder):
    """With labels, a loss alone."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.say(x, labels)
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        (Named, (X, Y)),
        (Named, [X, Y]),
        (Named, {"x": X, "y": Y}),
        (Named, OrderedDict(x=X, labels=Y, index=torch.arange(3))),
        (Named, BatchEncoding({"x": X, "labels": Y})),
        (Named, Fields(X, Y)),
        (Named, Record(X, Y)),
        (Named, Attributes()),
        (Named, Graph(x=X, y=Y)),
        (Named, ({"x": X}, Y)),
        (Named, {"inputs": {"x": X}, "labels": Y}),
        (OtherName, {"image": X, "label": Y}),
        (OtherName, (X, Y)),
        (WholeMapping, {"x": X, "y": Y}),
        (WholeMapping, BatchEncoding({"x": X, "y": Y})),
        (WholeMapping, {"x": X, "z": X, "y": Y}),
        (AnnotatedMapping, {"x": X, "y": Y}),
        (AnnotatedMapping, ({"x": X}, Y)),
        (WholeObject, Record(X, Y)),
        (WholeObject, Attributes()),
        (WholeObject, Graph(x=X, y=Y, edges=torch.zeros(2, 5, dtype=torch.long))),
        (WholePair, (X, Y)),
        (Open, {"x": X, "y": Y}),
        (Open, ({"x": X}, Y)),
        (Open, {"inputs": {"x": X}, "y": Y}),
        (Positional, (X, Y)),
        (KeywordOnly, {"x": X, "y": Y}),
        (NamedWithLengths, ((X, LENGTHS), Y)),
        (NamedWithLengths, {"x": X, "lengths": LENGTHS, "y": Y}),
        (NamedWithLengths, {"inputs": (X, LENGTHS), "y": Y}),
        (NamedWithMask, ((X, LENGTHS), Y)),
        (NamedWithMask, (X, Y)),
        (Positional, ((X, LENGTHS), Y)),
        (WithLabels, (X, Y)),
        (WithLabels, {"x": X, "y": Y}),
        (WithLabels, {"x": X, "labels": Y}),
        (MaybeLabels, (X, Y)),
        (MaybeLabels, {"x": X, "targets": Y}),
        (LossAlone, (X, Y)),
        (LossAlone, {"x": X, "labels": Y}),
    ],
)
def test_conventions(kind: type[Recorder], batch: Any) -> None:
    """The explained value is that of the class's logits, whatever the batch looks like."""
    torch.manual_seed(0)
    model = kind()
    assert labels_of(model, batch) is Y
    logits = logits_for(model, batch)
    torch.testing.assert_close(logits, model.layer(X))
    relevance = lrp_prune.attribute(model, [batch], composite="gradient", statistic="signed", matmul_dtype=None)
    assert (relevance.target, relevance.num_samples) == ("class", 3)
    expected = torch.zeros(3, 2)
    for x, y in zip(X, Y, strict=True):
        expected[y] += model.layer.weight[y].detach() * x / 3
    torch.testing.assert_close(relevance["layer.weight"], expected)


def test_what_is_given_is_what_the_forward_is_about() -> None:
    for batch in (((X, LENGTHS), Y), {"x": X, "lengths": LENGTHS, "y": Y}):
        model = NamedWithLengths()
        run(model, batch)
        assert model.given[0] is LENGTHS
    everything = Open()
    run(everything, {"x": X, "y": Y, "index": 3})
    assert set(everything.given[0]) == {"x", "y", "index"}
    positional = Positional()
    run(positional, ((X, LENGTHS), Y))
    assert positional.given == (LENGTHS,)
    labelled = WithLabels()
    run(labelled, (X, Y))
    assert labelled.given[0] is Y
    whole = WholeObject()
    batch = Record(X, Y)
    run(whole, batch)
    assert whole.given[0] is batch
    with lrp_prune.attributing(whole, "gradient") as propagation:
        relevance = propagation.relevance(whole(batch).sum())
    torch.testing.assert_close(relevance["data.x"], X * whole.layer.weight.sum(0))
    assert batch.x is X


def test_a_forward_of_two_inputs_is_given_both_of_a_pair_which_are_no_labels_then() -> None:
    model = NamedWithLengths()
    run(model, (X, LENGTHS))
    assert model.given[0] is LENGTHS
    assert labels_of(model, (X, LENGTHS)) is None
    with pytest.raises(ValueError, match="cannot be inferred for NamedWithLengths and a batch with no labels"):
        lrp_prune.attribute(model, [(X, LENGTHS)])


@pytest.mark.parametrize(
    ("kind", "batch", "message"),
    [
        (Named, (X, torch.arange(3), Y), r"3 entries \(a tensor of shape \(3, 2\), a tensor of shape \(3,\)"),
        (NamedWithLengths, (X, LENGTHS, Y), "3 entries"),
        (Named, [X, LENGTHS, Y, Y], "4 entries"),
        (Named, {"image": X, "mask": X, "y": Y}, r"failed \(TypeError.*given the whole batch as 'x'"),
        (NamedWithLengths, {"x": X, "y": Y}, "nothing for lengths"),
        (NamedWithLengths, {"image": X, "size": X, "y": Y}, "no entry fits"),
        (NamedWithLengths, X, r"cannot be called with this batch \(a tensor of shape \(3, 2\)\): missing .*'lengths'"),
        (NamedWithLengths, (X,), "missing a required argument: 'lengths'"),
        (Open, (X, Y), "too many positional arguments"),
        (WholeMapping, (X, Y), r"failed \(TypeError.*given the whole batch as 'batch'"),
        (Unpacking, (X, Y), r"failed \(ValueError.*was given it without what was taken for labels"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(kind: type[Recorder], batch: Any, message: str) -> None:
    for call in (
        lambda: run(kind(), batch),
        lambda: lrp_prune.attribute(kind(), [batch], target="class"),
        lambda: lrp_prune.prune(kind(), [batch], method="wanda"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}") as refusal:
            call()
        assert "relevance_target(batch)" in str(refusal.value)
        assert "def relevance_target(self, batch):\n" in str(refusal.value)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch is an empty tuple"):
        run(Named(), ())


def test_the_way_out_works() -> None:
    """What the messages propose, as a method and as a function."""
    batch = (X, torch.arange(3), Y)

    class Own(Named):
        def relevance_target(self, batch: Any) -> Tensor:
            logits = self(batch[0])
            return logits.gather(1, batch[2][:, None]).sum()

    torch.manual_seed(0)
    plain = Named()
    torch.manual_seed(0)
    own = Own()
    expected = lrp_prune.attribute(plain, [(X, Y)])
    by_method = lrp_prune.attribute(own, [batch])
    by_function = lrp_prune.attribute(
        plain, [batch], lambda model, batch: model(batch[0]).gather(1, batch[2][:, None]).sum()
    )
    for relevance in (by_method, by_function):
        torch.testing.assert_close(relevance["layer.weight"], expected["layer.weight"])


def test_a_call_says_which_labels_the_forward_can_do_without() -> None:
    assert call_of(LossAlone(), (X, Y)).spare == "labels"
    assert call_of(WithLabels(), (X, Y)).spare is None


def test_one_sample_no_tokens_and_no_module_are_refused_by_name() -> None:
    model, ids = build("llama"), batch_for("llama")["input_ids"]
    row = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": ids[0]}
    for call in (lambda: lrp_prune.attribute(model, [row]), lambda: lrp_prune.explain(model, row)):
        with pytest.raises(ValueError, match=r"must be \[samples, tokens\], and of shape \(7,\) it is one sample"):
            call()
    with pytest.raises(ValueError, match=r"of shape \(1, 0\) it has no tokens"):
        lrp_prune.explain(model, {"input_ids": ids[:1, :0]})
    pipeline = SimpleNamespace(model=model)
    batch = {"input_ids": ids, "labels": ids}
    for refused in (lrp_prune.attribute, lrp_prune.prune):
        with pytest.raises(
            TypeError, match=r"got SimpleNamespace: pass the model that it holds, SimpleNamespace\.model"
        ):
            refused(pipeline, [batch])
