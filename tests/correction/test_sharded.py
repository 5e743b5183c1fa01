"""Corrections of models that ``fully_shard`` has divided: the patch of one process, and only the own part changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here, not in each forked process
from torch import Tensor, nn

from lrp_prune import Relevance, attribute
from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.correction import Contrast, Corrections, Guard, Patch
from lrp_prune.correction.provenance import model_fingerprint
from tests.support.sharding import sharded, together, whole
from tests.support.small_models import batch_for, build

pytestmark = pytest.mark.processes

LINEAR, TIED = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"


def llama() -> nn.Module:
    torch.manual_seed(0)
    return build("llama").eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def made_up(model: nn.Module, seed: int) -> Relevance:
    """Few different values, so that ties decide, and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randint(-9, 9, parameter.shape, generator=generator).float()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    return Relevance(values, statistic="signed")


def divided(relevance: Relevance, model: nn.Module) -> Relevance:
    shardings = shardings_of(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in relevance.items()}
    parts = {name: shardings[name].part(tensor).clone() for name, tensor in relevance.items()}
    return Relevance(parts, statistic="signed", shardings=shardings, parameter_shapes=shapes)


CONTRASTS: list[dict[str, Any]] = [
    {},
    {"guard": None, "normalize": None},
    {"guard": Guard(0.3, scope="layer"), "normalize": "max", "include": ["*.mlp"]},
    {"reverse": True, "normalize": "mean", "exclude": [TIED]},
]


def test_the_patch_is_that_of_one_process_and_reverts_bit_by_bit(tmp_path: Path) -> None:
    model = llama()
    general, undesired, guard_by = (made_up(model, seed) for seed in (1, 2, 3))
    contrasts = [(amount, CONTRASTS[number]) for number, amount in enumerate((0.01, 0.002, 1, 300))]
    expected = [Patch.from_contrast(model, general, undesired, amount, **each) for amount, each in contrasts]
    guarded = Patch.from_contrast(model, general, undesired, 99, guard=Guard(0.2, by=guard_by))
    expected[1].apply_(model)
    both = Patch.from_contrast(model, general, undesired, 40, extends=expected[1])
    fingerprint, free = model_fingerprint(model), Contrast(general, undesired).num_candidates

    def check(mesh: Any) -> None:
        made = sharded(llama(), mesh)
        before = weights(made)
        parts = [divided(each, made) for each in (general, undesired, guard_by)]
        assert Contrast(parts[0], parts[1]).num_candidates == free
        found = [Patch.from_contrast(made, *parts[:2], amount, **each) for amount, each in contrasts]
        for patch, wanted in zip(found, expected, strict=True):
            assert patch == wanted
            assert patch.provenance == wanted.provenance
            assert all(patch[name].checksum == wanted[name].checksum for name in wanted)
        assert Patch.from_contrast(made, *parts[:2], 99, guard=Guard(0.2, by=parts[2])) == guarded
        patch = found[1]
        for strength in (1.0, 0.25):
            assert patch.strength_in(made) == 0
            patch.apply_(made, strength)
            assert patch.strength_in(made) == pytest.approx(strength, abs=1e-6)
            after = weights(made)
            for name, tensor in before.items():
                wanted = tensor.clone()
                if name in patch:
                    places = wanted.view(-1)
                    places[patch[name].positions] = (patch[name].originals.double() * (1 - strength)).float()
                assert torch.equal(after[name], wanted), name
            patch.revert_(made)
            assert same(before, weights(made))
        patch.apply_(made)
        assert model_fingerprint(made) == fingerprint
        assert Patch.from_contrast(made, *parts[:2], 40, extends=patch) == both
        with pytest.raises(ValueError, match="applied to this model already, at strength 1"):
            patch.apply_(made)
        patch.revert_(made)
        with pytest.raises(ValueError, match="zero everywhere"):
            Contrast(parts[0], parts[1] * 0.0)
        with pytest.raises(ValueError, match="divided among processes in different ways"):
            Contrast(parts[0], undesired)

    together(check, 3, tmp_path)  # parts of uneven sizes


