// Step 5: bf16 in pairs, and matrix tiles (AMX): one instruction multiplies 16 x 32 by 32 x 16 bf16. Blocks, slices and
// the lazy maximum are those of step 4; a slice has 32 queries, two tiles side by side.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "cpu/simd.h"
#include "problem.h"
#if defined(__AMX_BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/tiles.h"
#else
#include "emulated_tiles.h"
#endif

using namespace lr::LR_ISA;

namespace {

constexpr int kSlice = 32, kSlices = 32;     // queries in a slice, slices in a tile of queries
constexpr int kGroup = 32, kBlock = 256;     // keys whose scores are computed at once, keys in a block
constexpr int kMaxChannels = 256;            // head_dim at most
constexpr int kTileRow = 16;                 // units in a row of a tile, and its rows; a unit is a pair of bf16
constexpr int kRowBytes = kSlice * 4;        // from one row to the next of everything that has a column per query

struct alignas(64) Slice {
  uint32_t query[kMaxChannels / 2][kSlice];  // a row per pair of channels
  float out[kMaxChannels][kSlice];           // a row per channel; not yet divided by sum
  float max[kSlice], sum[kSlice];
};

struct Block {
  std::vector<uint32_t> key;    // [kBlock, units]: rows as they are, zeros after the last channel
  std::vector<uint32_t> value;  // [kBlock / kGroup, channels, kTileRow]: transposed, pairs of keys
  int count;
};

struct alignas(64) Scratch {
  float score[kGroup][kSlice];
  uint32_t weight[kGroup / 2][kSlice];  // a row per pair of keys
};

struct KeyList {
  std::vector<const BFloat16*> key, value;
};

int round_up(int64_t x, int to) { return int((x + to - 1) / to * to); }

KeyList list_keys(const Problem<BFloat16>& p, int64_t h) {
  KeyList list;
  for (const Source<BFloat16>& s : p.source)
    for (int64_t k = 0; k < s.count; ++k) {
      list.key.push_back(s.key + p.at(s.token(k), h));
      list.value.push_back(s.value + p.at(s.token(k), h));
    }
  return list;
}

void load_queries(const Problem<BFloat16>& p, int64_t h, int64_t first, Slice& s) {
  s = {};
  std::fill_n(s.max, kSlice, -FLT_MAX);
  for (int lane = 0; lane < kSlice; ++lane) {
    const BFloat16* query = p.query + p.at(std::min(first + lane, p.queries - 1), h);
    for (int c = 0; c < p.d; ++c) s.query[c / 2][lane] |= uint32_t(query[c].bits) << c % 2 * 16;
  }
}

void pack(const KeyList& list, size_t first, int d, Block& block) {
  const int units = round_up(d, 2 * kTileRow) / 2, channels = round_up(d, kTileRow);
  block.count = int(std::min<size_t>(kBlock, list.key.size() - first));
  block.key.assign(kBlock * units, 0);
  block.value.assign(kBlock / 2 * channels, 0);
  for (int k = 0; k < block.count; ++k) {
    std::memcpy(block.key.data() + k * units, list.key[first + k], d * 2);
    uint32_t* value = block.value.data() + k / kGroup * channels * kTileRow + k % kGroup / 2;
    for (int c = 0; c < d; ++c) value[c * kTileRow] |= uint32_t(list.value[first + k][c].bits) << k % 2 * 16;
  }
}

// score[k][i] = <key k, query i> for a group of 32 keys: four tiles of sums.
void score_group(const uint32_t* key, int units, const Slice& s, float (*score)[kSlice]) {
  memory_barrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int u = 0; u < units; u += kTileRow) {
    _tile_loadd(4, key + u, units * 4);
    _tile_loadd(5, key + u + kTileRow * units, units * 4);
    _tile_loadd(6, s.query[u], kRowBytes);
    _tile_loadd(7, s.query[u] + kTileRow, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, score[0], kRowBytes);
  _tile_stored(1, score[0] + kTileRow, kRowBytes);
  _tile_stored(2, score[kTileRow], kRowBytes);
  _tile_stored(3, score[kTileRow] + kTileRow, kRowBytes);
}

// Softmax weights of a group for a vector of queries, relative to `top`, rounded to bf16 and paired. Returns the sum of
// the rounded ones; `reached` becomes the largest logit.
Vec weigh(Scratch& x, int lane, float scale, Vec top, Vec& reached) {
  Vec sum = Vec{}, largest = set1(-INFINITY);
  for (int k = 0; k < kGroup; k += 2) {
    const Vec score0 = load(x.score[k] + lane), score1 = load(x.score[k + 1] + lane);
    largest = max(largest, max(score0, score1));
    const VecBits even = (VecBits)exp2<3, true>(scale * score0 - top) >> 16;
    const VecBits odd = (VecBits)exp2<3, true>(scale * score1 - top) >> 16;
    sum += (Vec)(even << 16) + (Vec)(odd << 16);
    const VecBits both = even | odd << 16;
    std::memcpy(x.weight[k / 2] + lane, &both, sizeof(both));
  }
  reached = scale * largest;
  return sum;
}

void attend_group(Slice& s, Scratch& x, float scale, int channels) {
  for (int lane = 0; lane < kSlice; lane += kLanes) {
    const Vec top = load(s.max + lane);
    Vec reached, sum = weigh(x, lane, scale, top, reached);
    if (any_greater(reached - top, set1(60))) {  // so for the first group, whose top is -FLT_MAX
      const Vec moved = max(top, reached), shrink = exp2<6>(top - moved);
      store(s.sum + lane, load(s.sum + lane) * shrink);
      for (int c = 0; c < channels; ++c) store(s.out[c] + lane, load(s.out[c] + lane) * shrink);
      store(s.max + lane, moved);
      sum = weigh(x, lane, scale, moved, reached);
    }
    store(s.sum + lane, load(s.sum + lane) + sum);
  }
}

// out[c][i] += Σ_k value[k][c] · weight[k][i] over a group of keys.
void add_values(const uint32_t* value, const Scratch& x, int channels, Slice& s) {
  memory_barrier();
  _tile_loadd(6, x.weight[0], kRowBytes);
  _tile_loadd(7, x.weight[0] + kTileRow, kRowBytes);
  for (int c = 0; c < channels; c += kTileRow) {
    _tile_loadd(0, s.out[c], kRowBytes);
    _tile_loadd(1, s.out[c] + kTileRow, kRowBytes);
    _tile_loadd(4, value + c * kTileRow, kTileRow * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(0, s.out[c], kRowBytes);
    _tile_stored(1, s.out[c] + kTileRow, kRowBytes);
  }
}

void attend_block(Slice& s, const Block& block, Scratch& x, int d, float scale) {
  const int units = round_up(d, 2 * kTileRow) / 2, channels = round_up(d, kTileRow);
  for (int k = 0; k < block.count; k += kGroup) {
    score_group(block.key.data() + k * units, units, s, x.score);
    const int live = std::min(kGroup, block.count - k);
    std::fill(x.score[live], x.score[kGroup], -INFINITY);
    attend_group(s, x, scale, channels);
    add_values(block.value.data() + k / 2 * channels, x, channels, s);
  }
}

void store_out(const Problem<BFloat16>& p, int64_t h, int64_t first, const Slice& s) {
  for (int lane = 0; lane < std::min<int64_t>(kSlice, p.queries - first); ++lane) {
    BFloat16* out = p.out + p.at(first + lane, h);
    for (int c = 0; c < p.d; ++c) from_float(s.out[c][lane] / s.sum[lane], out[c]);
  }
}

}  // namespace

// Whether the tiles can be used: the processor has them, and Linux gives a process their registers on request.
extern "C" bool runs_here() {
#if defined(__AMX_BF16__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;  // emulated
#endif
}

extern "C" void attend(const Problem<BFloat16>& p) {
  const TileSession session;
  std::vector<Slice> tile(kSlices);
  Block block;
  Scratch scratch;
  for (int64_t h = 0; h < p.heads; ++h) {
    const KeyList list = list_keys(p, h);
    for (int64_t first = 0; first < p.queries; first += kSlices * kSlice) {
      const int slices = int(std::min<int64_t>(kSlices, (p.queries - first + kSlice - 1) / kSlice));
      for (int i = 0; i < slices; ++i) load_queries(p, h, first + i * kSlice, tile[i]);
      for (size_t k = 0; k < list.key.size(); k += kBlock) {
        pack(list, k, int(p.d), block);
        for (int i = 0; i < slices; ++i) attend_block(tile[i], block, scratch, int(p.d), p.scale * kLog2E);
      }
      for (int i = 0; i < slices; ++i) store_out(p, h, first + i * kSlice, tile[i]);
    }
  }
}
