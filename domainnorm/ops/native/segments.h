// Moments of segments, affines of them, and their gradients, on a CPU.
//
// A segment is a run of samples of one tensor, each `channels` x `length` numbers. The numbers of a sample's channel lie
// side by side (contiguous tensors), or the channels of a place do (channels_last). Values of segments are (segments,
// channels) numbers, or `channels` numbers for all segments.

#pragma once

#include "vectors.h"

namespace domainnorm {

constexpr int64_t SHORT = 256;        // numbers of a row that ends before the processor fetches what follows unasked
constexpr int64_t PLACES = 256;       // of a channels_last tile: sums of so many are in single precision
constexpr int64_t NUMBERS = 1 << 16;  // of a channels_last tile, which stays in the second-level cache

// Some segments of equal size of one tensor: what is read, and what is written.
struct Part {
  const void *grad, *x;
  void* out;
  int64_t segments, samples, length, channels_last;
};
static_assert(sizeof(Part) == 7 * sizeof(int64_t), "__init__.py writes them as so many words");

// Values of segments; `step` is 0 where all segments have the same.
struct Values {
  const void* at;
  int64_t step;
};

// One part, and the number of the segments before it.
template <class T>
struct Segments {
  const T *grad, *x;
  T* out;
  int64_t first, segments, samples, channels, length, threads;

  int64_t count() const { return samples * length; }
  int64_t elements() const { return segments * channels * count(); }
  const acc_t<T>* values(Values of, int64_t segment) const {
    return (const acc_t<T>*)of.at + (first + segment) * of.step;
  }
  int64_t row(int64_t segment) const { return (first + segment) * channels; }
};

// Contiguous tensors.

// run(segment, channel, start) for all channels of all segments; `start` is where the channel of the first sample begins.
template <class T, class Run>
void each_channel(const Segments<T>& all, Run run) {
  parallel(all.segments * all.channels, all.elements(), all.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / all.channels, channel = task % all.channels;
      run(segment, channel, (segment * all.samples * all.channels + channel) * all.length);
    }
  });
}

// run(start, rows, n) for one channel of a segment, in tiles of `rows` samples' n numbers, which stay in the first-level
// cache.
template <class T, class Run>
void each_tile(const Segments<T>& all, int64_t start, Run run) {
  const int64_t stride = all.channels * all.length, length = all.length;
  if (length >= TILE) {
    for (int64_t sample = 0; sample < all.samples; ++sample)
      for (int64_t done = 0; done < length; done += TILE) run(start + sample * stride + done, 1, std::min(TILE, length - done));
  } else if (length) {
    const int64_t max_rows = TILE / length;
    for (int64_t sample = 0; sample < all.samples; sample += max_rows)
      run(start + sample * stride, std::min(max_rows, all.samples - sample), length);
  }
}

// Fetches the rows of a tile that the processor would not fetch in time.
template <class T>
void prefetch_short(const T* at, int64_t rows, int64_t n, int64_t stride) {
  if (n > SHORT || rows == 1) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(at + r * stride + i, 0, 2);
}

template <class T>
void moments_contiguous(const Segments<T>& all, acc_t<T>* mean, acc_t<T>* var) {
  const int64_t stride = all.channels * all.length;
  each_channel(all, [&](int64_t segment, int64_t channel, int64_t start) {
    double center = 0, squares = 0, done = 0;
    each_tile(all, start, [&](int64_t first, int64_t rows, int64_t n) {
      const T* x = all.x + first;
      prefetch_short(x, rows, n, stride);
      Sum<T, vec_t<T>> total;
      for (int64_t r = 0; r < rows; ++r)
        total.add(n, [at = x + r * stride](int64_t i, auto v) { return load_ahead<decltype(v)>(at + i); });
      const acc_t<T> pivot = total.value() / (rows * n);
      Sum<T, Pair<vec_t<T>>> deviations;
      for (int64_t r = 0; r < rows; ++r)
        deviations.add(n, [at = x + r * stride, pivot](int64_t i, auto v) {
          const auto delta = load<decltype(v)>(at + i) - pivot;
          return Pair<decltype(v)>{delta, delta * delta};
        });
      const auto rest = deviations.value();
      merge(pivot, rest.first, rest.second, rows * n, done, center, squares);
      done += rows * n;
    });
    mean[all.row(segment) + channel] = center;
    var[all.row(segment) + channel] = squares / std::max(done, 1.);
  });
}

