"""The wrapper carries patches that act under a condition as it carries others, and writes no weight for them."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lrp_prune.correction import ActivationAbove, ConditionalPatch, Patch, load_patches
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.conditions import EMBEDDING, TokenIs, last_layer_patch, where_token_is
from tests.support.patches import LAST, patch_of, tensors, unchanged, weights
from tests.support.small_models import build
from tests.support.trainers import forked

IDS = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(5))
AMONG = sorted(set(IDS.flatten().tolist()))[::3]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def conditional(module: nn.Module) -> ConditionalPatch:
    """Of the last layer of the fixture's module, where its hidden units say so."""
    patch = Patch.from_positions(module, {LAST: torch.arange(module.net[4].weight.numel())})
    return ConditionalPatch(patch, ActivationAbove("net.2", 0.4, torch.eye(8)[0]))


def test_it_is_switched_scaled_and_undone_bit_by_bit() -> None:
    model, static = build("llama"), build("llama")
    before, clean = weights(model), logits(model)
    patch = where_token_is(model, AMONG)
    corrected = CorrectedModule(model, {"loops": patch})
    assert corrected.strengths == {"loops": 1.0}
    full = logits(corrected)
    assert not torch.equal(full, clean)
    corrected.enable("loops", 0.5)
    patch.apply_(static, 0.5)
    assert torch.equal(logits(corrected), logits(static))
    with corrected.uncorrected():
        assert torch.equal(logits(corrected), clean)
    assert torch.equal(logits(corrected), logits(static))
    corrected.disable("loops")
    assert torch.equal(logits(corrected), clean)
    assert corrected.strengths == {"loops": 0.0}
    corrected.enable("loops")
    assert torch.equal(logits(corrected), full)
    assert unchanged(model, before)
    assert corrected.remove("loops") == patch
    assert torch.equal(logits(model), clean)


def test_it_acts_beside_a_patch_of_the_same_weights() -> None:
    model, expected = build("llama"), build("llama")
    plain = last_layer_patch(model)
    corrected = CorrectedModule(
        model,
        {"weights": plain, "loops": ConditionalPatch(plain, TokenIs(EMBEDDING, AMONG))},
        {"weights": 0.5, "loops": 0.5},
    )
    plain.apply_(expected, 0.75)
    held = torch.isin(IDS, torch.tensor(AMONG))
    torch.testing.assert_close(logits(corrected)[held], logits(expected)[held], rtol=1e-5, atol=1e-6)
    corrected.disable("weights")
    corrected.disable("loops")
    assert torch.equal(logits(corrected), logits(build("llama")))


def test_the_same_patch_acts_once_whatever_its_names() -> None:
    model = build("llama")
    corrected = CorrectedModule(model, {"loops": where_token_is(model, AMONG)})
    expected = logits(corrected)
    corrected.add("again", where_token_is(model, AMONG), 0.0)
    with pytest.raises(ValueError, match="'again' and 'loops' are the same: disable 'loops' first"):
        corrected.enable("again", 0.5)
    assert corrected.strengths == {"loops": 1.0, "again": 0.0}
    assert torch.equal(logits(corrected), expected)
    corrected.disable("loops")
    corrected.enable("again")
    assert torch.equal(logits(corrected), expected)


def test_another_model_is_refused_and_nothing_stays() -> None:
    patch = where_token_is(build("llama"), AMONG)
    other = build("llama")
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(2)
    with pytest.raises(ValueError, match="other values"):
        CorrectedModule(other, {"loops": patch})
    assert not any(module._forward_hooks for module in other.modules())


@pytest.mark.slow
def test_a_state_dict_brings_it_with_its_condition(tmp_path: Path) -> None:
    model = build("llama")
    corrected = CorrectedModule(model, {"loops": where_token_is(model, AMONG)}, {"loops": 0.5})
    expected = logits(corrected)
    torch.save(corrected.state_dict(), tmp_path / "state.pt")
    assert all(
        torch.equal(value, weights(build("llama"))[name.removeprefix("module.")])
        for name, value in corrected.state_dict().items()
        if isinstance(value, Tensor)
    )
    again = CorrectedModule(build("llama"))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.patches == corrected.patches
    assert again.strengths == {"loops": 0.5}
    assert torch.equal(logits(again), expected)
    # What is loaded takes the place of what was there, once.
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.disable("loops")
    assert torch.equal(logits(again), logits(build("llama")))


