// Inference example weighing: each row is normalized by the union of its own moments and the population's, in one call;
// called by compiled.py, which checks what comes in. The layer's merge of rows is the reference.

#include "rows.h"

using namespace domainnorm;

namespace {

struct Weighing {
  double share, eps;  // of the row's own moments
  Numbers mean, var, weight, bias;
};

// Of one row with its own moments, and the numbers of its sample, how it is normalized.
template <class T>
struct Row {
  One<T> scale, centre, shift;
  Row(const Weighing& by, One<T> own_mean, One<T> own_var, int64_t sample, int64_t channel) {
    const One<T> mean = of_sample<T>(by.mean, sample)[channel], var = of_sample<T>(by.var, sample)[channel];
    const One<T> share = by.share, rest = 1 - by.share, apart = own_mean - mean;
    centre = share * own_mean + rest * mean;
    const One<T> both = share * own_var + rest * var + share * rest * apart * apart;
    scale = One<T>(1) / std::sqrt(both + One<T>(by.eps));
    if (by.weight.at) scale *= of_sample<T>(by.weight, sample)[channel];
    shift = by.bias.at ? of_sample<T>(by.bias, sample)[channel] : 0;
  }
};

// A row at a time, or with `last` a sample, is read and written while it is in a cache.
template <class T>
void weigh(const Part& part, int64_t first, int64_t channels, int64_t threads, const Weighing& by) {
  const int64_t length = part.length;
  const T* x = (const T*)part.x;
  T* y = (T*)part.out;
  if (!part.last)
    return parallel(part.samples * channels, part.samples * channels * length, threads, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Size one{1, 1, length, 1};
        One<T> mean, var;
        row_moments<T>(x + row * length, &mean, &var, one);
        const Row<T> of(by, mean, var, first + row / channels, row % channels);
        row_affine<T>(x + row * length, y + row * length, {&of.scale, 0}, {&of.centre, 0}, {&of.shift, 0}, one);
      }
    });
  parallel(part.samples, part.samples * channels * length, threads, [=](int64_t begin, int64_t end) {
    std::vector<One<T>> mean(channels), var(channels), scale(channels), shift(channels);
    for (int64_t sample = begin; sample < end; ++sample) {
      const Size one{1, channels, length, 1};
      const int64_t at = sample * channels * length;
      last_moments<T>(x + at, mean.data(), var.data(), one);
      for (int64_t i = 0; i < channels; ++i) {
        const Row<T> of(by, mean[i], var[i], first + sample, i);
        scale[i] = of.scale;
        mean[i] = of.centre;
        shift[i] = of.shift;
      }
      last_affine<T>(x + at, y + at, {scale.data(), 0}, {mean.data(), 0}, {shift.data(), 0}, one);
    }
  });
}

}  // namespace

#define WEIGHED(NAME, T)                                                                                            \
  extern "C" void weighed_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,              \
                                 Weighing by) {                                                                     \
    int64_t samples = 0;                                                                                            \
    for (int64_t k = 0; k < number; samples += parts[k++].samples)                                                  \
      weigh<T>(parts[k], samples, channels, threads, by);                                                           \
  }

WEIGHED(float32, float)
WEIGHED(float64, double)
WEIGHED(bfloat16, bfloat16)
