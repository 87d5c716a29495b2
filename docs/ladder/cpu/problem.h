// What every step of the ladder computes: the queries of one image attend to the visible keys of two sources, in one
// softmax. Heads lie beside each other in memory, as a model's projections leave them.
#pragma once
#include <cstdint>

template <class T>
struct Source {
  const T* key;          // [tokens, heads, d]
  const T* value;        // [tokens, heads, d]
  const int32_t* index;  // [count] the visible tokens; null: all of them
  int64_t count;         // how many tokens are visible

  int64_t token(int64_t k) const { return index ? index[k] : k; }
};

template <class T>
struct Problem {
  const T* query;  // [queries, heads, d]
  T* out;          // [queries, heads, d]
  Source<T> source[2];
  int64_t queries, heads, d;
  float scale;

  int64_t at(int64_t token, int64_t head) const { return (token * heads + head) * d; }
};
