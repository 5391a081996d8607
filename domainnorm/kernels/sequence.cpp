// SeqNorm: GroupNorm of each sample without an affine, then a BatchNorm of groups of samples, in one call each way; called
// by compiled_batches.py; library.py checks what comes in. The layer's own merges of rows are the reference.
//
// With the mean μ and deviation σ of a sample's channel group, and M and S of the z = (x - μ) / σ of a group of samples,
// y = γ (z - M) / S + β. The moments of z are those of the rows of x, moved and scaled: x is read for them once.

#include <memory>

#include "batches.h"
#include "rows.h"

using namespace domainnorm;

namespace {

constexpr int64_t BLOCK = 1 << 20;  // bytes that stay in the second-level cache

// As many numbers as there are rows may take long to be set to zero: these are written before they are read.
template <class N>
using Unset = std::unique_ptr<N[]>;

// Neighbouring channel groups of the samples of a group, or with group -1 of all samples.
struct Block {
  int64_t group;
  std::vector<int64_t> samples;
  int64_t first, sets, threads;
};

// What both ways work on.
template <class T>
struct Sequence {
  const Part* parts;
  int64_t number, channels, threads, samples;
  Batches batches;
  const One<T>*weight, *bias;  // (channels,), or none
  One<T>* counted;
  double *z_mean, *z_var;       // of z, (groups, channels)
  One<T>*row_mean, *row_var;    // of rows, (samples, channels)
  One<T>*mean, *var;            // of the channel groups of samples, (samples, channels / width)
  std::vector<Sample<T>> each;  // of all samples
  std::vector<double> count;    // of each group
  Unset<double> inverse;        // 1 / σ of each channel group, once they are known
  Unset<One<T>> centre;         // μ of each row, likewise

  Sequence(const Part* parts, int64_t number, int64_t channels, int64_t threads, Batches batches, Numbers weight,
           Numbers bias, Tables tables)
      : parts(parts), number(number), channels(channels), threads(threads), batches(batches),
        weight((const One<T>*)weight.at), bias((const One<T>*)bias.at), counted((One<T>*)tables.counted),
        z_mean((double*)tables.batches), z_var(z_mean + batches.groups * channels), row_mean((One<T>*)tables.rows),
        mean((One<T>*)tables.first), each(samples_of<T>(parts, number, channels)), count(batches.groups) {
    samples = each.size();
    row_var = row_mean + samples * channels;
    var = mean + samples * sets();
    inverse.reset(new double[samples * sets()]);
    centre = of_each_row();
    for (int64_t n = 0; n < samples; ++n) count[group(n)] += each[n].length;
  }

  int64_t group(int64_t sample) const { return batches.group ? batches.group[sample] : 0; }
  int64_t sets() const { return channels / batches.width; }
  double inverted(double var) const { return 1 / std::sqrt(var + batches.eps); }
  double gamma(int64_t channel) const { return weight ? weight[channel] : 1; }

