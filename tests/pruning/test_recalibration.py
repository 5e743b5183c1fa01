"""Recalibration: channels are brought back to the dense model's, by what least squares say and only as far as it helps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Masks
from lrp_prune.pruning import scorer
from lrp_prune.pruning.moments import PairedMoments
from lrp_prune.pruning.recalibration import recalibrate
from tests.support.recalibrated import MODELS, applied, masks_of
from tests.support.small_models import batch_for, build


def test_moments_are_those_of_all_batches_together() -> None:
    generator = torch.Generator().manual_seed(0)
    pruned, dense = (torch.randn(100, 3, generator=generator).double() * 3 + 1000 for _ in range(2))
    parts, whole, other = PairedMoments(3), PairedMoments(3), PairedMoments(3)
    whole.add(pruned, dense)
    for start, stop in ((0, 7), (7, 7), (7, 60)):
        parts.add(pruned[start:stop], dense[start:stop])
    other.add(pruned[60:], dense[60:])
    parts.merge([other, PairedMoments(3)])
    for strength, shifted in ((1.0, True), (1.0, False), (0.5, True)):
        for mine, theirs in zip(parts.fit(strength, shifted), whole.fit(strength, shifted), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-6)
    for mine, theirs in zip(parts.change(), whole.change(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_fit_is_the_least_squares_of_a_channel() -> None:
    generator = torch.Generator().manual_seed(1)
    pruned = torch.randn(50, 2, generator=generator).double() + 2
    dense = pruned * torch.tensor([3.0, 0.5]) + torch.tensor([1.0, -1.0]) + torch.randn(50, 2, generator=generator)
    moments = PairedMoments(2)
    moments.add(pruned, dense)
    scale, shift = moments.fit(1.0, shifted=True)
    for channel in range(2):
        design = torch.stack([pruned[:, channel], torch.ones(50)], 1)
        expected = torch.linalg.lstsq(design.double(), dense[:, channel, None].double()).solution.flatten()
        torch.testing.assert_close(torch.stack([scale[channel], shift[channel]]), expected, rtol=1e-6, atol=1e-6)
    alone, none = moments.fit(1.0, shifted=False)
    torch.testing.assert_close(alone, (pruned * dense).sum(0).double() / (pruned**2).sum(0).double())
    assert not none.any()
    half, _ = moments.fit(0.5, shifted=True)
    torch.testing.assert_close(half, 1 + (scale - 1) / 2)


def test_a_channel_without_weights_gets_the_dense_mean() -> None:
    moments = PairedMoments(1)
    moments.add(torch.full((10, 1), 0.5), torch.arange(10.0)[:, None])
    scale, shift = moments.fit(1.0, shifted=True)
    assert scale.item() == 1 and shift.item() == pytest.approx(4.0)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_closer_to_the_dense_ones_and_the_forecast_is_right(name: str) -> None:
    """What was judged with masks in the products is what the model gives once they are applied."""
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    masks = masks_of(model, 0.6)
    found = recalibrate(model, masks, batches, "regression")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert found.strength > 0
    plain, mended = copy.deepcopy(model), applied(model, masks, found)
    masks.apply_(plain)
    fresh = [torch.randn_like(batch[0]) for batch in batches]

    def off(sparse: nn.Module, inputs: list[Tensor]) -> float:
        return sum(float((sparse(x) - model(x)).square().mean() / model(x).var(correction=0)) for x in inputs) / len(
            inputs
        )

    with torch.no_grad():
        assert off(mended, fresh) < off(plain, fresh)
        judged = [batches[-1][0]]
        assert off(plain, judged) == pytest.approx(found.divergences[0.0], rel=1e-3)
        assert off(mended, judged) == pytest.approx(found.divergences[found.strength], rel=1e-3)
    assert all(not mended.get_parameter(key)[~mask].any() for key, mask in masks.items())


def test_nothing_moves_where_nothing_is_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).train()
    for _ in range(3):
        model(torch.randn(16, 3, 6, 6))
    batches = [(torch.randn(16, 3, 6, 6),) for _ in range(2)]
    masks = Masks({"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)})
    found = recalibrate(model, masks, batches, "class", strengths=(1.0,))
    assert found.divergences[1.0] < 1e-10
    same = applied(model, masks, found)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert model.training


def test_statistics_of_batch_normalizations_move_by_what_has_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    data = torch.randn(64, 3, 6, 6) + 1
    for _ in range(200):
        model.train()(data)
    model.eval()
    masks = lrp_prune.select(scorer("magnitude", model, include=["0"]).compute(), 0.5, lrp_prune.Scope(floor=0))
    found = recalibrate(model, masks, [(data,)], "regression", strengths=(1.0,))
    assert found.strength == 1
    sparse = applied(model, masks, found)
    with torch.no_grad():
        x = sparse[0](data)
    torch.testing.assert_close(sparse[1].running_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sparse[1].running_var, x.var((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_what_does_not_help_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are nonsense make outputs worse on batches that they were not fitted to."""
    monkeypatch.setattr(
        PairedMoments, "fit", lambda self, strength, shifted: (self._means[0] * 0 + 4, self._means[0] * 0)
    )
    torch.manual_seed(0)
    model, batches = MODELS["without biases"]()
    masks = masks_of(model, 0.3)
    found = recalibrate(model, masks, batches, "regression")
    assert found.strength == 0 and not found.scales
    assert min(found.divergences, key=found.divergences.__getitem__) == 0.0


