"""The models of the panel: each is made and trained here in seconds to a minute, and judged on data that it has not seen."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from sys import path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn

Batch = Any
Split = list[Batch]


@dataclass
class Data:
    """Batches to train on, to calibrate with (of the training data), and to judge by, which nothing else sees."""

    train: Split
    reference: Split
    held_out: Split


@dataclass(frozen=True)
class Case:
    """One kind of model on one kind of data.

    Args:
        name: what it is called in tables.
        build: an untrained model.
        data: from a seed.
        loss: of a model on a batch, for the training.
        score: of a model's outputs on a batch: sum over what is judged, and how many that is; higher is better.
        chance: the score of a model that knows nothing, or what computes it.
        epochs: of the training; none: the model comes trained, and is pruned in one shot alone.
        rate: the training's largest learning rate.
        include: weights that are pruned; None: those that are by default.
        target: what is explained; None: inferred.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], Data]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], tuple[float, int]]
    chance: float | Callable[[], float]
    epochs: float = 10
    rate: float = 2e-3
    include: tuple[str, ...] | None = None
    target: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def score_of(case: Case, model: nn.Module, batches: Split) -> float:
    """The mean score over batches."""
    model.eval()
    total, number = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            value, count = case.score(model, batch)
            total, number = total + value, number + count
    return total / max(number, 1)


def train(case: Case, model: nn.Module, batches: Split, epochs: float, rate: float, seed: int) -> Iterator[None]:
    """An ordinary training: AdamW, the rate rising for a tenth of the time and then falling to zero; yields after each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    steps = max(round(epochs * len(batches)), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        model.train()
        loss = case.loss(model, batches[order.pop()])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield


# Data


def batched(size: int, *columns: Any) -> Split:
    """Tuples of tensors in batches of equal size; a mapping of tensors gives mappings."""
    if len(columns) == 1 and isinstance(columns[0], dict):
        length = len(next(iter(columns[0].values())))
        starts = range(0, length, size)
        return [{name: tensor[start : start + size] for name, tensor in columns[0].items()} for start in starts]
    return [tuple(column[start : start + size] for column in columns) for start in range(0, len(columns[0]), size)]


def split(columns: Any, size: int, seed: int, held_out: float = 0.25, reference: int = 4) -> Data:
    """Shuffled and parted; the reference is of the training part."""
    mapping = isinstance(columns, dict)
    length = len(next(iter(columns.values())) if mapping else columns[0])
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    cut = round(length * (1 - held_out))

    def part(indices: Tensor) -> Split:
        if mapping:
            return batched(size, {name: tensor[indices] for name, tensor in columns.items()})
        return batched(size, *(column[indices] for column in columns))

    train = part(order[: cut - cut % size])
    return Data(train, train[:reference], part(order[cut:]))


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16 - 0.3, torch.tensor(labels)


def digits(shape: Sequence[int], name: str | None = None) -> Callable[[int], Data]:
    """8 x 8 images of handwritten digits in some shape, in pairs or under the name that the model calls them by."""

    def make(seed: int) -> Data:
        images, labels = _digits()
        images = images.reshape(-1, *shape)
        return split((images, labels) if name is None else {name: images, "labels": labels}, 32, seed)

    return make


@functools.cache
def speeches() -> str:
    """State of the Union addresses, one after the other."""
    path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from language_model import load_documents

    return "\n".join(load_documents())


@functools.cache
def characters() -> tuple[Tensor, int]:
    """The speeches as numbers of characters; rare ones share one."""
    text = speeches()[:1_500_000]
    counts: dict[str, int] = {}
    for character in text:
        counts[character] = counts.get(character, 0) + 1
    known = sorted(character for character, count in counts.items() if count > 200)
    index = {character: number + 2 for number, character in enumerate(known)}  # 0 is padding, 1 is a mask
    return torch.tensor([index.get(character, 1) for character in text]), len(known) + 2


def character_windows(length: int, number: int) -> Callable[[int], Data]:
    """Windows of text; what is held out is of other speeches."""

    def make(seed: int) -> Data:
        ids, _ = characters()
        cut = round(0.85 * len(ids))
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(cut - length, (number,), generator=generator)
        later = torch.randint(cut, len(ids) - length, (256,), generator=torch.Generator().manual_seed(0))
        windows = torch.stack([ids[start : start + length] for start in (*starts.tolist(), *later.tolist())])
        train = batched(16, {"input_ids": windows[:number], "labels": windows[:number]})
        return Data(train, train[:6], batched(16, {"input_ids": windows[number:], "labels": windows[number:]}))

    return make


def masked_chains(seed: int) -> Data:
    """Walks through 60 states with four ways on from each; a fifth of the states is hidden, to be guessed from both sides."""
    ways = torch.randint(2, 62, (62, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.empty(8192, 24, dtype=torch.int64)
    ids[:, 0] = torch.randint(2, 62, (8192,), generator=generator)
    for place in range(1, 24):
        ids[:, place] = ways[ids[:, place - 1], torch.randint(4, (8192,), generator=generator)]
    hidden = torch.rand(ids.shape, generator=generator) < 0.2
    return split({"input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}, 32, seed)


def marked_sequences(seed: int) -> Data:
    """Two classes that a few tokens tell apart beyond doubt: a classifier is soon sure of everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (2048,), generator=generator)
    ids = torch.randint(20, 100, (2048, 20), generator=generator)
    for row, label in enumerate(labels.tolist()):
        places = torch.randperm(20, generator=generator)[:4]
        ids[row, places] = torch.randint(10 * label, 10 * label + 10, (4,), generator=generator)
    return split({"input_ids": ids, "labels": labels}, 32, seed)


