"""Explanations: what they hold, of which samples and inputs, and what is done with them."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.targets import LogitDifference
from lrp_prune.visualization import Explanation, Pixels, Tokens
from lrp_prune.visualization.subwords import labelled, words
from tests.support.small_models import Counting, batch_for, build, forward
from tests.support.words import of_bytes, of_pieces


def test_relevance_is_that_of_the_engine_for_the_predicted_logit() -> None:
    model, batch = build("llama"), batch_for("llama")
    found = lrp_prune.explain(model, batch)
    with lrp_prune.attributing(model) as propagation:
        logits = forward(model, batch)
        relevance = propagation.relevance(logits.amax(-1).sum())["model.embed_tokens"].sum(-1)
    torch.testing.assert_close(found.inputs["input_ids"].relevance, relevance.detach())
    torch.testing.assert_close(found.values, logits.amax(-1).detach())
    assert found.inputs["input_ids"].labels[0] == tuple(map(str, batch["input_ids"][0].tolist()))
    assert str(logits.argmax(-1)[0].item()) in found.target


def test_what_no_label_says_is_no_explanation() -> None:
    model, ids = build("llama"), batch_for("llama")["input_ids"]
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(ValueError, match="a batch has no labelled, unpadded token"):
        lrp_prune.explain(model, batch, target="next_token")
    (problem,) = lrp_prune.audit(model, batch, target="next_token").problems
    assert "a batch has no labelled, unpadded token" in str(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "vit", "resnet"])
def test_with_all_that_is_elsewhere_it_conserves(name: str) -> None:
    """Under CP-LRP, of models without biases: nothing that is relevant is left out, and nothing twice."""
    model, batch = build(name, biases=False), batch_for(name)
    found = lrp_prune.explain(model, batch, target=1, composite="cp_lrp")
    total = sum(float(part.relevance.sum()) for part in found.inputs.values()) + sum(found.elsewhere.values())
    assert total == pytest.approx(float(found.values.sum()), rel=1e-3, abs=1e-4)


def test_both_sides_of_an_encoder_decoder_are_there_also_where_they_read_the_same() -> None:
    model, batch = build("t5"), batch_for("t5")
    found = lrp_prune.explain(model, batch, target=5)
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(forward(model, batch)[:, 5].sum())
    for argument, root in (("input_ids", "encoder.embed_tokens"), ("decoder_input_ids", "decoder.embed_tokens")):
        torch.testing.assert_close(found.inputs[argument].relevance, relevance[root].sum(-1).detach())


def test_an_encoder_decoder_without_decoder_tokens_is_explained_at_the_first() -> None:
    model, ids = build("bart"), batch_for("bart")["input_ids"]
    found = lrp_prune.explain(model, {"input_ids": ids})
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    same = lrp_prune.explain(model, {"input_ids": ids, "decoder_input_ids": start})
    assert str(found) == str(same) and found.inputs["decoder_input_ids"].labels[0] == ("0",)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="needs decoder_input_ids or labels"):
        lrp_prune.explain(model, {"input_ids": ids})


def test_padding_is_not_shown_and_changes_nothing() -> None:
    model, ids = build("llama"), batch_for("llama")["input_ids"]
    alone = lrp_prune.explain(model, {"input_ids": ids[:1, :4]}, target=3)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = torch.cat([ids[:1, :3] * 0, ids[:1, :4]], 1)
    both = lrp_prune.explain(model, {"input_ids": torch.cat([padded, ids[1:]]), "attention_mask": mask}, target=3)
    first = both[0].inputs["input_ids"]
    assert first.labels == alone.inputs["input_ids"].labels and first.positions == ((3, 4, 5, 6),)
    values = [value for _, value in first.of(0)]
    assert values == pytest.approx(alone.inputs["input_ids"].relevance[0].tolist(), rel=1e-3, abs=1e-5)


def test_samples_are_taken_one_by_one() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    found = lrp_prune.explain(model, x, target=[0, 1, 0, 1])
    assert len(found) == 4 and [len(each) for each in found] == [1] * 4
    expected = model.weight.detach()[[0, 1, 0, 1]] * x
    torch.testing.assert_close(found.inputs["input"].relevance, expected)
    torch.testing.assert_close(found[-1].inputs["input"].relevance, expected[3:])
    assert found[1].values.tolist() == pytest.approx([model(x)[1, 1].item()])
    with pytest.raises(IndexError, match="there are 4 samples, got 4"):
        found[4]


def test_what_two_targets_differ_in_is_the_explanation_of_their_difference() -> None:
    model, batch = build("llama"), batch_for("llama")
    difference = lrp_prune.explain(model, batch, target=5) - lrp_prune.explain(model, batch, target=7)
    directly = lrp_prune.explain(model, batch, target=LogitDifference(5, 7))
    torch.testing.assert_close(
        difference.inputs["input_ids"].relevance, directly.inputs["input_ids"].relevance, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(difference.values, directly.values, rtol=1e-3, atol=1e-5)
    assert difference.target == "the logit of 5 minus the logit of 7"


def test_explanations_of_other_inputs_or_rules_are_not_subtracted() -> None:
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    first = lrp_prune.explain(model, x, target=0)
    with pytest.raises(ValueError, match="other rules"):
        first - lrp_prune.explain(model, x, target=0, composite="cp_lrp")
    with pytest.raises(ValueError, match="other inputs"):
        first - lrp_prune.explain(model, torch.ones(2, 3), target=0)


def test_images_and_steps_in_time_and_features() -> None:
    image = torch.rand(2, 3, 16, 16)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    part = lrp_prune.explain(network, image, composite="epsilon_gamma").inputs["input"]
    assert isinstance(part, Pixels) and part.heat.shape == (2, 16, 16) and torch.equal(part.pixels, image)
    image += 1  # as a loader may write the next batch into it
    assert torch.equal(part.pixels + 1, image)
    assert part.images().min() == 0 and part.images().max() == 1 and part.images().shape == (2, 16, 16, 3)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    steps = lrp_prune.explain(Recurrent(), torch.randn(2, 5, 3)).inputs["x"]
    assert isinstance(steps, Tokens) and steps.kind == "steps" and steps.labels[1] == ("0", "1", "2", "3", "4")
    named = lrp_prune.explain(nn.Linear(2, 2), torch.ones(1, 2), features=["age", "size"]).inputs["input"]
    assert isinstance(named, Tokens) and named.kind == "features" and named.labels == (("age", "size"),)
    with pytest.raises(ValueError, match="features has 3 names, and 'input' has 2 features"):
        lrp_prune.explain(nn.Linear(2, 2), torch.ones(1, 2), features=["a", "b", "c"])


def test_a_target_of_ones_own_and_a_module_with_its_own() -> None:
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    found = lrp_prune.explain(model, x, target=lambda model, batch: model(batch)[:, 1].sum())
    torch.testing.assert_close(
        found.inputs["input"].relevance, lrp_prune.explain(model, x, 1).inputs["input"].relevance
    )
    assert found.values.shape == (1,) and bool(torch.isnan(found[0].values).all())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

        def relevance_target(self, batch: Any) -> Tensor:
            return 3 * self(batch)[:, 0].sum()

    own = Own()
    torch.testing.assert_close(
        lrp_prune.explain(own, x).inputs["x"].relevance, 3 * x * own.layer.weight[0].detach(), rtol=1e-4, atol=1e-6
    )


def test_nothing_of_the_model_changes() -> None:
    model, batch = build("bert").train(), batch_for("bert")
    state = torch.get_rng_state()
    lrp_prune.explain(model, batch)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for name, options in (("t5", {"latent": ["encoder.block.*"]}), ("vit", {})):
        found = lrp_prune.explain(build(name), batch_for(name), target=1, **options)
        found.save(tmp_path / name)
        again = Explanation.load(tmp_path / name)
        assert str(again) == str(found) and again.html() == found.html()
        assert again.elsewhere == found.elsewhere and again.layers.keys() == found.layers.keys()
        assert all(torch.equal(again.layers[key], values) for key, values in found.layers.items())
    lrp_prune.Masks({"w": torch.ones(2, dtype=torch.bool)}).save(tmp_path / "masks")
    with pytest.raises(ValueError, match=r"expected 'lrp_prune.explanation'"):
        Explanation.load(tmp_path / "masks")


def test_texts_are_read_with_a_tokenizer_and_pieces_joined() -> None:
    model, tokenizer = build("bert"), of_pieces()
    found = lrp_prune.explain(model, ["the unlikely end", "the end ."], target=1, tokenizer=tokenizer)
    part = found.inputs["input_ids"]
    assert isinstance(part, Tokens)
    assert part.labels == ((" the", " un", "like", "ly", " end"), (" the", " end", " ."))
    joined = found.joined().inputs["input_ids"]
    assert isinstance(joined, Tokens) and joined.labels[0] == (" the", " unlike" + "ly", " end")
    pieces, together = [value for _, value in part.of(0)], [value for _, value in joined.of(0)]
    assert together == pytest.approx([pieces[0], sum(pieces[1:4]), pieces[4]])
    assert found.target == "the logit of 1"  # a class, and no token
    model.config.id2label = {0: "bad", 1: "good"}
    assert lrp_prune.explain(model, "the end", target=1, tokenizer=tokenizer).target == "the logit of good"
    assert lrp_prune.explain(model, batch_for("bert"), target=[1, 1]).target == "the logit of good"  # which is both's
    spoken = lrp_prune.explain(build("llama"), "the end", target=6, tokenizer=tokenizer)
    assert spoken.target == "the logit of 'end'"
    with pytest.raises(ValueError, match="texts need tokenizer="):
        lrp_prune.explain(model, "the end")
    with pytest.raises(ValueError, match="with a pad_token"):
        lrp_prune.explain(model, ["the", "the"], tokenizer=of_bytes())


def test_pieces_of_bytes_begin_with_their_blank() -> None:
    tokenizer = of_bytes()
    ids = tokenizer("<s>hely the.\nly 東é").input_ids
    texts, begins = labelled(ids, tokenizer)
    assert "".join(texts) == "<s>hely the.\nly 東é"
    joined = ["".join(texts[place] for place in group) for group in words(texts, begins)]
    assert joined == ["<s>", "hely", " the", ".", "\n", "ly", " ", "東é"]
    assert "" in texts  # the other bytes of a letter


def test_values_that_are_called_the_same_are_not_taken_for_the_same(tmp_path: Path) -> None:
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    first, other = (lrp_prune.explain(model, values, target=0) for values in (x, x + 1))
    with pytest.raises(ValueError, match="other inputs"):
        first - other
    with pytest.raises(ValueError, match="other inputs"):
        first[0] - first[1]
    first.save(tmp_path / "first")
    with pytest.raises(ValueError, match="other inputs"):
        Explanation.load(tmp_path / "first") - other
    assert not float((Explanation.load(tmp_path / "first") - first).values.abs().sum())


class Several(NamedTuple):
    hidden: Tensor
    other: Tensor


class ReturnsSeveral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Several:
        return Several(self.layer(x), x)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = ReturnsSeveral(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).hidden)


def test_layers_that_return_several_by_name_are_followed_and_those_that_cannot_be_are_told() -> None:
    model, x = Named(), torch.randn(2, 3)
    found = lrp_prune.explain(model, x, target=1, latent=["inner"])
    expected = model.inner.layer(x) * model.head.weight[1]
    torch.testing.assert_close(found.layers["inner"], expected.detach())
    with pytest.raises(ValueError, match=r"latent pattern 'inner.idle' matches no module that has relevance"):
        lrp_prune.explain(model, x, target=1, latent=["inner", "inner.idle"])


def test_a_batch_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch has no samples"):
        lrp_prune.explain(nn.Linear(3, 2), torch.ones(0, 3))


@pytest.mark.parametrize("answer", [True, torch.tensor([1.7, 0.2]), []])
def test_answers_are_integers(answer: Any) -> None:
    with pytest.raises(ValueError, match="answers must be ids of classes or tokens, integers"):
        lrp_prune.explain(nn.Linear(3, 2), torch.ones(2, 3), target=answer)


class WithoutMask(nn.Module):
    """A sum over all embeddings, those of padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).sum(1))


