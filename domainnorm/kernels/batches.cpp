// Whole normalization batches on a CPU: moments, merge and affine in one call, and all gradients in another. Called by
// compiled.py, which checks what comes in; plain.py says what each function computes.
//
// A normalization batch is the samples of one group by `width` neighbouring channels. Where the places of a channel lie
// side by side, a batch is finished while it is in a cache, so that memory is gone through once each way. With `last`
// the channels of a place lie side by side, and all batches are read before anything is written.

#include "vectors.h"

using namespace domainnorm;

namespace {

constexpr int64_t SHORT = 256;       // numbers of a row that ends before the processor fetches what follows unasked
constexpr int64_t PLACES = 256;     // of a tile with all channels: a sum of so many is in single precision
constexpr int64_t NUMBERS = 1 << 16;  // of such a tile, which stays in the second-level cache

struct Batches {
  const int64_t* group;  // of each sample; none: all are of the same
  int64_t groups, width;
  double eps;
};

// Moments (groups, channels), and of the batches (groups, channels / width): the same where width is 1. Whether they are
// to be filled, and whether anything is to be normalized by them.
struct Tables {
  void *mean, *var, *batch_mean, *batch_var;
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

// Places of a channel side by side.

// run(tile, n) for the numbers of one channel of the samples, in tiles of n numbers, of one piece or several.
template <class T, class Run>
void each_tile(const Sample<T>* begin, const Sample<T>* end, int64_t channel, std::vector<Piece<T>>& tile, Run run) {
  int64_t n = 0;
  tile.clear();
  for (const auto* sample = begin; sample < end; ++sample)
    for (int64_t done = 0; done < sample->length;) {
      const int64_t length = std::min(TILE - n, sample->length - done), at = channel * sample->length + done;
      tile.push_back({sample->grad + at, sample->x + at, length});
      if (sample->length <= SHORT)
        for (int64_t i = 0; i < length; i += 64 / (int64_t)sizeof(T)) {
          __builtin_prefetch(sample->x + at + i, 0, 2);
          __builtin_prefetch(sample->grad + at + i, 0, 2);
        }
      n += length;
      done += length;
      if (n == TILE) {
        run(tile, n);
        tile.clear();
        n = 0;
      }
    }
  if (n) run(tile, n);
}

// Of one channel of the samples of a group: how many numbers, their mean and the squares of what lies beyond it.
template <class T>
double moments(const Work<T>& work, int64_t group, int64_t channel, std::vector<Piece<T>>& tile, double& centre,
               double& squares) {
  double done = 0;
  each_tile(work.first(group), work.first(group + 1), channel, tile, [&](const auto& pieces, int64_t n) {
    Sum<T, Many<T>> all;
    for (const auto& piece : pieces)
      all.add(piece.length, [x = piece.x](int64_t i, auto v) { return load<decltype(v)>(x + i); });
    const One<T> own = all.value() / n;
    Sum<T, Pair<Many<T>>> of;
    for (const auto& piece : pieces)
      of.add(piece.length, [x = piece.x, own](int64_t i, auto v) {
        auto rest = load<decltype(v)>(x + i) - own;
        return Pair<decltype(v)>{rest, rest * rest};
      });
    const auto rest = of.value();
    merge(own, rest.first, rest.second, n, done, centre, squares);
    done += n;
  });
  return done;
}

template <class T>
void normalize_rows(const Work<T>& work, Tables tables) {
  const int64_t channels = work.channels, width = work.batches.width, sets = channels / width;
  One<T>*mean = (One<T>*)tables.mean, *var = (One<T>*)tables.var;
  One<T>*batch_mean = (One<T>*)tables.batch_mean, *batch_var = (One<T>*)tables.batch_var;
  parallel(work.batches.groups * sets, work.places * channels, work.threads, [=, &work](int64_t begin, int64_t end) {
    std::vector<Piece<T>> tile;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / sets, first = task % sets * width;
      if (tables.fill) {
        double done = 0, all_centre = 0, all_squares = 0;
        for (int64_t channel = first; channel < first + width; ++channel) {
          double centre = 0, squares = 0;
          const double n = moments(work, group, channel, tile, centre, squares);
          mean[group * channels + channel] = centre;
          var[group * channels + channel] = squares / std::max(n, 1.);
          if (n) merge(centre, 0, squares, n, done, all_centre, all_squares);
          done += n;
        }
        batch_mean[task] = all_centre;
        batch_var[task] = all_squares / std::max(done, 1.);
      }
      if (!tables.use) continue;
      const One<T> c = batch_mean[task], scale = work.inverse(batch_var[task]);
      for (const auto* sample = work.first(group); sample < work.first(group + 1); ++sample)
        for (int64_t channel = first; channel < first + width; ++channel) {
          const One<T> a = work.gamma(*sample, channel) * scale, b = work.beta(*sample, channel);
          const T* from = sample->x + channel * sample->length;
          T* to = sample->out + channel * sample->length;
          each<T>(sample->length, [=](int64_t i, auto v) { store(to + i, a * (load<decltype(v)>(from + i) - c) + b); });
        }
    }
  });
}

template <class T>
void gradient_rows(const Work<T>& work, Tables tables, One<T>* to_weight, One<T>* to_bias) {
  const int64_t channels = work.channels, width = work.batches.width, sets = channels / width;
  const One<T>*mean = (const One<T>*)tables.batch_mean, *var = (const One<T>*)tables.batch_var;
  parallel(work.batches.groups * sets, work.places * channels, work.threads, [=, &work](int64_t begin, int64_t end) {
    std::vector<Piece<T>> tile;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / sets, first = task % sets * width;
      const auto *start = work.first(group), *stop = work.first(group + 1);
      const One<T> c = mean[task];
      const double inverse = work.inverse(var[task]);
      double count = 0, total = 0, products = 0;  // of γ · grad over the batch
      for (int64_t channel = first; channel < first + width; ++channel)
        for (const auto* sample = start; sample < stop;) {
          const auto* next = work.each() ? sample + 1 : stop;
          double sum_grad = 0, sum_products = 0;
          each_tile(sample, next, channel, tile, [&](const auto& pieces, int64_t n) {
            Sum<T, Pair<Many<T>>> both;
            for (const auto& piece : pieces)
              both.add(piece.length, [g = piece.grad, x = piece.x, c](int64_t i, auto v) {
                using V = decltype(v);
                const V of_grad = load<V>(g + i);
                return Pair<V>{of_grad, of_grad * (load<V>(x + i) - c)};
              });
            const auto of = both.value();
            sum_grad += of.first;
            sum_products += of.second;
            count += n;
          });
          const int64_t row = work.unit(*sample) * channels + channel;
          to_weight[row] = sum_products * inverse;
          to_bias[row] = sum_grad;
          total += sum_grad * work.gamma(*sample, channel);
          products += sum_products * work.gamma(*sample, channel);
          sample = next;
        }
      const One<T> b = -products * inverse * inverse * inverse / count, d = -total * inverse / count;
      for (const auto* sample = start; sample < stop; ++sample)
        for (int64_t channel = first; channel < first + width; ++channel) {
          const One<T> a = work.gamma(*sample, channel) * inverse;
          const int64_t at = channel * sample->length;
          const T *g = sample->grad + at, *from = sample->x + at;
          T* to = sample->out + at;
          each<T>(sample->length, [=](int64_t i, auto v) {
            using V = decltype(v);
            store(to + i, a * load<V>(g + i) + (b * (load<V>(from + i) - c) + d));
          });
        }
    }
  });
}

