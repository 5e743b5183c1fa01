"""One training with pruning, on one device or several: alone, replicated (DDP) or sharded (FSDP2).

    python examples/multi_gpu.py                                    # one device
    python examples/multi_gpu.py --strategy ddp --devices 2
    python examples/multi_gpu.py --strategy fsdp --devices 2
    python examples/multi_gpu.py fit --config examples/multi_gpu.yaml    # the same by LightningCLI

A small Llama learns to predict the bytes of the State of the Union addresses, and half of its weights are removed in two
rounds while it learns. GPUs are used where there are enough, else as many CPU processes as there are devices asked for. The
model and the callback do not know on how many devices they run.
"""

import argparse
import sys
from typing import Any

import language_model
import lightning
import presenting
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lrp_prune.callbacks import RelevancePruning


class ByteModel(lightning.LightningModule):
    """A small Llama over bytes.

    Args:
        hidden: width of the model.
        layers: number of decoder layers.
        learning_rate: of AdamW.
    """

    def __init__(self, hidden: int = 128, layers: int = 4, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = LlamaConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
        self.model: LlamaForCausalLM | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = LlamaForCausalLM(self.config)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                from torch.distributed.fsdp import fully_shard

                for layer in self.model.model.layers:
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        return self.model(input_ids=input_ids, **arguments)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = self(**batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        loss = self(**batch, use_cache=False).loss
        self.log("bits_per_byte", loss / torch.log(torch.tensor(2.0)), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class _Windows(Dataset):
    def __init__(self, data: Tensor, length: int) -> None:
        self.data, self.length = data, length

    def __len__(self) -> int:
        return len(self.data) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.data[index * self.length : (index + 1) * self.length]
        return {"input_ids": window, "labels": window}


class Speeches(lightning.LightningDataModule):
    """Windows of bytes from the State of the Union addresses; the last tenth of them for validation.

    Args:
        windows: how many windows are used in all.
        length: bytes in a window.
        batch_size: windows in a batch, on each device.
    """

    def __init__(self, windows: int = 2000, length: int = 128, batch_size: int = 16) -> None:
        super().__init__()
        self.windows, self.length, self.batch_size = windows, length, batch_size

    def setup(self, stage: str) -> None:
        text = "\n".join(language_model.load_documents()).encode()[: self.windows * self.length]
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        border = len(data) * 9 // 10 // self.length * self.length
        self.train, self.held_out = _Windows(data[:border], self.length), _Windows(data[border:], self.length)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, self.batch_size)


def strategy_of(name: str, devices: int) -> Strategy | str:
    """Lightning's strategy by a short name."""
    if name == "ddp":
        return DDPStrategy()
    if name == "fsdp":
        return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    return "auto"


def main() -> None:
    presenting.quiet()
    if sys.argv[1:2] in (["fit"], ["validate"]):
        torch.set_num_threads(1)
        LightningCLI(ByteModel, Speeches, save_config_callback=None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--strategy", choices=["one", "ddp", "fsdp"], default="one", help="how the devices work together")
    add(
        "--devices",
        type=int,
        default=None,
        help="GPUs, or CPU processes where there are not as many; 1, or 2 with a strategy",
    )
    add("--epochs", type=int, default=3, help="pruning takes the first of them for each round")
    add("--sparsity", type=float, default=0.5, help="fraction of the weights to remove")
    add("--windows", type=int, default=2000, help="windows of 128 bytes, a tenth of them held out")
    options = parser.parse_args()
    devices = options.devices or (1 if options.strategy == "one" else 2)

    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    pruning = RelevancePruning(sparsity=options.sparsity, rounds=2)
    trainer = lightning.Trainer(
        strategy=strategy_of(options.strategy, devices),
        devices=devices,
        accelerator="gpu" if torch.cuda.device_count() >= devices else "cpu",
        max_epochs=options.epochs,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=presenting.IN_TERMINAL,
    )
    trainer.fit(ByteModel(), Speeches(options.windows))
    if trainer.is_global_zero:
        quality = float(trainer.callback_metrics["bits_per_byte"])
        print(f"\n{options.strategy} on {devices}: {pruning.masks.sparsity:.1%} pruned, {quality:.2f} bits per byte")


if __name__ == "__main__":
    main()
