// Whole normalization batches on a CPU: which rows they are.
//
// A normalization batch is the samples of one group by `width` neighbouring channels.

#pragma once

#include "vectors.h"

namespace domainnorm {

struct Batches {
  const int64_t* group;  // of each sample; none: all are of the same
  int64_t groups, width, together;
  double eps;
};

// Means, and after them as many variances: of channels, which the caller counts, (groups, channels) or with `together` of
// all groups in one (1, channels); of the batches, (groups, channels / width); of a sequence's rows, and of its first
// batches. Those of the channels and of the batches may be the same. And r and d of a Batch Renorm, (groups, channels).
struct Tables {
  void *counted, *batches, *rows, *first, *corrections;
  int64_t write;  // whether more is asked for than what is read
};

// What a Batch Renorm corrects its batches towards, and how far, of each group; none: no mean.
struct Towards {
  Numbers mean, var;
  const double *r_max, *d_max;
};

// Two numbers of each of (rows, channels), and of each row how many places they are of.
struct Twos {
  int64_t channels;
  std::vector<double> first, second, places;
  Twos(int64_t rows, int64_t channels)
      : channels(channels), first(rows * channels), second(rows * channels), places(rows) {}
};

// Of each channel, `n` numbers with this mean and these squares of what lies beyond it, into the `done` before them.
inline void merge(int64_t channels, const double* mean, const double* squares, double n, double done, double* to_mean,
                  double* to_squares) {
  const double share = n ? n / (done + n) : 0;
  for (int64_t i = 0; i < channels; ++i) {
    const double apart = mean[i] - to_mean[i];
    to_mean[i] = done ? to_mean[i] + apart * share : n ? mean[i] : to_mean[i];
    to_squares[i] += squares[i] + apart * apart * share * done;
  }
}

// Into `mean`, and the variances after it, what the caller counts: `of` has the mean and the squares of what lies beyond it
// of each channel of each group.
template <class N>
void count(const Twos& of, const Batches& batches, N* mean) {
  Twos all(batches.together ? 1 : batches.groups, of.channels);
  N* var = mean + all.first.size();
  for (int64_t group = 0; group < batches.groups; ++group) {
    const int64_t to = batches.together ? 0 : group, at = group * of.channels;
    merge(of.channels, &of.first[at], &of.second[at], of.places[group], all.places[to], &all.first[to * of.channels],
          &all.second[to * of.channels]);
    all.places[to] += of.places[group];
  }
  for (size_t row = 0; row < all.places.size(); ++row)
    for (int64_t i = 0; i < of.channels; ++i) {
      mean[row * of.channels + i] = all.first[row * of.channels + i];
      var[row * of.channels + i] = all.second[row * of.channels + i] / std::max(all.places[row], 1.);
    }
}

template <class T>
struct Sample {
  const T *grad, *x;
  T* out;
  int64_t length, row;  // its number among all samples
};

template <class T>
std::vector<Sample<T>> samples_of(const Part* parts, int64_t number, int64_t channels) {
  std::vector<Sample<T>> all;
  for (const Part* part = parts; part < parts + number; ++part)
    for (int64_t k = 0; k < part->samples; ++k) {
      const int64_t at = k * channels * part->length;
      const void* grad = part->grad ? part->grad : part->x;  // none is read in the forward pass
      all.push_back({(const T*)grad + at, (const T*)part->x + at, (T*)part->out + at, part->length,
                     (int64_t)all.size()});
    }
  return all;
}

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
  One<T>*r, *d;  // of each channel of each group, or none