@functools.cache
def _words() -> tuple[Tensor, Tensor, int]:
    """Windows of 32 words of speeches, the quarter of the time line that each is from, and the number of words."""
    words = speeches().lower().split()
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    known = sorted(counts, key=lambda word: -counts[word])[:2000]
    index = {word: number + 1 for number, word in enumerate(known)}
    ids = torch.tensor([index.get(word, 0) for word in words])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    eras = (torch.arange(len(windows)) * 4 / len(windows)).long()
    return windows, eras, len(known) + 1


def eras(seed: int) -> Data:
    """From which quarter of the time line some words are, a fifth of the labels wrong: nothing is ever sure."""
    windows, labels, _ = _words()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:6144]
    labels = labels[chosen]
    wrong = torch.rand(labels.shape, generator=generator) < 0.2
    labels = torch.where(wrong, torch.randint(4, labels.shape, generator=generator), labels)
    return split({"input_ids": windows[chosen], "labels": labels}, 32, seed)


def tagged(seed: int) -> Data:
    """A tag for each token, by its own kind and that of the token before."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(4, (100,), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(100, (2048, 16), generator=generator)
    own = kinds[ids]
    before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], 1)
    return split({"input_ids": ids, "labels": (own + before) % 4}, 32, seed)


def reversed_sequences(seed: int) -> Data:
    """Six numbers to be said backwards."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 22, (6144, 6), generator=generator)
    return split({"input_ids": ids, "labels": ids.flip(1)}, 64, seed)


def friedman(seed: int) -> Data:
    """Friedman's first function of ten numbers, of which five matter."""
    inputs, values = make_friedman1(2048, noise=0.3, random_state=seed)
    values = (values - 14.4) / 4.9
    columns = torch.tensor(inputs, dtype=torch.float32) * 2 - 1, torch.tensor(values, dtype=torch.float32)[:, None]
    return split(columns, 32, seed)


# What is learnt, and how it is judged


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(class_logits(model, batch), labels_of(batch))


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    if isinstance(batch, dict):
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    else:
        logits = model(batch[0])
    return logits


