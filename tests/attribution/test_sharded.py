"""Relevance of models that ``fully_shard`` has divided is that of one process on all samples, and disturbs nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.attribution import Flat, Gamma
from lrp_prune.distributed.fsdp import groups_of_parameters
from lrp_prune.distributed.sharding import OtherProcessError
from tests.support.sharding import sharded, together, whole
from tests.support.small_models import build

pytestmark = pytest.mark.processes

SETTINGS: list[dict[str, Any]] = [
    {},
    {"statistic": "geometric", "composite": "epsilon"},
    {"statistic": "geometric", "include": ["*"]},
    {"statistic": "squared_token", "include": ["*.mlp", "*embed*"]},
    {"statistic": "abs_sample"},
    {"composite": "cp_lrp", "statistic": "signed"},
    {"composite": "epsilon", "statistic": "geometric", "chunks": 2},
    {"composite": lrp_prune.Composite("terms", {"linear": Gamma(0.4)}, base="epsilon"), "statistic": "squared_token"},
    {"composite": lrp_prune.Composite("terms", {"linear": Gamma(0.4)}, base="epsilon"), "statistic": "geometric"},
    {"composite": lrp_prune.Composite("equal", {"linear": Flat()}, base="epsilon"), "statistic": "geometric"},
    {"granularity": "neuron"},
    {"granularity": "head"},
    {"granularity": "block"},
    {"granularity": "embedding"},
]


def token_batches(processes: int, batches: int = 2, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Batches of two sequences, as many for each process; the last two tokens of one sequence do not count."""
    ids = torch.randint(2, 50, (processes * batches, 2, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:, 1, 5:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


def own(batches: list[Any], mesh: Any) -> list[Any]:
    return batches[mesh.get_local_rank() :: mesh.size()]


def llama(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build("llama", **config)
    model.tie_weights()
    return model


def furthest(found: lrp_prune.Relevance, expected: lrp_prune.Relevance) -> float:
    """The largest relative difference of a tensor; what describes the two must be equal."""
    for what in ("num_samples", "members", "layouts", "unscored", "parameter_shapes", "model", "target"):
        assert getattr(found, what) == getattr(expected, what), what
    assert list(found) == list(expected)
    return max(relative(found[name], expected[name]) for name in expected)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((whole(found) - expected.cpu()).norm() / expected.cpu().norm().clamp(min=1e-12))


@pytest.mark.parametrize("processes", [2, 3])
def test_relevance_is_that_of_one_process_on_all_samples(tmp_path: Path, processes: int) -> None:
    batches = token_batches(processes)
    expected = [lrp_prune.attribute(llama().eval(), batches, matmul_dtype=None, **setting) for setting in SETTINGS]

    def check(mesh: Any) -> None:
        model = sharded(llama(), mesh)
        for setting, reference in zip(SETTINGS, expected, strict=True):
            relevance = lrp_prune.attribute(model, own(batches, mesh), matmul_dtype=None, **setting)
            assert furthest(relevance, reference) < 1e-5, setting
            for name, tensor in relevance._sums.items():
                shape = relevance.sharding(name).local_shape if relevance.sharding(name) else reference[name].shape
                assert tuple(tensor.shape) == tuple(shape)
            relevance.save(tmp_path / "relevance.safetensors")
            assert furthest(lrp_prune.Relevance.load(tmp_path / "relevance.safetensors"), reference) < 1e-5
        for by in ("mean", "max", "sum", "total"):
            for mine, theirs in (
                (relevance, reference),
                (relevance * 2, reference * 2),
                (relevance - relevance * 0.5, reference * 0.5),
            ):
                assert max(relative(mine.normalized(by)[n], theirs.normalized(by)[n]) for n in theirs) < 1e-5
        assert furthest(relevance + relevance, reference + reference) < 1e-5

    together(check, processes, tmp_path)


class Convolutions(nn.Module):
    """Convolutions, of which inputs of ``geometric`` have the weights' own shape, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.again = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(5, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.again(self.first(inputs))).mean((2, 3)))


@pytest.mark.parametrize("processes", [2, 3])
def test_convolutions_and_layers_used_twice(tmp_path: Path, processes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(2, 3, 6, 6, generator=generator), torch.randint(4, (2,), generator=generator))
        for _ in range(2 * processes)
    ]
    settings = [{"statistic": "geometric"}, {"statistic": "abs_token"}, {"granularity": "neuron"}]
    expected = [lrp_prune.attribute(Convolutions().eval(), batches, matmul_dtype=None, **each) for each in settings]

    def check(mesh: Any) -> None:
        model = Convolutions()
        model = sharded(model, mesh, [model.first, model.again])
        for setting, reference in zip(settings, expected, strict=True):
            relevance = lrp_prune.attribute(model, own(batches, mesh), matmul_dtype=None, **setting)
            assert furthest(relevance, reference) < 1e-5, setting
            relevance.save(tmp_path / "relevance.safetensors")
            assert furthest(lrp_prune.Relevance.load(tmp_path / "relevance.safetensors"), reference) < 1e-5

    together(check, processes, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_transposed_weights_and_experts_that_one_process_does_not_use(tmp_path: Path, name: str) -> None:
    batches = [
        {"input_ids": torch.full((1, 3), 2 + index), "labels": torch.full((1, 3), 2 + index)} for index in range(2)
    ]
    settings = [{"statistic": "geometric"}, {"granularity": "head"}, {"granularity": "neuron"}]
    expected = [lrp_prune.attribute(build(name), batches, matmul_dtype=None, **each) for each in settings]

    def check(mesh: Any) -> None:
        model = build(name)
        model = sharded(model, mesh, model.transformer.h if name == "gpt2" else model.model.layers)
        for setting, reference in zip(settings, expected, strict=True):
            relevance = lrp_prune.attribute(model, own(batches, mesh), matmul_dtype=None, **setting)
            assert furthest(relevance, reference) < 1e-5, setting
            for scope in ("row", "2:4") if "statistic" in setting else ("global", "layer"):
                masks = lrp_prune.select(relevance, 0.5, scope=scope)
                assert masks.gathered() == lrp_prune.select(reference, 0.5, scope=scope)

    together(check, 2, tmp_path)


def test_meshes_of_replicas_of_shards(tmp_path: Path) -> None:
    """Two replicas of two shards each, and replicas alone."""
    batches = token_batches(4, 1)
    expected = lrp_prune.attribute(llama().eval(), batches, matmul_dtype=None)

    def check(mesh: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        both = init_device_mesh(mesh.device_type, (2, 2), mesh_dim_names=("replicate", "shard"))
        relevance = lrp_prune.attribute(sharded(llama(), both), own(batches, mesh), matmul_dtype=None)
        assert furthest(relevance, expected) < 1e-5
        masks = lrp_prune.select(relevance, 0.5, scope="global")
        assert masks.gathered() == lrp_prune.select(expected, 0.5, scope="global")

    together(check, 4, tmp_path)


def test_checkpointed_layers_frozen_weights_and_low_precision(tmp_path: Path) -> None:
    batches = token_batches(2)

    def made(checkpointed: str = "", frozen: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        model = llama().to(dtype)
        layers = list(model.model.layers)
        if checkpointed == "transformers":
            model.gradient_checkpointing_enable()
            model.train()
        elif checkpointed:
            apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("mlp" in name)
        return model

    options = {"matmul_dtype": None, "trainable_only": True}
    cases: dict[str, tuple[dict[str, Any], float]] = {
        "checkpointed by torch": ({"checkpointed": "torch"}, 1e-5),
        "checkpointed by transformers": ({"checkpointed": "transformers"}, 1e-5),
        "frozen": ({"frozen": True}, 1e-5),
        "bfloat16": ({"dtype": torch.bfloat16}, 2e-2),
    }
    expected = {
        name: lrp_prune.attribute(made(**arguments).eval(), batches, **options)
        for name, (arguments, _) in cases.items()
    }

    def check(mesh: Any) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        for name, (arguments, tolerance) in cases.items():
            model = sharded(made(**arguments), mesh)
            relevance = lrp_prune.attribute(model, own(batches, mesh), **options)
            assert furthest(relevance, expected[name]) < tolerance, name
            assert all(tensor.dtype == torch.float32 for tensor in relevance._sums.values())
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        relevance = lrp_prune.attribute(sharded(made(), mesh, mp_policy=policy), own(batches, mesh), **options)
        reference = lrp_prune.attribute(made().eval(), batches, **options)
        assert furthest(relevance, reference) < 2e-2
        relevance = lrp_prune.attribute(
            sharded(made(), mesh),
            own(batches, mesh),
            **options,
            forward_context=lambda: torch.autocast(mesh.device_type, torch.bfloat16),
        )
        assert furthest(relevance, reference) < 2e-2

    together(check, 2, tmp_path)


def test_attributing_and_wanda(tmp_path: Path) -> None:
    batch = {"input_ids": token_batches(1)[0]["input_ids"]}
    scores = lrp_prune.pruning.scorers.scorer("wanda", llama().eval())
    for entry in token_batches(2):
        scores.update(entry)
    expected = scores.compute()
    with lrp_prune.attributing(llama().eval(), latent=["model.layers.*"]) as propagation:
        pass
    reference = llama().eval()
    with lrp_prune.attributing(reference, latent=["model.layers.*"]) as propagation:
        roots = propagation.relevance(reference(**batch).logits[:, -1].max(-1).values.sum())

    def check(mesh: Any) -> None:
        model = sharded(llama(), mesh).eval()
        with lrp_prune.attributing(model, latent=["model.layers.*"]) as propagation:
            found = propagation.relevance(
                model(**{k: v.to(mesh.device_type) for k, v in batch.items()}).logits[:, -1].max(-1).values.sum()
            )
        assert list(found) == list(roots)
        assert max(relative(found[name], roots[name]) for name in roots) < 1e-5
        scores = lrp_prune.pruning.scorers.scorer("wanda", model)
        for entry in own(token_batches(2), mesh):
            scores.update(entry)
        assert furthest(scores.compute(), expected) < 1e-5

    together(check, 2, tmp_path)


@pytest.mark.parametrize("synchronized", [True, False])
@pytest.mark.parametrize("collects", ["well", "with an error"])
def test_gradients_in_an_accumulation_window_are_untouched(tmp_path: Path, synchronized: bool, collects: str) -> None:
    def train(mesh: Any, collect: bool) -> list[torch.Tensor]:
        model = sharded(llama(), mesh).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        batches = [{k: v.to(mesh.device_type) for k, v in entry.items()} for entry in own(token_batches(2, 4), mesh)]
        gradients = []
        for index, batch in enumerate(batches):
            model.set_requires_gradient_sync(synchronized or index % 2 == 1)
            model(**batch).loss.backward()
            model.set_requires_gradient_sync(True)  # gradients that were not reduced wait for the next backward
            if index == 0 and collect and collects == "well":
                lrp_prune.attribute(model, own(token_batches(2), mesh))
                assert lrp_prune.attribute(model, own(token_batches(2), mesh), granularity="head").num_samples == 8
            elif index == 0 and collect:
                bad = lambda model, batch: model(**batch).logits.sum() * float("inf")  # noqa: E731
                with pytest.raises(FloatingPointError):
                    lrp_prune.attribute(model, own(token_batches(2), mesh), target=bad)
                with pytest.raises(ZeroDivisionError):
                    lrp_prune.attribute(
                        model,
                        own(token_batches(2), mesh),
                        target=lambda model, batch: model(**batch).logits.sum() / (1 // 0),
                    )
            if index == 0:
                gradients += [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        flags = {
            (g.reduce_grads, g.all_reduce_grads)
            for m in model.modules()
            if hasattr(m, "unshard")
            for g in groups_of_parameters(m)
        }
        assert flags == {(True, True)}
        return gradients + [parameter.to_local().clone() for parameter in model.parameters()]

    def check(mesh: Any) -> None:
        plain, collected = train(mesh, False), train(mesh, True)
        assert len(plain) == len(collected)
        assert all(torch.equal(a, b) for a, b in zip(plain, collected, strict=True))

    together(check, 2, tmp_path)


def test_errors_of_one_process_are_raised_in_all(tmp_path: Path) -> None:
    def check(mesh: Any) -> list[str]:
        model, rank, said = sharded(llama(), mesh), mesh.get_local_rank(), []

        def fails(model: nn.Module, batch: Any) -> torch.Tensor:
            value = model(**batch).logits.sum()
            return value * float("nan") if rank == 1 else value

        batches = own(token_batches(2), mesh)
        own_failure = (OtherProcessError, FloatingPointError)[rank]
        for arguments, kind in (({"target": fails}, own_failure), ({"batches": batches[: 1 + rank]}, ValueError)):
            with pytest.raises(kind) as error:
                lrp_prune.attribute(model, **{"batches": batches, **arguments})
            said.append(str(error.value))
        lrp_prune.attribute(model, batches)
        return said

    first, second = together(check, 2, tmp_path)
    assert first[0].startswith("collecting relevance failed in process 1: FloatingPointError")
    assert "not finite" in second[0]
    assert first[1] == second[1] and first[1].startswith("1 of 2 processes have 1 batches")


def test_what_was_gathered_in_inference_mode_is_refused(tmp_path: Path) -> None:
    def check(mesh: Any) -> None:
        from lrp_prune.engine.unsharding import make_ordinary

        batches = own(token_batches(2), mesh)
        for prepared in (False, True):
            model = sharded(llama(), mesh)
            with torch.inference_mode():
                if prepared:
                    make_ordinary(model)
                model(input_ids=batches[0]["input_ids"].to(mesh.device_type))
            if prepared:
                lrp_prune.attribute(model, batches)
            else:
                with pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
                    lrp_prune.attribute(model, batches)

    together(check, 2, tmp_path)


def test_tensor_parallel_models_are_refused(tmp_path: Path) -> None:
    def check(mesh: Any) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(mesh.device_type)
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        with pytest.raises(ValueError, match=r"0\.weight is a DTensor .* use fully_shard alone"):
            lrp_prune.attribute(model, [(torch.ones(2, 4), torch.zeros(2).long())])

    together(check, 2, tmp_path)
