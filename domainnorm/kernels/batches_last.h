// Whole normalization batches where the channels of a place lie side by side: all are read before anything is written.

#pragma once

#include "batches.h"

namespace domainnorm {

constexpr int64_t PLACES = 256;     // of a tile with all channels: a sum of so many is in single precision
constexpr int64_t NUMBERS = 1 << 16;  // of such a tile, which stays in the second-level cache

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

// What is of chunks merged into what is of groups: of most groups one chunk is all.
template <class T>
Twos of_groups(Twos of, const std::vector<Chunk<T>>& all, int64_t groups) {
  int64_t alone = 0;
  while (alone < (int64_t)all.size() && all[alone].group == alone) ++alone;
  if (alone == (int64_t)all.size() && alone == groups) return of;
  Twos merged(groups, of.channels);
  for (size_t k = 0; k < all.size(); ++k) {
    const int64_t group = all[k].group;
    merge(of.channels, &of.first[k * of.channels], &of.second[k * of.channels], of.places[k], merged.places[group],
          &merged.first[group * of.channels], &merged.second[group * of.channels]);
    merged.places[group] += of.places[k];
  }
  return merged;
}

template <class T>
void last_moments(const Work<T>& work, Tables tables) {
  const int64_t channels = work.channels, groups = work.batches.groups, width = work.batches.width;
  const auto all = chunks(work, false);
  Twos of(all.size(), channels);  // means, and squares of what lies beyond them
  parallel(all.size(), work.places * channels, work.threads, [&](int64_t begin, int64_t end) {
    std::vector<One<T>> own(channels), rest(channels), squares(channels);  // of a tile
    One<T>*o = own.data(), *r = rest.data(), *s = squares.data();
    for (int64_t k = begin; k < end; ++k)
      each_tile(all[k], channels, [&](const Piece<T>* at, int64_t n) {
        double *centre = &of.first[k * channels], *beyond = &of.second[k * channels];
        if (of.places[k])
          std::copy(centre, centre + channels, o);
        else
          each_column<T>(
              channels, n, [=](int64_t place, int64_t i, auto v) { return load_ahead<decltype(v)>(at[place].x + i); },
              [=](int64_t i, auto sum) { store(o + i, sum / One<T>(n)); });
        each_column<T>(
            channels, n,
            [=](int64_t place, int64_t i, auto v) {
              const auto beyond = load_ahead<decltype(v)>(at[place].x + i) - load<decltype(v)>(o + i);
              return Pair<decltype(v)>{beyond, beyond * beyond};
            },
            [=](int64_t i, const auto& sums) {
              store(r + i, sums.first);
              store(s + i, sums.second);
            });
        for (int64_t i = 0; i < channels; ++i) {
          const One<T> of_tile = std::isfinite(rest[i]) ? own[i] : own[i] + rest[i];  // infinite or NaN, as the tile is
          merge(of_tile, rest[i], squares[i], n, of.places[k], centre[i], beyond[i]);
        }
        of.places[k] += n;
      });
  });
  const Twos merged = of_groups(std::move(of), all, groups);
  count(merged, work.batches, (One<T>*)tables.counted);
  One<T>*mean = (One<T>*)tables.batches, *var = mean + work.sets();
  for (int64_t set = 0; set < work.sets(); ++set) {
    const double n = merged.places[set * width / channels];
    const double *means = &merged.first[set * width], *beyond = &merged.second[set * width];
    double centre = 0, squares = 0;
#pragma omp simd reduction(+ : centre)
    for (int64_t k = 0; k < width; ++k) centre += means[k];
    centre /= width;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < width; ++k) squares += beyond[k] + n * (means[k] - centre) * (means[k] - centre);
    mean[set] = centre;
    var[set] = squares / std::max(n * width, 1.);
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
void normalize_last(const Work<T>& work, Tables tables, Towards towards) {
  last_moments(work, tables);
  if (!tables.write) return;
  const int64_t channels = work.channels, width = work.batches.width;
  const One<T>*mean = (const One<T>*)tables.batches, *var = mean + work.sets();
  for (int64_t set = 0; work.r && set < work.sets(); ++set)
    work.correct(towards, set / channels, set % channels, mean[set], var[set]);
  const auto all = chunks(work, true);
  parallel(all.size(), work.places * channels, work.threads, [&, mean, var](int64_t begin, int64_t end) {
    std::vector<One<T>> scale(channels), centre(channels), shift(channels);
    const One<T>*a = scale.data(), *b = shift.data(), *c = centre.data();
    each_stretch(
        all, begin, end,
        [&](const Sample<T>& of, int64_t group) {
          for (int64_t i = 0, set = group * channels / width; i < channels; ++set) {
            const One<T> inverse = work.inverse(var[set]);
            for (const int64_t next = i + width; i < next; ++i) {
              centre[i] = mean[set];
              scale[i] = work.gamma(of, i) * inverse;
              shift[i] = work.beta(of, i);
            }
          }
        },
        [=](const Sample<T>& of, int64_t place) {
          const T* from = of.x + place * channels;
          T* to = of.out + place * channels;
          each<T>(channels, [=](int64_t i, auto v) {
            using V = decltype(v);
            store_ahead(to + i, load<V>(a + i) * (load_ahead<V>(from + i) - load<V>(c + i)) + load<V>(b + i));
          });
        });
  });
}

template <class T>
void gradient_last(const Work<T>& work, Tables tables, const AffineGradient<One<T>>& to_affine) {
  const int64_t channels = work.channels, width = work.batches.width, groups = work.batches.groups;
  const One<T>*mean = (const One<T>*)tables.batches, *var = mean + work.sets();
  const auto all = chunks(work, true);
  Twos of(all.size(), channels), batches(groups, channels / width);  // Σ grad and Σ grad · (x - mean)
  parallel(all.size(), work.places * channels, work.threads, [&, mean](int64_t begin, int64_t end) {
    std::vector<One<T>> centre(channels);
    const One<T>* c = centre.data();
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t i = 0, set = all[k].group * channels / width; i < channels; ++set)
        for (const int64_t next = i + width; i < next; ++i) centre[i] = mean[set];
      double *total = of.first.data() + k * channels, *products = of.second.data() + k * channels;
      each_tile(all[k], channels, [=](const Piece<T>* at, int64_t n) {
        each_column<T>(
            channels, n,
            [=](int64_t place, int64_t i, auto v) {
              using V = decltype(v);
              const V of_grad = load_ahead<V>(at[place].grad + i);
              return Pair<V>{of_grad, of_grad * (load_ahead<V>(at[place].x + i) - load<V>(c + i))};
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
    for (int64_t i = 0, set = all[k].group * channels / width; i < channels; ++set) {
      const double inverse = work.inverse(var[set]);
      for (const int64_t next = i + width; i < next; ++i) {
        const int64_t row = all[k].unit * channels + i;
        const double total = of.first[k * channels + i], products = of.second[k * channels + i];
        to_affine.bias[row] += total;
        to_affine.weight[row] += work.to_gamma(sample, i, products * inverse, total);
        batches.first[set] += total * work.gamma(sample, i);
        batches.second[set] += products * work.gamma(sample, i);
      }
    }
  }
  parallel(all.size(), work.places * channels, work.threads, [&, mean, var](int64_t begin, int64_t end) {
    std::vector<One<T>> scale(channels), slope(channels), centre(channels), offset(channels);
    const One<T>*a = scale.data(), *b = slope.data(), *c = centre.data(), *d = offset.data();
    each_stretch(
        all, begin, end,
        [&](const Sample<T>& sample, int64_t group) {
          for (int64_t i = 0, set = group * channels / width; i < channels; ++set) {
            const double inverse = work.inverse(var[set]), share = inverse / (batches.places[group] * width);
            const One<T> b_of = -batches.second[set] * inverse * inverse * share, d_of = -batches.first[set] * share;
            for (const int64_t next = i + width; i < next; ++i) {
              centre[i] = mean[set];
              scale[i] = work.gamma(sample, i) * inverse;
              slope[i] = b_of;
              offset[i] = d_of;
            }
          }
        },
        [=](const Sample<T>& sample, int64_t place) {
          const T *g = sample.grad + place * channels, *from = sample.x + place * channels;
          T* to = sample.out + place * channels;
          each<T>(channels, [=](int64_t i, auto v) {
            using V = decltype(v);
            const V rest = load<V>(b + i) * (load_ahead<V>(from + i) - load<V>(c + i)) + load<V>(d + i);
            store_ahead(to + i, load<V>(a + i) * load_ahead<V>(g + i) + rest);
          });
        });
  });
}

}  // namespace domainnorm