// Channels of a place side by side.

// Places of one group, and with γ and β of each row of one sample: as many as a thread takes at once.
template <class T>
struct Chunk {
  int64_t group, unit, places;
  std::vector<Sample<T>> stretches;  // places of one sample each
};

template <class T>
std::vector<Chunk<T>> chunks(const Work<T>& work, bool by_unit) {
  const int64_t most = std::max((work.places + work.threads - 1) / work.threads, FEWEST / work.channels + 1);
  std::vector<Chunk<T>> all;
  for (const auto& sample : work.samples)
    for (int64_t done = 0; done < sample.length;) {
      const int64_t group = work.of(sample), unit = by_unit ? work.unit(sample) : group;
      if (all.empty() || all.back().group != group || all.back().unit != unit || all.back().places == most)
        all.push_back({group, unit, 0, {}});
      const int64_t places = std::min(most - all.back().places, sample.length - done), at = done * work.channels;
      all.back().stretches.push_back({sample.grad + at, sample.x + at, sample.out + at, places, sample.row});
      all.back().places += places;
      done += places;
    }
  return all;
}

// put(i, Σ body(place, i, V{})) for all channels i, numbers or vectors of them, over so many places.
template <class T, class Body, class Put>
void each_column(int64_t channels, int64_t places, Body body, Put put) {
  constexpr int64_t W = WIDTH<T>;
  int64_t i = 0;
  for (; i + 4 * W <= channels; i += 4 * W) {
    decltype(body(0, 0, Many<T>{})) parts[4] = {};
    for (int64_t place = 0; place < places; ++place)
      for (int k = 0; k < 4; ++k) parts[k] += body(place, i + k * W, Many<T>{});
    for (int k = 0; k < 4; ++k) put(i + k * W, parts[k]);
  }
  for (; i + W <= channels; i += W) {
    decltype(body(0, 0, Many<T>{})) part = {};
    for (int64_t place = 0; place < places; ++place) part += body(place, i, Many<T>{});
    put(i, part);
  }
  for (; i < channels; ++i) {
    decltype(body(0, 0, One<T>{})) part = {};
    for (int64_t place = 0; place < places; ++place) part += body(place, i, One<T>{});
    put(i, part);
  }
}