def test_padding_has_no_relevance_also_where_the_model_looks_at_it() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = {"input_ids": torch.arange(1, 6).expand(2, 5), "attention_mask": mask}
    part = lrp_prune.explain(WithoutMask(), batch, target=1).inputs["input_ids"]
    assert not part.relevance[0, :2].any() and bool(part.relevance[1].all())
    assert part.labels == (("3", "4", "5"), ("1", "2", "3", "4", "5"))


def test_what_is_of_all_samples_is_none_of_ones_and_colours_are_of_all_inputs() -> None:
    found = lrp_prune.explain(build("vit"), batch_for("vit"), target=1)
    assert found.elsewhere and not found[0].elsewhere and found[0][0].values.tolist() == found.values[:1].tolist()
    parts = {
        name: Tokens(torch.tensor([[value]]), (("a",),), ((0,),), ((True,),))
        for name, value in (("x", 1.0), ("y", -3.0))
    }
    assert Explanation(parts, torch.ones(1), "a", "b").largest(0) == 3.0


def test_tokens_that_are_looked_up_twice_have_the_relevance_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2, bias=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head((self.one(input_ids) + self.two(input_ids)).sum(1))

    found = lrp_prune.explain(Twice(), {"input_ids": torch.arange(5).expand(2, 5)}, target=1)
    torch.testing.assert_close(found.inputs["input_ids"].relevance.sum(1), found.values)


@pytest.mark.parametrize("look", [lrp_prune.explain, lrp_prune.audit])
def test_buffers_that_a_forward_writes_are_as_they_were(look: Any) -> None:
    model = Counting()
    look(model, torch.randn(5, 6))
    assert not model.runs.any()


def test_a_value_that_is_known_of_all_samples_only_is_not_said_of_one() -> None:
    explanation = lrp_prune.explain(nn.Linear(3, 2), torch.randn(4, 3), target=lambda model, batch: model(batch).sum())
    assert [explanation.value_of(sample) for sample in range(4)] == [None] * 4
    assert "nan" not in str(explanation) and "nan" not in str(explanation[1]) and "nan" not in explanation[1].html()
