// Step 1: the definition, one query at a time.
#include <algorithm>
#include <cmath>
#include <vector>

#include "problem.h"

extern "C" void attend(const Problem<float>& p) {
  std::vector<float> weight(p.source[0].count + p.source[1].count);
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.queries; ++i) {
      const float* query = p.query + p.at(i, h);
      float* w = weight.data();
      for (const Source<float>& s : p.source)
        for (int64_t k = 0; k < s.count; ++k) {
          const float* key = s.key + p.at(s.token(k), h);
          float score = 0;
          for (int64_t c = 0; c < p.d; ++c) score += query[c] * key[c];
          *w++ = score * p.scale;
        }
      const float max = *std::max_element(weight.begin(), weight.end());
      float sum = 0;
      for (float& x : weight) sum += x = std::exp(x - max);
      float* out = p.out + p.at(i, h);
      std::fill_n(out, p.d, 0.0f);
      w = weight.data();
      for (const Source<float>& s : p.source)
        for (int64_t k = 0; k < s.count; ++k, ++w) {
          const float* value = s.value + p.at(s.token(k), h);
          for (int64_t c = 0; c < p.d; ++c) out[c] += *w / sum * value[c];
        }
    }
}
