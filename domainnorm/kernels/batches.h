// Whole normalization batches on a CPU: which rows they are.
//
// A normalization batch is the samples of one group by `width` neighbouring channels.

#pragma once

#include "vectors.h"

namespace domainnorm {

struct Batches {
  const int64_t* group;  // of each sample; none: all are of the same
  int64_t groups, width;
  double eps;
};

// What is kept for the backward pass: moments (groups, channels) and of the batches, (groups, channels / width), the same
// where width is 1; a sequence has those of rows, too. Whether they are to be filled, and to be used.
struct Tables {
  void *mean, *var, *batch_mean, *batch_var, *row_mean, *row_var;
  int64_t fill, use;
};

template <class T>
struct Sample {
  const T *grad, *x;
  T* out;
  int64_t length, row;  // its number among all samples
};

template <class T>
struct Piece {
  const T *grad, *x;
  int64_t length;
};

// What a call works on. γ and β are of each channel, or with `each` of each row; `unit` is whose they are.
template <class T>
struct Work {
  std::vector<Sample<T>> samples;  // of one group after the other
  std::vector<int64_t> begin;      // of each group, and the end
  int64_t channels, threads, places = 0;
  Batches batches;
  Numbers weight, bias;

  Work(const Part* parts, int64_t number, int64_t channels, int64_t threads, Batches batches, Numbers weight,
       Numbers bias)
      : begin(batches.groups + 1), channels(channels), threads(threads), batches(batches), weight(weight), bias(bias) {
    std::vector<Sample<T>> all;
    for (const Part* part = parts; part < parts + number; ++part)
      for (int64_t k = 0; k < part->samples; ++k) {
        const int64_t at = k * channels * part->length;
        const void* grad = part->grad ? part->grad : part->x;  // none is read in the forward pass
        all.push_back({(const T*)grad + at, (const T*)part->x + at, (T*)part->out + at, part->length,
                       (int64_t)all.size()});
        places += part->length;
      }
    for (const auto& sample : all) ++begin[of(sample) + 1];
    for (int64_t g = 0; g < batches.groups; ++g) begin[g + 1] += begin[g];
    samples.resize(all.size());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (const auto& sample : all) samples[next[of(sample)]++] = sample;
  }

  int64_t of(const Sample<T>& sample) const { return batches.group ? batches.group[sample.row] : 0; }
  bool each() const { return weight.step || bias.step; }
  int64_t unit(const Sample<T>& sample) const { return each() ? sample.row : of(sample); }
  One<T> gamma(const Sample<T>& sample, int64_t channel) const {
    return weight.at ? of_sample<T>(weight, sample.row)[channel] : 1;
  }
  One<T> beta(const Sample<T>& sample, int64_t channel) const {
    return bias.at ? of_sample<T>(bias, sample.row)[channel] : 0;
  }
  double inverse(double var) const { return 1 / std::sqrt(var + batches.eps); }
  const Sample<T>* first(int64_t group) const { return samples.data() + begin[group]; }
};

}  // namespace domainnorm
