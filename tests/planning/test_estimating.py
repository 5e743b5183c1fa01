"""The plan against counted live tensor bytes, and against what it is made of."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lrp_prune
from lrp_prune.planning.live import Live
from lrp_prune.pruning import LeastSquares, OptimalBrainSurgeon, recalibrate, scorer
from lrp_prune.pruning.compensation import compensate_
from lrp_prune.pruning.recalibration import Recalibration
from lrp_prune.training.keeping import MaskKeeper
from tests.support.live_bytes import allocated
from tests.support.sharding import device_type, sharded, together
from tests.support.small_models import batch_for, build

SIZES = [
    {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 500},
    {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 2, "vocab_size": 4000},
]


def _llama(sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [32, 256])
@pytest.mark.parametrize("sizes", SIZES, ids=["small vocabulary", "large vocabulary"])
def test_collecting_takes_what_is_planned(sizes, tokens):
    model = _llama(sizes)
    batch = {"input_ids": torch.randint(0, sizes["vocab_size"], (2, tokens))}
    plan = lrp_prune.estimate(model, batch=(2, tokens))
    assert plan == lrp_prune.estimate(model.config, batch=(2, tokens))
    with Live() as live:
        lrp_prune.attribute(model, [batch, batch], composite="epsilon", statistic="geometric")
    counted = live.peak + _bytes(model.parameters()) + _bytes(model.buffers())
    assert plan.collecting == pytest.approx(counted, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 5])
@pytest.mark.parametrize("sizes", SIZES, ids=["small vocabulary", "large vocabulary"])
def test_recalibrating_takes_what_is_planned(sizes, batches, monkeypatch):
    """As much memory, and as many forwards."""
    model = _llama(sizes)
    reference = [{"input_ids": torch.randint(0, sizes["vocab_size"], (2, 128))} for _ in range(batches)]
    masks = lrp_prune.select(scorer("random", model).compute(), 0.5)
    forwards = []
    model.model.register_forward_hook(lambda module, args, output: forwards.append(len(output[0]) // 2))
    plan = lrp_prune.estimate(model, batch=(2, 128), batches=batches)
    forwards.clear()
    with Live() as live:
        recalibrate(model, masks, reference, "next_token")
    counted = live.peak + _bytes(model.parameters()) + _bytes(model.buffers())
    assert plan.recalibrating == pytest.approx(counted, rel=0.15)
    assert plan.recalibration_passes == sum(forwards)
    assert lrp_prune.estimate(model, batch=(2, 128), batches=40).recalibration_passes == 1 + 4 + 12 * 3 + 4 * 4
    dense = lrp_prune.estimate(model, batch=(2, 128), batches=batches, sparsity=0.0)
    values = sum(model.get_parameter(name).nbytes for name in masks)
    assert plan.recalibration - dense.recalibration == pytest.approx(values / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_what_is_kept_to_undo_a_pruning_is_planned(sparsity, monkeypatch):
    """Of one round the values that are zeroed, and on the host what is scaled; of two the whole model there, and no more."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(200, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 100)
    ).eval()
    model.register_buffer("unused", torch.zeros(50, 1000))
    batches = [(torch.randn(64, 200), torch.randint(100, (64,))) for _ in range(4)]
    plan, rounds = lrp_prune.estimate(model, sparsity=sparsity), 2 if sparsity > 0.6 else 1
    held, real = [], Recalibration.apply_

    def apply_(self, module):
        held.append(live.now - _bytes([*self.scales.values(), *self.shifts.values()]))
        assert self.strength
        real(self, module)

    monkeypatch.setattr(Recalibration, "apply_", apply_)
    with Live() as live:
        lrp_prune.prune(model, batches, sparsity, recalibrate=True, progress=False)
    zeroed = 4 * sparsity * plan.masks if rounds == 1 else 0  # a mask has a byte for each weight
    assert len(held) == rounds
    assert held[-1] == pytest.approx(plan.relevance + plan.host + zeroed, rel=0.03)


