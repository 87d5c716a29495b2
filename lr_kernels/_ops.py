"""The namespace of the torch ops. Every build of the kernel for Hugging Face's `kernels` has a file of this name with a
namespace of its own, so that several versions, and the installed package, can be loaded into one process."""

import torch

ops = torch.ops.lr_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op."""
    return f"lr_kernels::{op_name}"
