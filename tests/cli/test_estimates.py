from __future__ import annotations

import pytest
import torch

from cli.estimates import Memory, count_parameters, estimate_memory, optimizer_bytes, tokens_per_second
from cli.profiles import A100, EIGHT_A100
from config.loading import load, shipped
from config.schemas import PipelineConfig
from trainkit.optimizers import build_optimizer
from transformerlm.models.build import create_model

VOCABULARY = 300
SMALL = ("model.num_layers=2", "model.d_model=64", "model.num_heads=2", "model.num_kv_heads=0", "model.d_ff=96")


def config_of(*settings: str) -> PipelineConfig:
    return load(PipelineConfig, shipped("quickstart"), [*SMALL, *settings]).config


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_held_is_what_training_holds(optimizer: str) -> None:
    config = config_of(f"optimizer.kind={optimizer}", "training.ema_decay=0.9")
    model = create_model(config.model, vocab_size=VOCABULARY)
    updater = build_optimizer(config.optimizer, model)
    model(torch.arange(8).view(1, 8)).sum().backward()
    updater.step()
    parameters = list(model.parameters())
    state = sum(t.nbytes for values in updater.state.values() for t in values.values() if isinstance(t, torch.Tensor))
    memory = estimate_memory(config, VOCABULARY)
    assert memory.weights == memory.average == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert memory.optimizer == optimizer_bytes(config.optimizer, model) == state
    assert memory.held == 3 * memory.weights + state
    assert count_parameters(config, VOCABULARY) == sum(p.numel() for p in parameters)


def test_strategies_divide_what_they_divide() -> None:
    profile = load(PipelineConfig, shipped("runpod_2b")).config
    vocab_size = profile.tokenizer.vocab_size

    def memory(strategy: str, *more: str) -> Memory:
        config = load(PipelineConfig, shipped("runpod_2b"), [f"distributed.strategy={strategy}", *more]).config
        return estimate_memory(config, vocab_size, gpus=4)

    alone = estimate_memory(profile, vocab_size)
    copied, zero1, fsdp = memory("replicate"), memory("zero1"), memory("fsdp")
    assert copied == alone
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (alone.weights, alone.gradients, alone.optimizer // 4)
    assert (fsdp.weights, fsdp.optimizer) == (alone.weights // 4, alone.optimizer // 4)
    assert fsdp.gradients == alone.gradients  # whole, while micro-batches accumulate
    at_once = memory("fsdp", "training.device_batch_size=64")
    assert at_once.gradients == alone.gradients // 4


def test_speed_goes_with_gpus_and_recomputation_costs_a_quarter() -> None:
    config = load(PipelineConfig, shipped("runpod_1b")).config
    again = load(PipelineConfig, shipped("runpod_1b"), ["training.activation_checkpointing=blocks"]).config
    vocab_size = config.tokenizer.vocab_size
    one = tokens_per_second(config, vocab_size, A100, 0.4)
    assert tokens_per_second(config, vocab_size, EIGHT_A100, 0.4) == pytest.approx(8 * one)
    assert tokens_per_second(again, vocab_size, A100, 0.4) == pytest.approx(0.75 * one)
    # 6 · parameters, and attention; no more than a quarter of it at this length
    assert 0.75 < 6 * count_parameters(config, vocab_size) / (0.4 * 312e12 / one) < 1
    assert estimate_memory(again, vocab_size).peak < estimate_memory(config, vocab_size).peak
