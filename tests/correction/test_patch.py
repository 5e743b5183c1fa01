"""Patches: bit-exact round trips, refusal of what they were not made for, and combination."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lrp_prune.correction import Entries, Patch
from tests.support.patches import DOWN, UP, some_patch, unchanged, weights
from tests.support.small_models import build


class Wrapped(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model


def test_apply_removes_exactly_the_entries_and_revert_is_bit_equal() -> None:
    model = build("llama")
    before = weights(model)
    patch = some_patch(model)
    patch.apply_(model)
    for name, tensor in model.state_dict().items():
        expected = before[name].clone()
        if name in patch:
            expected.view(-1)[patch[name].positions] = 0.0
        assert torch.equal(tensor, expected), name
    assert patch.strength_in(model) == 1.0
    patch.revert_(model)
    assert unchanged(model, before)
    assert patch.strength_in(model) == 0.0


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strength_scales_in_the_models_type_and_reverts(strength: float, dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    before = weights(model)
    patch = some_patch(model)
    patch.apply_(model, strength)
    for name in patch:
        positions = patch[name].positions
        expected = (before[name].view(-1)[positions].double() * (1 - strength)).to(dtype)
        assert torch.equal(model.get_parameter(name).view(-1)[positions], expected)
    assert patch.strength_in(model) == pytest.approx(strength, abs=0.01)
    patch.revert_(model)
    assert unchanged(model, before)


def test_special_values_come_back_bit_by_bit() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[-0.0, float("inf"), float("nan"), 1e-45]]))
    before = model.weight.detach().clone().view(torch.int32)
    patch = Patch.from_positions(model, {"weight": torch.arange(4)})
    patch.apply_(model)
    assert model.weight.tolist() == [[0.0] * 4]
    patch.revert_(model)
    assert torch.equal(model.weight.detach().view(torch.int32), before)


@pytest.mark.slow
def test_a_round_trip_through_a_file_and_a_new_process(tmp_path: Path) -> None:
    model = build("llama")
    patch = some_patch(model, behaviour="repetition", references={"undesired": ["a", "b"]})
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    assert path.stat().st_size < 4096
    code = f"""
import sys, torch
sys.path.append({str(Path(__file__).parents[2])!r})
from tests.support.small_models import build
from lrp_prune.correction import Patch
model = build("llama")
before = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
patch = Patch.load({str(path)!r})
patch.apply_(model)
removed = sum(int((tensor != before[name]).sum()) for name, tensor in model.state_dict().items())
patch.revert_(model)
print(removed, all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), patch.behaviour)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["18", "True", "repetition"], done.stderr
    assert Patch.load(path) == patch
    assert Patch.load(path).provenance == json.loads(json.dumps(patch.provenance))


@pytest.mark.slow
def test_names_are_canonical_between_a_lightning_module_and_the_bare_model() -> None:
    bare, wrapped = build("llama"), Wrapped(build("llama"))
    before = weights(bare)
    patch = Patch.from_positions(wrapped, {f"net.{UP}": torch.tensor([3, 5])})
    patch.apply_(bare)
    assert bare.get_parameter(UP).view(-1)[[3, 5]].tolist() == [0, 0]
    patch.revert_(bare)
    assert unchanged(bare, before)
    other = some_patch(bare)
    other.apply_(wrapped)
    assert other.strength_in(wrapped) == 1.0
    compiled = torch.compile(build("llama"))
    other.apply_(compiled)
    assert other.strength_in(compiled) == 1.0


def test_the_file_holds_nothing_executable_and_kinds_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    torch.save({"anything": print}, path)
    with pytest.raises(ValueError, match="safetensors"):
        Patch.load(path)
    from lrp_prune import Masks

    Masks({"weight": torch.ones(2, dtype=torch.bool)}).save(path)
    with pytest.raises(ValueError, match=r"lrp_prune\.masks.*expected 'lrp_prune\.patch'"):
        Patch.load(path)


def test_another_model_is_refused_untouched() -> None:
    model = build("llama")
    patch = some_patch(model)
    other = build("llama")
    other.get_parameter(DOWN).data.add_(1e-6)
    before = weights(other)
    with pytest.raises(ValueError, match=rf"{DOWN} holds other values.*9 of 9 positions"):
        patch.apply_(other)
    assert unchanged(other, before)
    with pytest.raises(KeyError, match=f"has no parameter '{UP}'"):
        patch.apply_(build("gpt2"))
    with pytest.raises(ValueError, match=r"shape \(8, 2\), the patch is of \(2, 8\)"):
        Patch.from_positions(nn.Linear(8, 2), {"weight": torch.tensor([0])}).apply_(nn.Linear(2, 8))