  // run(block) for all of it: by groups, and where rows lie in one piece by channel groups, if so many `tensors` of a block
  // stay in a cache.
  template <class Run>
  void each_block(int64_t tensors, Run run) {
    std::vector<Block> blocks;
    const int64_t together = parts->last ? sets() : 1;
    int64_t most = 0, places = 0;
    for (int64_t g = 0; g < batches.groups; ++g) {
      most = std::max<int64_t>(most, tensors * count[g] * together * batches.width * sizeof(T));
      places += count[g];
    }
    if (most > BLOCK) {
      blocks.push_back({-1, {}, 0, sets(), threads});
      for (int64_t n = 0; n < samples; ++n) blocks[0].samples.push_back(n);
      return run(blocks[0]);
    }
    const int64_t each_group = sets() / together;
    for (int64_t g = 0; g < batches.groups; ++g)
      for (int64_t set = 0; set < sets(); set += together) blocks.push_back({g, {}, set, together, 1});
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t k = 0; k < each_group; ++k) blocks[group(n) * each_group + k].samples.push_back(n);
    parallel(blocks.size(), places * channels, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) run(blocks[k]);
    });
  }
  // body(sample, set, row, g) for each channel group of the samples of a block, with the places of its first channel among
  // the rows, and among the channels of groups of samples.
  template <class Body>
  void each_set(const Block& block, Body body) const {
    for (const int64_t n : block.samples)
      for (int64_t k = block.first; k < block.first + block.sets; ++k)
        body(n, n * sets() + k, n * channels + k * batches.width, group(n) * channels + k * batches.width);
  }
  // body(g, group, channel) for each channel of the groups of samples of a block.
  template <class Body>
  void each_channel(const Block& block, Body body) const {
    const int64_t begin = block.first * batches.width, end = begin + block.sets * batches.width;
    for (int64_t of = std::max<int64_t>(block.group, 0); of < (block.group < 0 ? batches.groups : block.group + 1); ++of)
      for (int64_t channel = begin; channel < end; ++channel) body(of * channels + channel, of, channel);
  }
  // run(sample, size, row) for the rows of each sample of a block that is not all.
  template <class Run>
  void each_part(const Block& block, Run run) const {
    const int64_t first = block.first * batches.width;
    for (const int64_t n : block.samples) {
      const int64_t at = first * each[n].length;
      const Sample<T> rows{each[n].grad + at, each[n].x + at, each[n].out + at, each[n].length, n};
      run(rows, Size{1, block.sets * batches.width, each[n].length, 1}, n * channels + first);
    }
  }
  Unset<One<T>> of_each_row() const { return Unset<One<T>>(new One<T>[samples * channels]); }
  Numbers of_rows(const Unset<One<T>>& numbers) const { return {numbers.get(), channels}; }

  // What rows.h does, with the rows of a block.
  void read(const Block& block) const {
    if (block.group < 0) return moments<T>(parts, number, channels, threads, row_mean, row_var);
    each_part(block, [&](const Sample<T>& of, Size size, int64_t row) {
      (parts->last ? last_moments<T> : row_moments<T>)(of.x, row_mean + row, row_var + row, size);
    });
  }
  void write(const Block& block, const Unset<One<T>>& scale, const Unset<One<T>>& shift) const {
    if (block.group < 0)
      return affine<T>(parts, number, channels, threads, of_rows(scale), of_rows(centre), of_rows(shift));
    each_part(block, [&](const Sample<T>& of, Size size, int64_t row) {
      (parts->last ? last_affine<T> : row_affine<T>)(of.x, of.out, {&scale[row], 0}, {&centre[row], 0},
                                                     {&shift[row], 0}, size);
    });
  }
  void sum(const Block& block, const Unset<One<T>>& total, const Unset<One<T>>& products) const {
    if (block.group < 0)
      return sums<T>(parts, number, channels, threads, total.get(), products.get(), of_rows(centre));
    each_part(block, [&](const Sample<T>& of, Size size, int64_t row) {
      (parts->last ? last_sums<T> : row_sums<T>)(of.grad, of.x, {&centre[row], 0}, &total[row], &products[row], size);
    });
  }
  void write_gradient(const Block& block, const Unset<One<T>>& scale, const Unset<One<T>>& to_mean,
                      const Unset<One<T>>& to_var) const {
    if (block.group < 0)
      return gradient<T>(parts, number, channels, threads, of_rows(scale), of_rows(centre), of_rows(to_mean),
                         of_rows(to_var));
    each_part(block, [&](const Sample<T>& of, Size size, int64_t row) {
      (parts->last ? last_gradient<T> : row_gradient<T>)(of.grad, of.x, of.out, {&scale[row], 0}, {&centre[row], 0},
                                                         {&to_mean[row], 0}, {&to_var[row], 0}, size);
    });
  }

  // 1 / σ and μ where they are needed, once σ² and μ of the channel groups are known.
  void spread(const Block& block) {
    each_set(block, [&](int64_t, int64_t set, int64_t row, int64_t) {
      inverse[set] = inverted(var[set]);
      std::fill_n(&centre[row], batches.width, mean[set]);
    });
  }
};

