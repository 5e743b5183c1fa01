"""Prints the memory that collecting relevance and training with pruning take on each device, before anything is loaded.

    python examples/plan_memory.py
    python examples/plan_memory.py --model meta-llama/Llama-2-13b-hf --devices 8 --optimizer sgd     # with a network

By default for Llama-2-7B and Llama-3-8B, in bfloat16 with AdamW, sharded by FSDP2 over 1, 4 and 8 devices.
"""

import argparse

import torch
from presenting import aligned
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import lrp_prune

_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
KNOWN = {
    "Llama-2-7B": LlamaConfig(**_LLAMA, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000),
    "Llama-3-8B": LlamaConfig(**_LLAMA, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
}
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "relevance",
    "masks",
    "activations",
    "temporary",
    "collecting",
    "training",
)


def rows(name: str, config: PretrainedConfig, options: argparse.Namespace) -> list[str]:
    """One row of the table for each number of devices, in GiB."""
    lines = []
    for devices in options.devices:
        plan = lrp_prune.estimate(
            config,
            devices,
            strategy=options.strategy,
            batch=(1, options.tokens),
            optimizer=options.optimizer,
            dtype=getattr(torch, options.dtype),
            accumulate_on=options.accumulate_on,
        )
        cells = [f"{getattr(plan, part) / 2**30:.1f}" for part in PARTS]
        lines.append(" | ".join([f"| {name}", str(devices), *cells]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=[], help="hub names or folders with a configuration; the two Llamas if not given")
    add("--devices", nargs="+", type=int, default=[1, 4, 8])
    add("--strategy", choices=["fsdp", "ddp"], default="fsdp")
    add("--tokens", type=int, default=2048, help="tokens on each device")
    add("--optimizer", default="adamw", help="adamw, adam, momentum, sgd or none")
    add("--dtype", default="bfloat16", help="of the weights")
    add("--accumulate-on", default=None, help="cpu keeps the relevance in the host's memory")
    options = parser.parse_args()
    configs = {name: AutoConfig.from_pretrained(name) for name in options.model} or KNOWN
    print(f"GiB on each device, {options.strategy}, {options.dtype}, {options.optimizer}, {options.tokens} tokens")
    table = ["| model | devices | " + " | ".join(PARTS) + " |", "|---" * (2 + len(PARTS)) + "|"]
    for name, config in configs.items():
        table += rows(name, config, options)
    print(aligned("\n".join(table)))


if __name__ == "__main__":
    main()
