"""The kernel of hf_kernel, loaded by Hugging Face's `kernels` beside the installed package and put into models by
`kernelize`; the variant of them that this machine prefers. test_hf_kernel_alone.py: without the package."""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from torch import nn
from torch.nn import functional as F

import lr_kernels.interop
from lr_kernels.testing import assert_matches

SCRIPT = Path(lr_kernels.__file__).parents[1] / "hf_kernel/build.py"
LAYERS = ("Attention", "ScaledDotProductAttention", "MultiheadAttention")
MODE = Mode.TRAINING | Mode.TORCH_COMPILE


@use_kernel_forward_from_hub("Attention")
class Core(nn.Module):
    """PyTorch's attention on (B, N, H, D)."""

    def forward(self, query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class CoreModel(nn.Module):
    """Self-attention of one block, its core a module of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.core = nn.Linear(32, 96), nn.Linear(32, 32), Core()

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)
        return x + self.out(self.core(query, key, value).flatten(2))


@use_kernel_forward_from_hub("ScaledDotProductAttention")
def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


@use_kernelized_func(sdpa)
class FunctionModel(nn.Module):
    """Attention by a function, which hides keys."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).transpose(1, 3).unbind(2)
        mask = torch.arange(x.shape[1], device=x.device)[None, None, None] < 20
        return self.out(sdpa(query, key, value, mask, scale=0.5).transpose(1, 2).flatten(2))


class TorchModel(nn.Module):
    """PyTorch's own decoder layer: self- and cross-attention by nn.MultiheadAttention, padded keys."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(32, 4, dim_feedforward=64, dropout=0.0, batch_first=True)

    def forward(self, x):
        hidden = (torch.arange(x.shape[1], device=x.device) > 20).expand(x.shape[0], -1)
        return self.layer(x, x.flip(1), tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden)


MODELS = {"Attention": CoreModel, "ScaledDotProductAttention": FunctionModel, "MultiheadAttention": TorchModel}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    subprocess.run([sys.executable, SCRIPT, folder / "build"], check=True)
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    return get_local_kernel(folder)


@pytest.fixture
def kernelized(folder):
    """Puts the kernel's layers into a model."""

    def replaced(model):
        layers = {name: LocalLayerRepository(folder, layer_name=name) for name in LAYERS}
        mapping = {name: {"cpu": {MODE: layer}} for name, layer in layers.items()}
        with use_kernel_mapping(mapping, inherit_mapping=False):
            return kernelize(model, mode=MODE, device="cpu", use_fallback=False)

    return replaced


@pytest.fixture(autouse=True)
def extensible():
    """Let `kernelize` replace nn.MultiheadAttention in the tests of this file, and undo that afterwards. `sdpa` is one
    module that all models share, so its replaced forward is removed too."""
    replace_kernel_forward_from_hub(nn.MultiheadAttention, "MultiheadAttention")
    yield
    del nn.MultiheadAttention.kernel_layer_name, nn.MultiheadAttention.kernel_condition
    vars(sdpa).pop("forward", None)


@pytest.fixture
def calls(kernel, monkeypatch):
    """How often the operator ran."""
    seen = []
    one_source = sys.modules[f"{kernel.__name__}.interop.one_source"]
    original = one_source.multi_source_attention
    monkeypatch.setattr(one_source, "multi_source_attention", lambda *a, **k: seen.append(1) or original(*a, **k))
    return seen


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stock(name):
    torch.manual_seed(0)
    return MODELS[name]()


def gradients(model, x):
    leaves = [x.requires_grad_(), *model.parameters()]
    return torch.autograd.grad(model(x).square().sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loaded_functions_compute_attention(kernel, dtype):
    q, k, v = (randn(2, 33, 4, 40, dtype=dtype, seed=i) for i in range(3))

    def expected(*x):
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x)).transpose(1, 2)

    oracle = expected(q, k, v), expected(q.double(), k.double(), v.double())
    assert_matches(kernel.multi_source_attention(q, [kernel.Source(k, v)]), *oracle)
    assert_matches(kernel.memory_efficient_attention(q, k, v), *oracle)
    by_heads = kernel.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert_matches(by_heads.transpose(1, 2), *oracle)
    assert_matches(kernel.layers.Attention()(q, k, v), *oracle)


def test_the_kernel_offers_the_package_s_functions(kernel):
    for name in set(kernel.__all__) - {"layers"}:
        own = getattr(lr_kernels, name, None) or getattr(lr_kernels.interop, name)
        offered = getattr(kernel, name)
        assert offered is not own
        assert [*inspect.signature(offered).parameters] == [*inspect.signature(own).parameters]


