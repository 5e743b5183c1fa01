"""Edge attribution patching (Syed et al., arXiv 2310.10348), written plainly for Llama models, and what it keeps in memory.

    python tests/benchmarks/edge_patching.py               # gate training against it, on the same model and batch

Every edge of the residual stream is scored: from the embeddings, each head and each MLP to the queries, keys and values of
each head, each MLP and the logits of all later layers. As its authors' code does, each head reads a copy of the stream of its
own for queries, keys and values (of which the gradients are needed apart), grouped keys and values are repeated for each
head, and the differences of all writers' outputs between counterfactual and clean prompt are kept through the backward.

What is counted is the allocator's: all bytes of live tensors, at their peak, above what lived before.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from sys import path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import language_model

from lrp_prune import circuits, tasks
from lrp_prune.circuits.hard_concrete import sample
from lrp_prune.tasks.metrics import batch_metric, kl_divergence
from lrp_prune.tasks.task import Batch

Hook = Callable[[str, Tensor], Tensor]
"""Sees what a node reads or writes by name, and returns it."""


def edge_ready(model: nn.Module, ids: Tensor, wrote: Hook, reads: Hook) -> Tensor:
    """The logits ``[samples, vocabulary]`` at the last position, with a copy of the residual stream for each reader.

    Args:
        model: a ``LlamaForCausalLM``.
        ids: ``[samples, tokens]``.
        wrote: sees the writers ``input``, ``a<layer>`` (``[samples, tokens, heads, width]``) and ``m<layer>``.
        reads: sees the readers ``a<layer>.q``, ``.k`` and ``.v`` (``[samples, tokens, heads, width]``), ``m<layer>`` and
            ``logits``.
    """
    inner, config = model.model, model.config
    heads, size = config.num_attention_heads, model.model.layers[0].self_attn.head_dim
    stream = wrote("input", inner.embed_tokens(ids))
    rotations = inner.rotary_emb(stream, torch.arange(ids.shape[1])[None])
    for layer, block in enumerate(inner.layers):
        attention = block.self_attn

        def projected(kind: str, layer: int = layer, block: nn.Module = block, stream: Tensor = stream) -> Tensor:
            """``[samples, heads, tokens, size]``."""
            weight = getattr(block.self_attn, f"{kind}_proj").weight.view(-1, size, stream.shape[-1])
            weight = weight.repeat_interleave(heads // len(weight), 0)
            copies = reads(f"a{layer}.{kind}", stream[:, :, None].repeat(1, 1, heads, 1))
            return torch.einsum("sthd,hed->shte", block.input_layernorm(copies), weight)

        q, k = apply_rotary_pos_emb(projected("q"), projected("k"), *rotations)
        mixed = F.scaled_dot_product_attention(q, k, projected("v"), is_causal=True)
        output = attention.o_proj.weight.view(-1, heads, size)
        written = wrote(f"a{layer}", torch.einsum("shte,dhe->sthd", mixed, output))
        stream = stream + written.sum(2)
        copy = reads(f"m{layer}", stream.clone())
        stream = stream + wrote(f"m{layer}", block.mlp(block.post_attention_layernorm(copy)))
    final = reads("logits", stream.clone())
    logits: Tensor = model.lm_head(inner.norm(final[:, -1]))
    return logits


def edge_scores(model: nn.Module, batch: Batch, metric: str = "logit_difference") -> dict[str, Tensor]:
    """The score of each edge: reader -> ``[writers before it]`` or ``[writers before it, heads]``, summed over the batch.

    Writers are in the order in which they write: the embeddings, then the heads and the MLP of each layer.
    """
    samples, tokens = batch["input_ids"].shape
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    writers = 1 + len(model.model.layers) * (heads + 1)
    differences = torch.zeros(samples, tokens, writers, width, dtype=model.dtype)
    position, scores = [0], {}

    def note(sign: float) -> Hook:
        position[0] = 0

        def wrote(name: str, written: Tensor) -> Tensor:
            rows = written.detach() if written.dim() == 4 else written.detach()[:, :, None]
            differences[:, :, position[0] : position[0] + rows.shape[2]] += sign * rows
            position[0] += rows.shape[2]
            return written

        return wrote

    def score(name: str, copy: Tensor) -> Tensor:
        before = position[0]

        def backward(gradient: Tensor) -> None:
            letters = "h" if gradient.dim() == 4 else ""
            scores[name] = torch.einsum(f"stwd,st{letters}d->w{letters}", differences[:, :, :before], gradient)

        # Without this nothing would require a gradient, as no weight does.
        copy = copy if copy.requires_grad else copy.requires_grad_()
        copy.register_hook(backward)
        return copy

    with torch.no_grad():
        edge_ready(model, batch["counterfactual_ids"], note(1.0), lambda name, copy: copy)
    with torch.enable_grad():
        logits = edge_ready(model, batch["input_ids"], note(-1.0), score)
        batch_metric(metric, logits, batch).sum().backward()
    return scores


def gate_step(gates: Any, batch: Batch) -> None:
    """One step of gate training, as :meth:`~lrp_prune.circuits.GateTraining.training_step` does it."""
    drawn = {name: sample(value) for name, value in gates.locations().items()}
    full = gates.full_logits(batch)
    loss = kl_divergence(full, gates.gated_logits(batch, drawn)).mean() + gates.pressure(gates.locations(), 0.5)
    loss.backward()


def peak_bytes(action: Callable[[], Any]) -> int:
    """The most bytes of tensors that live at once while ``action`` runs, above those that lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=language_model.PACKAGED_MODEL, help="the packaged model, or a hub name or folder (Llama)")
    add("--batch-sizes", nargs="+", type=int, default=[4, 16], help="prompts in a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = language_model.load_model(options.model)
    model.requires_grad_(False)
    print("| prompts | tokens | edge attribution patching, MB | gate training, MB | ratio |\n|---|---|---|---|---|")
    for batch_size in options.batch_sizes:
        task = tasks.IndirectObject(tokenizer, samples=4 * batch_size)
        batch = max(task.batches(batch_size), key=lambda batch: len(batch["input_ids"]))
        gates = circuits.GateTraining(model, task, density=0.05, batch_size=batch_size)
        edges = peak_bytes(lambda batch=batch: edge_scores(model, batch))
        ours = peak_bytes(lambda gates=gates, batch=batch: gate_step(gates, batch))
        samples, tokens = batch["input_ids"].shape
        print(f"| {samples} | {tokens} | {edges / 1e6:.0f} | {ours / 1e6:.0f} | {edges / ours:.2f} |", flush=True)
        print(json.dumps({"prompts": samples, "tokens": tokens, "edge_bytes": edges, "gate_bytes": ours}), flush=True)


if __name__ == "__main__":
    main()
