"""From a recipe's block to DeepSpeed's configuration."""

from __future__ import annotations

import pytest
import torch

from rlhf.engine import zero
from rlhf.engine.engine import Engine
from rlhf.recipe.schema import OptimBlock, ZeroBlock


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_trained_model(stage):
    block = ZeroBlock(stage=stage, bucket_size=5000, persistence_threshold=7)
    config = zero.trained_config(block, OptimBlock(max_grad_norm=0.5), bf16=stage > 0)
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert config["bf16"] == {"enabled": stage > 0, "check_grad_overflow": True}
    # stage 0 clips in the engine, which must see the norm before the step
    assert config["gradient_clipping"] == (0.5 if stage else 0.0)
    sharding = config["zero_optimization"]
    assert sharding["stage"] == stage and sharding["reduce_bucket_size"] == 5000 and sharding["overlap_comm"] is False
    assert sharding.get("stage3_param_persistence_threshold") == (7 if stage == 3 else None)
    assert "offload_optimizer" not in sharding and "offload_param" not in sharding


def test_offloading():
    block = ZeroBlock(stage=3, offload_optimizer=True, offload_params=True)
    trained = zero.trained_config(block, OptimBlock(), bf16=True)["zero_optimization"]
    assert trained["offload_optimizer"]["device"] == trained["offload_param"]["device"] == "cpu"
    frozen = zero.frozen_config(ZeroBlock(stage=3, offload_params=True), bf16=True)["zero_optimization"]
    assert frozen["offload_param"]["device"] == "cpu" and "offload_optimizer" not in frozen


def test_a_frozen_model_keeps_nothing_gathered():
    config = zero.frozen_config(ZeroBlock(stage=3), bf16=False)["zero_optimization"]
    assert config["stage3_max_live_parameters"] == config["stage3_max_reuse_distance"] == 0
    assert "stage3_max_live_parameters" not in zero.frozen_config(ZeroBlock(), bf16=False)["zero_optimization"]


def test_shapes_and_shares_of_sharded_parameters(forked):
    def body():
        module = torch.nn.Linear(6, 4)
        assert zero.held_elements(module) == (28, 28) and not zero.is_sharded(module.weight)
        engine = Engine(module, ZeroBlock(stage=3, persistence_threshold=10), bf16=False, optim=OptimBlock())
        assert zero.is_sharded(module.weight) and module.weight.numel() == 0
        assert zero.full_shape(module.weight) == (4, 6) and zero.full_shape(module.bias) == (4,)
        assert engine.num_elements() == (28, 28)
        assert zero.held_elements(module) == (28, 28)  # one rank has it all

    forked(body)