// run(places, n) for the places of a chunk, in tiles of n.
template <class T, class Run>
void each_tile(const Chunk<T>& chunk, int64_t channels, Run run) {
  const int64_t most = std::max<int64_t>(8, std::min(PLACES, NUMBERS / channels));
  std::vector<Piece<T>> tile;
  for (const auto& stretch : chunk.stretches)
    for (int64_t place = 0; place < stretch.length; ++place) {
      tile.push_back({stretch.grad + place * channels, stretch.x + place * channels, channels});
      if ((int64_t)tile.size() == most) {
        run(tile.data(), most);
        tile.clear();
      }
    }
  if (!tile.empty()) run(tile.data(), (int64_t)tile.size());
}

// Two numbers of each of (rows, channels), and of each row how many places they are of.
struct Twos {
  int64_t channels;
  std::vector<double> first, second, places;
  Twos(int64_t rows, int64_t channels)
      : channels(channels), first(rows * channels), second(rows * channels), places(rows) {}
};

template <class T>
void last_moments(const Work<T>& work, Tables tables) {
  const int64_t channels = work.channels, groups = work.batches.groups, width = work.batches.width;
  const auto all = chunks(work, false);
  Twos of(all.size(), channels), merged(groups, channels);  // mean, squares of what lies beyond it
  parallel(all.size(), work.places * channels, work.threads, [&](int64_t begin, int64_t end) {
    std::vector<One<T>> own(channels), rest(channels), squares(channels);  // of a tile
    One<T>*o = own.data(), *r = rest.data(), *s = squares.data();
    for (int64_t k = begin; k < end; ++k)
      each_tile(all[k], channels, [&](const Piece<T>* at, int64_t n) {
        each_column<T>(
            channels, n, [=](int64_t place, int64_t i, auto v) { return load<decltype(v)>(at[place].x + i); },
            [=](int64_t i, auto sum) { store(o + i, sum / One<T>(n)); });
        each_column<T>(
            channels, n,
            [=](int64_t place, int64_t i, auto v) {
              const auto beyond = load<decltype(v)>(at[place].x + i) - load<decltype(v)>(o + i);
              return Pair<decltype(v)>{beyond, beyond * beyond};
            },
            [=](int64_t i, const auto& sums) {
              store(r + i, sums.first);
              store(s + i, sums.second);
            });
        for (int64_t i = 0; i < channels; ++i)
          merge(own[i], rest[i], squares[i], n, of.places[k], of.first[k * channels + i], of.second[k * channels + i]);
        of.places[k] += n;
      });
  });
  for (size_t k = 0; k < all.size(); ++k) {
    const int64_t group = all[k].group;
    for (int64_t i = 0; i < channels; ++i)
      merge(of.first[k * channels + i], 0, of.second[k * channels + i], of.places[k], merged.places[group],
            merged.first[group * channels + i], merged.second[group * channels + i]);
    merged.places[group] += of.places[k];
  }
  for (int64_t row = 0; row < groups * channels; ++row) {
    ((One<T>*)tables.mean)[row] = merged.first[row];
    ((One<T>*)tables.var)[row] = merged.second[row] / std::max(merged.places[row / channels], 1.);
  }
  for (int64_t set = 0; width > 1 && set < groups * channels / width; ++set) {
    const double n = merged.places[set * width / channels];
    double centre = 0, squares = 0;
    for (int64_t k = 0; n && k < width; ++k)
      merge(merged.first[set * width + k], 0, merged.second[set * width + k], n, n * k, centre, squares);
    ((One<T>*)tables.batch_mean)[set] = centre;
    ((One<T>*)tables.batch_var)[set] = squares / std::max(n * width, 1.);
  }
}

