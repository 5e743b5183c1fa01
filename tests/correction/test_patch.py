"""Patches: bit-exact round trips, refusal of what they were not made for, and combination."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from small_models import build
from torch import Tensor, nn

from lrp_prune.correction import Entries, Patch

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def some_patch(model: nn.Module, seed: int = 0, **provenance) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    positions = {
        name: torch.randperm(model.get_parameter(name).numel(), generator=generator)[:9] for name in (UP, DOWN)
    }
    return Patch.from_positions(model, positions, **provenance)


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


def test_a_round_trip_through_a_file_and_a_new_process(tmp_path: Path) -> None:
    model = build("llama")
    patch = some_patch(model, behaviour="repetition", references={"undesired": ["a", "b"]})
    path = tmp_path / "patch.safetensors"
    patch.save(path)
    assert path.stat().st_size < 4096
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent.parent / "support")!r})
from small_models import build
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


class Outer(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def at_two_depths() -> tuple[nn.Sequential, Outer, Patch, Patch]:
    """A model, a module around it, and a patch made on each; they share one entry."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    outer = Outer(net)
    first = Patch.from_positions(outer, {"net.0.weight": torch.tensor([0, 1])})
    second = Patch.from_positions(net, {"0.weight": torch.tensor([1, 2]), "2.bias": torch.tensor([3])})
    return net, outer, first, second


def test_patches_with_names_of_two_depths_are_combined() -> None:
    net, outer, first, second = at_two_depths()
    before = weights(net)
    for one, other in ((first, second), (second, first)):
        assert one.overlap(other) == {"net.0.weight": 1}
        assert one.overlap(other, outer) == {"net.0.weight" if one is first else "0.weight": 1}
        union = one | other
        assert {name: union[name].positions.tolist() for name in union} == {
            "net.0.weight": [0, 1, 2],
            "net.2.bias": [3],
        }
        for model in (outer, net):
            union.apply_(model)
            assert int((net[0].weight == 0).sum()) == 3
            union.revert_(model)
            assert unchanged(net, before)
    assert {name: entry.positions.tolist() for name, entry in (first - second).items()} == {"net.0.weight": [0]}
    assert {name: entry.positions.tolist() for name, entry in (second - first).items()} == {
        "net.0.weight": [2],
        "net.2.bias": [3],
    }


def test_names_of_two_depths_that_nothing_relates_are_refused_when_applied() -> None:
    net, outer, first, _ = at_two_depths()
    apart = Patch.from_positions(net, {"2.weight": torch.tensor([1])})
    assert first.overlap(apart) == {}
    before = weights(net)
    with pytest.raises(KeyError, match=r"several depths, 'net\.0\.weight' and '2\.weight'.* on the same module"):
        (first | apart).apply_(outer)
    with pytest.raises(KeyError, match=r"has no parameter 'absent"):
        Patch({"net.0.weight": first["net.0.weight"], "absent.weight": first["net.0.weight"]}).apply_(outer)
    assert unchanged(net, before)


def test_equal_biases_of_two_models_are_not_taken_for_one() -> None:
    pair = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("first", "second")})
    for layer in pair.values():
        nn.init.zeros_(layer.bias)
    whole = Patch.from_positions(pair, {"first.bias": torch.tensor([0])})
    part = Patch.from_positions(pair["second"], {"bias": torch.tensor([0])})
    assert whole.overlap(part) == {}
    assert list(whole | part) == ["first.bias", "bias"]


def test_tied_parameters_overlap_under_any_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    first = Patch.from_positions(model, {"0.weight": torch.tensor([0, 1])})
    second = Patch.from_positions(model, {"1.weight": torch.tensor([1, 2])})
    assert first.overlap(second) == {}
    assert first.overlap(second, model) == {"0.weight": 1}


def test_union_and_difference() -> None:
    model = build("llama")
    before = weights(model)
    first, second = some_patch(model, 0, behaviour="a"), some_patch(model, 1, behaviour="b")
    shared = Patch.from_positions(model, {UP: torch.cat([first[UP].positions[:3], second[UP].positions[:2]])})
    union, both = first | second, first | second | shared
    assert both == union
    assert union.num_entries == 36 - sum(first.overlap(second).values())
    assert union.behaviour == "a | b"
    union.apply_(model)
    first.revert_(model)
    for name in union:
        zero = set((model.get_parameter(name).view(-1) == 0).nonzero().view(-1).tolist())
        assert zero == set((union - first)[name].positions.tolist())
    (union - first).revert_(model)
    assert unchanged(model, before)
    assert (union - first).overlap(first) == {}
    assert shared.overlap(first) == {UP: 3}
    with pytest.raises(ValueError, match="nothing is left"):
        first - union


def test_patches_of_different_models_are_not_combined() -> None:
    model, other = build("llama"), build("llama")
    other.get_parameter(UP).data.view(-1)[0] += 1
    with pytest.raises(ValueError, match=f"unite patches of different models: the checksums of {UP}"):
        some_patch(model) | some_patch(other, 1)
    with pytest.raises(ValueError, match="different models"):
        some_patch(model) - some_patch(build("llama", dtype=torch.bfloat16))


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