def test_whoever_differs_all_refuse_and_nothing_changes(tmp_path: Path) -> None:
    patch = Patch.from_positions(llama(), {LINEAR: torch.tensor([0, 1])})

    def check(mesh: Any) -> None:
        made = sharded(llama(), mesh)
        parameter = made.get_parameter(LINEAR)
        places = parameter.to_local().detach()
        if mesh.get_local_rank() == 1:  # elsewhere than the patch's entries, which the first process has
            places[-1, -1] += 1
        before = weights(made)
        with pytest.raises(ValueError, match="differs elsewhere from what the patch was made for"):
            patch.apply_(made)
        assert same(before, weights(made))
        patch.apply_(made, strict=False)
        patch.revert_(made)
        if mesh.get_local_rank() == 0:
            places[0, 0] += 1
        for call in (lambda: patch.apply_(made, strict=False), lambda: patch.revert_(made)):
            before = weights(made)
            with pytest.raises(ValueError, match=r"other values than the patch|neither the originals nor scaled ones"):
                call()
            assert same(before, weights(made))

    together(check, 2, tmp_path)


def test_units_and_masks_that_are_divided(tmp_path: Path) -> None:
    """Neurons are whole in each process, what they own is divided; a mask may be a ``DTensor``."""
    model = llama()
    batches = [batch_for("llama"), {name: value.flip(1) for name, value in batch_for("llama").items()}]
    options: dict[str, Any] = {"granularity": "neuron", "statistic": "signed", "include": ["*.mlp"]}
    sets = [attribute(model, [batch], **options) for batch in batches]
    expected = {removal: Patch.from_contrast(model, *sets, 3, removal=removal) for removal in ("contribution", "all")}
    marked = torch.zeros_like(model.get_parameter(LINEAR), dtype=torch.bool)
    marked[[0, 3, -1], [1, 0, -1]] = True

    def check(mesh: Any) -> None:
        made = sharded(llama(), mesh)
        found = [attribute(made, [batch], **options) for batch in batches]
        for removal, patch in expected.items():
            assert Patch.from_contrast(made, *found, 3, removal=removal) == patch
        sharding = shardings_of(made)[LINEAR]
        divided_mask = sharding.tensor(sharding.part(marked).contiguous())
        patch = Patch.from_positions(made, {LINEAR: divided_mask})
        assert patch == Patch.from_positions(model, {LINEAR: marked})

    together(check, 2, tmp_path)


def test_corrections_are_switched_and_frozen_on_sharded_models(tmp_path: Path) -> None:
    model = llama()
    first = Patch.from_positions(model, {LINEAR: torch.tensor([0, 7, 90]), TIED: torch.tensor([3, 400])})
    second = Patch.from_positions(model, {LINEAR: torch.tensor([1, 91])})
    batch = {**batch_for("llama"), "labels": batch_for("llama")["input_ids"]}

    def check(mesh: Any) -> None:
        made = sharded(llama(), mesh)
        before = weights(made)
        corrections = Corrections(made)
        for name, patch in (("first", first), ("second", second)):
            corrections.add(name, patch)
            corrections.enable(name, 0.5)
        assert corrections.current("first") == first
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
        corrections.attach([optimizer])
        made(**batch).loss.backward()
        gradient = whole(made.get_parameter(LINEAR).grad).view(-1)
        assert int((gradient == 0).sum()) == 5
        assert bool((gradient[[0, 1, 7, 90, 91]] == 0).all())
        optimizer.step()
        assert (first.strength_in(made), second.strength_in(made)) == (pytest.approx(0.5), pytest.approx(0.5))
        state = {"key": made.state_dict()[LINEAR]}
        corrections.without(state, {id(made.get_parameter(LINEAR)): ["key"]})
        assert torch.equal(whole(state["key"]).view(-1)[first[LINEAR].positions], first[LINEAR].originals)
        corrections.disable("first")
        corrections.enable("second", 1.0)
        corrections.disable("second")
        for name in (LINEAR, TIED):
            kept = (whole(made.get_parameter(name)) == before[name]).view(-1).nonzero().view(-1).tolist()
            assert kept == ([0, 1, 7, 90, 91] if name == LINEAR else [3, 400])

    together(check, 2, tmp_path)
