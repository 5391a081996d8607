// What the kernels are made of: vectors of numbers, sums, threads, and what they are given. See rows.cpp and batches.cpp.

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

// Of an element type the type that it is computed in, one number or a vector of them.
template <class T>
struct Wide {
  using One = float;
  typedef float Many __attribute__((vector_size(VECTOR)));
};
template <>
struct Wide<double> {
  using One = double;
  typedef double Many __attribute__((vector_size(VECTOR)));
};
template <class T>
using One = typename Wide<T>::One;
template <class T>
using Many = typename Wide<T>::Many;
template <class T>
constexpr int64_t WIDTH = VECTOR / sizeof(One<T>);

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
inline Many<float> load<Many<float>, bfloat16>(const bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  Many<float> value;
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
inline void store(bfloat16* to, Many<float> value) {
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

// body(i, V{}) for all places i < n, of one number or of a vector of them.
template <class T, class Body>
inline void each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + WIDTH<T> <= n; i += WIDTH<T>) body(i, Many<T>{});
  for (; i < n; ++i) body(i, One<T>{});
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
inline N halved(V numbers) {
  if constexpr (sizeof(V) == 2 * sizeof(N)) {
    return numbers[0] + numbers[1];
  } else {
    typedef N Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &numbers, sizeof halves);
    return halved<N>(halves[0] + halves[1]);
  }
}
template <class T>
inline One<T> within(Many<T> numbers) {
  return halved<One<T>>(numbers);
}
template <class T>
inline Pair<One<T>> within(const Pair<Many<T>>& pair) {
  return {within<T>(pair.first), within<T>(pair.second)};
}

// The sum of body(i, V{}) over i < n, of one piece after the other: numbers, or pairs of them; of no more than single
// precision can bear.
template <class T, class Value>
struct Sum {
  static constexpr int64_t W = WIDTH<T>;
  Value parts[4] = {};
  decltype(within<T>(Value{})) total = {};

  template <class Body>
  inline void add(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
      for (int k = 0; k < 4; ++k) parts[k] += body(i + k * W, Many<T>{});
    for (; i + W <= n; i += W) parts[0] += body(i, Many<T>{});
    for (; i < n; ++i) total += body(i, One<T>{});
  }
  inline auto value() const {
    Value all = parts[0];
    all += parts[1];
    Value others = parts[2];
    others += parts[3];
    all += others;
    auto result = within<T>(all);
    result += total;
    return result;
  }
};

template <class T, class Body>
inline auto sum(int64_t n, Body body) {
  Sum<T, decltype(body(0, Many<T>{}))> of;
  of.add(n, body);
  return of.value();
}

// The team of threads that torch has, by GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP that it
// has loaded; new threads would find its idle ones, which wait busily, in their way. Without it all runs on one.
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
      [](void* of) {
        const Work& work = *static_cast<Work*>(of);
        const int64_t member = team.member(), members = team.members();
        work.run(work.tasks * member / members, work.tasks * (member + 1) / members);
      },
      &work, threads, 0);
}

// Numbers of rows: the sample's lie `step` after those of the one before, which is 0 where all samples have the same.
struct Numbers {
  const void* at;
  int64_t step;
};

template <class T>
const One<T>* of_sample(Numbers numbers, int64_t sample) {
  return (const One<T>*)numbers.at + sample * numbers.step;
}

// One of several tensors (samples, channels, length): what is read, what is written.
struct Part {
  const void *grad, *x;
  void* out;
  int64_t samples, length, last;
};
static_assert(sizeof(Part) == 6 * sizeof(int64_t), "library.py writes them as so many words");

// A tile's moments into `centre` and `squares`, those of the `done` numbers before it, as Moments.merge does. Of its `n`
// numbers `own` is the mean, to the rounding of a sum in single precision, or that of the numbers before: what it is off by
// then, which cancels, is in the squares of all, too. `rest` is the sum of what lies beyond it, which corrects this, and
// `of` that of the squares.
inline void merge(double own, double rest, double of, double n, double done, double& centre, double& squares) {
  const double beyond = std::isfinite(rest) ? rest / n : 0;
  const double within = std::max(of - beyond * beyond * n, 0.);
  if (!done) {
    centre = own + beyond;
    squares = within;
    return;
  }
  const double apart = own + beyond - centre, share = n / (done + n);
  centre += apart * share;
  squares += within + apart * apart * share * done;
}

}  // namespace domainnorm
