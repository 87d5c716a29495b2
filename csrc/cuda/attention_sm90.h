// multi_source_attention on Hopper (sm_90), forward. docs/hopper.md explains how it works.
#pragma once
#include <cstdint>

#include "params.h"

struct CUstream_st;

namespace lr {

// Why the kernel cannot take the call, in words that follow "expected no", or null. All it needs beyond what
// multi_source_attention accepts stands here.
const char* attention_sm90_lacks(const AttentionParams& p);

struct AttentionSm90Params {
  AttentionParams attention;
  int32_t multiprocessors;  // of the device
  int32_t parts;            // into which the keys of a query are split; 0: as many as a model of the cost says
  void* workspace;          // of attention_sm90_workspace bytes, at a multiple of 16; its contents do not matter
  CUstream_st* stream;
};

int64_t attention_sm90_workspace(const AttentionSm90Params& p);

// Null, or the error of a launch.
const char* attention_sm90_cuda(const AttentionSm90Params& p);

}  // namespace lr
