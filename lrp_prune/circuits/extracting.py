"""From circuit to model: what the circuit does not keep is gone, or a constant."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrp_prune.circuits.ablation import Place, Reference
from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.references import reference_for
from lrp_prune.models.subject import forwarded
from lrp_prune.names import named_modules, named_parameters
from lrp_prune.pruning import Masks
from lrp_prune.tasks.task import Task


def keep_only_(
    model: nn.Module,
    circuit: Circuit,
    task: Task | None = None,
    ablation: str = "zero",
    *,
    add_biases: bool = False,
    batch_size: int = 16,
) -> Masks:
    r"""Make the circuit the whole model, in place.

    Under zero ablation this is ``circuit.to_masks().apply_(model)``. Under mean ablation what the removed units contribute on
    average is added to the bias of the layer that they are read by (:math:`b \leftarrow b + W_r \bar a_r`; of a block to its
    output's), and then their weights are zeroed: the model does by itself what ablated evaluation does to it. A
    counterfactual is another prompt each time and cannot be part of a model.

    Args:
        model: the model that the circuit was found in.
        circuit: of units; of weights for zero ablation only.
        task: over whose counterfactual prompts means are taken, for ``"mean"``.
        ablation: ``"zero"`` or ``"mean"``.
        add_biases: give a bias to layers that have none and need one; the state dict then has names that ``from_pretrained``
            does not know unless the model's configuration has such biases (Llama's ``attention_bias`` and ``mlp_bias``).
        batch_size: prompts in a batch.

    Returns:
        The masks of what is kept, for pruning (they are what training must keep at zero) and for patches:
        ``Patch.from_positions(model, {name: ~mask for name, mask in circuit.to_masks().items()})`` is zero ablation that can be
        undone.

    Raises:
        ValueError: for another ablation, no task, a layer without a bias, or one that is called more than once in a forward;
            nothing has changed then.

    Example:
        >>> from lrp_prune.circuits import discover
        >>> from lrp_prune.tasks import TableTask
        >>> class Tiny(nn.Sequential):
        ...     def forward(self, input_ids):
        ...         return super().forward(input_ids)
        >>> _ = torch.manual_seed(0)
        >>> model = Tiny(nn.Embedding(4, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> row = {"clean": "0", "counterfactual": "1", "answers": " 2", "distractors": " 3"}
        >>> task = TableTask(lambda text, **_: {"input_ids": [int(word) for word in text.split()]}, [row])
        >>> circuit = discover(model, task).at(4)
        >>> keep_only_(model, circuit, task, "mean").sparsity
        0.75
    """
    if ablation not in ("zero", "mean"):
        raise ValueError(
            f"ablation must be 'zero' or 'mean' for a model of its own, got {ablation!r}: counterfactual activations are of "
            "another prompt"
        )
    module, masks = forwarded(model), circuit.to_masks()
    if ablation == "mean":
        if task is None:
            raise ValueError("means are taken over a task's counterfactual prompts: give task=")
        if circuit.granularity == "weight":
            raise ValueError("weights have no activations to replace by means: use ablation='zero'")
        batches = task.batches(batch_size)
        means = reference_for(module, circuit.sites, batches, "mean")(batches[0])
        _bake(module, circuit, means or {}, add_biases)
        # Biases now hold what is left of closed blocks.
        baked = {f"{site.module}.bias" for site in circuit.sites}
        masks = Masks({name: masks[name] for name in masks if name not in baked}, granularity=masks.granularity)
    masks.apply_(model)
    return masks


def _bake(model: nn.Module, circuit: Circuit, means: Reference, add_biases: bool) -> None:
    """Add to the biases what the removed units write on average."""
    modules, parameters = named_modules(model), named_parameters(model)
    kept = circuit.closed().kept
    changes: dict[str, Tensor] = {}
    for name in dict.fromkeys(site.module for site in circuit.sites):
        sites = [site for site in circuit.sites if site.module == name]
        if all(bool(kept[site.name].all()) for site in sites):
            continue
        layer, bias = modules[name], parameters.get(f"{name}.bias")
        if bias is None and not (add_biases and isinstance(layer, nn.Linear)):
            raise ValueError(
                f"{name} ({type(layer).__name__}) has no bias that could hold the means of what is removed: pass "
                "add_biases=True (of nn.Linear), or use ablation='zero'"
            )
        closed = next((site for site in sites if site.at_output and not bool(kept[site.name])), None)
        if closed is not None:
            old = torch.zeros(1, device="cpu") if bias is None else bias.detach().cpu()
            changes[name] = _single(means, (name, True)).to(torch.float64).cpu() - old.to(torch.float64)
            continue
        inner = [site for site in sites if not site.at_output]
        reader = inner[0].members[0]
        weight = (
            parameters[reader.parameter].detach().movedim(1 if reader.dim is None else reader.dim, 1)
        )  # [written, read]
        removed = torch.zeros(weight.shape[1], dtype=torch.bool, device="cpu")
        for site in inner:
            removed |= ~kept[site.name].repeat_interleave(site.width)
        average = _single(means, (name, False)).to(torch.float64).cpu() * removed
        changes[name] = weight.to(torch.float64).cpu() @ average
    with torch.no_grad():
        for name, change in changes.items():
            weight = next(modules[name].parameters())
            if f"{name}.bias" not in parameters:
                modules[name].bias = nn.Parameter(change.to(weight), requires_grad=weight.requires_grad)
            else:
                parameters[f"{name}.bias"].add_(change.to(weight))


def _single(means: Reference, place: Place) -> Tensor:
    found: Sequence[Tensor] = means[place]
    if len(found) != 1:
        raise ValueError(
            f"{place[0]} is called {len(found)} times in a forward, with a mean for each: one bias cannot hold them; use "
            "ablation='zero'"
        )
    return found[0]
