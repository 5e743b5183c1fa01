"""Masks: packing, algebra, application, files."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lrp_prune
from lrp_prune.pruning import Masks, save_pruned
from lrp_prune.selection import bits
from tests.support.small_models import batch_for, build


def random_masks(seed=0, shapes=((3, 5), (16,), (), (2, 3, 4), (0, 3)), granularity="weight"):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}": torch.rand(shape, generator=generator) < 0.6 for i, shape in enumerate(shapes)}
    return tensors, Masks(tensors, granularity=granularity)


def test_every_length_packs_and_unpacks():
    generator = torch.Generator().manual_seed(0)
    for length in range(70):
        mask = torch.rand(length, generator=generator) < 0.5
        packed = bits.pack(mask)
        assert packed.numel() == (length + 7) // 8
        assert torch.equal(bits.unpack(packed, (length,)), mask)
        assert bits.count(packed) == int(mask.sum())
        # What other devices than the CPU do gives the same bytes.
        assert torch.equal(bits._pack_with_torch(mask), packed)
        assert torch.equal(bits._unpack_with_torch(packed, length), mask)
        assert torch.equal(bits.unpack(bits.invert(packed, length), (length,)), ~mask)
        assert bits.count(bits.invert(packed, length)) == int((~mask).sum())


def test_one_bit_for_each_entry_and_exact_counts():
    tensors, masks = random_masks()
    assert list(masks) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(masks[name], tensor)
        assert masks.bits(name).numel() == (tensor.numel() + 7) // 8
        assert masks.pruned_in(name) == int((~tensor).sum())
    assert masks.num_entries == sum(tensor.numel() for tensor in tensors.values())
    assert masks.num_pruned == sum(int((~tensor).sum()) for tensor in tensors.values())
    assert masks.sparsity == masks.num_pruned / masks.num_entries
    assert masks.sparsity_of("layer.1") == masks.pruned_in("layer.1") / 16
    assert masks.sparsity_of("layer.4") == 0.0
    assert Masks({}).sparsity == 0.0
    assert "5 parameters" in repr(masks) and f"{masks.num_pruned:,} of {masks.num_entries:,}" in repr(masks)


def test_a_read_mask_is_a_copy():
    _, masks = random_masks()
    before = masks.checksum()
    masks["layer.0"].fill_(False)
    assert masks.checksum() == before


def test_algebra_is_that_of_the_tensors():
    (a, masks_a), (b, masks_b) = random_masks(0), random_masks(1)
    for name in a:
        assert torch.equal((masks_a & masks_b)[name], a[name] & b[name])
        assert torch.equal((masks_a | masks_b)[name], a[name] | b[name])
        assert torch.equal((~masks_a)[name], ~a[name])
    assert ~~masks_a == masks_a
    assert (masks_a | ~masks_a).num_pruned == 0
    assert (masks_a & ~masks_a).sparsity == 1.0
    assert (masks_a & random_masks(1, granularity="head")[1]).granularity == "weight"


def test_different_names_or_shapes_do_not_combine():
    _, masks = random_masks()
    with pytest.raises(ValueError, match=r"'layer\.4' is in one of them only"):
        masks & random_masks(shapes=((3, 5), (16,), (), (2, 3, 4)))[1]
    with pytest.raises(ValueError, match=r"'layer.0': shapes \(3, 5\) and \(5, 3\)"):
        masks | random_masks(shapes=((5, 3), (16,), (), (2, 3, 4), (0, 3)))[1]
    with pytest.raises(TypeError):
        masks & {"layer.0": torch.ones(3, 5, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"masks are torch\.bool"):
        Masks({"weight": torch.ones(3)})


def test_equality_and_checksum_follow_names_shapes_and_bits_only():
    tensors, masks = random_masks()
    reordered = Masks(dict(reversed(tensors.items())), granularity="head")
    assert reordered == masks and reordered.checksum() == masks.checksum()
    flipped = {name: tensor.clone() for name, tensor in tensors.items()}
    flipped["layer.1"][3] ^= True
    renamed = {name.replace("layer.0", "layer.9"): tensor for name, tensor in tensors.items()}
    reshaped = {**tensors, "layer.0": tensors["layer.0"].reshape(5, 3)}
    for other in map(Masks, (flipped, renamed, reshaped)):
        assert other != masks and other.checksum() != masks.checksum()
    assert masks != tensors
    assert copy.deepcopy(masks) == masks


def test_checksum_is_stable_over_versions():
    masks = Masks({"weight": torch.tensor([[True, False], [True, True]])})
    assert masks.checksum() == "258857de1ecddd8ce78c12701be4d44c21cd803bf7f81e26556cfbcad7820773"


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def test_what_is_pruned_becomes_positive_zero_and_nothing_else_changes():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, float("nan"), float("inf"), -1.0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0] = False
    Masks({"0.weight": mask}).apply_(Holder(model))
    weight = model[0].weight.detach()
    assert (weight[~mask].view(torch.int16) == 0).all()
    assert torch.equal(weight[mask], before["0.weight"][mask])
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert model[0].weight.requires_grad and model[0].weight.is_leaf


def test_nothing_is_changed_unless_everything_fits():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    none = torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(KeyError, match=r"no parameter '7.weight'"):
        Masks({"0.weight": none, "7.weight": none}).apply_(model)
    with pytest.raises(ValueError, match=r"1.weight has shape \(2, 3\), its mask \(3, 4\)"):
        Masks({"0.weight": none, "1.weight": none}).apply_(model)
    integers = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    model[1].weight = integers
    with pytest.raises(ValueError, match=r"1.weight has type torch.int8"):
        Masks({"0.weight": none, "1.weight": none[:2, :3]}).apply_(model)
    assert torch.equal(model[0].weight, before["0.weight"])


def test_file_round_trip(tmp_path):
    _, masks = random_masks(granularity="neuron")
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    loaded = Masks.load(path)
    assert loaded == masks and list(loaded) == list(masks) and loaded.granularity == "neuron"
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, masks = random_masks()
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        random_masks(1)[1].save(path)
    monkeypatch.undo()
    assert Masks.load(path) == masks
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]


def rewritten(path, tensors=None, metadata=None):
    with safe_open(path, framework="pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = dict(file.metadata())
    described |= metadata or {}
    save_file({**old, **(tensors or {})}, path, {key: value for key, value in described.items() if value is not None})


def test_damaged_and_foreign_files_are_refused(tmp_path):
    _, masks = random_masks()
    path = tmp_path / "masks.safetensors"

    def fresh():
        masks.save(path)

    fresh()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Masks.load(path)
    fresh()
    rewritten(path, metadata={"format": "lrp_prune.relevance"})
    with pytest.raises(ValueError, match=r"holds 'lrp_prune\.relevance'"):
        Masks.load(path)
    fresh()
    rewritten(path, metadata={"version": "999"})
    with pytest.raises(ValueError, match="version 999"):
        Masks.load(path)
    for lost in ("order", "description", "version"):
        fresh()
        rewritten(path, metadata={lost: None})
        with pytest.raises(ValueError, match=f"is damaged: it has no '{lost}'"):
            Masks.load(path)
    fresh()
    rewritten(path, metadata={"description": "{}"})
    with pytest.raises(ValueError, match="is damaged: its masks and their shapes"):
        Masks.load(path)
    fresh()
    rewritten(path, tensors={"layer.0": torch.zeros(5, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"mask of layer.0 has \(5,\)"):
        Masks.load(path)
    for lost in ("order", "description", "version"):
        fresh()
        rewritten(path, metadata={lost: None})
        with pytest.raises(ValueError, match=f"is damaged: it has no '{lost}'"):
            Masks.load(path)
    fresh()
    rewritten(path, metadata={"description": "{}"})
    with pytest.raises(ValueError, match="is damaged: its masks and their shapes"):
        Masks.load(path)
    fresh()
    rewritten(path, tensors={"layer.0": torch.full((2,), 255, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="bits beyond its 15 entries"):
        Masks.load(path)
    fresh()
    rewritten(path, metadata={"description": json.dumps({"granularity": "weight", "shapes": {"layer.0": [3, 5]}})})
    with pytest.raises(ValueError, match="different names"):
        Masks.load(path)


def test_state_is_plain_and_round_trips_through_a_checkpoint():
    _, masks = random_masks(granularity="head")
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    restored = Masks.from_state_dict(torch.load(file, weights_only=True))
    assert restored == masks and restored.granularity == "head"
    with pytest.raises(ValueError, match="version 7"):
        Masks.from_state_dict({**masks.state_dict(), "version": 7})


def test_offloaded_weights_are_refused_by_name_before_anything_changes(tmp_path: Path) -> None:
    model, batch = build("llama"), {**batch_for("llama"), "labels": batch_for("llama")["input_ids"]}
    masks = lrp_prune.prune(copy.deepcopy(model), [batch], 0.5, recalibrate=False)
    split = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    split |= {"model.norm": "cpu", "lm_head": "cpu"}
    model = dispatch_model(model, split, main_device="cpu", offload_dir=str(tmp_path / "offloaded"))
    before = {name: entry.clone() for name, entry in model.named_parameters() if not entry.is_meta}
    assert len(before) < len(list(model.parameters()))
    for refused in (
        lambda: masks.apply_(model),
        lambda: lrp_prune.prune(model, [batch], 0.5),
        lambda: lrp_prune.prune(model, [batch], 0.5, method="magnitude", recalibrate=False),
        lambda: lrp_prune.attribute(model, [batch]),
        lambda: save_pruned(model, tmp_path / "saved", masks),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+ is on the meta device and holds no values yet"):
            refused()
    assert all(torch.equal(model.get_parameter(name), entry) for name, entry in before.items())