@pytest.mark.slow
def test_a_copy_is_switched_by_itself() -> None:
    model = build("llama")
    corrected = CorrectedModule(model, {"loops": where_token_is(model, AMONG)})
    expected = logits(corrected)
    twin = copy.deepcopy(corrected)
    twin.disable("loops")
    assert torch.equal(logits(twin), logits(build("llama")))
    assert torch.equal(logits(corrected), expected)
    with corrected.uncorrected():
        clean = copy.deepcopy(corrected)
    assert torch.equal(logits(clean), logits(build("llama")))
    assert torch.equal(logits(corrected), expected)


@pytest.mark.slow
def test_it_cannot_be_merged_and_is_written_beside(tmp_path: Path) -> None:
    model = build("llama")
    corrected = CorrectedModule(model, {"loops": where_token_is(model, AMONG)}, {"loops": 0.5})
    expected = logits(corrected)
    with pytest.raises(ValueError, match=r"'loops' acts under a condition .* merged=False"):
        corrected.save_pretrained(tmp_path / "merged")
    corrected.save_pretrained(tmp_path / "beside", merged=False)
    loaded = type(model).from_pretrained(tmp_path / "beside")
    again = CorrectedModule(loaded.eval(), *load_patches(tmp_path / "beside"))
    assert torch.equal(logits(again), expected)
    corrected.disable("loops")
    corrected.save_pretrained(tmp_path / "merged")


@pytest.mark.slow
def test_training_goes_through_it_and_resumes(everything, trainer, tmp_path: Path) -> None:
    def run(corrected: CorrectedModule, epochs: int, checkpoint: Path | None = None):
        torch.manual_seed(4)
        run = trainer(max_epochs=epochs)
        run.fit(corrected, ckpt_path=checkpoint)
        return run

    def make(strength: float = 1.0) -> CorrectedModule:
        module = everything()
        module.net[3].p = 0.0
        return CorrectedModule(module, {"loops": conditional(module)}, {"loops": strength})

    whole, part, rest, without = make(), make(), make(), make(0.0)
    original = whole.module.net[4].weight.detach().clone()
    run(whole, 2)
    run(part, 1).save_checkpoint(tmp_path / "one.ckpt")
    run(rest, 2, tmp_path / "one.ckpt")
    run(without, 2)
    trained = tensors(whole)
    assert all(torch.equal(tensors(rest)[name], value) for name, value in trained.items())
    assert not torch.equal(whole.module.net[4].weight, original)
    assert not torch.equal(whole.module.net[4].weight, without.module.net[4].weight)
    whole.enable("loops", 0.5)  # on weights that were trained since
    assert whole.strengths == {"loops": 0.5}


def test_patches_of_both_kinds_are_pending_together(everything, trainer) -> None:
    made = everything()
    late = everything(late=True)
    patches = {"weights": patch_of(made), "loops": conditional(made)}
    corrected = CorrectedModule(late, patches, {"loops": 0.5})
    assert corrected.pending == {"weights": 1.0, "loops": 0.5}
    corrected.configure_model()
    assert corrected.strengths == {"weights": 1.0, "loops": 0.5}


@pytest.mark.slow
@pytest.mark.processes
def test_data_parallel_training_is_alike_on_all_ranks(everything, loader, trainer, tmp_path: Path) -> None:
    module = everything()
    original = module.net[4].weight.detach().clone()
    corrected = CorrectedModule(module, {"loops": conditional(module)})

    class Save(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
            during = pl_module(inputs).detach()
            pl_module.disable("loops")
            saved = (tensors(pl_module.module), during, pl_module(inputs).detach())
            (tmp_path / f"{trainer.global_rank}").write_bytes(pickle.dumps(saved))

    trainer(devices=2, strategy=forked(), max_epochs=1, callbacks=[Save()], use_distributed_sampler=True).fit(
        corrected, loader(), loader(seed=2)
    )
    first, second = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    assert torch.equal(first[0][LAST], second[0][LAST])
    assert not torch.equal(first[0][LAST], original)
    assert not torch.equal(first[1], first[2])