@pytest.mark.slow
def test_a_training_with_kept_zeros_takes_what_is_planned():
    model, tokens = _llama(SIZES[0]).train(), 64
    batch = {"input_ids": torch.randint(0, 500, (2, tokens))}
    plan = lrp_prune.estimate(model, batch=(2, tokens))
    masks = lrp_prune.prune(model, [batch], sparsity=0.5, method="magnitude")
    with Live() as live:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        keeper = MaskKeeper(model, masks, [optimizer])
        for _ in range(2):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        relevance = lrp_prune.attribute(model, [batch, batch], composite="epsilon", statistic="geometric")
    counted = live.peak + _bytes(model.parameters()) + _bytes(model.buffers())
    assert plan.training == pytest.approx(counted, rel=0.15)
    assert keeper.nbytes == plan.masks
    assert plan.relevance == pytest.approx(_bytes(relevance.sums.values()), rel=0.02)
    keeper.remove()


@pytest.mark.processes
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_of_a_sharded_model_takes_what_is_planned(tmp_path, processes):
    sizes = {"hidden_size": 192, "intermediate_size": 528, "num_hidden_layers": 6, "vocab_size": 600}
    batch = {"input_ids": torch.randint(0, 600, (2, 64), generator=torch.Generator().manual_seed(0))}
    plan = lrp_prune.estimate(_llama(sizes), processes, batch=(2, 64))

    def collecting(mesh):
        model = sharded(_llama(sizes), mesh)
        weights = _bytes(parameter.to_local() for parameter in model.parameters()) + _bytes(model.buffers())
        assert weights == pytest.approx(plan.weights, rel=0.02)
        collect = partial(lrp_prune.attribute, model, [batch, batch], composite="epsilon", statistic="geometric")
        relevance, _, most = min((allocated(collect) for _ in range(2)), key=lambda counted: counted[2])
        assert _bytes(relevance.sums.values()) == pytest.approx(plan.relevance, rel=0.05)
        return weights + most

    if device_type(processes) == "cuda":
        pytest.skip("counts the CPU's allocations")
    for counted in together(collecting, processes, tmp_path):
        assert plan.collecting == pytest.approx(counted, rel=0.15)


@pytest.mark.slow
def test_what_is_divided_and_what_is_not():
    model = _llama(SIZES[0])
    alone, replicated, divided = (
        lrp_prune.estimate(model, world_size, strategy=strategy, batch=(1, 16))
        for world_size, strategy in ((1, "fsdp"), (4, "ddp"), (4, "fsdp"))
    )
    assert alone == replicated
    for name in ("weights", "gradients", "optimizer", "relevance", "masks"):
        assert getattr(divided, name) == pytest.approx(getattr(alone, name) / 4, rel=0.05)
    assert divided.activations == alone.activations
    assert divided.temporary > alone.temporary  # a whole layer and its sums


def test_options_count():
    model = _llama(SIZES[0])
    full = lrp_prune.estimate(model)
    assert full.activations == 0
    assert full.optimizer == 2 * full.gradients == 2 * _bytes(model.parameters())
    assert lrp_prune.estimate(model, optimizer="sgd").optimizer == 0
    assert lrp_prune.estimate(model, optimizer=3).optimizer == 3 * full.gradients
    half = lrp_prune.estimate(model, dtype=torch.bfloat16)
    assert half.gradients == full.gradients // 2
    assert half.relevance == full.relevance
    on_host = lrp_prune.estimate(model, accumulate_on="cpu")
    assert on_host.relevance == 0
    assert on_host.host == full.host + full.relevance
    assert lrp_prune.estimate(model, granularity="neuron").relevance == 0
    attention = lrp_prune.estimate(model, include=["*self_attn*"])
    assert attention.masks == sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert lrp_prune.estimate(model).gradients == 0