// run(places) for the places of each sample, by all threads; before those of another sample, prepare(sample).
template <class T, class Prepare, class Run>
void each_stretch(const std::vector<Chunk<T>>& all, int64_t begin, int64_t end, Prepare prepare, Run run) {
  int64_t unit = -1;
  for (int64_t k = begin; k < end; ++k)
    for (const auto& stretch : all[k].stretches) {
      if (all[k].unit != unit) prepare(stretch, all[k].group);
      unit = all[k].unit;
      for (int64_t place = 0; place < stretch.length; ++place) run(stretch, place);
    }
}

template <class T>
void normalize_last(const Work<T>& work, Tables tables) {
  if (tables.fill) last_moments(work, tables);
  if (!tables.use) return;
  const int64_t channels = work.channels, width = work.batches.width;
  const One<T>*mean = (const One<T>*)tables.batch_mean, *var = (const One<T>*)tables.batch_var;
  const auto all = chunks(work, true);
  parallel(all.size(), work.places * channels, work.threads, [&, mean, var](int64_t begin, int64_t end) {
    std::vector<One<T>> scale(channels), centre(channels), shift(channels);
    const One<T>*a = scale.data(), *b = shift.data(), *c = centre.data();
    each_stretch(
        all, begin, end,
        [&](const Sample<T>& of, int64_t group) {
          for (int64_t i = 0; i < channels; ++i) {
            const int64_t set = (group * channels + i) / width;
            centre[i] = mean[set];
            scale[i] = work.gamma(of, i) * One<T>(work.inverse(var[set]));
            shift[i] = work.beta(of, i);
          }
        },
        [=](const Sample<T>& of, int64_t place) {
          const T* from = of.x + place * channels;
          T* to = of.out + place * channels;
          each<T>(channels, [=](int64_t i, auto v) {
            using V = decltype(v);
            store(to + i, load<V>(a + i) * (load<V>(from + i) - load<V>(c + i)) + load<V>(b + i));
          });
        });
  });
}