template <class T>
void affine_contiguous(const Segments<T>& all, Values scale, Values center, Values shift) {
  each_channel(all, [&](int64_t segment, int64_t channel, int64_t start) {
    const acc_t<T> a = all.values(scale, segment)[channel], b = all.values(shift, segment)[channel];
    const acc_t<T> c = all.values(center, segment)[channel];
    for (int64_t sample = 0; sample < all.samples; ++sample) {
      const int64_t at = start + sample * all.channels * all.length;
      const T* x = all.x + at;
      T* y = all.out + at;
      each<T>(all.length, [=](int64_t i, auto v) { store_ahead(y + i, a * (load<decltype(v)>(x + i) - c) + b); });
    }
  });
}

template <class T>
void sums_contiguous(const Segments<T>& all, Values center, acc_t<T>* total, acc_t<T>* products) {
  const int64_t stride = all.channels * all.length;
  each_channel(all, [&](int64_t segment, int64_t channel, int64_t start) {
    const acc_t<T> c = all.values(center, segment)[channel];
    double sum_grad = 0, sum_products = 0;
    each_tile(all, start, [&](int64_t first, int64_t rows, int64_t n) {
      const T *grad = all.grad + first, *x = all.x + first;
      prefetch_short(grad, rows, n, stride);
      prefetch_short(x, rows, n, stride);
      Sum<T, Pair<vec_t<T>>> both;
      for (int64_t r = 0; r < rows; ++r)
        both.add(n, [g = grad + r * stride, at = x + r * stride, c](int64_t i, auto v) {
          using V = decltype(v);
          const V value = load_ahead<V>(g + i);
          return Pair<V>{value, value * (load_ahead<V>(at + i) - c)};
        });
      const auto sums = both.value();
      sum_grad += sums.first;
      sum_products += sums.second;
    });
    total[all.row(segment) + channel] = sum_grad;
    products[all.row(segment) + channel] = sum_products;
  });
}

template <class T>
void gradient_contiguous(const Segments<T>& all, Values scale, Values center, Values slope, Values offset) {
  each_channel(all, [&](int64_t segment, int64_t channel, int64_t start) {
    const acc_t<T> a = all.values(scale, segment)[channel], c = all.values(center, segment)[channel];
    const acc_t<T> b = all.values(slope, segment)[channel], d = all.values(offset, segment)[channel];
    for (int64_t sample = 0; sample < all.samples; ++sample) {
      const int64_t at = start + sample * all.channels * all.length;
      const T *grad = all.grad + at, *x = all.x + at;
      T* out = all.out + at;
      each<T>(all.length, [=](int64_t i, auto v) {
        using V = decltype(v);
        store_ahead(out + i, a * load<V>(grad + i) + (b * (load<V>(x + i) - c) + d));
      });
    }
  });
}

// channels_last tensors: a segment is `count()` places of `channels` numbers each.

// Neighboring places of one segment, as many as a thread takes at once.
struct Chunk {
  int64_t segment, place, places;  // the first place, of all segments
};

template <class T>
std::vector<Chunk> chunks(const Segments<T>& all) {
  const int64_t places = all.count();
  const int64_t max_places =
      std::max((all.segments * places + all.threads - 1) / all.threads, FEWEST / all.channels + 1);
  std::vector<Chunk> found;
  for (int64_t segment = 0; segment < all.segments; ++segment)
    for (int64_t done = 0; done < places; done += max_places)
      found.push_back({segment, segment * places + done, std::min(max_places, places - done)});
  return found;
}