@pytest.mark.slow
def test_nothing_is_loaded_or_changed():
    config = LlamaConfig(hidden_size=2**17, intermediate_size=2**19, num_hidden_layers=4, num_attention_heads=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.train()
    lrp_prune.estimate(model, 512, batch=(1, 2048))
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 > 2 * 2**40
    assert model.training
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
def test_any_module_and_batch():
    model = nn.Sequential(nn.Linear(10, 400), nn.ReLU(), nn.Linear(400, 3))
    plan = lrp_prune.estimate(model, batch=(torch.randn(50, 10), torch.zeros(50)))
    assert plan.activations >= 50 * 400 * 4
    assert "collecting" in str(plan)
    images = lrp_prune.estimate(build("vit"), batch={"pixel_values": torch.randn(2, 3, 16, 16)})
    assert images.activations > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0}, "world_size must be an integer of at least 1, got 0"),
        ({"world_size": 2.5}, "world_size must be .* got 2.5"),
        ({"world_size": "2"}, "world_size must be .* got '2'"),
        ({"batches": 0}, "batches must be an integer of at least 1, got 0"),
        ({"batches": True}, "batches must be .* got True"),
        ({"optimizer": -1}, r"optimizer \(tensors that it keeps\) must be a number in \[0, inf\), got -1"),
        ({"optimizer": None}, "optimizer .* got None"),
        ({"dtype": "bfloat16"}, "dtype must be None or a torch.dtype .* got 'bfloat16'"),
        ({"accumulate_on": "disk"}, "accumulate_on must be None or name a device, got 'disk'"),
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"method": "snip"}, "method must be one of"),
        ({"granularity": "channel"}, "granularity must be one of"),
        ({"trainable_only": 1}, "trainable_only must be True or False, got 1"),
        ({"exclude": "bias"}, "exclude must be a list of name patterns .* got 'bias'"),
        ({"strategy": "deepspeed"}, "strategy must be 'ddp' or 'fsdp', got 'deepspeed'"),
        ({"optimizer": "lamb"}, "optimizer must be one of"),
        ({"batch": (1, 2, 3)}, "cannot be run without data"),
        ({"include": ["nothing"]}, "nothing"),
    ],
)
def test_what_is_impossible_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrp_prune.estimate(nn.Linear(2, 2), **arguments)


def test_no_model():
    with pytest.raises(ValueError, match="must be a module or a Hugging Face configuration, got str"):
        lrp_prune.estimate("meta-llama/Llama-2-7b-hf")


def _compensated(name, ways):
    """A model, its reference batches, and one of them as it is given to the plan."""
    torch.manual_seed(0)
    if name == "images":
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, groups=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 10),
        ).eval()  # fmt: skip
        batches = [torch.randn(16, 3, 8, 8) for _ in range(3)]
        return model, batches, batches[0]
    if name == "t5":
        batches = [batch_for("t5", 8, 12) for _ in range(3)]
        return build("t5"), batches, batches[0]
    number, samples, tokens = ways
    model = _llama(SIZES[name == "large vocabulary"])
    return model, [{"input_ids": torch.randint(0, 500, (samples, tokens))} for _ in range(number)], (samples, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batches", "way"),
    [
        ("small vocabulary", (5, 2, 128), LeastSquares()),
        ("large vocabulary", (12, 1, 16), LeastSquares(dense=0.0)),
        ("images", None, LeastSquares()),
        ("images", None, OptimalBrainSurgeon()),
        ("t5", None, LeastSquares()),
    ],
    ids=str,
)
def test_compensating_stays_within_what_is_planned(name, batches, way):
    """And not by far: what is laid together, one group's Gram matrices, a stage's weights, and what stages gave."""
    model, reference, batch = _compensated(name, batches)
    masks = lrp_prune.select(scorer("random", model).compute(), 0.5)
    plan = lrp_prune.estimate(model, batch=batch, batches=len(reference), compensation=way)
    with Live() as live:
        compensate_(model, masks, reference, way)
    kept = plan.host - lrp_prune.estimate(model).host
    assert live.peak < plan.compensation + kept < 2 * live.peak
    assert (
        plan.compensating == plan.weights + plan.compensation and plan.recalibration == plan.recalibration_passes == 0
    )
    assert "compensating" in str(plan) and "recalib" not in str(plan)


