"""What this process can run: dtypes of the kernels, Triton's interpreter, errors from C++."""

import os

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ERRORS_REACH_PYTHON = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether an error raised by the C++ extension arrives in Python. With torch 2.11 it crashes the process in torch's
boxed kernel, so with that torch the checks in Python always come first."""


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which also serves CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tf32_allowed() -> bool:
    """Whether PyTorch was told that TF32 is good enough for products of fp32 on a GPU."""
    return torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