// run(first, n) for the places of a chunk, in tiles of n.
template <class Run>
void each_tile(const Chunk& chunk, int64_t channels, Run run) {
  const int64_t max_places = std::max<int64_t>(8, std::min(PLACES, NUMBERS / channels));
  for (int64_t done = 0; done < chunk.places; done += max_places)
    run(chunk.place + done, std::min(max_places, chunk.places - done));
}

// put(i, sum of body(place, i, V{}) over the places) for all channels i, numbers or vectors of them.
template <class T, class Body, class Put>
void each_column(int64_t channels, int64_t places, Body body, Put put) {
  constexpr int64_t W = WIDTH<T>;
  int64_t i = 0;
  for (; i + 4 * W <= channels; i += 4 * W) {
    decltype(body(0, 0, vec_t<T>{})) parts[4] = {};
    for (int64_t place = 0; place < places; ++place)
      for (int k = 0; k < 4; ++k) parts[k] += body(place, i + k * W, vec_t<T>{});
    for (int k = 0; k < 4; ++k) put(i + k * W, parts[k]);
  }
  for (; i + W <= channels; i += W) {
    decltype(body(0, 0, vec_t<T>{})) part = {};
    for (int64_t place = 0; place < places; ++place) part += body(place, i, vec_t<T>{});
    put(i, part);
  }
  for (; i < channels; ++i) {
    decltype(body(0, 0, acc_t<T>{})) part = {};
    for (int64_t place = 0; place < places; ++place) part += body(place, i, acc_t<T>{});
    put(i, part);
  }
}

template <class T>
void moments_channels_last(const Segments<T>& all, acc_t<T>* mean, acc_t<T>* var) {
  const int64_t channels = all.channels;
  const auto found = chunks(all);
  std::vector<double> centers(found.size() * channels), squares(found.size() * channels);
  parallel(found.size(), all.elements(), all.threads, [&](int64_t begin, int64_t end) {
    std::vector<acc_t<T>> pivots(channels), rests(channels), rest_squares(channels);  // of a tile
    acc_t<T>*p = pivots.data(), *r = rests.data(), *s = rest_squares.data();
    for (int64_t k = begin; k < end; ++k) {
      double *center = &centers[k * channels], *own = &squares[k * channels], done = 0;
      each_tile(found[k], channels, [&](int64_t first, int64_t n) {
        const T* x = all.x + first * channels;
        if (done)
          std::copy(center, center + channels, p);
        else
          each_column<T>(
              channels, n,
              [=](int64_t place, int64_t i, auto v) { return load_ahead<decltype(v)>(x + place * channels + i); },
              [=](int64_t i, auto sum) { store(p + i, sum / acc_t<T>(n)); });
        each_column<T>(
            channels, n,
            [=](int64_t place, int64_t i, auto v) {
              using V = decltype(v);
              const V delta = load_ahead<V>(x + place * channels + i) - load<V>(p + i);
              return Pair<V>{delta, delta * delta};
            },
            [=](int64_t i, const auto& sums) {
              store(r + i, sums.first);
              store(s + i, sums.second);
            });
        for (int64_t i = 0; i < channels; ++i) {
          const acc_t<T> pivot = std::isfinite(r[i]) ? p[i] : p[i] + r[i];  // infinite or NaN, as the tile is
          merge(pivot, r[i], s[i], n, done, center[i], own[i]);
        }
        done += n;
      });
    }
  });
  std::vector<double> done(all.segments);
  std::vector<double> merged(all.segments * channels), merged_squares(all.segments * channels);
  for (size_t k = 0; k < found.size(); ++k) {
    const int64_t segment = found[k].segment;
    for (int64_t i = 0; i < channels; ++i)
      merge(centers[k * channels + i], 0, squares[k * channels + i], found[k].places, done[segment],
            merged[segment * channels + i], merged_squares[segment * channels + i]);
    done[segment] += found[k].places;
  }
  for (int64_t i = 0; i < all.segments * channels; ++i) {
    mean[all.row(0) + i] = merged[i];
    var[all.row(0) + i] = merged_squares[i] / std::max<double>(all.count(), 1);
  }
}