  Work(const Part* parts, int64_t number, int64_t channels, int64_t threads, Batches batches, Numbers weight,
       Numbers bias, Tables tables)
      : begin(batches.groups + 1), channels(channels), threads(threads), batches(batches), weight(weight), bias(bias),
        r((One<T>*)tables.corrections), d(r ? r + batches.groups * channels : r) {
    const auto all = samples_of<T>(parts, number, channels);
    for (const auto& sample : all) {
      places += sample.length;
      ++begin[of(sample) + 1];
    }
    for (int64_t g = 0; g < batches.groups; ++g) begin[g + 1] += begin[g];
    samples.resize(all.size());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (const auto& sample : all) samples[next[of(sample)]++] = sample;
  }

  int64_t of(const Sample<T>& sample) const { return batches.group ? batches.group[sample.row] : 0; }
  bool each() const { return weight.step || bias.step; }
  int64_t unit(const Sample<T>& sample) const { return each() ? sample.row : of(sample); }
  int64_t sets() const { return batches.groups * channels / batches.width; }
  // γ and β, which are of channels or rows, with r and d, which are of groups: y = γ r (x - mean) / σ + γ d + β.
  One<T> gamma(const Sample<T>& sample, int64_t channel) const {
    return given_gamma(sample, channel) * (r ? r[of(sample) * channels + channel] : 1);
  }
  One<T> beta(const Sample<T>& sample, int64_t channel) const {
    const One<T> given = bias.at ? of_sample<T>(bias, sample.row)[channel] : 0;
    return d ? given_gamma(sample, channel) * d[of(sample) * channels + channel] + given : given;
  }
  One<T> given_gamma(const Sample<T>& sample, int64_t channel) const {
    return weight.at ? of_sample<T>(weight, sample.row)[channel] : 1;
  }
  // The gradient of γ, from those of `gamma` and `beta`.
  double to_gamma(const Sample<T>& sample, int64_t channel, double of_gamma, double of_beta) const {
    const int64_t at = of(sample) * channels + channel;
    return r ? r[at] * of_gamma + d[at] * of_beta : of_gamma;
  }
  // r and d of one channel of a group, which has these moments (Batch Renormalization, Alg. 1).
  void correct(const Towards& towards, int64_t group, int64_t channel, double mean, double var) const {
    const double sigma = std::sqrt(of_sample<T>(towards.var, group)[channel] + batches.eps);
    const double apart = (mean - of_sample<T>(towards.mean, group)[channel]) / sigma;
    const double r_max = towards.r_max[group], d_max = towards.d_max[group];
    r[group * channels + channel] = std::min(std::max(std::sqrt(var + batches.eps) / sigma, 1 / r_max), r_max);
    d[group * channels + channel] = std::min(std::max(apart, -d_max), d_max);
  }
  Twos of_groups() const {  // still 0, with their places
    Twos all(batches.groups, channels);
    for (const auto& sample : samples) all.places[of(sample)] += sample.length;
    return all;
  }
  double inverse(double var) const { return 1 / std::sqrt(var + batches.eps); }
  const Sample<T>* first(int64_t group) const { return samples.data() + begin[group]; }
};

// The gradients of γ and β, zeros at first: with `each` those of rows, (units, channels), else of all units in one. Where
// units are to be summed they are kept apart until `put`.
template <class N>
struct AffineGradient {
  int64_t units, channels;
  N *to_weight, *to_bias;
  std::vector<N> kept;
  N *weight, *bias;

  AffineGradient(int64_t units, int64_t channels, bool each, void* to_weight, void* to_bias)
      : units(units), channels(channels), to_weight((N*)to_weight), to_bias((N*)to_bias),
        kept(each || units == 1 ? 0 : 2 * units * channels), weight(kept.empty() ? this->to_weight : kept.data()),
        bias(kept.empty() ? this->to_bias : weight + units * channels) {}
  AffineGradient(const AffineGradient&) = delete;

  void put() const {
    if (!kept.empty())
      for (int64_t row = 0; row < units * channels; row += channels)
        for (int64_t i = 0; i < channels; ++i) {
          to_weight[i] += weight[row + i];
          to_bias[i] += bias[row + i];
        }
  }
};

}  // namespace domainnorm