def test_entries_elsewhere_in_a_parameter_are_checked_unless_told_otherwise() -> None:
    model = build("llama")
    patch = some_patch(model)
    free = next(i for i in range(100) if i not in patch[UP].positions.tolist())
    model.get_parameter(UP).data.view(-1)[free] += 1
    before = weights(model)
    with pytest.raises(ValueError, match=rf"{UP} holds the patched values, but differs elsewhere"):
        patch.apply_(model)
    assert unchanged(model, before)
    patch.apply_(model, strict=False)
    patch.revert_(model)
    assert unchanged(model, before)


def test_a_model_in_another_precision_is_accepted_and_a_different_one_is_not() -> None:
    patch = some_patch(build("llama"))
    model = build("llama", dtype=torch.bfloat16)
    before = weights(model)
    patch.apply_(model, 0.5)
    patch.revert_(model)
    assert unchanged(model, before)
    model.get_parameter(UP).data.mul_(1.1)
    with pytest.raises(ValueError, match="other values"):
        patch.apply_(model)


def test_applying_twice_and_reverting_what_is_not_applied_are_refused() -> None:
    model = build("llama")
    patch = some_patch(model)
    patch.apply_(model, 0.5)
    before = weights(model)
    with pytest.raises(ValueError, match=r"applied to this model already, at strength 0\.5: revert it first"):
        patch.apply_(model)
    assert unchanged(model, before)
    model.get_parameter(UP).data.normal_()
    before = weights(model)
    with pytest.raises(ValueError, match="not applied to this model"):
        patch.revert_(model)
    assert unchanged(model, before)
    patch.revert_(model, strict=False)
    assert patch.strength_in(model) == 0.0


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), True, "1"])
def test_a_strength_outside_of_its_range_is_refused(strength) -> None:
    model = build("llama")
    before = weights(model)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]"):
        some_patch(model).apply_(model, strength)
    assert unchanged(model, before)


def test_a_failure_while_writing_leaves_nothing_half_applied(monkeypatch) -> None:
    from lrp_prune.correction.entries import Located

    model = build("llama")
    patch = some_patch(model)
    before = weights(model)
    write, calls = Located.write_, []

    def failing(located: Located, values: Tensor) -> None:
        calls.append(located)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        write(located, values)

    monkeypatch.setattr(Located, "write_", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        patch.apply_(model)
    assert unchanged(model, before)


def test_wrong_positions_are_refused() -> None:
    model = build("llama")
    for positions, message in (
        (torch.tensor([1 << 30]), "outside of its"),
        (torch.tensor([-1]), "outside of its"),
        (torch.tensor([0.5]), "flat integers or a bool mask"),
        (torch.zeros(3, dtype=torch.bool), "has shape"),
        (torch.zeros(0, dtype=torch.int64), "at least one entry"),
    ):
        with pytest.raises(ValueError, match=message):
            Patch.from_positions(model, {UP: positions})
    with pytest.raises(KeyError, match="no parameter 'nothing'"):
        Patch.from_positions(model, {"nothing": torch.tensor([0])})
    quantized = nn.Module()
    quantized.weight = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized weights cannot be patched"):
        Patch.from_positions(quantized, {"weight": torch.tensor([0])})
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device"):
        Patch.from_positions(meta, {"weight": torch.tensor([0])})
    with pytest.raises(ValueError, match="ascending"):
        Patch({"weight": Entries(torch.tensor([1, 0]), torch.zeros(2), (4,), "")})
    with pytest.raises(ValueError, match="plain values"):
        some_patch(model, behaviour=print)


def test_strided_and_scalar_parameters() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(4, 3).t())
    module.scale = nn.Parameter(torch.tensor(2.0))
    before = weights(module)
    patch = Patch.from_positions(module, {"weight": torch.tensor([1, 4]), "scale": torch.tensor([0])})
    patch.apply_(module)
    assert module.scale.item() == 0
    assert (module.weight[0, 1].item(), module.weight[1, 0].item()) == (0, 0)
    patch.revert_(module)
    assert unchanged(module, before)


def test_inference_mode_and_gradients_do_not_matter() -> None:
    model = build("llama")
    patch = some_patch(model)
    with torch.inference_mode():
        patch.apply_(model)
    patch.revert_(model)
    patch.apply_(model)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
