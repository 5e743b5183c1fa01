"""On a GPU, where there is one: the CPU's relevance and masks, every precision, memory, corrections."""

import copy
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support import labelled_models, small_models
from tests.support.on_gpu import moved, needs_a_gpu, on_a_gpu
from tests.support.small_models import llama

pytestmark = [pytest.mark.processes, needs_a_gpu]


def distance(found: Tensor, expected: Tensor) -> float:
    """The size of the difference over the size of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def labelled(name: str) -> dict[str, Tensor]:
    """A batch for a small model, with the input as labels where it has no classes."""
    batch = small_models.batch_for(name)
    if name in ("vit", "resnet", "bert"):
        return {**batch, "labels": torch.tensor([0, 1])}
    return batch if name in ("clip_vision", "ctrl") else {**batch, "labels": batch["input_ids"]}


SMALL = [name for name in (*small_models.ARCHITECTURES, *small_models.NO_CHOICE, *small_models.POSITIONS,
                           *small_models.GATED) if name != "clip_vision"]  # fmt: skip


def made(name: str) -> tuple[nn.Module, Any]:
    """A small model and a batch with labels, of either collection."""
    if name in labelled_models.CASES:
        return labelled_models.CASES[name].made()
    return small_models.build(name), labelled(name)


@pytest.mark.parametrize("collection", ["small", "labelled"])
def test_relevance_is_that_of_the_cpu(collection: str, tmp_path: Path) -> None:
    def differences() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in SMALL if collection == "small" else labelled_models.CASES:
            try:
                model, batch = made(name)
                expected = lrp_prune.attribute(model, [batch])
                relevance = lrp_prune.attribute(copy.deepcopy(model).cuda(), [moved(batch)])
                worst = max(distance(relevance[weight], expected[weight]) for weight in expected)
                if worst > 1e-2 or relevance.target != expected.target:
                    found[name] = worst, relevance.target, expected.target
            except Exception:
                found[name] = traceback.format_exc()[-2000:]
        return found

    differ = on_a_gpu(differences, tmp_path)
    assert not differ, "\n".join(f"{name}: {what}" for name, what in differ.items())


@pytest.mark.parametrize("granularity", ["weight", "neuron", "head", "block"])
def test_every_statistic_is_that_of_the_cpu(granularity: str, tmp_path: Path) -> None:
    statistics = ["signed", "abs_sample", "abs_token"]
    if granularity == "weight":
        statistics += ["squared_token", "geometric"]

    def differences() -> dict[str, float]:
        model, batch = made("llama")
        on_card, found = copy.deepcopy(model).cuda(), {}
        for composite in ("attnlrp", "cp_lrp", "epsilon", "gradient"):
            for statistic in statistics:
                options: dict[str, Any] = {"statistic": statistic, "granularity": granularity, "composite": composite}
                expected = lrp_prune.attribute(model, [batch], **options)
                relevance = lrp_prune.attribute(on_card, [moved(batch)], **options)
                values = [distance(relevance[name], expected[name]) for name in expected]
                found[f"{composite} {statistic}"] = max(values)
        return found

    differ = on_a_gpu(differences, tmp_path)
    assert len(differ) == 4 * len(statistics)
    assert max(differ.values()) < 1e-2, differ


def test_inputs_and_latent_relevance_are_those_of_the_cpu_and_conserved(tmp_path: Path) -> None:
    def relevances() -> list[tuple[float, float]]:
        model = small_models.build("llama", biases=False)
        batch = small_models.batch_for("llama")
        found = []
        for device in ("cpu", "cuda"):
            model, given = model.to(device), moved(batch, device)
            with lrp_prune.attributing(model, composite="cp_lrp", latent=["*.mlp"]) as propagation:
                value = model(**given, use_cache=False).logits[:, -1].max(-1).values.sum()
                relevance = propagation.relevance(value)
            roots = sum(float(relevance[root].sum()) for root in relevance if "mlp" not in root)
            found.append((float(value.detach()), roots))
        return found

    (value, roots), (on_card, roots_there) = on_a_gpu(relevances, tmp_path)
    assert on_card == pytest.approx(value, rel=1e-4)
    assert roots_there == pytest.approx(roots, rel=1e-3)
    assert roots_there == pytest.approx(on_card, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast bfloat16", "autocast float16"])
def test_low_precision_gives_finite_relevance_like_that_of_float32(precision: str, tmp_path: Path) -> None:
    dtype = getattr(torch, precision.split()[-1])

    def distances() -> dict[str, float]:
        found = {}
        for name in ("llama", "gpt2", "bert", "vit", "resnet", "t5"):
            model, batch = made(name)
            model, batch = model.cuda(), moved(batch)
            expected = lrp_prune.attribute(model, [batch])
            if precision.startswith("autocast"):
                with torch.autocast("cuda", dtype):
                    relevance = lrp_prune.attribute(model, [batch])
            else:
                inputs = {key: leaf.to(dtype) if leaf.is_floating_point() else leaf for key, leaf in batch.items()}
                relevance = lrp_prune.attribute(model.to(dtype), [inputs])
            assert all(tensor.dtype == torch.float32 for tensor in relevance.values()), name
            # Of most weights: what lies at a ReLU's or a pool's edge may fall to its other side.
            joined = torch.cat([relevance[key].flatten() for key in expected])
            reference = torch.cat([expected[key].flatten() for key in expected])
            assert joined.isfinite().all(), name
            found[name] = distance(joined, reference)
        return found

    differ = on_a_gpu(distances, tmp_path)
    assert max(differ.values()) < (0.1 if dtype == torch.bfloat16 else 0.02), differ


@pytest.mark.parametrize(
    "options",
    [{}, {"recalibrate": False}, {"scope": "row"}, {"scope": "2:4"}, {"granularity": "neuron", "recalibrate": False},
     {"method": "wanda"}, {"method": "gradient"}, {"method": "magnitude"}, {"sparsity": 0.8}],
    ids=str,
)  # fmt: skip
def test_pruning_gives_the_masks_and_weights_of_the_cpu(options: dict[str, Any], tmp_path: Path) -> None:
    def prunings() -> dict[str, Any]:
        found = {}
        for name in ("llama", "bert", "resnet"):
            given = {"sparsity": 0.5, **options}
            if name != "llama" and given.get("scope") == "2:4":
                continue
            model, batch = made(name)
            on_card = copy.deepcopy(model).cuda()
            expected = lrp_prune.prune(model, [batch, batch], **given)
            masks = lrp_prune.prune(on_card, [moved(batch), moved(batch)], **given)
            different = sum(int((masks[key].cpu() != expected[key]).sum()) for key in expected)
            weights = sum(mask.numel() for mask in expected.values())
            zero = all(not on_card.get_parameter(key)[~masks[key].cuda()].any() for key in masks)
            devices = {parameter.device.type for parameter in on_card.parameters()}
            found[name] = (different / weights, zero, devices, masks.sparsity - expected.sparsity)
        return found

    for name, (different, zero, devices, sparsity) in on_a_gpu(prunings, tmp_path).items():
        assert different < 5e-3, (name, different)
        assert zero, name
        assert devices == {"cuda"}, name
        assert sparsity == pytest.approx(0, abs=1e-9), name


def test_sums_may_lie_in_the_memory_of_the_host(tmp_path: Path) -> None:
    def sums() -> tuple[set[str], set[str], float]:
        model, batch = made("llama")
        model, batch = model.cuda(), moved(batch)
        there = lrp_prune.attribute(model, [batch, batch])
        here = lrp_prune.attribute(model, [batch, batch], accumulate_on="cpu")
        worst = max(distance(here[name], there[name]) for name in there)
        return {t.device.type for t in there.values()}, {t.device.type for t in here.values()}, worst

    there, here, worst = on_a_gpu(sums, tmp_path)
    assert (there, here) == ({"cuda"}, {"cpu"})
    assert worst < 1e-5


def test_a_compiled_model_gives_what_the_plain_one_gives(tmp_path: Path) -> None:
    def worst() -> float:
        model, batch = made("llama")
        model, batch = model.cuda(), moved(batch)
        expected = lrp_prune.attribute(model, [batch])
        compiled = torch.compile(model)
        compiled(**batch, use_cache=False)
        relevance = lrp_prune.attribute(compiled, [batch])
        return max(distance(relevance[name], expected[name]) for name in expected)

    assert on_a_gpu(worst, tmp_path) < 1e-4


def test_collecting_needs_four_bytes_a_weight_and_one_layer_beside_the_model(tmp_path: Path) -> None:
    """The sums of all weights, and passing tensors of a layer; no second copy of weights, sums or gradients."""

    def bytes_beside() -> tuple[int, int, int]:
        model = (
            llama(
                hidden_size=512,
                intermediate_size=2048,
                num_hidden_layers=12,
                num_attention_heads=8,
                vocab_size=512,
                num_key_value_heads=8,
            )
            .cuda()
            .eval()
        )
        ids = torch.randint(0, 512, (1, 64), device="cuda")
        batch = {"input_ids": ids, "labels": ids}
        lrp_prune.attribute(model, [batch])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        relevance = lrp_prune.attribute(model, [batch, batch])
        extra = torch.cuda.max_memory_allocated() - before
        scored = sum(tensor.numel() for tensor in relevance.values())
        layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        return extra, scored, layer

    extra, scored, layer = on_a_gpu(bytes_beside, tmp_path)
    assert extra < 4 * scored + 4 * 4 * layer + (64 << 20), (extra / scored, layer)


def test_a_correction_on_a_card_zeroes_and_restores_exactly(tmp_path: Path) -> None:
    def correct() -> tuple[bool, bool, int]:
        model, batch = made("llama")
        model, batch = model.cuda(), moved(batch)
        other = {key: leaf.flip(1) for key, leaf in batch.items()}
        general, undesired = (lrp_prune.attribute(model, [given], statistic="signed") for given in (batch, other))
        before = copy.deepcopy(model.state_dict())
        patch = lrp_prune.Patch.from_contrast(model, general, undesired, amount=50)
        patch.apply_(model)
        changed = sum(int((model.state_dict()[key] != tensor).sum()) for key, tensor in before.items())
        patch.revert_(model)
        same = all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
        patch.save(tmp_path / "patch.safetensors")
        loaded = lrp_prune.Patch.load(tmp_path / "patch.safetensors")
        loaded.apply_(model)
        loaded.revert_(model)
        return same, all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items()), changed

    same, again, changed = on_a_gpu(correct, tmp_path)
    assert same and again
    assert changed == 50


@pytest.mark.parametrize("granularity", ["neuron", "head"])
def test_a_model_on_a_card_is_shrunk_by_batches_that_are_not(granularity: str, tmp_path: Path) -> None:
    def shrink() -> tuple[int, float, float, set[str]]:
        model, batch = made("llama")
        model = model.cuda()
        options: dict[str, Any] = {"recalibrate": False, "progress": False}
        masks = lrp_prune.prune(model, [batch], 0.5, "magnitude", "layer", granularity=granularity, **options)
        with torch.no_grad():
            expected = model(input_ids=moved(batch["input_ids"])).logits
        shrunk = lrp_prune.shrink(model, masks, [batch], measure=1)
        with torch.no_grad():
            apart = distance(model(input_ids=moved(batch["input_ids"])).logits, expected)
        return shrunk.taken, apart, shrunk.tolerance, {parameter.device.type for parameter in model.parameters()}

    taken, apart, tolerance, devices = on_a_gpu(shrink, tmp_path)
    assert taken > 0 and apart < tolerance and devices == {"cuda"}