@pytest.mark.processes
def test_compensating_what_is_divided_stays_within_what_is_planned(tmp_path):
    sizes = {**SIZES[0], "hidden_size": 256, "intermediate_size": 900}  # so that layers take more than activations

    def compensating(mesh):
        model = sharded(_llama(sizes), mesh)
        masks = lrp_prune.select(scorer("random", model).compute(), 0.5)
        batches = [{"input_ids": torch.randint(0, 500, (2, 64))} for _ in range(2)]
        with Live() as live:
            compensate_(model, masks, batches, LeastSquares())
        return live.peak

    alone = lrp_prune.estimate(_llama(sizes), batch=(2, 64), batches=2, compensation="exact")
    plan = lrp_prune.estimate(_llama(sizes), 2, batch=(2, 64), batches=2, compensation="exact")
    kept = plan.host - lrp_prune.estimate(_llama(sizes), 2).host
    for peak in together(compensating, 2, tmp_path):
        assert peak < plan.compensation + kept < 2 * peak
    assert plan.compensation > alone.compensation and plan.weights < 0.6 * alone.weights


def _got() -> int:
    """Channels that the layers of a block get: queries, keys and values together, output, up and gate, down."""
    return 3 * SIZES[0]["hidden_size"] + SIZES[0]["intermediate_size"]


def _gave() -> int:
    """Channels that they give, but for the last: queries and output, half as many keys and values, up and gate."""
    return 3 * SIZES[0]["hidden_size"] + 2 * SIZES[0]["intermediate_size"]


@pytest.mark.slow
def test_what_stages_gave_grows_with_batches_and_nothing_else_does_with_large_ones(monkeypatch):
    monkeypatch.setattr("lrp_prune.pruning.compensation.together.ENTRIES", 0)
    # A stage's outputs of the dense model, before and now, and of the pruned one before; without the dense one before and now.
    # And the larger of what the layers of one got in the dense model, and of what those before the last one give.
    for dense, kept in ((0.5, 3 * 128 + max(_got(), _gave())), (0.0, 128 + _gave())):
        plans = [
            lrp_prune.estimate(_llama(SIZES[0]), batch=(2, 64), batches=number, compensation=LeastSquares(dense=dense))
            for number in (1, 4, 7)
        ]
        assert len({plan.compensation for plan in plans}) == 1
        assert plans[2].host - plans[1].host == plans[1].host - plans[0].host == kept * 3 * 2 * 64 * 4


def test_what_layers_got_is_planned_as_far_as_it_is_kept(monkeypatch):
    options = {"batch": (2, 64), "batches": 3, "compensation": "exact"}
    whole = lrp_prune.estimate(_llama(SIZES[0]), **options)
    monkeypatch.setattr("lrp_prune.planning.compensation.ROOM", 1000)
    assert whole.host - lrp_prune.estimate(_llama(SIZES[0]), **options).host == (
        max(_got(), _gave()) * 3 * 2 * 64 * 4 - 1000
    )


def test_a_compensation_that_cannot_be_planned():
    model = nn.Linear(2, 2)
    for options, message in (
        ({"compensation": "best"}, "compensation must be one of"),
        ({"compensation": "exact"}, "pass batch="),
    ):
        with pytest.raises(ValueError, match=message):
            lrp_prune.estimate(model, **options)
    ddp = lrp_prune.estimate(model, 2, strategy="ddp", batch=torch.zeros(4, 2), compensation="exact")
    assert ddp == lrp_prune.estimate(model, batch=torch.zeros(4, 2), compensation="exact") and ddp.compensation > 0
