// Moments of the rows of a tensor, affines of them, and their gradients, on a CPU. Called by compiled.py, which checks
// what comes in; plain.py says what each function computes.
//
// A tensor is `samples` x `channels` x `length` numbers. A row lies in one piece, or with `last` the channels of each
// place lie side by side. Numbers of rows are (samples, channels) in any case, of one tensor after the other.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 8192;          // elements that stay in the first-level cache while their moments are taken
constexpr int64_t FEWEST = 1 << 17;     // elements worth a thread

struct bfloat16 {
  uint16_t bits;
};

// Of an element type the type that it is computed in, one number or a vector of them.
template <class T>
struct Wide {
  using One = float;
  typedef float Many __attribute__((vector_size(64)));
};
template <>
struct Wide<double> {
  using One = double;
  typedef double Many __attribute__((vector_size(64)));
};
template <class T>
using One = typename Wide<T>::One;
template <class T>
using Many = typename Wide<T>::Many;
template <class T>
constexpr int64_t WIDTH = 64 / sizeof(One<T>);

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

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
  std::memcpy(&halves, from, 32);
  Words words = __builtin_convertvector(halves, Words) << 16;
  Many<float> value;
  std::memcpy(&value, &words, 64);
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
  std::memcpy(&words, &value, 64);
  words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  words = value != value ? Words{} + 0x7fc0 : words;
  Halves halves = __builtin_convertvector(words, Halves);
  std::memcpy(to, &halves, 32);
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
template <class T>
inline One<T> within(Many<T> numbers) {
  One<T> parts[WIDTH<T>];
  std::memcpy(parts, &numbers, sizeof parts);
  for (int64_t half = WIDTH<T> / 2; half; half /= 2)
    for (int64_t k = 0; k < half; ++k) parts[k] += parts[k + half];
  return parts[0];
}
template <class T>
inline Pair<One<T>> within(const Pair<Many<T>>& pair) {
  return {within<T>(pair.first), within<T>(pair.second)};
}

// The sum of body(i, V{}) over i < n, numbers or pairs of them; n is small enough for single precision.
template <class T, class Body>
inline auto sum(int64_t n, Body body) {
  constexpr int64_t W = WIDTH<T>;
  decltype(body(0, Many<T>{})) parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) parts[k] += body(i + k * W, Many<T>{});
  for (; i + W <= n; i += W) parts[0] += body(i, Many<T>{});
  parts[0] += parts[1];
  parts[2] += parts[3];
  parts[0] += parts[2];
  decltype(body(0, One<T>{})) total = {};
  if (n >= W) total += within<T>(parts[0]);
  for (; i < n; ++i) total += body(i, One<T>{});
  return total;
}

// The team of threads that torch has, by GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP that it
// has loaded; new threads would find its idle ones, which wait busily, in their way. Without it all runs on one.
struct Team {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int (*member)();
  int (*members)();
} team = {};

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

struct Size {
  int64_t samples, channels, length, threads;
  int64_t rows() const { return samples * channels; }
  int64_t elements() const { return rows() * length; }
  template <class T>
  One<T> of(Numbers numbers, int64_t row) const {
    return ((const One<T>*)numbers.at)[row / channels * numbers.step + row % channels];
  }
};

template <class T>
const One<T>* of_sample(Numbers numbers, int64_t sample) {
  return (const One<T>*)numbers.at + sample * numbers.step;
}

// A tile's moments into `centre` and `squares`, those of the `done` numbers before it, as Moments.merge does. Of its `n`
// numbers `own` is the mean, to the rounding of a sum in single precision; `rest` is the sum of what lies beyond it,
// which corrects this, and `of` that of the squares.
inline void merge(double own, double rest, double of, double n, double done, double& centre, double& squares) {
  const double beyond = std::isfinite(rest) ? rest / n : 0;
  const double apart = own + beyond - centre, share = n / (done + n);
  centre += apart * share;
  squares += std::max(of - beyond * beyond * n, 0.) + apart * apart * share * done;
}

// Rows that lie in one piece.

template <class T>
void row_moments(const T* x, One<T>* mean, One<T>* var, Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double centre = 0, squares = 0;  // of the tiles so far, merged as Moments.merge does
      for (int64_t done = 0; done < size.length; done += TILE) {
        const int64_t n = std::min(TILE, size.length - done);
        const T* tile = x + row * size.length + done;
        const One<T> own = sum<T>(n, [=](int64_t i, auto v) { return load<decltype(v)>(tile + i); }) / n;
        const auto of = sum<T>(n, [=](int64_t i, auto v) {
          auto rest = load<decltype(v)>(tile + i) - own;
          return Pair<decltype(v)>{rest, rest * rest};
        });
        merge(own, of.first, of.second, n, done, centre, squares);
      }
      mean[row] = centre;
      var[row] = squares / std::max<int64_t>(size.length, 1);
    }
  });
}

