"""Stages of models, and what they give in their place."""

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lrp_prune
from lrp_prune.names import named_parameters
from lrp_prune.pruning import LeastSquares
from lrp_prune.pruning.compensation import compensate_
from lrp_prune.pruning.compensation.stages import Given, StageReached, Watched, leaving_after, made_of, stages_of
from tests.support.small_models import batch_for, build

STAGES = {
    "llama": ["model.layers.0", "model.layers.1"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
}


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    outside = ("embed", "head", "shared", "wte", "wpe", "classifier")
    return {
        name: value
        for name, value in named_parameters(model).items()
        if value.dim() > 1 and not any(word in name for word in outside)
    }


@pytest.mark.parametrize("name", STAGES)
def test_what_repeats_is_a_stage(name: str) -> None:
    model = build(name)
    found = stages_of(model, matrices(model))
    assert [entry for entry in found if "score" not in entry] == STAGES[name]
    inside = [id(value) for stage in found.values() for value in stage.parameters()]
    assert all(inside.count(id(value)) == 1 for value in matrices(model).values())


def test_layers_outside_of_what_repeats_are_stages_by_themselves() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "rest": nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())})
    assert list(stages_of(model, dict(model.named_parameters()))) == ["first", "rest.0.0"]
    assert list(stages_of(model, {"first.weight": model["first"].weight})) == ["first"]


