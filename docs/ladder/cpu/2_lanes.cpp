// Step 2: queries in SIMD lanes. A slice of queries walks the keys a few at a time, and its softmax is kept up to date
// as it goes (online): no list of weights as long as the keys.
#include "lanes.h"

namespace {

// Adds up to kTile keys to the softmax of a slice.
void add_keys(Slice& s, const float* const* key, const float* const* value, int count, int d, float scale) {
  Lanes weight[kTile];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) weight[i] = all(0);
  for (int c = 0; c < d; ++c) {
    const Lanes& query = s.query[c];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) weight[i] = weight[i] + key[i][c] * query;
  }

  Lanes top = s.max;
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    weight[i] = i < count ? scale * weight[i] : all(-INFINITY);
    top = max(top, weight[i]);
  }
  const Lanes shrink = exp2(s.max - top);
  s.max = top;
  s.sum = s.sum * shrink;
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    weight[i] = exp2(weight[i] - top);
    s.sum = s.sum + weight[i];
  }

  for (int c = 0; c < d; ++c) {
    Lanes out = s.out[c] * shrink;
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) out = out + value[i][c] * weight[i];
    s.out[c] = out;
  }
}

}  // namespace

extern "C" void attend(const Problem<float>& p) {
  Slice slice;
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t first = 0; first < p.queries; first += kSlice) {
      load_queries(p, h, first, slice);
      for (const Source<float>& s : p.source)
        for (int64_t k = 0; k < s.count; k += kTile) {
          const float *key[kTile], *value[kTile];
          for (int i = 0; i < kTile; ++i) {
            const int64_t token = s.token(std::min(k + i, s.count - 1));
            key[i] = s.key + p.at(token, h);
            value[i] = s.value + p.at(token, h);
          }
          add_keys(slice, key, value, int(std::min<int64_t>(kTile, s.count - k)), int(p.d), p.scale * kLog2E);
        }
      store_out(p, h, first, slice);
    }
}
