// Step 3: a block of keys is gathered and packed once, and then serves all slices of a tile of queries.
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

// out[c] = out[c] · shrink + Σ_k weight[k] · value[k][c] for channels c … d, kCount at a time and then those left.
template <int kCount>
void add_values(const Block& block, const Lanes* weight, Lanes shrink, int c, int d, Lanes* out) {
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
    for (int i = 0; i < kCount; ++i) out[c + i] = out[c + i] * shrink + sum[i];
  }
  if constexpr (kCount > 1) add_values<kCount - 1>(block, weight, shrink, c, d, out);
}

// Adds a block of keys to the softmax of a slice.
void attend_block(Slice& s, const Block& block, Lanes* weight, int d, float scale) {
  Lanes top = s.max;
  for (int k = 0; k < block.count; k += kTile) {
    Lanes score[kTile];
    score_tile(block.key.data() + k * d, s, d, score);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      weight[k + i] = k + i < block.count ? scale * score[i] : all(-INFINITY);
      top = max(top, weight[k + i]);
    }
  }
  const Lanes shrink = exp2(s.max - top);
  Lanes sum = s.sum * shrink;
  for (int k = 0; k < block.count; ++k) {
    weight[k] = exp2(weight[k] - top);
    sum = sum + weight[k];
  }
  s.max = top;
  s.sum = sum;
  add_values<kTile>(block, weight, shrink, 0, d, s.out.data());
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
        for (int i = 0; i < slices; ++i) attend_block(tile[i], block, weight.data(), int(p.d), p.scale * kLog2E);
      }
      for (int i = 0; i < slices; ++i) store_out(p, h, first + i * kSlice, tile[i]);
    }
  }
}
