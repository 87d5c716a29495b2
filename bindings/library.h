// Registers ops under a namespace that the loader names. So copies of this library in one process, as the installed
// package and a kernel for Hugging Face's `kernels` are, have a namespace each.
#pragma once
#include <torch/csrc/stable/library.h>

namespace lr {

// A function that registers ops of one dispatch key, kept until lr_kernels_register calls it.
struct Implementations {
  Implementations(const char* key, void (*add)(torch::stable::detail::StableLibrary&));
};

}  // namespace lr

// The ops of a file, as STABLE_TORCH_LIBRARY_IMPL registers them under a namespace that is known when it is compiled.
#define LR_LIBRARY_IMPL(key, m)                                    \
  static void add_ops(torch::stable::detail::StableLibrary& m);    \
  static const lr::Implementations implementations(#key, add_ops); \
  static void add_ops(torch::stable::detail::StableLibrary& m)