template <class T>
void row_affine(const T* x, T* y, Numbers scale, Numbers centre, Numbers shift, Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const One<T> a = size.of<T>(scale, row), b = size.of<T>(shift, row), c = size.of<T>(centre, row);
      const T* from = x + row * size.length;
      T* to = y + row * size.length;
      each<T>(size.length, [=](int64_t i, auto v) { store(to + i, a * (load<decltype(v)>(from + i) - c) + b); });
    }
  });
}

template <class T>
void row_sums(const T* grad, const T* x, Numbers centre, One<T>* total, One<T>* products, Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const One<T> c = size.of<T>(centre, row);
      double sum_grad = 0, sum_products = 0;
      for (int64_t done = 0; done < size.length; done += TILE) {
        const int64_t n = std::min(TILE, size.length - done), first = row * size.length + done;
        const T *g = grad + first, *of = x + first;
        const auto both = sum<T>(n, [=](int64_t i, auto v) {
          using V = decltype(v);
          const V of_grad = load<V>(g + i);
          return Pair<V>{of_grad, of_grad * (load<V>(of + i) - c)};
        });
        sum_grad += both.first;
        sum_products += both.second;
      }
      total[row] = sum_grad;
      products[row] = sum_products;
    }
  });
}

template <class T>
void row_gradient(const T* grad, const T* x, T* out, Numbers scale, Numbers centre, Numbers to_mean, Numbers to_var,
                  Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const One<T> a = size.of<T>(scale, row), b = 2 * size.of<T>(to_var, row) / size.length;
      const One<T> c = size.of<T>(centre, row), d = size.of<T>(to_mean, row) / size.length;
      const T *g = grad + row * size.length, *from = x + row * size.length;
      T* to = out + row * size.length;
      each<T>(size.length, [=](int64_t i, auto v) {
        using V = decltype(v);
        store(to + i, a * load<V>(g + i) + (b * (load<V>(from + i) - c) + d));
      });
    }
  });
}

// Channels side by side: places are taken together while they stay in a cache.

// run(sample, first, channels, tile) for each sample and its channels from one multiple of 64 to another, so that few
// samples have work for all threads; `tile` places of them stay in a cache.
template <class Run>
void each_block(Size size, Run run) {
  const int64_t blocks = size.samples >= size.threads ? 1 : (size.channels + 63) / 64;
  const int64_t width = blocks == 1 ? size.channels : 64;
  parallel(size.samples * blocks, size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * width, channels = std::min(width, size.channels - first);
      run(task / blocks, first, channels, std::max<int64_t>(8, TILE / channels));
    }
  });
}

template <class T>
void last_moments(const T* x, One<T>* mean, One<T>* var, Size size) {
  each_block(size, [=](int64_t sample, int64_t first, int64_t channels, int64_t tile) {
    std::vector<One<T>> own(channels), rest(channels), of(channels);  // of a tile
    std::vector<double> centres(channels), squares(channels);
    One<T>*o = own.data(), *r = rest.data(), *s = of.data();
    for (int64_t done = 0; done < size.length; done += tile) {
      const int64_t n = std::min(tile, size.length - done);
      const T* from = x + (sample * size.length + done) * size.channels + first;
      std::fill(own.begin(), own.end(), 0);
      std::fill(rest.begin(), rest.end(), 0);
      std::fill(of.begin(), of.end(), 0);
      for (int64_t place = 0; place < n; ++place) {
        const T* at = from + place * size.channels;
        each<T>(channels, [=](int64_t i, auto v) {
          using V = decltype(v);
          store(o + i, load<V>(o + i) + load<V>(at + i));
        });
      }
      each<T>(channels, [=](int64_t i, auto v) { store(o + i, load<decltype(v)>(o + i) / One<T>(n)); });
      for (int64_t place = 0; place < n; ++place) {
        const T* at = from + place * size.channels;
        each<T>(channels, [=](int64_t i, auto v) {
          using V = decltype(v);
          V beyond = load<V>(at + i) - load<V>(o + i);
          store(r + i, load<V>(r + i) + beyond);
          store(s + i, load<V>(s + i) + beyond * beyond);
        });
      }
      for (int64_t i = 0; i < channels; ++i) merge(own[i], rest[i], of[i], n, done, centres[i], squares[i]);
    }
    const int64_t row = sample * size.channels + first;
    for (int64_t i = 0; i < channels; ++i) {
      mean[row + i] = centres[i];
      var[row + i] = squares[i] / std::max<int64_t>(size.length, 1);
    }
  });
}

