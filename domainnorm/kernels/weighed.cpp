// Inference example weighing: each row is normalized by the union of its own moments and the population's, in one call;
// called by compiled.py, which checks what comes in. The layer's merge of rows is the reference.

#include "rows.h"

using namespace domainnorm;

namespace {

struct Weighing {
  double share, eps;  // of the row's own moments
  Numbers mean, var, weight, bias;
};

// How rows with these moments, of neighbouring channels of a sample, are normalized: their means become the centres.
template <class T>
void weigh(const Weighing& by, int64_t sample, int64_t channel, int64_t number, One<T>* mean, const One<T>* var,
           One<T>* scale, One<T>* shift) {
  const auto of = [=](Numbers numbers) { return numbers.at ? of_sample<T>(numbers, sample) + channel : nullptr; };
  const One<T>*all_mean = of(by.mean), *all_var = of(by.var), *weight = of(by.weight), *bias = of(by.bias);
  const One<T> share = by.share, rest = 1 - by.share, eps = by.eps;
#pragma omp simd
  for (int64_t i = 0; i < number; ++i) {
    const One<T> apart = mean[i] - all_mean[i];
    const One<T> both = share * var[i] + rest * all_var[i] + share * rest * apart * apart;
    mean[i] = share * mean[i] + rest * all_mean[i];
    scale[i] = (weight ? weight[i] : 1) / std::sqrt(both + eps);
    shift[i] = bias ? bias[i] : 0;
  }
}

// Some channels of a sample at a time, all of them with `last`, are read and written while they are in a cache.
template <class T>
void weigh(const Part& part, int64_t first, int64_t channels, int64_t threads, const Weighing& by) {
  const int64_t length = part.length;
  const int64_t width = part.last ? channels : std::clamp<int64_t>(TILE / std::max<int64_t>(length, 1), 1, channels);
  const int64_t blocks = (channels + width - 1) / width;
  parallel(part.samples * blocks, part.samples * channels * length, threads, [=](int64_t begin, int64_t end) {
    std::vector<One<T>> mean(width), var(width), scale(width), shift(width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t sample = block / blocks, channel = block % blocks * width;
      const Size some{1, std::min(width, channels - channel), length, 1};
      const int64_t at = (sample * channels + channel) * length;
      const T* x = (const T*)part.x + at;
      T* y = (T*)part.out + at;
      (part.last ? last_moments<T> : row_moments<T>)(x, mean.data(), var.data(), some);
      weigh<T>(by, first + sample, channel, some.channels, mean.data(), var.data(), scale.data(), shift.data());
      (part.last ? last_affine<T> : row_affine<T>)(x, y, {scale.data(), 0}, {mean.data(), 0}, {shift.data(), 0}, some);
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
