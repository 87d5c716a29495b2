// How a call of attention on Hopper is cut into work items, and which of its tensors TMA can copy.
#include <type_traits>

#include "cuda/attention_sm90.h"
#include "cuda/sm90/launch.h"

namespace lr {
namespace {

using sm90::KeyTile;
using sm90::Kind;
using sm90::kQueries;
using sm90::Problem;

constexpr int kConsumerThreads = 128 * sm90::kConsumers;
constexpr int64_t kMost = (int64_t(1) << 31) - 1;

Kind kind_of(const AttentionParams& p) {
  bool general = !(p.scale > 0) || p.softmax_groups > 1 || p.weight[0];
  for (int s = 0; s < p.sources; ++s) {
    const AttentionSource& x = p.source[s];
    general |= x.key_bias || x.logit_scale || x.logit_bias || x.value_index || x.storage != Storage::kElements;
  }
  return general ? Kind::kGeneral : Kind::kPlain;
}

// Calls f with the number of channels, as a constant, that serves the call's head_dim.
template <class F>
auto for_channels(int64_t d, F f) {
  if (d <= 40) return f(std::integral_constant<int, 40>());
  if (d <= 64) return f(std::integral_constant<int, 64>());
  if (d <= 80) return f(std::integral_constant<int, 80>());
  if (d <= 128) return f(std::integral_constant<int, 128>());
  if (d <= 160) return f(std::integral_constant<int, 160>());
  return f(std::integral_constant<int, 256>());
}

// How a call is cut.
struct Cut {
  Kind kind;
  KeyTile tile;
  int channels, tiles, parts;  // tiles: of the queries of a row and head; parts: of the keys
  int64_t works;
};

// The number of parts for which a model of the time is smallest: rounds of work items, tiles in each, what starts an
// item, and with several parts their way through memory and a second launch. In microseconds, from an H200's rates.
int best_parts(int64_t items, int64_t key_tiles, int keys, const AttentionParams& p, int channels,
               int multiprocessors) {
  constexpr double kStart = 2, kMerge = 3;          // before the first product; a launch
  constexpr double kFlops = 5.98e6, kExps = 2.8e4;  // of a multiprocessor
  constexpr double kOverlap = 1.155;                // what FlashAttention-3 reaches over one after the other
  constexpr double kBytes = 4e6;
  const double tile = kQueries * keys * (4.0 * channels / kFlops + 1 / kExps) / kOverlap;
  const double result = 4.0 * p.b * p.n * p.h * channels;  // bytes of a part's
  int best = 1;
  double least = 0;
  for (int parts = 1; parts <= 8 && key_tiles >= 2 * parts; ++parts) {
    const int64_t rounds = (items * parts + multiprocessors - 1) / multiprocessors;
    double time = rounds * ((key_tiles + parts - 1) / parts * tile + kStart);
    if (parts > 1) time += kMerge + 2 * parts * result / kBytes;
    if (parts == 1 || time < least) best = parts, least = time;
  }
  return best;
}

Cut cut(const AttentionSm90Params& x) {
  const AttentionParams& p = x.attention;
  Cut c{};
  c.kind = kind_of(p);
  c.tile = for_channels(p.d, [&](auto d) { return sm90::key_tile<d>(c.kind); });
  c.channels = for_channels(p.d, [](auto d) { return int(d); });
  c.tiles = static_cast<int>((p.n + kQueries - 1) / kQueries + (p.query_order ? p.c - 1 : 0));
  int64_t key_tiles = 0;
  for (int s = 0; s < p.sources; ++s) key_tiles += (p.source[s].m + c.tile.keys - 1) / c.tile.keys;
  const int64_t items = p.b * p.h * c.tiles;
  c.parts = p.softmax_groups > 1 ? 1
            : x.parts            ? x.parts
                                 : best_parts(items, key_tiles, c.tile.keys, p, c.channels, x.multiprocessors);
  c.works = items * c.parts;
  return c;
}

// Whether TMA takes such strides of (head, token, row) in elements, where the dimension has more than one entry.
bool describable(const int64_t (&dim)[4], const int64_t (&stride)[4]) {
  for (int i = 1; i < 4; ++i)
    if (dim[i] > (int64_t(1) << 32) || (dim[i] > 1 && (stride[i] <= 0 || stride[i] % 8 || stride[i] >> 39)))
      return false;
  return true;
}

const char* make_maps(Problem& x, const Cut& c) {
  const AttentionParams& p = x.attention;
  const int box[4] = {c.tile.channels, 1, c.tile.keys, 1};
  for (int s = 0; s < p.sources; ++s) {
    const AttentionSource& source = p.source[s];
    if (source.key_index || source.storage != Storage::kElements || source.m == 0 || source.r == 0) continue;
    const auto make = [&](sm90::TensorMap& map, uint32_t& set, const void* data, const int64_t (&of)[3]) {
      const int64_t dim[4] = {p.d, source.k, source.m, source.r};
      int64_t stride[4] = {2, of[2], of[1], of[0]};
      if (!describable(dim, stride)) return static_cast<const char*>(nullptr);
      for (int i = 1; i < 4; ++i)
        stride[i] = dim[i] > 1 ? 2 * stride[i] : 16;  // bytes; of one entry: any that is legal
      set |= 1u << s;
      return sm90::encode_map(map, p.dtype == DType::kFloat16, data, dim, stride, box, c.tile.swizzle);
    };
    if (const char* error = make(x.maps.key[s], x.maps.keys, source.key, source.key_stride)) return error;
    if (source.value_index) continue;
    if (const char* error = make(x.maps.value[s], x.maps.values, source.value, source.value_stride)) return error;
  }
  return nullptr;
}

int64_t cells(const AttentionParams& p) { return p.b * p.n * p.h; }

}  // namespace

const char* attention_sm90_lacks(const AttentionParams& p) {
  const auto unaligned = [&](const void* data, const int64_t (&stride)[3], Storage storage = Storage::kElements) {
    const bool starts = reinterpret_cast<uintptr_t>(data) % (storage == Storage::kElements ? 16 : 8) == 0;
    return !starts || stride[0] % 8 || stride[1] % 8 || stride[2] % 8;
  };
  if (p.dtype == DType::kFloat32) return "float32";
  if (p.d % 8) return "head_dim that is not a multiple of 8";
  if (p.e != p.d) return "value whose head_dim is not that of the keys";
  if (p.query_block) return "blocks of queries";
  if (unaligned(p.query, p.query_stride)) return "query whose rows are not at multiples of 8 numbers";
  if (unaligned(p.out, p.out_stride)) return "out whose rows are not at multiples of 8 numbers";
  for (int s = 0; s < p.sources; ++s) {
    const AttentionSource& x = p.source[s];
    if (x.key_range) return "key_range";
    if (x.key_index && (x.key_block != 1 || x.index_stride[2] || x.count_stride[2])) return "blocks of keys";
    if (unaligned(x.key, x.key_stride, x.storage)) return "key whose rows are not at multiples of 8 numbers";
    if (unaligned(x.value, x.value_stride, x.storage)) return "value whose rows are not at multiples of 8 numbers";
    if (x.key_stride[1] >> 30 || x.value_stride[1] >> 30) return "tokens that are 2 GiB or more apart";
  }
  if (p.n > kMost - kQueries * p.c || p.b * p.h > kMost / (p.n / kQueries + p.c + 1) / 8)
    return "more than 2147483647 tiles of work";
  return nullptr;
}

int64_t attention_sm90_workspace(const AttentionSm90Params& x) {
  const AttentionParams& p = x.attention;
  const Cut c = cut(x);
  if (p.softmax_groups > 1)
    return int64_t(sm90::blocks_of(c.works, x.multiprocessors)) * (c.channels / 2) * kConsumerThreads * 4;
  return c.parts > 1 ? c.parts * cells(p) * (c.channels * 4 + 16) : 0;
}

const char* attention_sm90_cuda(const AttentionSm90Params& p) {
  const Cut c = cut(p);
  if (c.works == 0) return nullptr;
  Problem x{};
  x.attention = p.attention;
  x.works = static_cast<int32_t>(c.works);
  x.tiles = c.tiles;
  x.parts = c.parts;
  x.results = static_cast<float*>(p.workspace);
  x.part_out = static_cast<float*>(p.workspace);
  if (c.parts > 1) x.part_sums = reinterpret_cast<double*>(x.part_out + c.parts * cells(p.attention) * c.channels);
  if (const char* error = make_maps(x, c)) return error;
  x.gathers = (x.maps.keys & x.maps.values) != (1u << p.attention.sources) - 1;
  return for_channels(p.attention.d, [&](auto d) { return sm90::run<d>(x, c.kind, p.multiprocessors, p.stream); });
}

}  // namespace lr