// The moments of z, from those of the rows.
template <class T>
void merge_rows(Sequence<T>& of, const Block& block) {
  const int64_t width = of.batches.width;
  of.each_set(block, [&](int64_t, int64_t set, int64_t row, int64_t) {
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
  of.spread(block);
  of.each_channel(block, [&](int64_t g, int64_t, int64_t) { of.z_mean[g] = of.z_var[g] = 0; });
  of.each_set(block, [&](int64_t n, int64_t set, int64_t row, int64_t g) {
    const One<T>* mean = of.row_mean + row;
    const double centre = of.mean[set], share = of.each[n].length * of.inverse[set];
    double* to = of.z_mean + g;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) to[k] += share * (mean[k] - centre);
  });
  of.each_channel(block, [&](int64_t g, int64_t group, int64_t) { of.z_mean[g] /= std::max(of.count[group], 1.); });
  of.each_set(block, [&](int64_t n, int64_t set, int64_t row, int64_t g) {
    const One<T>*mean = of.row_mean + row, *var = of.row_var + row;
    const double centre = of.mean[set], s = of.inverse[set], length = of.each[n].length, *m = of.z_mean + g;
    double* to = of.z_var + g;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) {
      const double apart = (mean[k] - centre) * s - m[k];
      to[k] += length * (var[k] * s * s + apart * apart);
    }
  });
  of.each_channel(block, [&](int64_t g, int64_t group, int64_t) { of.z_var[g] /= std::max(of.count[group], 1.); });
}

template <class T>
void normalize_sequence(Sequence<T>&& of) {
  const int64_t width = of.batches.width, numbers = of.batches.groups * of.channels;
  std::vector<double> factor(numbers), offset(numbers);  // γ / S, and β - M γ / S
  const Unset<One<T>> scale = of.of_each_row(), shift = of.of_each_row();
  of.each_block(1, [&](const Block& block) {
    of.read(block);
    merge_rows(of, block);
    of.each_channel(block, [&](int64_t g, int64_t, int64_t channel) {
      factor[g] = of.gamma(channel) * of.inverted(of.z_var[g]);
      offset[g] = (of.bias ? of.bias[channel] : 0) - of.z_mean[g] * factor[g];
    });
    of.each_set(block, [&](int64_t, int64_t set, int64_t row, int64_t g) {
      const double s = of.inverse[set], *f = &factor[g], *o = &offset[g];
      One<T>*a = &scale[row], *b = &shift[row];
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) {
        a[k] = s * f[k];
        b[k] = o[k];
      }
    });
    of.write(block, scale, shift);
  });
  Twos z(of.batches.groups, of.channels);
  z.places = of.count;
  for (int64_t g = 0; g < numbers; ++g) {
    z.first[g] = of.z_mean[g];
    z.second[g] = of.z_var[g] * of.count[g / of.channels];
  }
  domainnorm::count(z, of.batches, of.counted);
}

// With F = γ / S, the gradient of z is F g - A - B (z - M): A and B are its means over the group of samples, of itself and
// times z - M, as in a BatchNorm. Then that of x is the same again, over the channel group of the sample.
template <class T>
void gradient_sequence(Sequence<T>&& of, const AffineGradient<One<T>>& to_affine) {
  const int64_t width = of.batches.width, numbers = of.batches.groups * of.channels;
  const Unset<One<T>> total = of.of_each_row(), products = of.of_each_row();  // Σ g and Σ g (x - μ) of rows
  const Unset<One<T>> scale = of.of_each_row(), to_mean = of.of_each_row(), to_var = of.of_each_row();
  std::vector<double> all(numbers), beyond(numbers);  // Σ g and Σ g (z - M) of groups
  std::vector<double> factor(numbers), a(numbers), b(numbers);
  of.each_block(2, [&](const Block& block) {
    of.spread(block);
    of.sum(block, total, products);
    of.each_set(block, [&](int64_t, int64_t set, int64_t row, int64_t g) {
      const One<T>*t = &total[row], *p = &products[row];
      const double s = of.inverse[set], *m = of.z_mean + g;
      double *to_all = &all[g], *to_beyond = &beyond[g];
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) {
        to_all[k] += t[k];
        to_beyond[k] += s * p[k] - m[k] * t[k];
      }
    });
    of.each_channel(block, [&](int64_t g, int64_t group, int64_t channel) {
      const double inverse = of.inverted(of.z_var[g]), count = std::max(of.count[group], 1.);
      to_affine.bias[g] = all[g];
      to_affine.weight[g] = beyond[g] * inverse;
      factor[g] = of.gamma(channel) * inverse;
      a[g] = factor[g] * all[g] / count;
      b[g] = factor[g] * beyond[g] * inverse * inverse / count;
    });
    of.each_set(block, [&](int64_t n, int64_t set, int64_t row, int64_t g) {
      const One<T>*t = &total[row], *p = &products[row], *mean = of.row_mean + row, *var = of.row_var + row;
      const double s = of.inverse[set], length = of.each[n].length, centre = of.mean[set], *m = of.z_mean + g;
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
    of.write_gradient(block, scale, to_mean, to_var);
  });
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
