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
  int64_t number, channels, threads;
  Batches batches;
  const One<T>*weight, *bias;         // (channels,), or none
  double *z_mean, *z_var;             // of z, (groups, channels)
  One<T>*row_mean, *row_var;          // of rows, (samples, channels)
  One<T>*mean, *var;                  // of the channel groups of samples, (samples, channels / width)
  One<T>*total_mean, *total_var;      // of z, which the caller counts
  int64_t samples = 0;
  std::vector<double> length;  // of each sample
  std::vector<double> count;   // of each group

  Sequence(const Part* parts, int64_t number, int64_t channels, int64_t threads, Batches batches, Numbers weight,
           Numbers bias, Tables tables)
      : parts(parts), number(number), channels(channels), threads(threads), batches(batches),
        weight((const One<T>*)weight.at), bias((const One<T>*)bias.at), z_mean((double*)tables.batch_mean),
        z_var((double*)tables.batch_var), row_mean((One<T>*)tables.row_mean), row_var((One<T>*)tables.row_var),
        mean((One<T>*)tables.first_mean), var((One<T>*)tables.first_var), total_mean((One<T>*)tables.mean),
        total_var((One<T>*)tables.var), count(batches.groups) {
    for (const Part* part = parts; part < parts + number; ++part) length.insert(length.end(), part->samples, part->length);
    samples = length.size();
    for (int64_t n = 0; n < samples; ++n) count[group(n)] += length[n];
  }

  int64_t group(int64_t sample) const { return batches.group ? batches.group[sample] : 0; }
  int64_t sets() const { return channels / batches.width; }
  double inverse(double var) const { return 1 / std::sqrt(var + batches.eps); }
  One<T> gamma(int64_t channel) const { return weight ? weight[channel] : 1; }

  // 1 / σ of each channel group, and μ of each row.
  std::vector<double> inverses() const {
    std::vector<double> all(samples * sets());
    for (size_t k = 0; k < all.size(); ++k) all[k] = inverse(var[k]);
    return all;
  }
  std::vector<One<T>> centres() const {
    std::vector<One<T>> all(samples * channels);
    for (int64_t set = 0; set < samples * sets(); ++set) std::fill_n(&all[set * batches.width], batches.width, mean[set]);
    return all;
  }
  Numbers of_rows(const std::vector<One<T>>& numbers) const { return {numbers.data(), channels}; }

  // body(row, set, g, channel, length) for all rows; g is the place of its group and channel.
  template <class Body>
  void each_row(Body body) const {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t set = n * sets(), channel = 0; channel < channels; ++set)
        for (const int64_t end = channel + batches.width; channel < end; ++channel)
          body(n * channels + channel, set, group(n) * channels + channel, channel, length[n]);
  }
};

// The moments of z, from those of the rows.
template <class T>
void merge_rows(const Sequence<T>& of) {
  const int64_t width = of.batches.width;
  for (int64_t set = 0; set < of.samples * of.sets(); ++set) {
    const One<T>*mean = of.row_mean + set * width, *var = of.row_var + set * width;
    double centre = 0, squares = 0;
    for (int64_t k = 0; k < width; ++k) centre += mean[k];
    centre /= width;
    for (int64_t k = 0; k < width; ++k) squares += var[k] + (mean[k] - centre) * (mean[k] - centre);
    of.mean[set] = centre;
    of.var[set] = squares / width;
  }
  const auto inverses = of.inverses();
  Twos z(of.batches.groups, of.channels);
  z.places = of.count;
  of.each_row([&](int64_t row, int64_t set, int64_t g, int64_t, double length) {
    z.first[g] += length * (of.row_mean[row] - of.mean[set]) * inverses[set];
  });
  for (size_t g = 0; g < z.first.size(); ++g) z.first[g] /= std::max(of.count[g / of.channels], 1.);
  of.each_row([&](int64_t row, int64_t set, int64_t g, int64_t, double length) {
    const double apart = (of.row_mean[row] - of.mean[set]) * inverses[set] - z.first[g];
    z.second[g] += length * (of.row_var[row] * inverses[set] * inverses[set] + apart * apart);
  });
  for (size_t g = 0; g < z.first.size(); ++g) {
    of.z_mean[g] = z.first[g];
    of.z_var[g] = z.second[g] / std::max(of.count[g / of.channels], 1.);
  }
  domainnorm::count(z, of.batches, of.total_mean, of.total_var);
}