template <class T>
void last_sums(const T* grad, const T* x, Numbers centre, One<T>* total, One<T>* products, Size size) {
  each_block(size, [=](int64_t sample, int64_t first, int64_t channels, int64_t tile) {
    std::vector<One<T>> own(channels), of(channels);  // sums of a tile
    std::vector<double> sums(channels), sums_of_products(channels);
    One<T>*o = own.data(), *s = of.data();
    const One<T>* c = of_sample<T>(centre, sample) + first;
    for (int64_t done = 0; done < size.length; done += tile) {
      const int64_t n = std::min(tile, size.length - done);
      const int64_t start = (sample * size.length + done) * size.channels + first;
      std::fill(own.begin(), own.end(), 0);
      std::fill(of.begin(), of.end(), 0);
      for (int64_t place = 0; place < n; ++place) {
        const T *g = grad + start + place * size.channels, *at = x + start + place * size.channels;
        each<T>(channels, [=](int64_t i, auto v) {
          using V = decltype(v);
          const V of_grad = load<V>(g + i);
          store(o + i, load<V>(o + i) + of_grad);
          store(s + i, load<V>(s + i) + of_grad * (load<V>(at + i) - load<V>(c + i)));
        });
      }
      for (int64_t i = 0; i < channels; ++i) {
        sums[i] += own[i];
        sums_of_products[i] += of[i];
      }
    }
    const int64_t row = sample * size.channels + first;
    std::copy(sums.begin(), sums.end(), total + row);
    std::copy(sums_of_products.begin(), sums_of_products.end(), products + row);
  });
}

template <class T>
void last_affine(const T* x, T* y, Numbers scale, Numbers centre, Numbers shift, Size size) {
  parallel(size.samples * size.length, size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t n = place / size.length;
      const One<T> *a = of_sample<T>(scale, n), *b = of_sample<T>(shift, n), *c = of_sample<T>(centre, n);
      const T* from = x + place * size.channels;
      T* to = y + place * size.channels;
      each<T>(size.channels, [=](int64_t i, auto v) {
        using V = decltype(v);
        store(to + i, load<V>(a + i) * (load<V>(from + i) - load<V>(c + i)) + load<V>(b + i));
      });
    }
  });
}

template <class T>
void last_gradient(const T* grad, const T* x, T* out, Numbers scale, Numbers centre, Numbers to_mean, Numbers to_var,
                   Size size) {
  parallel(size.samples * size.length, size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t n = place / size.length;
      const One<T> *a = of_sample<T>(scale, n), *b = of_sample<T>(to_var, n), *c = of_sample<T>(centre, n);
      const One<T>*d = of_sample<T>(to_mean, n), share = One<T>(1) / size.length;
      const T *g = grad + place * size.channels, *from = x + place * size.channels;
      T* to = out + place * size.channels;
      each<T>(size.channels, [=](int64_t i, auto v) {
        using V = decltype(v);
        V rest = 2 * load<V>(b + i) * (load<V>(from + i) - load<V>(c + i)) + load<V>(d + i);
        store(to + i, load<V>(a + i) * load<V>(g + i) + share * rest);
      });
    }
  });
}

// One of several tensors: what is read, what is written.
struct Part {
  const void *grad, *x;
  void* out;
  int64_t samples, length, last;
};

// run(part, size, first) for all parts; `first` is the number of the rows before.
template <class Run>
void each_part(const Part* parts, int64_t number, int64_t channels, int64_t threads, Run run) {
  int64_t samples = 0;
  for (int64_t k = 0; k < number; samples += parts[k++].samples)
    run(parts[k], Size{parts[k].samples, channels, parts[k].length, threads}, samples);
}

template <class T>
Numbers from(Numbers numbers, int64_t sample) {
  return {of_sample<T>(numbers, sample), numbers.step};
}

}  // namespace

#define ROWS(NAME, T)                                                                                               \
  extern "C" void moments_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, void* mean,  \
                                 void* var) {                                                                       \
    each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {                   \
      (part.last ? last_moments<T> : row_moments<T>)((const T*)part.x, (One<T>*)mean + first * channels,            \
                                                     (One<T>*)var + first * channels, size);                        \
    });                                                                                                             \
  }                                                                                                                 \
  extern "C" void affine_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,               \
                                Numbers scale, Numbers centre, Numbers shift) {                                     \
    each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {                   \
      (part.last ? last_affine<T> : row_affine<T>)((const T*)part.x, (T*)part.out, from<T>(scale, first),           \
                                                   from<T>(centre, first), from<T>(shift, first), size);            \
    });                                                                                                             \
  }                                                                                                                 \
  extern "C" void sums_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, void* total,    \
                              void* products, Numbers centre) {                                                     \
    each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {                   \
      (part.last ? last_sums<T> : row_sums<T>)((const T*)part.grad, (const T*)part.x, from<T>(centre, first),       \
                                               (One<T>*)total + first * channels,                                   \
                                               (One<T>*)products + first * channels, size);                         \
    });                                                                                                             \
  }                                                                                                                 \
  extern "C" void gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,             \
                                  Numbers scale, Numbers centre, Numbers to_mean, Numbers to_var) {                 \
    each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {                   \
      (part.last ? last_gradient<T> : row_gradient<T>)((const T*)part.grad, (const T*)part.x, (T*)part.out,         \
                                                       from<T>(scale, first), from<T>(centre, first),               \
                                                       from<T>(to_mean, first), from<T>(to_var, first), size);      \
    });                                                                                                             \
  }

ROWS(float32, float)
ROWS(float64, double)
ROWS(bfloat16, bfloat16)

extern "C" void use_team(Team of_torch) { team = of_torch; }

// Of the file that this was built from.
extern "C" uint32_t source() { return SOURCE; }
