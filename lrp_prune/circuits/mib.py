"""Export to the graph files of EAP-IG and the MIB benchmark (``Graph.from_json`` of github.com/hannamw/EAP-IG, version 2)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.ranking import Ranking


def save_mib_graph(
    circuit: Circuit,
    path: str | os.PathLike[str],
    ranking: Ranking | None = None,
    parallel: bool = False,
    heads: int | None = None,
    width: int | None = None,
) -> None:
    """Write a circuit of heads and blocks as a MIB graph in JSON.

    Heads are the nodes ``a<layer>.h<head>``, MLP blocks ``m<layer>``; an attention block switches all heads of its layer. An
    edge is in the graph where both its ends are. Nodes that the circuit does not know stay in, without a score.

    Args:
        circuit: of heads, attention blocks and MLP blocks.
        path: the file to write.
        ranking: where the nodes' scores are taken from.
        parallel: whether attention and MLP of a layer read the same residual stream (GPT-J, GPT-NeoX).
        heads: heads in each layer, where the circuit has none.
        width: of the residual stream, where the circuit has no heads.

    Raises:
        ValueError: if it has units that the format does not know (MIB's neurons are dimensions of what a node writes), layers
            without attention or MLP, or ``heads`` and ``width`` are unknown.
    """
    kinds = {site.kind for site in circuit.sites}
    foreign = sorted(kinds - {"head", "attention_block", "mlp_block"})
    if foreign or not kinds:
        raise ValueError(
            f"MIB graphs know heads and MLP blocks, not {foreign[0] if foreign else circuit.granularity}s: discover with "
            "granularity=['head', 'mlp_block']"
        )
    sites = {kind: [site for site in circuit.sites if site.kind == kind] for kind in kinds}
    layers = {len(of_kind) for of_kind in sites.values()}
    if len(layers) > 1:
        raise ValueError(
            f"MIB graphs have attention and an MLP in each layer, the circuit has {sorted(layers)} of them"
        )
    for site in sites.get("head", ()):
        heads = site.units if heads is None else heads
        reader = site.members[0]
        width = (
            dict(site.shapes)[reader.parameter][0 if reader.dim is None else 1 - reader.dim] if width is None else width
        )
        if site.units != heads:
            raise ValueError(f"MIB graphs have equally many heads in each layer, got {heads} and {site.units}")
    if heads is None or width is None:
        raise ValueError("the circuit has no heads: give heads= and width= of the model")
    number = layers.pop()
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True}}
    for layer in range(number):
        for head in range(heads):
            nodes[f"a{layer}.h{head}"] = _attention_node(circuit, sites, layer, head, ranking)
        nodes[f"m{layer}"] = _node(circuit, sites.get("mlp_block"), layer, 0, ranking)
    nodes["logits"] = {"in_graph": True}
    graph = {
        "cfg": {"n_layers": number, "n_heads": heads, "parallel_attn_mlp": parallel, "d_model": width},
        "nodes": nodes,
        "edges": _edges(nodes, number, heads, parallel),
    }
    Path(path).write_text(json.dumps(graph), encoding="utf-8")


def _node(circuit: Circuit, sites: Any, layer: int, unit: int, ranking: Ranking | None) -> dict[str, Any]:
    if not sites:
        return {"in_graph": True}
    name = sites[layer].name
    node: dict[str, Any] = {"in_graph": bool(circuit.kept[name][unit])}
    if ranking is not None and name in ranking.scores:
        node["score"] = float(ranking.scores[name][unit])
    return node


def _attention_node(
    circuit: Circuit, sites: Mapping[str, Any], layer: int, head: int, ranking: Ranking | None
) -> dict[str, Any]:
    block = _node(circuit, sites.get("attention_block"), layer, 0, ranking)
    if "head" not in sites:
        return block
    node = _node(circuit, sites["head"], layer, head, ranking)
    return {**node, "in_graph": node["in_graph"] and block["in_graph"]}


def _edges(nodes: Mapping[str, Any], layers: int, heads: int, parallel: bool) -> dict[str, Any]:
    edges: dict[str, Any] = {}

    def connect(parents: list[str], child: str, kinds: tuple[str, ...] = ("",)) -> None:
        for parent in parents:
            inside = nodes[parent]["in_graph"] and nodes[child]["in_graph"]
            for kind in kinds:
                edges[f"{parent}->{child}{kind}"] = {"score": 0.0, "in_graph": inside}

    before = ["input"]
    for layer in range(layers):
        of_layer = [f"a{layer}.h{head}" for head in range(heads)]
        for child in of_layer:
            connect(before, child, ("<q>", "<k>", "<v>"))
        connect(before if parallel else before + of_layer, f"m{layer}")
        before = [*before, *of_layer, f"m{layer}"]
    connect(before, "logits")
    return edges
