// Vectors, sums and threads, of which the kernels are made.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace domainnorm {

constexpr int64_t TILE = 8192;          // elements that stay in the first-level cache while their moments are taken
constexpr int64_t FEWEST = 1 << 17;     // elements worth a thread
constexpr int64_t AHEAD = 4096;         // bytes: a page

#if defined(__AVX512F__)
constexpr int64_t VECTOR = 64;  // bytes that the processor computes with at once
#elif defined(__AVX2__)
constexpr int64_t VECTOR = 32;
#else
constexpr int64_t VECTOR = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};

// The type that numbers of an element type are computed in, and a vector of it.
template <class T>
struct Accumulate {
  using acc = float;
  typedef float vec __attribute__((vector_size(VECTOR)));
};
template <>
struct Accumulate<double> {
  using acc = double;
  typedef double vec __attribute__((vector_size(VECTOR)));
};
template <class T>
using acc_t = typename Accumulate<T>::acc;
template <class T>
using vec_t = typename Accumulate<T>::vec;
template <class T>
constexpr int64_t WIDTH = VECTOR / sizeof(acc_t<T>);

typedef uint16_t Halves __attribute__((vector_size(VECTOR / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR)));

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <>
inline float load<float, bfloat16>(const bfloat16* from) {
  uint32_t word = uint32_t(from->bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
template <>
inline vec_t<float> load<vec_t<float>, bfloat16>(const bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  vec_t<float> value;
  std::memcpy(&value, &words, sizeof words);
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}
// To the nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* to, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  to->bits = value != value ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}
inline void store(bfloat16* to, vec_t<float> value) {
  Words words;
  std::memcpy(&words, &value, sizeof words);
  words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  words = value != value ? Words{} + 0x7fc0 : words;
  Halves halves = __builtin_convertvector(words, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// For a way through memory: what lies AHEAD is fetched, too. Unasked, a processor fetches what follows within a page only.
template <class V, class T>
inline V load_ahead(const T* from) {
  __builtin_prefetch((const char*)from + AHEAD);
  return load<V>(from);
}
template <class V, class T>
inline void store_ahead(T* to, V value) {
  __builtin_prefetch((const char*)to + AHEAD, 1);
  store(to, value);
}

// body(i, V{}) for all i < n, in steps of a vector or of one number.
template <class T, class Body>
inline void each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + WIDTH<T> <= n; i += WIDTH<T>) body(i, vec_t<T>{});
  for (; i < n; ++i) body(i, acc_t<T>{});
}

// Two sums side by side, of numbers or of vectors of them.
template <class V>
struct Pair {
  V first, second;
  Pair& operator+=(const Pair& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

// The sum of the numbers in a vector, halved as long as it can be; of both of a pair.
template <class N, class V>
inline N sum_of_halves(V numbers) {
  if constexpr (sizeof(V) == 2 * sizeof(N)) {
    return numbers[0] + numbers[1];
  } else {
    typedef N Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &numbers, sizeof halves);
    return sum_of_halves<N>(halves[0] + halves[1]);
  }
}
template <class T>
inline acc_t<T> reduce(vec_t<T> numbers) {
  return sum_of_halves<acc_t<T>>(numbers);
}
template <class T>
inline Pair<acc_t<T>> reduce(const Pair<vec_t<T>>& pair) {
  return {reduce<T>(pair.first), reduce<T>(pair.second)};
}

// The sum of body(i, V{}) over i < n, for one range after the other: numbers, or pairs of them. In single precision, so of
// no more than a tile.
template <class T, class Value>
struct Sum {
  static constexpr int64_t W = WIDTH<T>;
  Value parts[4] = {};
  decltype(reduce<T>(Value{})) total = {};

  template <class Body>
  inline void add(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
      for (int k = 0; k < 4; ++k) parts[k] += body(i + k * W, vec_t<T>{});
    for (; i + W <= n; i += W) parts[0] += body(i, vec_t<T>{});
    for (; i < n; ++i) total += body(i, acc_t<T>{});
  }
  inline auto value() const {
    Value all = parts[0];
    all += parts[1];
    Value others = parts[2];
    others += parts[3];
    all += others;
    auto result = reduce<T>(all);
    result += total;
    return result;
  }
};

// The threads of the OpenMP that torch has loaded, by GOMP_parallel, omp_get_thread_num and omp_get_num_threads: threads of
// another OpenMP would compete with them, because they wait busily. Without them everything runs on one thread.
struct Team {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int (*member)();
  int (*members)();
};
inline Team team = {};

// run(begin, end) for all `tasks`, on so many threads that each has enough of all `elements`.
template <class Run>
void parallel(int64_t tasks, int64_t elements, int64_t threads, Run run) {
  threads = std::max<int64_t>(1, std::min({threads, tasks, elements / FEWEST}));
  if (threads == 1 || !team.run) return run(0, tasks);
  struct Work {
    Run run;
    int64_t tasks;
  } work{run, tasks};
  team.run(
      [](void* data) {
        const Work& work = *static_cast<Work*>(data);
        const int64_t member = team.member(), members = team.members();
        work.run(work.tasks * member / members, work.tasks * (member + 1) / members);
      },
      &work, threads, 0);
}

// Merges the `n` numbers of a tile into the mean and the sum of squared deviations of the `done` numbers before it (Chan et
// al.). `pivot` is the tile's mean, up to the rounding of a sum in single precision, or any number near it; `rest` is the
// sum of the deviations from the pivot, which corrects it, and `rest_squares` that of their squares.
inline void merge(double pivot, double rest, double rest_squares, double n, double done, double& mean, double& squares) {
  const double offset = std::isfinite(rest) ? rest / n : 0;
  const double own_squares = std::max(rest_squares - offset * offset * n, 0.);
  if (!done) {
    mean = pivot + offset;
    squares = own_squares;
    return;
  }
  const double delta = pivot + offset - mean, weight = n / (done + n);
  mean += delta * weight;
  squares += own_squares + delta * delta * weight * done;
}

}  // namespace domainnorm