template <class T>
void sums_channels_last(const Segments<T>& all, Values center, acc_t<T>* total, acc_t<T>* products) {
  const int64_t channels = all.channels;
  const auto found = chunks(all);
  std::vector<double> totals(found.size() * channels), all_products(found.size() * channels);
  parallel(found.size(), all.elements(), all.threads, [&](int64_t begin, int64_t end) {
    std::vector<acc_t<T>> tile_total(channels), tile_products(channels);
    acc_t<T>*t = tile_total.data(), *p = tile_products.data();
    for (int64_t k = begin; k < end; ++k) {
      const acc_t<T>* c = all.values(center, found[k].segment);
      each_tile(found[k], channels, [&](int64_t first, int64_t n) {
        const T *grad = all.grad + first * channels, *x = all.x + first * channels;
        each_column<T>(
            channels, n,
            [=](int64_t place, int64_t i, auto v) {
              using V = decltype(v);
              const V value = load_ahead<V>(grad + place * channels + i);
              return Pair<V>{value, value * (load_ahead<V>(x + place * channels + i) - load<V>(c + i))};
            },
            [=](int64_t i, const auto& sums) {
              store(t + i, sums.first);
              store(p + i, sums.second);
            });
        for (int64_t i = 0; i < channels; ++i) {
          totals[k * channels + i] += t[i];
          all_products[k * channels + i] += p[i];
        }
      });
    }
  });
  std::vector<double> sum_grad(all.segments * channels), sum_products(all.segments * channels);
  for (size_t k = 0; k < found.size(); ++k)
    for (int64_t i = 0; i < channels; ++i) {
      sum_grad[found[k].segment * channels + i] += totals[k * channels + i];
      sum_products[found[k].segment * channels + i] += all_products[k * channels + i];
    }
  std::copy(sum_grad.begin(), sum_grad.end(), total + all.row(0));
  std::copy(sum_products.begin(), sum_products.end(), products + all.row(0));
}

// run(segment, at) for all places of all segments; `at` is where the place begins.
template <class T, class Run>
void each_place(const Segments<T>& all, Run run) {
  const int64_t places = all.count();
  parallel(all.segments * places, all.elements(), all.threads, [&](int64_t begin, int64_t end) {
    int64_t segment = places ? begin / places : 0, left = (segment + 1) * places - begin;
    for (int64_t place = begin; place < end; ++place, --left) {
      if (!left) {
        ++segment;
        left = places;
      }
      run(segment, place * all.channels);
    }
  });
}

template <class T>
void affine_channels_last(const Segments<T>& all, Values scale, Values center, Values shift) {
  each_place(all, [&](int64_t segment, int64_t at) {
    const acc_t<T> *a = all.values(scale, segment), *b = all.values(shift, segment), *c = all.values(center, segment);
    const T* x = all.x + at;
    T* y = all.out + at;
    each<T>(all.channels, [=](int64_t i, auto v) {
      using V = decltype(v);
      store_ahead(y + i, load<V>(a + i) * (load_ahead<V>(x + i) - load<V>(c + i)) + load<V>(b + i));
    });
  });
}

template <class T>
void gradient_channels_last(const Segments<T>& all, Values scale, Values center, Values slope, Values offset) {
  each_place(all, [&](int64_t segment, int64_t at) {
    const acc_t<T> *a = all.values(scale, segment), *b = all.values(slope, segment), *c = all.values(center, segment);
    const acc_t<T>* d = all.values(offset, segment);
    const T *grad = all.grad + at, *x = all.x + at;
    T* out = all.out + at;
    each<T>(all.channels, [=](int64_t i, auto v) {
      using V = decltype(v);
      const V rest = load<V>(b + i) * (load_ahead<V>(x + i) - load<V>(c + i)) + load<V>(d + i);
      store_ahead(out + i, load<V>(a + i) * load_ahead<V>(grad + i) + rest);
    });
  });
}

}  // namespace domainnorm
