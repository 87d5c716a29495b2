// wgmma: operands are found through their descriptors, as the hardware does.
#include "block.h"

namespace lr::emulator {

constexpr uint32_t kPoison = 0x7fa1dead;  // the bits of a NaN that nothing computes: a sum that is read in flight

static bool is_poison(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits == kPoison;
}
static void poison(float* x, int n) {
  for (int i = 0; i < n; ++i) std::memcpy(x + i, &kPoison, 4);
}

// Where eight neighbouring numbers of an operand lie: the canonical layouts of the PTX ISA, in units of 16 bytes,
//   channels contiguous:          none ((8,n),2):((1,SBO),LBO); swizzled by W units ((8,n),2):((W,SBO),1)
//   the other dimension (N) is:   none ((1,n),(8,k)):((X,SBO),(1,LBO)); swizzled ((W,n),(8,k)):((1,LBO),(W,SBO))
// with bits 4.. of the address exclusive-ored by bits 7... row: of N (or M); octet: of the 16 channels, or the reverse
// where N is contiguous.
static uint32_t operand_address(uint64_t descriptor, bool transposed, int row, int octet) {
  const uint32_t start = (descriptor & 0x3fff) << 4, lbo = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t sbo = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62, width = mode == 0 ? 1 : mode == 1 ? 8 : mode == 2 ? 4 : 2;
  uint32_t at = start + row % 8 * (width * kUnit);
  if (!transposed)
    at += row / 8 * sbo + octet * (mode == 0 ? lbo : kUnit);
  else if (mode == 0)
    at += octet * sbo + row / 8 * lbo;
  else
    at += octet % width * kUnit + octet / width * lbo + row / 8 * sbo;
  return at ^ ((at >> 7 & (width - 1)) << 4);
}

void Block::wgmma(int n, bool half, bool transposed, bool accumulate, float* d, const uint32_t* a,
                  uint64_t a_descriptor, uint64_t b_descriptor) {
  Thread& t = me();
  Warp& w = warp();
  const int lane = current_ % 32, warps = current_ / 128 * 4;
  if (t.needs_fence) fail("wgmma: no wgmma.fence since the registers were touched");
  if (n % 8 || n < 8 || n > 256) fail("wgmma: N %d", n);
  for (uint64_t x : {b_descriptor, a ? b_descriptor : a_descriptor})
    if (x & (3ull << 14 | 3ull << 30 | 0xffffull << 46))
      fail("wgmma: reserved bits or a base offset in descriptor %llx", static_cast<unsigned long long>(x));
  const size_t place = t.issued++;
  const Product mine{n, half, transposed, !a, accumulate, a_descriptor, b_descriptor, 0, {}, {}, {}, {}, false};
  const auto same = [](const Product& x, const Product& y) {
    return x.n == y.n && x.half == y.half && x.transposed == y.transposed && x.a_shared == y.a_shared &&
           x.accumulate == y.accumulate && x.a_descriptor == y.a_descriptor && x.b_descriptor == y.b_descriptor;
  };
  if (place == w.products.size()) w.products.push_back(mine);
  Product& product = w.products[place];
  if (!same(product, mine)) fail("wgmma %zu: the lanes of the warp differ", place);
  product.d[lane] = d;
  product.a[lane] = a;
  if (a) std::memcpy(product.a_then[lane], a, 16);
  Sums* sums = nullptr;
  for (Sums& x : t.sums) {
    if (x.registers == d && x.size == n / 2)
      sums = &x;
    else if (x.registers < d + n / 2 && d < x.registers + x.size)
      fail("wgmma: sums overlap in flight");
  }
  if (!sums) {
    t.sums.push_back({d, n / 2, std::vector<float>(d, d + n / 2), place});
  } else {
    for (int i = 0; i < sums->size; ++i)
      if (!is_poison(d[i])) fail("wgmma: sum %d was written in flight", i);
    sums->last = place;
  }
  poison(d, n / 2);
  if (++product.lanes < 32) return;
  // The warp has issued it: what it will read must be there.
  for (int other = warps; other < warps + 4; ++other)
    if (warps_[other].products.size() > place && warps_[other].products[place].lanes == 32 &&
        !same(warps_[other].products[place], product))
      fail("wgmma %zu: the warps of the warpgroup differ", place);
  for (int row = 0; row < (transposed ? 16 : n); ++row)
    for (int octet = 0; octet < (transposed ? n / 8 : 2); ++octet)
      product.units.push_back(operand_address(b_descriptor, transposed, row, octet));
  for (int i = 0; i < (a ? 0 : 128); ++i)  // all 64 rows, since nothing says which warp reads which
    product.units.push_back(operand_address(a_descriptor, false, i / 2, i % 2));
  for (uint32_t at : product.units) {
    if (at < kReserved || at + kUnit > shared_.size()) fail("wgmma: operand at %u is outside shared memory", at);
    Unit& u = shared_.unit(at);
    if (u.barrier) fail("wgmma: operand at %u is an mbarrier", at);
    if (u.pending) fail("wgmma: operand at %u is still being copied", at);
    if (u.written != 0xffff) fail("wgmma: operand at %u was never written", at);
    if (u.unfenced >> (current_ / 32) & 1) fail("wgmma: operand at %u without fence.proxy.async", at);
    ++u.readers;
  }
  if (options_.timing == Timing::kEarly) execute(w, product);
}

void Block::execute(Warp& w, Product& x) {
  if (x.done) return;
  const int warp = int(&w - warps_.data());
  float a[16][16], b[16][256], sum[256];
  uint16_t octet[8];
  size_t unit = 0;
  const auto next = [&] { std::memcpy(octet, shared_.at(x.units[unit++]), kUnit); };
  for (int row = 0; row < (x.transposed ? 16 : x.n); ++row)
    for (int o = 0; o < (x.transposed ? x.n / 8 : 2); ++o) {
      next();
      for (int i = 0; i < 8; ++i) (x.transposed ? b[row][8 * o + i] : b[8 * o + i][row]) = number(octet[i], x.half);
    }
  if (x.a_shared) {
    for (int i = 0; i < 128; ++i) {
      next();
      if (i / 32 == warp % 4)
        for (int k = 0; k < 8; ++k) a[i / 2 % 16][i % 2 * 8 + k] = number(octet[k], x.half);
    }
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      if (std::memcmp(x.a[lane], x.a_then[lane], 16)) {
        current_ = warp * 32 + lane;
        fail("wgmma: operands in registers changed in flight");
      }
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i)
          a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + i] =
              number(uint16_t(x.a_then[lane][r] >> (16 * i)), x.half);
    }
  }
  for (int row = 0; row < 16; ++row) {
    std::fill(sum, sum + x.n, 0.0f);
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < x.n; ++j) sum[j] += a[row][k] * b[k][j];
    for (int c = 0; c < 4; ++c) {  // the four lanes that hold this row
      const int lane = row % 8 * 4 + c;
      for (Sums& s : threads_[warp * 32 + lane].sums)
        if (s.registers == x.d[lane])
          for (int i = row / 8 * 2; i < s.size; i += 4)
            for (int j = i; j < i + 2; ++j) {
              const float y = sum[j / 4 * 8 + c * 2 + j % 2];
              s.value[j] = x.accumulate ? s.value[j] + y : y;
            }
    }
  }
  for (uint32_t at : x.units) --shared_.unit(at).readers;
  x.units.clear();
  x.done = true;
}

