// SeqNorm: GroupNorm of each sample without an affine, then a BatchNorm of groups of samples, in one call each way; called
// by compiled_batches.py; library.py checks what comes in. The layer's own merges of rows are the reference.
//
// With the mean μ and deviation σ of a sample's channel group, and M and S of the z = (x - μ) / σ of a group of samples,
// y = γ (z - M) / S + β. The moments of z are those of the rows of x, moved and scaled: x is read for them once.

#include "batches.h"
#include "rows.h"

using namespace domainnorm;

namespace {

// What both ways work on.
template <class T>
struct Sequence {
  const Part* parts;
  int64_t number, channels, threads, samples = 0;
  Batches batches;
  const One<T>*weight, *bias;  // (channels,), or none
  One<T>* counted;
  double *z_mean, *z_var;       // of z, (groups, channels)
  One<T>*row_mean, *row_var;    // of rows, (samples, channels)
  One<T>*mean, *var;            // of the channel groups of samples, (samples, channels / width)
  std::vector<double> length;   // of each sample
  std::vector<double> count;    // of each group
  std::vector<double> inverse;  // 1 / σ of each channel group, once they are known

  Sequence(const Part* parts, int64_t number, int64_t channels, int64_t threads, Batches batches, Numbers weight,
           Numbers bias, Tables tables)
      : parts(parts), number(number), channels(channels), threads(threads), batches(batches),
        weight((const One<T>*)weight.at), bias((const One<T>*)bias.at), counted((One<T>*)tables.counted),
        z_mean((double*)tables.batches), z_var(z_mean + batches.groups * channels), row_mean((One<T>*)tables.rows),
        mean((One<T>*)tables.first), count(batches.groups) {
    for (const Part* part = parts; part < parts + number; ++part) length.insert(length.end(), part->samples, part->length);
    samples = length.size();
    row_var = row_mean + samples * channels;
    var = mean + samples * sets();
    for (int64_t n = 0; n < samples; ++n) count[group(n)] += length[n];
  }

  int64_t group(int64_t sample) const { return batches.group ? batches.group[sample] : 0; }
  int64_t sets() const { return channels / batches.width; }
  double inverted(double var) const { return 1 / std::sqrt(var + batches.eps); }
  double gamma(int64_t channel) const { return weight ? weight[channel] : 1; }
  void invert() {
    inverse.resize(samples * sets());
    for (size_t k = 0; k < inverse.size(); ++k) inverse[k] = inverted(var[k]);
  }
  // μ of each row.
  std::vector<One<T>> centres() const {
    std::vector<One<T>> all(samples * channels);
    for (int64_t set = 0; set < samples * sets(); ++set) std::fill_n(&all[set * batches.width], batches.width, mean[set]);
    return all;
  }
  Numbers of_rows(const std::vector<One<T>>& numbers) const { return {numbers.data(), channels}; }

  // body(sample, set, row, channel, g) for all channel groups of the samples, with the places of their first channels among
  // the rows, the channels, and those of the groups of samples.
  template <class Body>
  void each_set(Body body) const {
    for (int64_t n = 0, set = 0; n < samples; ++n)
      for (int64_t channel = 0; channel < channels; channel += batches.width, ++set)
        body(n, set, n * channels + channel, channel, group(n) * channels + channel);
  }
};

// The moments of z, from those of the rows.
template <class T>
void merge_rows(Sequence<T>& of) {
  const int64_t width = of.batches.width, numbers = of.batches.groups * of.channels;
  of.each_set([&](int64_t, int64_t set, int64_t row, int64_t, int64_t) {
    const One<T>*mean = of.row_mean + row, *var = of.row_var + row;
    double centre = 0, squares = 0;
#pragma omp simd reduction(+ : centre)
    for (int64_t k = 0; k < width; ++k) centre += mean[k];
    centre /= width;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < width; ++k) squares += var[k] + (mean[k] - centre) * (mean[k] - centre);
    of.mean[set] = centre;
    of.var[set] = squares / width;
  });
  of.invert();
  Twos z(of.batches.groups, of.channels);
  z.places = of.count;
  of.each_set([&](int64_t n, int64_t set, int64_t row, int64_t, int64_t g) {
    const One<T>* mean = of.row_mean + row;
    const double centre = of.mean[set], share = of.length[n] * of.inverse[set];
    double* to = &z.first[g];
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) to[k] += share * (mean[k] - centre);
  });
  for (int64_t g = 0; g < numbers; ++g) z.first[g] /= std::max(of.count[g / of.channels], 1.);
  of.each_set([&](int64_t n, int64_t set, int64_t row, int64_t, int64_t g) {
    const One<T>*mean = of.row_mean + row, *var = of.row_var + row;
    const double centre = of.mean[set], s = of.inverse[set], length = of.length[n];
    const double* m = &z.first[g];
    double* to = &z.second[g];
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      const double apart = (mean[k] - centre) * s - m[k];
      to[k] += length * (var[k] * s * s + apart * apart);
    }
  });
  for (int64_t g = 0; g < numbers; ++g) {
    of.z_mean[g] = z.first[g];
    of.z_var[g] = z.second[g] / std::max(of.count[g / of.channels], 1.);
  }
  domainnorm::count(z, of.batches, of.counted);
}

