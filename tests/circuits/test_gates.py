"""What gates switch: each known defect of the first code for them, and what they are made of."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import circuits
from lrp_prune.circuits import GateTraining
from lrp_prune.circuits.ablation import effective
from lrp_prune.circuits.hard_concrete import probability_open, sample
from lrp_prune.tasks.task import answer_logits
from tests.support.circuit_tasks import small_task
from tests.support.small_models import build

ATTENTIONS = ["eager", "sdpa"]


def gates_of(name: str = "gpt2", attention: str | None = "sdpa", **options: Any) -> GateTraining:
    return GateTraining(build(name, attention), small_task(), **options)


def switched(gates: GateTraining, value: float = 0.0, **units: Any) -> dict[str, Tensor]:
    """All gates open, those of the named kinds set; kind=(layer, units) or kind=slice(None) for all."""
    result = {site.name: torch.ones(site.units) for site in gates.sites}
    for kind, chosen in units.items():
        for layer, site in enumerate([site for site in gates.sites if site.kind == kind]):
            if isinstance(chosen, slice):
                result[site.name][:] = value
            elif chosen[0] == layer:
                result[site.name][chosen[1]] = value
    return result


def logits(gates: GateTraining, batch: dict[str, Tensor], switches: dict[str, Tensor]) -> Tensor:
    return gates.gated_logits(batch, switches).detach()


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_open_gates_are_the_model(name: str, ablation: str) -> None:
    gates = gates_of(name, ablation=ablation)
    for batch in gates.task.batches():
        torch.testing.assert_close(
            logits(gates, batch, switched(gates)), gates.full_logits(batch), rtol=1e-5, atol=1e-6
        )


def _without_layer(model: nn.Module, batch: dict[str, Tensor], layer: int) -> Tensor:
    """The model in which both blocks of a layer add what they add in the counterfactual run, computed independently."""
    block = model.transformer.h[layer]
    seen: dict[nn.Module, Tensor] = {}
    parts = (block.attn.c_proj, block.mlp.c_proj)
    handles = [part.register_forward_hook(lambda m, _, output: seen.__setitem__(m, output)) for part in parts]
    with torch.no_grad():
        answer_logits(model, batch, counterfactual=True)
        for handle in handles:
            handle.remove()
        handles = [part.register_forward_hook(lambda m, _, output: seen[m]) for part in parts]
        result = answer_logits(model, batch)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("layer", [0, 1])
def test_closing_a_layer_switches_its_contribution_and_not_the_residual_stream(layer: int) -> None:
    # Defect 2: closing one layer's gate made the output that of the counterfactual run.
    gates = gates_of()
    for batch in gates.task.batches():
        closed = logits(gates, batch, switched(gates, attention_block=(layer, [0]), mlp_block=(layer, [0])))
        torch.testing.assert_close(closed, _without_layer(gates.base, batch, layer))
        with torch.no_grad():
            counterfactual = answer_logits(gates.base, batch, counterfactual=True)
        assert not torch.allclose(closed, counterfactual, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_heads_are_true_heads(attention: str) -> None:
    # Defect 3: "heads" were slices of the attention's output behind the output projection. Defect 5: eager attention crashed.
    gates = gates_of(attention=attention)
    model: Any = gates.base
    for batch in gates.task.batches():
        closed = logits(gates, batch, switched(gates, head=(0, [2])))
        inputs: list[Tensor] = []
        projection = model.transformer.h[0].attn.c_proj
        note = projection.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].clone()))
        with torch.no_grad():
            answer_logits(model, batch, counterfactual=True)
        note.remove()

        def interchange(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            mixed = args[0].clone()
            mixed[..., 16:24] = inputs[0][..., 16:24]  # noqa: B023  # used at once
            return (mixed,)

        swap = projection.register_forward_pre_hook(interchange)
        with torch.no_grad():
            expected = answer_logits(model, batch)
        swap.remove()
        torch.testing.assert_close(closed, expected)
        assert not torch.allclose(closed, gates.full_logits(batch), atol=1e-6)


@pytest.mark.parametrize("kind", circuits.NODE_KINDS)
def test_every_kind_interchanges(kind: str) -> None:
    # Defect 4: attention neurons were zeroed where all others were interchanged. With equal prompts nothing may change.
    gates = gates_of()
    for batch in gates.task.batches():
        same = {**batch, "counterfactual_ids": batch["input_ids"]}
        torch.testing.assert_close(
            logits(gates, same, switched(gates, **{kind: slice(None)})), gates.full_logits(batch), rtol=1e-4, atol=1e-5
        )
        changed = logits(gates, batch, switched(gates, **{kind: slice(None)}))
        assert not torch.allclose(changed, gates.full_logits(batch), atol=1e-6)


def test_all_channels_of_a_head_are_the_head_and_all_heads_are_the_block() -> None:
    gates = gates_of()
    for batch in gates.task.batches():
        channels = logits(gates, batch, switched(gates, attention_neuron=(0, list(range(8, 16)))))
        torch.testing.assert_close(channels, logits(gates, batch, switched(gates, head=(0, [1]))))
        heads = logits(gates, batch, switched(gates, head=(1, [0, 1, 2, 3])))
        torch.testing.assert_close(heads, logits(gates, batch, switched(gates, attention_block=(1, [0]))))
        neurons = logits(gates, batch, switched(gates, mlp_neuron=(1, list(range(128)))))
        torch.testing.assert_close(neurons, logits(gates, batch, switched(gates, mlp_block=(1, [0]))))


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("seed", range(4))
def test_finalising_does_not_change_the_function(ablation: str, seed: int) -> None:
    # Defect 2, second half: the hierarchy was enforced by gates that were other functions.
    gates = gates_of(ablation=ablation)
    torch.manual_seed(seed)
    with torch.no_grad():
        for site, value in zip(gates.sites, gates.log_alpha, strict=True):
            value.copy_(torch.randn(site.units) + (-2.0 if site.kind == "attention_neuron" else 0.0))
            if site.kind == "attention_neuron" and seed % 2:
                value[: site.units // 2] = -1.0
            if site.kind == "mlp_neuron" and seed == 3:
                value[:] = -1.0
    raw = {name: value > 0 for name, value in gates.locations().items()}
    circuit = gates.circuit()
    assert circuit.size <= sum(int(mask.sum()) for mask in raw.values())
    assert circuit == circuit.closed()
    for batch in gates.task.batches():
        torch.testing.assert_close(logits(gates, batch, circuit.kept), logits(gates, batch, raw), rtol=1e-4, atol=1e-5)
    if seed == 3 and ablation != "zero":
        assert not any(bool(circuit.kept[site.name].any()) for site in circuit.sites if site.kind == "mlp_block")


def test_a_penalty_on_neurons_does_not_move_blocks() -> None:
    gates = gates_of(penalties={"mlp_neuron": 1.0})
    gates.pressure(gates.locations(), 1.0).backward()
    moved = {
        site.kind
        for site, value in zip(gates.sites, gates.log_alpha, strict=True)
        if value.grad is not None and value.grad.any()
    }
    assert moved == {"mlp_neuron"}


def test_the_density_counts_what_really_passes() -> None:
    gates = gates_of()
    closed = {site.name: torch.ones(site.units) for site in gates.sites}
    block = next(site for site in gates.sites if site.kind == "attention_block")
    closed[block.name][:] = 0
    passing = effective(gates.sites, closed)
    for site in gates.sites:
        inside = site.module == block.module
        assert passing[site.name].sum() == (0 if inside else site.units)


def test_hard_concrete_gates_have_the_stated_distribution() -> None:
    torch.manual_seed(0)
    for location in (-1.0, 0.0, 2.0):
        values = sample(torch.full((200_000,), location))
        assert float((values > 0).float().mean()) == pytest.approx(
            float(probability_open(torch.tensor(location))), abs=5e-3
        )
        assert float(values.min()) >= 0 and float(values.max()) <= 1 and bool((values == 1).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularities": "layer"}, "granularity must be"),
        ({"ablation": "noise"}, "ablation must be"),
        ({"density": 0.0}, "density must be in"),
        ({"open_share": 0.0}, "open_share must be in"),
        ({"initial": float("nan")}, "initial must be a number"),
        ({"penalties": -1.0}, "penalties must be 0 or more"),
        ({"objective": "accuracy"}, "objective must be of"),
        ({"objective": {"kl": -1.0}}, "weight of 0 or more"),
        ({"objective": {"kl": 0.0}}, "needs a positive weight"),
        ({"granularities": "head", "penalties": {"mlp_neuron": 1.0}}, "penalties names 'mlp_neuron'"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gates_of(**options)
