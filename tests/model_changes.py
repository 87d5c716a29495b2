"""What users do to a model: they add LoRAs and offload its weights."""

import accelerate
import torch
from peft import LoraConfig


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def add_lora(model):
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def offload_by_accelerate(model):
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def offload_by_groups(model):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


OFFLOADS = [offload_by_accelerate, offload_by_groups]