void Block::wgmma_wait(int leave) {
  Thread& t = me();
  Warp& w = warp();
  const size_t end = int(t.groups.size()) > leave ? t.groups[t.groups.size() - 1 - leave] : 0;
  const int warps = current_ / 128 * 4;
  const uint64_t generation = t.waits++;
  ++w.waits;
  block_until("its warpgroup's wgmma", [&] {  // all lanes must be here, and all warps have issued the products
    if (w.waits < 32 * (generation + 1)) return false;
    for (int i = warps; i < warps + 4; ++i)
      for (size_t k = t.retired; k < end; ++k)
        if (warps_[i].products.size() <= k || warps_[i].products[k].lanes < 32) return false;
    return true;
  });
  for (size_t k = t.retired; k < end; ++k) execute(w, w.products[k]);
  t.retired = std::max(t.retired, end);
  for (size_t i = 0; i < t.sums.size();) {
    Sums& x = t.sums[i];
    if (x.last >= t.retired) {
      ++i;
      continue;
    }
    for (int j = 0; j < x.size; ++j)
      if (!is_poison(x.registers[j])) fail("wgmma: sum %d was written in flight", j);
    std::memcpy(x.registers, x.value.data(), 4 * x.size);
    t.sums.erase(t.sums.begin() + i);
  }
  t.needs_fence = true;
}

}  // namespace lr::emulator