template <class T>
void normalize_sequence(Sequence<T> of) {
  moments<T>(of.parts, of.number, of.channels, of.threads, of.row_mean, of.row_var);
  merge_rows(of);
  const int64_t width = of.batches.width;
  const auto centre = of.centres();
  std::vector<double> factor(of.batches.groups * of.channels), offset(factor.size());  // γ / S, and β - M γ / S
  for (int64_t group = 0, g = 0; group < of.batches.groups; ++group)
    for (int64_t channel = 0; channel < of.channels; ++channel, ++g) {
      factor[g] = of.gamma(channel) * of.inverted(of.z_var[g]);
      offset[g] = (of.bias ? of.bias[channel] : 0) - of.z_mean[g] * factor[g];
    }
  std::vector<One<T>> scale(centre.size()), shift(centre.size());
  of.each_set([&](int64_t, int64_t set, int64_t row, int64_t, int64_t g) {
    const double s = of.inverse[set], *f = &factor[g], *o = &offset[g];
    One<T>*a = &scale[row], *b = &shift[row];
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      a[k] = s * f[k];
      b[k] = o[k];
    }
  });
  affine<T>(of.parts, of.number, of.channels, of.threads, of.of_rows(scale), of.of_rows(centre), of.of_rows(shift));
}

// With F = γ / S, the gradient of z is F g - A - B (z - M): A and B are its means over the group of samples, of itself and
// times z - M, as in a BatchNorm. Then that of x is the same again, over the channel group of the sample.
template <class T>
void gradient_sequence(Sequence<T> of, const AffineGradient<One<T>>& to_affine) {
  of.invert();
  const int64_t width = of.batches.width;
  const auto centre = of.centres();
  std::vector<One<T>> total(centre.size()), products(centre.size());  // Σ g and Σ g (x - μ) of rows
  sums<T>(of.parts, of.number, of.channels, of.threads, total.data(), products.data(), of.of_rows(centre));

  std::vector<double> all(of.batches.groups * of.channels), beyond(all.size());  // Σ g and Σ g (z - M) of groups
  of.each_set([&](int64_t, int64_t set, int64_t row, int64_t, int64_t g) {
    const One<T>*t = &total[row], *p = &products[row];
    const double s = of.inverse[set], *m = of.z_mean + g;
    double *to_all = &all[g], *to_beyond = &beyond[g];
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      to_all[k] += t[k];
      to_beyond[k] += s * p[k] - m[k] * t[k];
    }
  });
  std::vector<double> factor(all.size()), a(all.size()), b(all.size());
  for (int64_t group = 0, g = 0; group < of.batches.groups; ++group)
    for (int64_t channel = 0; channel < of.channels; ++channel, ++g) {
      const double inverse = of.inverted(of.z_var[g]), count = std::max(of.count[group], 1.);
      to_affine.bias[g] = all[g];
      to_affine.weight[g] = beyond[g] * inverse;
      factor[g] = of.gamma(channel) * inverse;
      a[g] = factor[g] * all[g] / count;
      b[g] = factor[g] * beyond[g] * inverse * inverse / count;
    }

  std::vector<One<T>> scale(centre.size()), to_mean(centre.size()), to_var(centre.size());
  of.each_set([&](int64_t n, int64_t set, int64_t row, int64_t, int64_t g) {
    const One<T>*t = &total[row], *p = &products[row], *mean = of.row_mean + row, *var = of.row_var + row;
    const double s = of.inverse[set], length = of.length[n], centre = of.mean[set], *m = of.z_mean + g;
    const double *f = &factor[g], *of_a = &a[g], *of_b = &b[g];
    double sum = 0, sum_of_products = 0;  // of z's gradient, of the channel group
#pragma omp simd reduction(+ : sum, sum_of_products)
    for (int64_t k = 0; k < width; ++k) {
      const double apart = mean[k] - centre, rest = of_a[k] - of_b[k] * m[k];
      sum += f[k] * t[k] - length * (rest + of_b[k] * apart * s);
      sum_of_products += f[k] * p[k] - length * (rest * apart + of_b[k] * s * (var[k] + apart * apart));
    }
    sum /= length * width;
    sum_of_products *= s / (length * width);
    One<T>*to_scale = &scale[row], *mean_to = &to_mean[row], *var_to = &to_var[row];
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      to_scale[k] = s * f[k];
      var_to[k] = -length / 2 * s * s * (of_b[k] + sum_of_products);
      mean_to[k] = -length * s * (of_a[k] - of_b[k] * m[k] + sum);
    }
  });
  gradient<T>(of.parts, of.number, of.channels, of.threads, of.of_rows(scale), of.of_rows(centre), of.of_rows(to_mean),
              of.of_rows(to_var));
}

}  // namespace

#define SEQUENCE(NAME, T)                                                                                           \
  extern "C" void sequence_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,             \
                                  Batches batches, Numbers weight, Numbers bias, Tables tables) {                   \
    normalize_sequence(Sequence<T>(parts, number, channels, threads, batches, weight, bias, tables));               \
  }                                                                                                                 \
  extern "C" void sequence_gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,    \
                                           Batches batches, Numbers weight, Numbers bias, Tables tables,            \
                                           void* to_weight, void* to_bias) {                                        \
    const AffineGradient<One<T>> affine(batches.groups, channels, false, to_weight, to_bias);                       \
    gradient_sequence(Sequence<T>(parts, number, channels, threads, batches, weight, bias, tables), affine);        \
    affine.put();                                                                                                   \
  }

SEQUENCE(float32, float)
SEQUENCE(float64, double)
SEQUENCE(bfloat16, bfloat16)