def labels_of(batch: Batch) -> Tensor:
    labels: Tensor = batch["labels"] if isinstance(batch, dict) else batch[1]
    return labels


def accuracy(model: nn.Module, batch: Batch) -> tuple[float, int]:
    labels = labels_of(batch)
    return float((class_logits(model, batch).argmax(-1) == labels).sum()), labels.numel()


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def likelihood(model: nn.Module, batch: Batch) -> tuple[float, int]:
    """The mean log-likelihood of the labels, each batch counted once."""
    return -float(own_loss(model, batch)), 1


def sequence_accuracy(model: nn.Module, batch: Batch) -> tuple[float, int]:
    logits = model(**batch).logits
    return float((logits.argmax(-1) == batch["labels"]).sum()), batch["labels"].numel()


def squared_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def minus_squares(model: nn.Module, batch: Batch) -> tuple[float, int]:
    return -float(F.mse_loss(model(batch[0]), batch[1], reduction="sum")), len(batch[1])


# Models


class RowReader(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 64, num_layers=2, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rows(images)[0][:, -1])
        return logits


class PostNorm(nn.Module):
    """torch's own encoder, normed after each part, on the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 48), nn.Parameter(0.1 * torch.randn(1, 8, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(images) + self.place).mean(1))
        return logits


def conv_bn(inputs: int, outputs: int, size: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs))


class ResidualNet(nn.Module):
    """Residual blocks of convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 24, 3, padding=1)
        self.first = nn.ModuleList([conv_bn(24, 24, 3, padding=1) for _ in range(3)])
        self.second = nn.ModuleList([conv_bn(24, 24, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for one, two in zip(self.first, self.second, strict=True):
            x = (two(one(x).relu()) + x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def depthwise_cnn() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(1, 24, 3, padding=1), nn.ReLU()]
    for inputs, outputs, stride in ((24, 32, 1), (32, 48, 2), (48, 48, 1)):
        layers += [conv_bn(inputs, inputs, 3, padding=1, groups=inputs, stride=stride), nn.ReLU()]
        layers += [conv_bn(inputs, outputs, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)
    )  # fmt: skip


_BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def _bert(kind: str, vocabulary: int, **options: Any) -> nn.Module:
    model: nn.Module = getattr(tf, kind)(tf.BertConfig(**{**_BERT, "vocab_size": vocabulary, **options}))
    return model


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=_words()[2], dim=64, n_layers=3, n_heads=4, hidden_dim=128, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=4,
    )  # fmt: skip
    return tf.DistilBertForSequenceClassification(config)


def _vit() -> nn.Module:
    config = tf.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def _t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=24,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def _mixture() -> nn.Module:
    config = tf.MixtralConfig(
        vocab_size=characters()[1], **{**_LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config)


@functools.cache
def _turned_vit() -> dict[str, Tensor]:
    """A ViT that has learnt digits that lie on their left side: what the LoRA case starts from."""
    torch.manual_seed(100)
    model = _vit()
    turned = [
        {"pixel_values": batch["pixel_values"].rot90(1, (2, 3)), "labels": batch["labels"]}
        for batch in digits((1, 8, 8), "pixel_values")(100).train
    ]
    case = Case("turned", _vit, lambda seed: Data(turned, turned, turned), class_loss, accuracy, 0.1, 10)
    for _ in train(case, model, turned, case.epochs, case.rate, 100):
        pass
    return model.state_dict()


def _lora() -> nn.Module:
    """The same with adapters of rank 8 at queries and values, and a classifier of its own, to learn digits upright."""
    from peft import LoraConfig, get_peft_model

    model = _vit()
    model.load_state_dict(_turned_vit())
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


@functools.cache
def _language_model() -> Any:
    from language_model import load_model

    return load_model()


def _smollm2() -> nn.Module:
    model: nn.Module = copy.deepcopy(_language_model()[0])
    return model


def token_windows(manual: bool) -> Callable[[int], Data]:
    """Windows of SmolLM2's tokens, of speeches or of Python's manual; what is held out is of other texts."""

    def make(seed: int) -> Data:
        speeches()  # its folder is on the path from here on
        from pydoc_data.topics import topics

        from language_model import batches, load_documents, split_documents, windows

        tokenizer = _language_model()[1]
        calibration, held_out = split_documents(list(topics.values()) if manual else load_documents())
        reference = batches(windows(calibration, tokenizer, 8, 256, seed=seed), 1)
        return Data(reference, reference, batches(windows(held_out, tokenizer, 12, 256, seed=0), 1))

    return make


def token_guess(manual: bool) -> float:
    """The log-likelihood of tokens by their frequency alone in what is held out: no model does worse with good reason."""
    ids = torch.cat([batch["input_ids"].flatten() for batch in token_windows(manual)(0).held_out])
    shares = torch.bincount(ids).double() / len(ids)
    return float((shares * shares.clamp(min=1e-12).log()).sum())


def unigram(number: int) -> float:
    """The log-likelihood of characters by their frequency alone."""
    ids, size = characters()
    shares = torch.bincount(ids, minlength=size).double() / len(ids)
    return float((shares * shares.clamp(min=1e-9).log()).sum())


def cases() -> list[Case]:
    """All of them, the quickest first."""
    vocabulary = characters()[1]
    guess = unigram(vocabulary)
    return [
        Case("mlp", lambda: mlp(64, 10), digits((64,)), class_loss, accuracy, 0.1, 12),
        Case("regression", lambda: mlp(10, 1), friedman, squared_loss, minus_squares, -1.0, 25),
        Case("lstm", RowReader, digits((8, 8)), class_loss, accuracy, 0.1, 15, 4e-3),
        Case("cnn", plain_cnn, digits((1, 8, 8)), class_loss, accuracy, 0.1, 8),
        Case("resnet", ResidualNet, digits((1, 8, 8)), class_loss, accuracy, 0.1, 8, 4e-3),
        Case("depthwise", depthwise_cnn, digits((1, 8, 8)), class_loss, accuracy, 0.1, 12, 4e-3),
        Case("encoder", PostNorm, digits((8, 8)), class_loss, accuracy, 0.1, 15),
        Case("vit", _vit, digits((1, 8, 8), "pixel_values"), class_loss, accuracy, 0.1, 15),
        Case(
            "bert-sure", lambda: _bert("BertForSequenceClassification", 100, num_labels=2), marked_sequences,
            class_loss, accuracy, 0.5, 8,
        ),
        Case(
            "bert-unsure", lambda: _bert("BertForSequenceClassification", _words()[2], num_labels=4), eras,
            class_loss, accuracy, 0.25, 4,
        ),
        Case("distilbert", _distilbert, eras, class_loss, accuracy, 0.25, 4),
        Case(
            "bert-tags", lambda: _bert("BertForTokenClassification", 100, num_labels=4), tagged,
            own_loss, sequence_accuracy, 0.25, 8,
        ),
        Case("t5", _t5, reversed_sequences, own_loss, sequence_accuracy, 0.05, 20),
        Case(
            "bert-masked", lambda: _bert("BertForMaskedLM", 62), masked_chains, own_loss, likelihood, -math.log(60), 12,
        ),
        Case(
            "llama", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocabulary, **_LLAMA)),
            character_windows(96, 6000), own_loss, likelihood, guess, 2,
        ),
        Case("mixture", _mixture, character_windows(96, 6000), own_loss, likelihood, guess, 1.5),
        Case("lora", _lora, digits((1, 8, 8), "pixel_values"), class_loss, accuracy, 0.1, 15, 4e-3),
        *(
            Case(name, _smollm2, token_windows(manual), own_loss, likelihood, functools.partial(token_guess, manual), 0)
            for name, manual in (("smollm2-speeches", False), ("smollm2-manual", True))
        ),
    ]  # fmt: skip
