"""What test_hf_kernel_alone.py runs where lr_kernels is not installed: loads the kernel from a folder and writes what
its functions compute."""

import importlib.util
import sys
from pathlib import Path

import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import nn
from torch.nn import functional as F

MODE = Mode.TRAINING | Mode.TORCH_COMPILE
COEFFICIENTS = torch.tensor([[[2.0, -1.0, 0.9, 0.3, *[0.0] * 7]]])
"""Of one step and row, with two predictions: g_0, g_1, a, e, and what is not used."""


def inputs() -> dict[str, list[torch.Tensor]]:
    """query (1, 33, 2, 40), then key and value of two sources; latents (1, 4, 8, 8) and two predictions; a picture's
    tokens (2, 33, 32)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "attention": [randn(1, n, 2, 40) for n in (33, 20, 20, 13, 13)],
        "latents": [randn(1, 4, 8, 8) for _ in range(3)],
        "tokens": [randn(2, 33, 32)],
    }


@use_kernel_forward_from_hub("Attention")
class Attention(nn.Module):
    """PyTorch's attention on (B, N, H, D)."""

    def forward(self, query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def loss_gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return list(torch.autograd.grad(function(*leaves).square().sum(), leaves))


def results(kernel, variant: Path, backend: str) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    given = inputs()
    query, *keys_and_values = given["attention"]

    def attention(query, key, value, key_2, value_2):
        sources = [kernel.Source(key, value), kernel.Source(key_2, value_2)]
        return kernel.multi_source_attention(query, sources, backend=backend)

    def state(key, value):
        return kernel.multi_source_attention(query, [kernel.Source(key, value)], return_lse=True, backend=backend)

    parts = [state(*keys_and_values[:2]), state(*keys_and_values[2:])]
    merged, _ = kernel.merge_attention_states([out for out, _ in parts], [lse for _, lse in parts], backend=backend)
    sample, *predictions = given["latents"]
    repository = LocalLayerRepository(variant, layer_name="Attention")
    with use_kernel_mapping({"Attention": {"cpu": {MODE: repository}}}, inherit_mapping=False):
        layer = kernelize(Attention(), mode=MODE, device="cpu", use_fallback=False)
    assert layer.forward.__func__.__module__ == kernel.layers.__name__
    key, value = keys_and_values[:2]
    by_heads = kernel.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    # The specification reads values to find rows that see nothing finite, so a graph of it has a break.
    compiled = torch.compile(attention, fullgraph=backend != "reference", backend="aot_eager")
    return {
        "attention": attention(*given["attention"]),
        "gradients": loss_gradients(attention, given["attention"]),
        "compiled": compiled(*given["attention"]),
        "compiled gradients": loss_gradients(compiled, given["attention"]),
        "merged": merged,
        "step": kernel.step_blend(sample, predictions, COEFFICIENTS, 0, backend=backend),
        "one source": [by_heads.transpose(1, 2), kernel.memory_efficient_attention(query, key, value),
                       layer(query, key, value)],
    }  # fmt: skip


def main(variant: Path, backend: str, out: Path) -> None:
    assert importlib.util.find_spec("lr_kernels") is None
    kernel = get_local_kernel(variant)
    for path in variant.rglob("*.py"):
        parts = path.relative_to(variant).with_suffix("").parts
        importlib.import_module(".".join([kernel.__name__, *(part for part in parts if part != "__init__")]))
    names = [name for name in torch._C._dispatch_get_all_op_names() if "multi_source_attention" in name]
    assert names and all(name.startswith(f"{kernel.__name__}::") for name in names)
    assert not [name for name in sys.modules if name.split(".")[0] == "lr_kernels"]
    torch.save(results(kernel, variant, backend), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
