"""Training gates: the planted circuit is found, densities are reached, the model is left alone, two processes agree."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lrp_prune import circuits
from lrp_prune.circuits import Circuit, GateTraining
from lrp_prune.tasks.metrics import batch_metric
from tests.support.circuit_tasks import small_task
from tests.support.planted import NO, YES, PlantedHeads, PlantedNeurons, planted_task
from tests.support.small_models import build
from tests.support.trainers import forked


def gates_of(name: str = "gpt2", **options: Any) -> GateTraining:
    return GateTraining(build(name), small_task(), **options)


def trained(gates: GateTraining, epochs: int = 60, path: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **options,
    )
    trainer.fit(gates)
    return trainer


def planted(**options: Any) -> GateTraining:
    """Neurons 0 and 1 matter (in opposite prompts they are off), the six others change nothing."""
    model = PlantedNeurons([4.0, 3.0, *[1.0] * 6], [0.0, 0.0, *[2.0] * 6], [1.0, 1.0, *[0.0] * 6])
    return GateTraining(model, planted_task(8), "neuron", learning_rate=0.3, batch_size=4, **options)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_penalties_find_the_planted_circuit(ablation: str, tmp_path: Path) -> None:
    gates = planted(penalties=0.3, ablation=ablation)
    trained(gates, path=tmp_path)
    assert gates.circuit().kept["mlp_neuron:down"].tolist() == [True, True, *[False] * 6]
    result = circuits.evaluate(gates.base, gates.circuit(), planted_task(3), ablation=ablation)
    assert float(result.faithfulness) == pytest.approx(1)


@pytest.mark.slow
def test_what_tells_answers_from_distractors_is_less_than_what_the_model_does(tmp_path: Path) -> None:
    """The second neuron raises answer and distractor alike."""
    kept = {}
    for objective in ("kl", "answers"):
        gates = planted(penalties=0.3, objective=objective)
        with torch.no_grad():
            gates.base.down.weight[NO, 1] = gates.base.down.weight[YES, 1]
        trainer = trained(gates, path=tmp_path)
        assert f"gates/{objective}" in trainer.callback_metrics
        circuit = gates.circuit()
        kept[objective] = circuit.kept["mlp_neuron:down"].tolist()
        assert circuit.description["objective"] == f"1 {objective}"
    assert kept == {"kl": [True, True, *[False] * 6], "answers": [True, *[False] * 7]}


@pytest.mark.slow
def test_a_target_density_is_reached_and_kept(tmp_path: Path) -> None:
    gates = planted(density=0.5)
    trained(gates, epochs=150, path=tmp_path)
    assert 0.25 < gates.densities()["mlp_neuron"] < 0.55  # an upper bound: the neurons without effect do not come back
    assert gates.circuit().kept["mlp_neuron:down"][:2].all()
    assert gates.circuit(sizes={"mlp_neuron": 2}).kept["mlp_neuron:down"].tolist() == [True, True, *[False] * 6]


def test_targets_are_relative_bounds_that_fall_from_the_start() -> None:
    gates = planted(density=0.1)
    start = gates.densities()["mlp_neuron"]
    assert float(gates.pressure.start) == pytest.approx(start) and start > 0.9
    located = gates.locations()
    assert float(gates.pressure(located, 0.0)) == pytest.approx(0, abs=1e-5)
    excess = start / 0.1 - 1
    assert float(gates.pressure(located, 1.0)) == pytest.approx(5 / 2 * excess**2, rel=1e-4)
    assert float(gates.pressure(located, 0.5)) == pytest.approx(
        5 / 2 * (start / (start * 0.1) ** 0.5 - 1) ** 2, rel=1e-4
    )
    gates.pressure.step(located, 1.0)
    assert float(gates.pressure.multipliers) == pytest.approx(0.1 * excess, rel=1e-4)
    closed = {name: value - 20 for name, value in located.items()}
    assert float(gates.pressure(closed, 1.0)) == pytest.approx(-0.1 * excess, rel=1e-3)  # the multiplier's term alone
    for _ in range(20):
        gates.pressure.step(closed, 1.0)
    assert float(gates.pressure.multipliers) == 0 == float(gates.pressure(closed, 1.0))


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_remembering_saves_passes_and_changes_nothing(
    ablation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, passes = [], []
    for remember in (False, True):
        gates, calls = planted(penalties=0.3, ablation=ablation, remember=remember), []
        monkeypatch.setattr(gates, "full_logits", lambda batch, f=gates.full_logits, c=calls: c.append(1) or f(batch))
        trained(gates, epochs=5, path=tmp_path, limit_val_batches=0)
        found.append([value.detach() for value in gates.log_alpha])
        passes.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert passes == [10, 1]  # the two batches of an epoch have the same prompts


@pytest.mark.slow
def test_gates_rank_all_units(tmp_path: Path) -> None:
    gates = planted(penalties=0.3)
    trained(gates, path=tmp_path)
    ranking = gates.ranking()
    assert ranking.at(2) == gates.circuit() and {node.unit for node in ranking.nodes(2)} == {0, 1}
    assert ranking.description["ablation"] == "counterfactual" and len(ranking) == 8


@pytest.mark.slow
def test_all_granularities_are_trained_at_once(tmp_path: Path) -> None:
    model = PlantedHeads([4.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 2.0, 0.0])
    gates = GateTraining(
        model, planted_task(8, length=2), penalties=0.5, learning_rate=0.3, held_out=planted_task(4, length=3)
    )
    trained(gates, path=tmp_path)
    kept = {site.kind: gates.circuit().kept[site.name].tolist() for site in gates.sites}
    assert kept["attention_block"] == [True] and kept["head"] == [True, True, False]
    assert kept["attention_neuron"] == [True, False, True, False, False, False]


@pytest.mark.slow
def test_the_model_is_neither_trained_nor_stored(tmp_path: Path) -> None:
    model = build("llama").train()
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = GateTraining(model, small_task(), penalties=1.0)
    trainer = trained(gates, epochs=2, path=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    trainer.save_checkpoint(tmp_path / "gates.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "gates.ckpt", weights_only=True)
    assert sum(value.numel() for value in checkpoint["state_dict"].values()) == sum(s.units for s in gates.sites)
    other = GateTraining(build("llama"), small_task(), penalties=1.0)
    trainer = Trainer(max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                      enable_checkpointing=False)  # fmt: skip
    trainer.fit(other, ckpt_path=tmp_path / "gates.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(gates.log_alpha, other.log_alpha, strict=True))
    wrong = GateTraining(build("llama"), small_task(), "head")
    with pytest.raises(ValueError, match="checkpoint's gates are for sites"):
        wrong.on_load_checkpoint(checkpoint)


class Seeding(Callback):
    """Lightning does not store the states of random number generators."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_of_any_step_goes_on_as_if_nothing_had_happened(tmp_path: Path, accumulate: int) -> None:
    """Also one that is written in on_train_batch_end, and at an epoch's last window, which is a short one."""

    def fit(*callbacks: Callback, path: Path | None = None) -> GateTraining:
        gates = GateTraining(build("llama"), small_task(), "neuron", density=0.3, batch_size=1)
        trainer = Trainer(
            max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            callbacks=[Seeding(), *callbacks], enable_checkpointing=bool(callbacks), limit_val_batches=0,
            accumulate_grad_batches=accumulate, limit_train_batches=3,
        )  # fmt: skip
        loader = (
            gates.task.batches(1)[:1] * 3
        )  # Lightning begins with the first batch where a resume is within an epoch
        trainer.fit(gates, DataLoader(loader, batch_size=None), ckpt_path=path)
        return gates

    whole = fit(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    assert bool(whole.pressure.multipliers.any())
    written = sorted(tmp_path.glob("*.ckpt"))
    assert len(written) == (6 if accumulate == 1 else 4)
    for path in written[:-1]:
        again = fit(path=path)
        assert torch.equal(again.pressure.multipliers, whole.pressure.multipliers), path
        assert all(torch.equal(one, other) for one, other in zip(whole.log_alpha, again.log_alpha, strict=True)), path


def test_multipliers_move_by_the_steps_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gates, shares = gates_of(density=0.3, warmup=0.5), list[float]()
    monkeypatch.setattr(gates.pressure, "step", lambda located, progress: shares.append(progress))
    trainer = trained(gates, 4, tmp_path, limit_val_batches=0)
    steps = trainer.global_step
    assert shares == pytest.approx([2 * (step + 1) / steps for step in range(steps)])


def test_a_validation_that_moves_the_model_leaves_it_trainable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation runs in inference mode; changing the type of the weights stands for moving them to another device."""
    gates = gates_of()
    monkeypatch.setattr(gates.base, "to", lambda device: nn.Module.to(gates.base, torch.float64))
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path).validate(gates)
    assert not any(parameter.is_inference() for parameter in gates.base.parameters())
    gates.base(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in gates.base.parameters())


@pytest.mark.slow
def test_validation_measures_the_binary_circuit(tmp_path: Path) -> None:
    gates = planted(penalties=0.3, held_out=planted_task(3))
    trainer = trained(gates, path=tmp_path)
    measured = circuits.evaluate(gates.base, gates.circuit(), planted_task(3))
    assert float(trainer.callback_metrics["circuit/kl"]) == pytest.approx(float(measured.mean("kl")), abs=1e-6)
    expected = float(measured.mean("logit_difference"))
    assert float(trainer.callback_metrics["circuit/logit_difference"]) == pytest.approx(expected)
    assert float(trainer.callback_metrics["circuit/mlp_neurons"]) == pytest.approx(2 / 8)
    trainer.validate(gates, verbose=False)  # in inference mode
    assert float(trainer.callback_metrics["circuit/logit_difference"]) == pytest.approx(expected)


@pytest.mark.slow
def test_a_warm_start_orders_the_gates() -> None:
    model, task = build("gpt2"), small_task()
    rankings = [circuits.discover(model, task, kind, "attribution_patching") for kind in ("head", "neuron")]
    gates = GateTraining(
        model, task, ("head", "mlp_neuron", "mlp_block"), warm_start=rankings, initial=2.0, open_share={"head": 0.25}
    )
    located = gates.locations()
    for ranking in rankings:
        values = [float(located[node.group][node.unit].detach()) for node in ranking.nodes()]
        assert values == sorted(values, reverse=True) and values[0] > 0 > values[-1]
    heads = [value for name, values in located.items() if name.startswith("head:") for value in values.tolist()]
    # Of 8 heads the second is at the share: 1.5 ln(0.25 * 8 / rank).
    expected = [1.5 * math.log(2 / rank) for rank in range(1, 9)]
    assert sorted(heads, reverse=True) == pytest.approx(expected)
    # Without a target half begin open.
    neurons = torch.cat([values for name, values in located.items() if name.startswith("mlp_neuron:")])
    assert int((neurons > 0).sum()) == neurons.numel() // 2 - 1
    assert all(float(located[s.name].detach()) == 2.0 for s in gates.sites if s.kind == "mlp_block")
    with pytest.raises(ValueError, match="has no gates"):
        GateTraining(model, task, "head", warm_start=rankings[1])


@pytest.mark.slow
def test_circuits_of_gates_are_circuits(tmp_path: Path) -> None:
    gates = gates_of("llama")
    circuit = gates.circuit(sizes={"head": 3, "mlp_neuron": 0.5})
    assert circuit.sizes()["head"][0] <= 3
    circuit.save(tmp_path / "circuit.safetensors")
    assert Circuit.load(tmp_path / "circuit.safetensors") == circuit
    masked = gates_of("llama", ablation="zero").circuit(sizes={"head": 3, "mlp_neuron": 0.5})
    expected = circuits.evaluate(gates.base, masked, small_task(), ablation="zero").mean("logit_difference")
    masked.to_masks().apply_(gates.base)
    batches = small_task().batches()
    pruned = sum(float(batch_metric("logit_difference", gates.full_logits(b), b).sum()) for b in batches) / 3
    assert float(expected) == pytest.approx(pruned, rel=1e-4)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_train_the_same_gates(tmp_path: Path) -> None:
    gates = planted(penalties=0.3, held_out=planted_task(3))
    from lightning.pytorch import Callback

    class Save(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            torch.save([value.detach() for value in pl_module.log_alpha], tmp_path / f"{trainer.global_rank}.pt")

    trained(gates, path=tmp_path, strategy=forked(), devices=2, callbacks=[Save()])
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[0] > 0).tolist() == [True, True, *[False] * 6]
