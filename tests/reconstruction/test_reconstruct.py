"""Blocks learn what they gave: by their own outputs, under the masks, with nothing lost on the way."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares
from lrp_prune.reconstruction.stage import StageTraining, by_size
from tests.support.small_models import build, padded_text


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(12, 24), nn.Linear(24, 12), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.drop(self.down(torch.tanh(self.up(x))))
        return result


def dense_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(12, 4)).train()
    model[1].up.requires_grad_(False)
    return model


def data(number: int = 10, seed: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    inputs = [torch.randn(16, 6, generator=generator) @ mixing for _ in range(number)]
    return [(x, x.argmax(1) % 4) for x in inputs]


def masks_of(model: nn.Module, sparsity: float = 0.6) -> lrp_prune.Masks:
    return lrp_prune.prune(
        copy.deepcopy(model), sparsity=sparsity, method="magnitude", scope="layer", recalibrate=False
    )


def distance(model: nn.Module, dense: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(model.eval()(x), dense.eval()(x)) for x, _ in batches]
    return float(torch.cat([(one - other).square().flatten() for one, other in pairs]).mean())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: entry.detach().clone() for name, entry in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("compensation", [None, "exact"])
def test_reported_errors_are_those_of_the_blocks_on_what_is_held_out(compensation: str | None) -> None:
    """Computed from the two whole models, and better than masks alone on data that nothing has seen."""
    dense, batches = dense_model(), data()
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = masks_of(dense)
    done = lrp_prune.reconstruct(model, masks, batches, steps=80, compensation=compensation, progress=False)
    assert list(done.errors) == ["0", "1", "2", "3"] and not done.left_out
    with torch.no_grad():
        for index, (before, after) in enumerate(done.errors.values()):
            errors = []
            for x, _ in batches[-2:]:
                found, expected = (entry[: index + 1].eval()(x) for entry in (model, dense))
                errors.append((found - expected).square().mean() / expected.var(unbiased=False))
            assert after == pytest.approx(float(sum(errors) / 2), rel=1e-3) and after <= before
    masks.apply_(other)
    assert distance(model, dense, data(4, 7)) < 0.8 * distance(other, dense, data(4, 7))


@pytest.mark.slow
def test_zeros_stay_and_nothing_else_is_left_behind() -> None:
    model, batches = dense_model(), data()
    masks, state = masks_of(model), torch.get_rng_state()
    used: list[int] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        entries = list(parameters)
        used.append(sum(entry.numel() for entry in entries))
        return torch.optim.SGD(entries, lr=0.05, momentum=0.9, weight_decay=0.01)

    before = {name: entry.requires_grad for name, entry in model.named_parameters()}
    lrp_prune.reconstruct(model, masks, batches, steps=6, optimizer=optimizer, progress=False)
    assert used == [12 * 24 * 2 + 36] * 3 + [52]
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any() and model.get_parameter(name)[mask].all()
    assert {name: entry.requires_grad for name, entry in model.named_parameters()} == before
    assert all(entry.grad is None for entry in model.parameters()) and all(entry.training for entry in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    for entry in model.modules():
        assert "forward" not in vars(entry) and not entry._forward_hooks and not entry._forward_pre_hooks


@pytest.mark.slow
def test_blocks_that_training_does_not_help_are_as_before_it() -> None:
    model, other, batches = dense_model(), dense_model(), data()
    masks = masks_of(model)
    done = lrp_prune.reconstruct(
        model, masks, batches, steps=5, optimizer=lambda entries: torch.optim.SGD(entries, lr=1e3), progress=False
    )
    assert done.taken_back == ["0", "1", "2", "3"] and "taken back" in str(done)
    assert all(before == after for before, after in done.errors.values())
    lrp_prune.reconstruct(
        other, masks, batches, steps=1, optimizer=lambda entries: torch.optim.SGD(entries, lr=0.0), progress=False
    )
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_an_interruption_costs_the_block_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, masks = data(), masks_of(dense_model())
    fit, made = StageTraining.on_train_start, list[int]()

    def counted(training: StageTraining) -> None:
        made.append(1)
        if len(made) == 3:
            raise KeyError("cut off")
        fit(training)

    def run(model: nn.Module, folder: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(5)
        lrp_prune.reconstruct(model, masks, batches, steps=6, folder=folder, progress=False)
        return weights(model)

    whole = run(dense_model(), None)
    monkeypatch.setattr(StageTraining, "on_train_start", counted)
    model = dense_model()
    with pytest.raises(KeyError, match="cut off"):
        run(model, tmp_path)
    assert all(torch.equal(value, weights(dense_model())[name]) for name, value in weights(model).items())
    assert all(entry.requires_grad == ("1.up" not in name) for name, entry in model.named_parameters())
    found = run(model, tmp_path)
    assert len(made) == 3 + 2  # two blocks were done
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    other = dense_model()
    with torch.no_grad():
        other[0].up.bias += 1
    with pytest.raises(ValueError, match="is of another model, of other masks or of other arguments"):
        run(other, tmp_path)
    assert torch.equal(other[0].up.bias, dense_model()[0].up.bias + 1)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["compensation", "damping", "trainer", "optimizer", "batches"])
def test_a_folder_of_other_arguments_is_refused(tmp_path: Path, changed: str) -> None:
    batches = data()
    masks = masks_of(dense_model())
    options: dict[str, Any] = {
        "compensation": {"compensation": "obs"},
        "damping": {"compensation": LeastSquares(damping=0.3)},
        "trainer": {"trainer": {"gradient_clip_val": 1.0}},
        "optimizer": {"optimizer": torch.optim.SGD},
    }.get(changed, {})
    lrp_prune.reconstruct(dense_model(), masks, batches, steps=2, folder=tmp_path, progress=False)
    again = dense_model()
    lrp_prune.reconstruct(again, masks, batches, steps=2, folder=tmp_path, progress=False)
    other = batches[1:] + batches[:1] if changed == "batches" else batches
    with pytest.raises(ValueError, match="of other arguments"):
        lrp_prune.reconstruct(dense_model(), masks, other, steps=2, folder=tmp_path, progress=False, **options)


def test_gradients_and_what_is_drawn_elsewhere_play_no_part() -> None:
    batches, found = data(), []
    for seed in (1, 2):
        model = dense_model()
        masks = masks_of(model)
        gradients = {}
        for name, entry in model.named_parameters():
            entry.grad = gradients[name] = torch.full_like(entry, seed)
        torch.manual_seed(seed)
        lrp_prune.reconstruct(model, masks, batches, steps=3, progress=False)
        assert all(
            entry.grad is gradients[name] and bool((entry.grad == seed).all())
            for name, entry in model.named_parameters()
        )
        found.append(weights(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of it"):
        lrp_prune.reconstruct(dense_model(), masks, batches, steps=1, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trainer": {"precision": "bf16-mixed"}, "dense": 0, "compensation": None}])
def test_language_models(options: dict[str, Any]) -> None:
    """Blocks with arguments by name; embeddings and what is tied to them stay."""
    dense = build("llama").eval()
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(2, 30, (2, 12), generator=generator)} for _ in range(10)]
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = masks_of(dense)
    masks.apply_(plain)
    done = lrp_prune.reconstruct(model, masks, batches, steps=30, progress=False, **options)
    assert list(done.errors) == ["model.layers.0", "model.layers.1"]
    assert all(after <= before for before, after in done.errors.values())
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    if "compensation" in options:  # by least squares there is little left to learn here
        trained, before = (entry.model.layers[0].input_layernorm.weight for entry in (model, dense))
        assert not torch.equal(trained, before)
    with torch.no_grad():
        ids = torch.randint(2, 30, (8, 12), generator=generator)
        near, far = (
            (entry(input_ids=ids).logits - dense(input_ids=ids).logits).square().mean() for entry in (model, plain)
        )
    assert near < far
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_steps_are_in_proportion_to_each_tensor() -> None:
    large, small, none = (nn.Parameter(scale * torch.randn(100)) for scale in (10.0, 0.1, 0.0))
    rates = [group["lr"] for group in by_size([large, small, none], rate=0.003).param_groups]
    assert rates == pytest.approx([0.03 * float(large.square().mean().sqrt()) / 10, rates[1], 3e-6])
    assert rates[1] == pytest.approx(0.003 * float(small.square().mean().sqrt()))


def test_what_cannot_be_done_is_said_before_anything_changes() -> None:
    model, masks = dense_model(), masks_of(dense_model())
    before = weights(model)
    for options, message in (
        ({"batches": data(1)}, "pass two or more"),
        ({"steps": 0}, "steps"),
        ({"dense": 0.5}, "dense must be 0 or 1"),
        ({"compensation": LeastSquares(dense=0.0)}, "let both be 0, or neither"),
        ({"compensation": "best"}, "compensation must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            lrp_prune.reconstruct(model, masks, **{"batches": data(), "progress": False, **options})
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train its own model, and copies would no longer be copies."""
    model = dense_model()
    masks, before = masks_of(model), weights(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="this is one of 2, each of which would train a model of its own"):
        lrp_prune.reconstruct(model, masks, data(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_padding_is_not_learned() -> None:
    dense = build("gpt2")
    masks = masks_of(dense)
    found, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    for model, padding in ((found, 16), (expected, 0)):
        lrp_prune.reconstruct(model, masks, [padded_text(padding)] * 2, steps=2, compensation=None, progress=False)
    for name, entry in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), entry, rtol=1e-4, atol=1e-5)
