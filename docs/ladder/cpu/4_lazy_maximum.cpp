// Step 4: the lazy maximum. Weights are made while their scores are in registers, relative to a maximum that need not
// be the true one; only where a weight would become huge is the block done again. All else is step 3.
#include "lanes.h"

namespace {

constexpr int kBlock = 96;   // keys in a block: with their values 48 KiB at d = 64, which the L2 cache keeps
constexpr int kSlices = 32;  // slices in a tile of queries

// Where the visible keys and values of all sources lie, for one head.
struct KeyList {
  std::vector<const float*> key, value;
};

struct Block {
  std::vector<float> key, value;  // [kBlock, d] each
  int count;
};

KeyList list_keys(const Problem<float>& p, int64_t h) {
  KeyList list;
  for (const Source<float>& s : p.source)
    for (int64_t k = 0; k < s.count; ++k) {
      list.key.push_back(s.key + p.at(s.token(k), h));
      list.value.push_back(s.value + p.at(s.token(k), h));
    }
  return list;
}

void pack(const KeyList& list, size_t first, int64_t d, Block& block) {
  block.count = int(std::min<size_t>(kBlock, list.key.size() - first));
  for (int k = 0; k < block.count; ++k) {
    std::copy_n(list.key[first + k], d, block.key.data() + k * d);
    std::copy_n(list.value[first + k], d, block.value.data() + k * d);
  }
}

// score[i] = <key i, query of the lane> for kTile packed keys.
LR_INLINE void score_tile(const float* key, const Slice& s, int d, Lanes (&score)[kTile]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) score[i] = all(0);
  for (int c = 0; c < d; ++c) {
    const Lanes& query = s.query[c];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) score[i] = score[i] + key[i * d + c] * query;
  }
}

// out[c] += Σ_k weight[k] · value[k][c] for channels c … d, kCount at a time and then those left.
template <int kCount>
void add_values(const Block& block, const Lanes* weight, int c, int d, Lanes* out) {
  for (; c + kCount <= d; c += kCount) {
    Lanes sum[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sum[i] = all(0);
    const float* value = block.value.data() + c;
    for (int k = 0; k < block.count; ++k, value += d) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + value[i] * weight[k];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) out[c + i] = out[c + i] + sum[i];
  }
  if constexpr (kCount > 1) add_values<kCount - 1>(block, weight, c, d, out);
}

// The largest of the first kTile logits: the maximum that a slice starts with.
Lanes first_maximum(const Slice& s, const Block& block, int d, float scale) {
  Lanes score[kTile], top = all(-FLT_MAX);
  score_tile(block.key.data(), s, d, score);
  for (int i = 0; i < std::min(kTile, block.count); ++i) top = max(top, scale * score[i]);
  return top;
}

// Adds a block of keys to the softmax of a slice.
void attend_block(Slice& s, const Block& block, Lanes* weight, int d, float scale, bool first) {
  if (first) s.max = first_maximum(s, block, d, scale);
  for (;;) {
    Lanes top = all(-INFINITY), sum = all(0);
    for (int k = 0; k < block.count; k += kTile) {
      Lanes score[kTile];
      score_tile(block.key.data() + k * d, s, d, score);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        if (k + i >= block.count) score[i] = all(-INFINITY);
        top = max(top, score[i]);
        weight[k + i] = exp2(scale * score[i] - s.max);
        sum = sum + weight[k + i];
      }
    }
    top = scale * top;
    if (!any_greater(top - s.max, all(60))) {  // no weight above 2^60: fp32 has room for 2^127
      s.sum = s.sum + sum;
      break;
    }
    const Lanes moved = max(s.max, top), shrink = exp2(s.max - moved);
    s.max = moved;
    s.sum = s.sum * shrink;
    for (Lanes& x : s.out) x = x * shrink;
  }
  add_values<kTile>(block, weight, 0, d, s.out.data());
}

}  // namespace

extern "C" void attend(const Problem<float>& p) {
  std::vector<Slice> tile(kSlices);
  std::vector<Lanes> weight(kBlock + kTile);
  Block block{std::vector<float>((kBlock + kTile) * p.d), std::vector<float>(kBlock * p.d), 0};
  for (int64_t h = 0; h < p.heads; ++h) {
    const KeyList list = list_keys(p, h);
    for (int64_t first = 0; first < p.queries; first += kSlices * kSlice) {
      const int slices = int(std::min<int64_t>(kSlices, (p.queries - first + kSlice - 1) / kSlice));
      for (int i = 0; i < slices; ++i) load_queries(p, h, first + i * kSlice, tile[i]);
      for (size_t k = 0; k < list.key.size(); k += kBlock) {
        pack(list, k, p.d, block);
        for (int i = 0; i < slices; ++i)
          attend_block(tile[i], block, weight.data(), int(p.d), p.scale * kLog2E, k == 0);
      }
      for (int i = 0; i < slices; ++i) store_out(p, h, first + i * kSlice, tile[i]);
    }
  }
}
