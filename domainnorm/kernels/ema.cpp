// One EMA step of population statistics, for each set of moments that has elements; called by compiled.py. Table 5's rows;
// PopulationStatistics._ema_step is the reference.

#include "vectors.h"

namespace {

// Running statistics of each set, or of all sets one after the other, and how a step is taken.
struct Running {
  void *mean, *var;
  int64_t* tracked;       // steps so far
  int64_t apart;          // whether each set has its own
  double momentum;        // below 0: the cumulative average
  int64_t of_deviation;   // whether the average is of √(var + eps), as Batch Renorm's
  double eps;
};

// As torch.lerp.
double lerp(double from, double to, double share) {
  return share < 0.5 ? from + share * (to - from) : to - (to - from) * (1 - share);
}

template <class N>
void ema(const N* mean, const double* counts, int64_t sets, int64_t channels, const Running& of) {
  const N* var = mean + sets * channels;
  for (int64_t set = 0; set < sets; ++set, mean += channels, var += channels) {
    const double count = counts[set];
    if (!(count > 0)) continue;
    const int64_t own = of.apart ? set : 0, tracked = ++of.tracked[own];
    const double share = of.momentum < 0 ? 1. / tracked : of.momentum, unbiased = count / (count - 1);
    N *to_mean = (N*)of.mean + own * channels, *to_var = (N*)of.var + own * channels;
    for (int64_t i = 0; i < channels; ++i) to_mean[i] = lerp(to_mean[i], mean[i], share);
    if (!(count > 1)) continue;  // one is no variance
    for (int64_t i = 0; i < channels; ++i)
      if (of.of_deviation) {
        const double moved = lerp(std::sqrt(to_var[i] + of.eps), std::sqrt(var[i] + of.eps), share);
        to_var[i] = moved * moved - of.eps;
      } else {
        to_var[i] = lerp(to_var[i], var[i] * unbiased, share);
      }
  }
}

}  // namespace

#define EMA(NAME, N)                                                                                                \
  extern "C" void ema_##NAME(const void* table, const double* counts, int64_t sets, int64_t channels, Running of) { \
    ema((const N*)table, counts, sets, channels, of);                                                               \
  }

EMA(float32, float)
EMA(float64, double)