template <class T>
void normalize_sequence(const Sequence<T>& of) {
  moments<T>(of.parts, of.number, of.channels, of.threads, of.row_mean, of.row_var);
  merge_rows(of);
  const auto inverses = of.inverses(), centre = of.centres();
  std::vector<double> factor(of.batches.groups * of.channels);
  std::vector<One<T>> scale(centre.size()), shift(centre.size());
  for (size_t g = 0; g < factor.size(); ++g) factor[g] = of.gamma(g % of.channels) * of.inverse(of.z_var[g]);
  of.each_row([&](int64_t row, int64_t set, int64_t g, int64_t channel, double) {
    scale[row] = inverses[set] * factor[g];
    shift[row] = (of.bias ? of.bias[channel] : 0) - of.z_mean[g] * factor[g];
  });
  affine<T>(of.parts, of.number, of.channels, of.threads, of.of_rows(scale), of.of_rows(centre), of.of_rows(shift));
}

// With F = γ / S, the gradient of z is F g - A - B (z - M): A and B are its means over the group of samples, of itself and
// times z - M, as in a BatchNorm. Then that of x is the same again, over the channel group of the sample.
template <class T>
void gradient_sequence(const Sequence<T>& of, One<T>* to_weight, One<T>* to_bias) {
  const int64_t groups = of.batches.groups;
  const auto inverses = of.inverses(), centre = of.centres();
  std::vector<One<T>> total(centre.size()), products(centre.size());  // Σ g and Σ g (x - μ) of rows
  sums<T>(of.parts, of.number, of.channels, of.threads, total.data(), products.data(), of.of_rows(centre));

  std::vector<double> all(groups * of.channels), beyond(groups * of.channels);  // Σ g and Σ g (z - M) of groups
  of.each_row([&](int64_t row, int64_t set, int64_t g, int64_t, double) {
    all[g] += total[row];
    beyond[g] += inverses[set] * products[row] - of.z_mean[g] * total[row];
  });
  std::vector<double> factor(all.size()), a(all.size()), b(all.size());
  for (size_t g = 0; g < all.size(); ++g) {
    const double inverse = of.inverse(of.z_var[g]), count = std::max(of.count[g / of.channels], 1.);
    to_bias[g] = all[g];
    to_weight[g] = beyond[g] * inverse;
    factor[g] = of.gamma(g % of.channels) * inverse;
    a[g] = factor[g] * all[g] / count;
    b[g] = factor[g] * beyond[g] * inverse * inverse / count;
  }

  std::vector<double> sum(inverses.size()), sum_of_products(inverses.size());  // of z's gradient, of channel groups
  of.each_row([&](int64_t row, int64_t set, int64_t g, int64_t, double length) {
    const double s = inverses[set], apart = of.row_mean[row] - of.mean[set], m = of.z_mean[g];
    sum[set] += factor[g] * total[row] - length * (a[g] + b[g] * (apart * s - m));
    sum_of_products[set] += factor[g] * products[row] - length * ((a[g] - b[g] * m) * apart +
                                                                  b[g] * s * (of.row_var[row] + apart * apart));
  });
  std::vector<One<T>> scale(centre.size()), to_mean(centre.size()), to_var(centre.size());
  of.each_row([&](int64_t row, int64_t set, int64_t g, int64_t, double length) {
    const double s = inverses[set], count = length * of.batches.width;
    scale[row] = s * factor[g];
    to_var[row] = -length / 2 * s * s * (b[g] + s * sum_of_products[set] / count);
    to_mean[row] = -length * s * (a[g] - b[g] * of.z_mean[g] + sum[set] / count);
  });
  gradient<T>(of.parts, of.number, of.channels, of.threads, of.of_rows(scale), of.of_rows(centre), of.of_rows(to_mean),
              of.of_rows(to_var));
}

}  // namespace

#define SEQUENCE(NAME, T)                                                                                           \
  extern "C" void sequence_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,             \
                                  Batches batches, Numbers weight, Numbers bias, Tables tables) {                   \
    normalize_sequence(Sequence<T>(parts, number, channels, threads, batches, weight, bias, tables));         \
  }                                                                                                                 \
  extern "C" void sequence_gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,    \
                                           Batches batches, Numbers weight, Numbers bias, Tables tables,            \
                                           void* to_weight, void* to_bias) {                                        \
    gradient_sequence(Sequence<T>(parts, number, channels, threads, batches, weight, bias, tables),           \
                      (One<T>*)to_weight, (One<T>*)to_bias);                                                        \
  }

SEQUENCE(float32, float)
SEQUENCE(float64, double)
SEQUENCE(bfloat16, bfloat16)
