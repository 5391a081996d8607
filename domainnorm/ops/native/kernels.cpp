// The functions that __init__.py calls, which checks what comes in: for each dtype, of all segments of all tensors.

#include "segments.h"

using namespace domainnorm;

namespace {

// run(segments) for every part, whose layout chooses one of two functions.
template <class T, class... Args>
void each_part(const Part* parts, int64_t number, int64_t channels, int64_t threads,
               void (*contiguous)(const Segments<T>&, Args...), void (*channels_last)(const Segments<T>&, Args...),
               Args... args) {
  int64_t first = 0;
  for (const Part* part = parts; part < parts + number; first += part++->segments) {
    const Segments<T> all{(const T*)part->grad, (const T*)part->x, (T*)part->out, first,
                          part->segments,       part->samples,     channels,      part->length, threads};
    (part->channels_last ? channels_last : contiguous)(all, args...);
  }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                             \
  extern "C" void moments_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, void* mean,   \
                                 void* var) {                                                                        \
    each_part<T>(parts, number, channels, threads, moments_contiguous<T>, moments_channels_last<T>,                  \
                 (acc_t<T>*)mean, (acc_t<T>*)var);                                                                   \
  }                                                                                                                  \
  extern "C" void affine_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, Values scale,  \
                                Values center, Values shift) {                                                       \
    each_part<T>(parts, number, channels, threads, affine_contiguous<T>, affine_channels_last<T>, scale, center,     \
                 shift);                                                                                             \
  }                                                                                                                  \
  extern "C" void sums_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, Values center,   \
                              void* total, void* products) {                                                         \
    each_part<T>(parts, number, channels, threads, sums_contiguous<T>, sums_channels_last<T>, center,                \
                 (acc_t<T>*)total, (acc_t<T>*)products);                                                             \
  }                                                                                                                  \
  extern "C" void gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,              \
                                  Values scale, Values center, Values slope, Values offset) {                      \
    each_part<T>(parts, number, channels, threads, gradient_contiguous<T>, gradient_channels_last<T>, scale, center, \
                 slope, offset);                                                                                   \
  }

KERNELS(float32, float)
KERNELS(float64, double)
KERNELS(bfloat16, bfloat16)

extern "C" void use_team(Team of_torch) { team = of_torch; }

// A checksum of the files that this was compiled from.
extern "C" uint32_t source() { return SOURCE; }