def test_layers_are_pure(kernel):
    found = {name for name, x in vars(kernel.layers).items() if inspect.isclass(x) and x.__module__.endswith("layers")}
    assert found == set(LAYERS)
    for name in LAYERS:
        layer = getattr(kernel.layers, name)
        own = {member for member in vars(layer) if not member.startswith("__")}
        assert own == {"forward", "has_backward", "can_torch_compile"} and layer.__init__ is nn.Module.__init__
        assert layer.has_backward and layer.can_torch_compile


@pytest.mark.parametrize("name", LAYERS)
def test_a_kernelized_model_gives_stocks_numbers(name, calls, kernelized):
    x = randn(2, 33, 32)
    model = stock(name)
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        found = kernelized(model)(x)
    assert len(calls) == (2 if name == "MultiheadAttention" else 1)
    assert_matches(found, expected, exact)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.fault(number=28)
def test_gradients_pass_through_a_kernelized_model(name, calls, kernelized):
    x = randn(2, 33, 32)
    model = stock(name)
    expected, exact = gradients(model, x), gradients(copy.deepcopy(model).double(), x.detach().double())
    found = gradients(kernelized(model), x)
    assert calls
    flat = [torch.cat([g.flatten() for g in grads]) for grads in (found, expected, exact)]
    assert_matches(*flat, "gradients")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.fault(number=29)
def test_a_kernelized_model_compiles_whole(name, kernelized):
    x = randn(2, 33, 32)
    model = stock(name)
    expected, exact = gradients(model, x), gradients(copy.deepcopy(model).double(), x.detach().double())
    compiled = torch.compile(kernelized(model), fullgraph=True, backend="aot_eager")
    flat = [torch.cat([g.flatten() for g in grads]) for grads in (gradients(compiled, x), expected, exact)]
    assert_matches(*flat, "gradients")


@pytest.mark.parametrize("config", [{"batch_first": False}, {"bias": False}, {"kdim": 12, "vdim": 20}], ids=str)
def test_every_layout_of_multihead_attention(config, kernelized):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, **{"batch_first": True, **config})
    arguments = [randn(33, 2, size, seed=i) for i, size in enumerate((32, module.kdim, module.vdim))]
    arguments = arguments if not module.batch_first else [x.transpose(0, 1) for x in arguments]
    padding = randn(2, 33, seed=5)
    expected, _ = module(*arguments, padding, need_weights=False)
    exact, _ = copy.deepcopy(module).double()(*(x.double() for x in arguments), padding.double(), need_weights=False)
    found, weights = kernelized(module)(*arguments, padding, need_weights=False)
    assert_matches(found, expected, exact)
    assert weights is None


@pytest.mark.parametrize(
    ("config", "keywords", "name"),
    [({}, {"need_weights": True}, "need_weights"),
     ({}, {"attn_mask": torch.zeros(9, 9)}, "attn_mask"),
     ({}, {"is_causal": True}, "is_causal"),
     ({"dropout": 0.1}, {}, "dropout"),
     ({"add_bias_kv": True}, {}, "bias_k"),
     ({"add_zero_attn": True}, {}, "add_zero_attn")],
    ids=["weights", "mask", "causal", "dropout", "bias", "zero"],
)  # fmt: skip
@pytest.mark.fault(number=16)
def test_what_the_operator_has_not_is_refused_by_name(config, keywords, name, kernelized):
    module = kernelized(nn.MultiheadAttention(32, 4, batch_first=True, **config))
    x = randn(1, 9, 32)
    with pytest.raises(NotImplementedError, match=f"MultiheadAttention: {name}: expected none"):
        module(x, x, x, **{"need_weights": False, **keywords})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.fault(number=7)
def test_a_padding_mask_of_another_shape_is_named(batch_first, kernelized):
    module = kernelized(nn.MultiheadAttention(32, 4, batch_first=batch_first))
    x = randn(4, 9, 32) if batch_first else randn(9, 4, 32)
    hidden = torch.zeros(4, dtype=torch.bool)  # as many as heads: it would pass for a mask per head
    with pytest.raises(
        ValueError, match=r"MultiheadAttention: key_padding_mask: expected the shape \(4, 9\), got \(4,\)"
    ):
        module(x, x, x, key_padding_mask=hidden, need_weights=False)