class Skipping(nn.Module):
    """The last stage reads what the first gave; the middle one is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x).relu()
        second = self.layers[1](first)
        third = self.layers[2](self.layers[2](second))
        return self.layers[3](third + first)


def watched(model: nn.Module, x: Tensor) -> Watched:
    found = Watched(stages_of(model, dict(model.named_parameters())))
    with found.watching():
        model(x)
    return found


def test_a_forward_is_watched() -> None:
    found = watched(Skipping(), torch.randn(2, 3))
    assert found.order == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert dict(found.calls) == {"layers.0": 1, "layers.1": 1, "layers.2": 2, "layers.3": 1}
    assert found.needed["layers.0"] == set() and found.needed["layers.1"] == {"layers.0"}
    assert found.needed["layers.3"] == {"layers.0", "layers.2"}
    once = {name: found.needed[name] for name in ("layers.0", "layers.1")}
    assert made_of([found], ["layers.0", "layers.1", "layers.3"]) == {**once, "layers.3": {"layers.0", "layers.1"}}


def test_what_a_stage_returns_as_it_got_it_is_not_taken_for_its_own() -> None:
    class Through(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.through, self.last = nn.Linear(3, 3), Through(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            self.through(x)
            return self.last(x)

    assert watched(Model(), torch.randn(2, 3)).needed["last"] == {"first"}


def test_outputs_are_forgotten_when_nothing_more_is_made_of_them() -> None:
    model, x = Skipping(), torch.randn(2, 3)
    found = watched(model, x)
    stages = stages_of(model, dict(model.named_parameters()))
    known = Given(stages, found.needed, "cpu")
    outputs = [torch.randn(2, 3) for _ in range(3)]
    for name, output in zip(list(stages)[:3], outputs, strict=True):
        known.keep(name, [known.taken(output)])
    kept = {
        name: [bool(torch.isfinite(entry.tensor).all()) for entry in values] for name, values in known._outputs.items()
    }
    assert kept == {"layers.0": [True], "layers.1": [False], "layers.2": [True]}
    with known.standing_in(0):
        expected = model.layers[3](outputs[2] + outputs[0].relu())
        assert torch.equal(model(x), expected)
    assert "forward" not in vars(model.layers[0])
    assert not torch.equal(model(x), expected)


def test_what_is_forgotten_is_not_given_silently() -> None:
    model, x = Skipping(), torch.randn(2, 3)
    stages = stages_of(model, dict(model.named_parameters()))
    known = Given(stages, {name: set() for name in stages}, "cpu")  # as if nothing were made of anything
    for name in list(stages)[:3]:
        known.keep(name, [known.taken(torch.randn(2, 3))])
    with known.standing_in(0):
        assert bool(model(x).isnan().all())


def test_a_forward_is_left_with_the_stage_and_errors_come_through() -> None:
    model, told = Skipping(), list[Tensor]()
    with leaving_after(model.layers[1], told.append), pytest.raises(StageReached):
        model(torch.randn(2, 3))
    assert len(told) == 1 and not model.layers[1]._forward_hooks
    with leaving_after(model.layers[1], told.append), pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5))
    assert len(told) == 1


def test_a_forward_of_ones_own_is_put_back() -> None:
    model, x = Skipping(), torch.randn(2, 3)
    own = lambda x: x + 1.0  # noqa: E731  # what somebody has set on the module
    model.layers[0].forward = own
    stages = stages_of(model, dict(model.named_parameters()))
    known = Given(stages, {**{name: set() for name in stages}, "layers.1": {"layers.0"}}, "cpu")
    known.keep("layers.0", [known.taken(torch.zeros(2, 3))])
    with known.standing_in(0):
        assert not model.layers[0](x).any()
    assert vars(model.layers[0])["forward"] is own


def test_what_a_stage_gave_can_be_written_into_and_is_where_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(2, 3)
    known = Given(stages_of(model, dict(model.named_parameters())), {"0": set(), "2": {"0"}}, "cpu")
    known.keep("0", [known.taken(model[0](x))])
    with known.standing_in(0):
        assert torch.equal(model(x), model(x))
        assert model[0](x).requires_grad
    with FakeTensorMode():
        known.keep("0", [known.taken(torch.empty(2, 3, dtype=torch.int64, device="cuda"))])
        assert known._outputs["0"][0].tensor.device.type == "cpu"
        with known.standing_in(0):
            assert model[0](None).device.type == "cuda"


def test_of_what_is_forgotten_integers_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    known = Given(stages_of(model, dict(model.named_parameters())), {"0": set(), "1": set()}, "cpu")
    known.keep("0", [known.taken((torch.ones(2), torch.tensor([3, 4]), torch.tensor([False])))])
    with known.standing_in(0):
        floats, integers, flags = model[0](None)
    assert bool(floats.isnan().all()) and integers.tolist() == [3, 4] and flags.tolist() == [False]


def test_what_others_do_to_an_output_is_done_once() -> None:
    model, x = Skipping(), torch.randn(2, 3)
    model.layers[0].register_forward_hook(lambda _, __, output: output * 2)
    stages = stages_of(model, dict(model.named_parameters()))
    known = Given(stages, watched(model, x).needed, "cpu")
    outputs: list[Tensor] = []
    with leaving_after(model.layers[0], lambda output: outputs.append(known.taken(output))), suppress(StageReached):
        model(x)
    expected = model(x)
    known.keep("layers.0", outputs)
    with known.standing_in(0):
        assert torch.equal(model(x), expected)


def test_t5_needs_the_first_blocks_positions_everywhere() -> None:
    model, batch = build("t5"), batch_for("t5")
    found = Watched(stages_of(model, matrices(model)))
    with found.watching():
        model(**batch)
    assert "encoder.block.1" in found.needed["decoder.block.0"] & found.needed["decoder.block.1"]


class Attending(nn.Module):
    """An attention of torch, whose output projection is not called, and a layer whose weight is used from around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.holder, self.last = nn.ModuleDict({"layer": nn.Linear(16, 16)}), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        layer = self.holder["layer"]
        result: Tensor = self.last(nn.functional.linear(hidden, layer.weight, layer.bias).relu().mean(1))
        return result


@pytest.mark.parametrize("pattern", ["attention.out_proj.weight", "holder.layer.weight", "*"])
def test_weights_of_modules_that_are_not_called_belong_to_the_module_around(pattern: str) -> None:
    model, batches = Attending(), [(torch.randn(64, 5, 6), torch.arange(64) % 3) for _ in range(2)]
    masks = lrp_prune.prune(Attending(), batches, 0.5, "wanda", include=[pattern], recalibrate=False, progress=False)
    found = compensate_(model, masks, batches, LeastSquares())
    assert not found.left_out and set(found.errors) == set(masks)
    assert all(after < before for before, after in found.errors.values())
    done = lrp_prune.reconstruct(Attending(), masks, batches, steps=2, progress=False)
    assert done.errors
