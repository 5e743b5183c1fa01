"""What is pruned is zero on disk, in however many files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrp_prune
from lrp_prune.pruning import check_saved, save_pruned
from tests.support.small_models import batch_for, build


def pruned(name: str = "llama", **options: Any) -> tuple[Any, lrp_prune.Masks]:
    model = build(name, **options)
    return model, lrp_prune.prune(model, [batch_for(name)], 0.5, "magnitude", recalibrate=False, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zeros_of_all_files_are_read_again(tmp_path: Path, dtype: torch.dtype) -> None:
    model, masks = pruned(dtype=dtype)
    saved = save_pruned(model, tmp_path, masks, max_shard_size="20KB")
    assert len(saved.files) > 1 and set(saved.files) == {path.name for path in tmp_path.glob("*.safetensors")}
    assert (saved.zeros, saved.weights) == (masks.num_pruned, masks.num_entries) == (7680, 15360)
    assert f"{len(saved.files)} files: 7,680 of 15,360 weights are pruned, and zero (50.00%)" == str(saved)
    assert check_saved(tmp_path, masks) == saved


def test_masks_may_lie_beside_the_weights(tmp_path: Path) -> None:
    model, masks = pruned()
    saved = save_pruned(model, tmp_path, masks)
    masks.save(tmp_path / "masks.safetensors")
    assert check_saved(tmp_path, masks) == saved == save_pruned(model, tmp_path, masks)


def test_a_weight_that_is_not_zero_on_disk_is_seen(tmp_path: Path) -> None:
    model, masks = pruned()
    save_pruned(model, tmp_path, masks)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(iter(masks))
    tensors[name][~masks[name]] = 1e-30
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RuntimeError, match=rf"{int((~masks[name]).sum())} pruned weights are not zero.*first is {name}"
    ):
        check_saved(tmp_path, masks)


def test_a_model_that_is_not_pruned_is_not_written(tmp_path: Path) -> None:
    _, masks = pruned()
    with pytest.raises(ValueError, match=r"pruned weights of .* are not zero in the model"):
        save_pruned(build("llama"), tmp_path / "new", masks)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="Linear has no save_pretrained"):
        save_pruned(nn.Linear(2, 2), tmp_path, lrp_prune.Masks({"weight": torch.ones(2, 2) > 0}))


def test_experts_that_are_written_one_by_one_are_looked_at_as_they_are_loaded(tmp_path: Path) -> None:
    model, masks = pruned("mixtral")
    assert any("experts.gate_up_proj" in name for name in masks)
    saved = save_pruned(model, tmp_path, masks)
    assert saved.zeros == masks.num_pruned
    with pytest.raises(ValueError, match=r"none of .* may be model.layers.0.mlp"):
        check_saved(tmp_path, masks)


def test_tied_weights_are_found_under_the_name_that_is_written(tmp_path: Path) -> None:
    model = build("gpt2")
    shape = model.lm_head.weight.shape
    masks = lrp_prune.Masks({"lm_head.weight": torch.arange(shape.numel()).reshape(shape) % 3 > 0})
    masks.apply_(model)
    assert save_pruned(model, tmp_path, masks).zeros == masks.num_pruned
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_names_without_the_prefix_of_a_larger_model_are_found(tmp_path: Path) -> None:
    masks = lrp_prune.Masks({"head.weight": torch.tensor([[True, False]])})
    save_file({"model.head.weight": torch.tensor([[0.5, 0.0]])}, tmp_path / "a.safetensors")
    assert check_saved(tmp_path, masks).zeros == 1
    save_file({"other.head.weight": torch.tensor([[0.5, 0.0]])}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"several tensors of .* may be head.weight"):
        check_saved(tmp_path, masks)
    with pytest.raises(ValueError, match="has no safetensors files"):
        check_saved(tmp_path / "empty", masks)


def test_files_with_names_of_their_own_are_read_by_what_reads_them(tmp_path: Path) -> None:
    model, masks = pruned("mixtral")
    saved = save_pruned(model, tmp_path, masks)
    with pytest.raises(ValueError, match=r"load=AutoModelForCausalLM.from_pretrained"):
        check_saved(tmp_path, masks)
    assert check_saved(tmp_path, masks, load=type(model).from_pretrained) == saved


def test_a_name_that_is_there_as_it_is_is_not_confused_with_one_that_ends_alike(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False]])
    save_file({"a.weight": torch.tensor([[1.0, 0.0]]), "b.a.weight": torch.ones(1, 2)}, tmp_path / "model.safetensors")
    assert check_saved(tmp_path, lrp_prune.Masks({"a.weight": mask})).zeros == 1