template <class T>
void gradient_last(const Work<T>& work, Tables tables, One<T>* to_weight, One<T>* to_bias) {
  const int64_t channels = work.channels, width = work.batches.width, groups = work.batches.groups;
  const One<T>*mean = (const One<T>*)tables.batch_mean, *var = (const One<T>*)tables.batch_var;
  const auto all = chunks(work, true);
  Twos of(all.size(), channels), batches(groups, channels / width);  // Σ grad and Σ grad · (x - mean)
  parallel(all.size(), work.places * channels, work.threads, [&, mean](int64_t begin, int64_t end) {
    std::vector<One<T>> centre(channels);
    const One<T>* c = centre.data();
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t i = 0; i < channels; ++i) centre[i] = mean[(all[k].group * channels + i) / width];
      double *total = of.first.data() + k * channels, *products = of.second.data() + k * channels;
      each_tile(all[k], channels, [=](const Piece<T>* at, int64_t n) {
        each_column<T>(
            channels, n,
            [=](int64_t place, int64_t i, auto v) {
              using V = decltype(v);
              const V of_grad = load<V>(at[place].grad + i);
              return Pair<V>{of_grad, of_grad * (load<V>(at[place].x + i) - load<V>(c + i))};
            },
            [=](int64_t i, const auto& sums) {
              One<T> both[2][sizeof(sums.first) / sizeof(One<T>)];
              std::memcpy(both, &sums, sizeof both);
              for (size_t k = 0; k < sizeof both[0] / sizeof both[0][0]; ++k) {
                total[i + k] += both[0][k];
                products[i + k] += both[1][k];
              }
            });
      });
    }
  });
  for (size_t k = 0; k < all.size(); ++k) {
    const auto& sample = all[k].stretches[0];
    batches.places[all[k].group] += all[k].places;
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t set = (all[k].group * channels + i) / width, row = all[k].unit * channels + i;
      const double total = of.first[k * channels + i], products = of.second[k * channels + i];
      to_bias[row] += total;
      to_weight[row] += products * work.inverse(var[set]);
      batches.first[set] += total * work.gamma(sample, i);
      batches.second[set] += products * work.gamma(sample, i);
    }
  }
  parallel(all.size(), work.places * channels, work.threads, [&, mean, var](int64_t begin, int64_t end) {
    std::vector<One<T>> scale(channels), slope(channels), centre(channels), offset(channels);
    const One<T>*a = scale.data(), *b = slope.data(), *c = centre.data(), *d = offset.data();
    each_stretch(
        all, begin, end,
        [&](const Sample<T>& sample, int64_t group) {
          for (int64_t i = 0; i < channels; ++i) {
            const int64_t set = (group * channels + i) / width;
            const double inverse = work.inverse(var[set]), share = inverse / (batches.places[group] * width);
            centre[i] = mean[set];
            scale[i] = work.gamma(sample, i) * inverse;
            slope[i] = -batches.second[set] * inverse * inverse * share;
            offset[i] = -batches.first[set] * share;
          }
        },
        [=](const Sample<T>& sample, int64_t place) {
          const T *g = sample.grad + place * channels, *from = sample.x + place * channels;
          T* to = sample.out + place * channels;
          each<T>(channels, [=](int64_t i, auto v) {
            using V = decltype(v);
            const V rest = load<V>(b + i) * (load<V>(from + i) - load<V>(c + i)) + load<V>(d + i);
            store(to + i, load<V>(a + i) * load<V>(g + i) + rest);
          });
        });
  });
}

bool is_last(const Part* parts, int64_t number) {
  return std::all_of(parts, parts + number, [](const Part& part) { return part.last; });
}

}  // namespace

#define BATCHES(NAME, T)                                                                                            \
  extern "C" void normalize_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,            \
                                   Batches batches, Numbers weight, Numbers bias, Tables tables) {                  \
    const Work<T> work(parts, number, channels, threads, batches, weight, bias);                                    \
    (is_last(parts, number) ? normalize_last<T> : normalize_rows<T>)(work, tables);                                 \
  }                                                                                                                 \
  extern "C" void normalize_gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,   \
                                            Batches batches, Numbers weight, Numbers bias, Tables tables,           \
                                            void* to_weight, void* to_bias) {                                       \
    const Work<T> work(parts, number, channels, threads, batches, weight, bias);                                    \
    (is_last(parts, number) ? gradient_last<T> : gradient_rows<T>)(work, tables, (One<T>*)to_weight,                \
                                                                   (One<T>*)to_bias);                               \
  }

BATCHES(float32, float)
BATCHES(float64, double)
BATCHES(bfloat16, bfloat16)