def test_outputs_that_the_model_writes_into_count_as_they_came() -> None:
    """Those of products, and what batch normalizations get."""

    def made(in_place: bool) -> nn.Module:
        torch.manual_seed(0)

        class Adding(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(16, 8), nn.BatchNorm1d(8)

            def forward(self, images: Tensor) -> Tensor:
                x = F.relu(self.first(images), inplace=in_place)
                x = F.silu(self.second(x.flatten(2)).mean(1), inplace=in_place)
                y = self.norm(x)
                result: Tensor = x.add_(y) if in_place else x + y
                return result

        return Adding().eval()

    batches = [(torch.randn(32, 3, 6, 6),) for _ in range(4)]
    masks = masks_of(made(True), 0.6)
    one, other = (recalibrate(made(entry), masks, batches, "regression", strengths=(1.0,)) for entry in (True, False))
    assert one.divergences == pytest.approx(other.divergences) and len(one.scales) == 2
    for place, scale in one.scales.items():
        torch.testing.assert_close(scale, other.scales[place])
    torch.testing.assert_close(one.normalizations, other.normalizations)


class Looking(nn.Module):
    """Weights that are used, but in no product: rows that are looked up, and a gate for each channel and channel."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gates, self.head = nn.Embedding(20, 8), nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head((self.table(ids) * self.gates).relu().mean(1))
        return result


def test_weights_that_are_in_no_product_are_pruned_in_the_forecast() -> None:
    torch.manual_seed(0)
    model = Looking().eval()
    masks = lrp_prune.select(scorer("random", model, include=["table", "gates", "head"]).compute(), 0.5, scope="layer")
    batches = [torch.randint(20, (32, 4)) for _ in range(4)]
    found = recalibrate(model, masks, batches, "regression", strengths=(1.0,))
    assert found.strength == 1 and found.parameters == ["head.weight", "head.bias"]
    plain = copy.deepcopy(model)
    masks.apply_(plain)
    with torch.no_grad():
        for strength, sparse in ((0.0, plain), (1.0, applied(model, masks, found))):
            dense = model(batches[-1])
            off = float((sparse(batches[-1]) - dense).square().mean() / dense.var(correction=0))
            assert off == pytest.approx(found.divergences[strength], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_language_models(name: str) -> None:
    """Views of fused and transposed weights, biases or none, shared embeddings; experts."""
    model, batch = build(name).eval(), {key: value.repeat(16, 1) for key, value in batch_for(name).items()}
    masks = masks_of(model, 0.5)
    found = recalibrate(model, masks, [batch], "next_token", strengths=(1.0,))
    assert found.divergences[1.0] < found.divergences[0.0] or found.strength == 0
    assert any("experts" in name for name in found.parameters) == (name == "mixtral" and found.strength > 0)
    sparse = applied(model, masks, found)
    assert all(not sparse.get_parameter(key)[~mask].any() for key, mask in masks.items())


class Tied(nn.Module):
    """Weights that are used a second time: by another layer, transposed, or as an embedding; and one with a buffer added."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second, self.third = how, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Embedding(8, 8)
        self.register_buffer("shift", torch.linspace(-2, 2, 8))
        if how == "another bias":
            self.second.weight = self.first.weight
        elif how == "one bias":
            self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if self.how == "transposed":
            hidden = F.linear(hidden, self.first.weight.T, self.second.bias)
        elif self.how == "embedding":
            hidden = F.linear(hidden, self.table.weight) + self.table(x.argmax(-1))
        elif self.how == "a buffer is added":
            hidden = F.linear(hidden, self.second.weight, self.shift)
        else:
            hidden = self.second(hidden)
        result: Tensor = self.third(hidden.relu())
        return result


@pytest.mark.parametrize(
    ("how", "left_alone"),
    [
        ("another bias", {"first.weight"}),
        ("transposed", {"first.weight"}),
        ("one bias", {"first.weight", "second.weight"}),
        ("embedding", {"table.weight"}),
        ("a buffer is added", {"second.weight"}),
        ("nothing", set()),
    ],
)
def test_what_something_else_uses_as_well_keeps_its_scale(how: str, left_alone: set[str]) -> None:
    torch.manual_seed(0)
    model = Tied(how).eval()
    batches = [(torch.randn(64, 8),) for _ in range(4)]
    names = ["first", "third"] + ["second"] * (how != "another bias") + ["table"] * (how == "embedding")
    if how in ("transposed", "embedding"):
        names.remove("second")
    masks = lrp_prune.select(scorer("random", model, include=names).compute(), 0.4, scope="layer")
    found = recalibrate(model, masks, batches, "regression", strengths=(1.0,))
    assert found.strength == 1
    scaled = {place.name for place in found.scales}
    assert scaled == {f"{name}.weight" for name in names} - left_alone == set(masks) - set(found.left_out)
    reasons = {name: "no product" if how == "a buffer is added" else "something else" for name in left_alone}
    assert all(reasons[name] in reason for name, reason in found.left_out.items())
    assert all(name in str(found) for name in left_alone)
    with torch.no_grad():
        mended, dense = applied(model, masks, found)(batches[-1][0]), model(batches[-1][0])
    off = float((mended - dense).square().mean() / dense.var(correction=0))
    assert off == pytest.approx(found.divergences[1.0], rel=1e-3)


def test_parameters_that_are_parts_of_one_memory() -> None:
    """As those are that were flattened: their entries do not begin where the memory does."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Itself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            other = x.roll(1, 1)  # so that queries are a part of the projection, and keys with values another
            result: Tensor = self.attention(x, other, other, need_weights=False)[0]
            return result

    plain = Itself().eval()
    flat = copy.deepcopy(plain)
    memory = torch.cat([torch.zeros(5), *(parameter.detach().reshape(-1) for parameter in flat.parameters())])
    start = 5
    for parameter in flat.parameters():
        parameter.data = memory[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    batches, masks = [(torch.randn(16, 5, 8),)], masks_of(plain, 0.5)
    results = []
    for entry in (plain, flat):
        found = recalibrate(entry, masks, batches, "regression", strengths=(1.0,))
        assert found.strength == 1 and len(found.scales) > 1
        masks.apply_(entry)
        found.apply_(entry)
        results.append(entry.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)
