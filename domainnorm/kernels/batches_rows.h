// Whole normalization batches where the places of a channel lie side by side. One is finished while it is in a cache, so
// that memory is gone through once each way.

#pragma once

#include "batches.h"

namespace domainnorm {

constexpr int64_t SHORT = 256;       // numbers of a row that ends before the processor fetches what follows unasked

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

// Of one channel of the samples of a group: the mean and the squares of what lies beyond it.
template <class T>
void moments(const Work<T>& work, int64_t group, int64_t channel, std::vector<Piece<T>>& tile, double& centre,
               double& squares) {
  double done = 0;
  each_tile(work.first(group), work.first(group + 1), channel, tile, [&](const auto& pieces, int64_t n) {
    Sum<T, Many<T>> all;
    for (const auto& piece : pieces)
      all.add(piece.length, [x = piece.x](int64_t i, auto v) { return load_ahead<decltype(v)>(x + i); });
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
}

template <class T>
void normalize_rows(const Work<T>& work, Tables tables, Towards towards) {
  const int64_t channels = work.channels, width = work.batches.width, sets = channels / width;
  Twos of = work.of_groups();
  One<T>*batch_mean = (One<T>*)tables.batches, *batch_var = batch_mean + work.sets();
  parallel(work.sets(), work.places * channels, work.threads, [=, &work, &of](int64_t begin, int64_t end) {
    std::vector<Piece<T>> tile;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / sets, first = task % sets * width;
      const double places = of.places[group];
      double all_centre = 0, all_squares = 0;
      for (int64_t channel = first; channel < first + width; ++channel) {
        double &centre = of.first[group * channels + channel], &squares = of.second[group * channels + channel];
        moments(work, group, channel, tile, centre, squares);
        if (places) merge(centre, 0, squares, places, places * (channel - first), all_centre, all_squares);
      }
      batch_mean[task] = all_centre;
      batch_var[task] = all_squares / std::max(places * width, 1.);
      if (!tables.write) continue;
      if (work.r) work.correct(towards, group, first, all_centre, batch_var[task]);
      const One<T> c = batch_mean[task], scale = work.inverse(batch_var[task]);
      for (const auto* sample = work.first(group); sample < work.first(group + 1); ++sample)
        for (int64_t channel = first; channel < first + width; ++channel) {
          const One<T> a = work.gamma(*sample, channel) * scale, b = work.beta(*sample, channel);
          const T* from = sample->x + channel * sample->length;
          T* to = sample->out + channel * sample->length;
          each<T>(sample->length, [=](int64_t i, auto v) { store_ahead(to + i, a * (load<decltype(v)>(from + i) - c) + b); });
        }
    }
  });
  count(of, work.batches, (One<T>*)tables.counted);
}

template <class T>
void gradient_rows(const Work<T>& work, Tables tables, const AffineGradient<One<T>>& to_affine) {
  const int64_t channels = work.channels, width = work.batches.width, sets = channels / width;
  const One<T>*mean = (const One<T>*)tables.batches, *var = mean + work.sets();
  parallel(work.sets(), work.places * channels, work.threads, [=, &work, &to_affine](int64_t begin, int64_t end) {
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
                const V of_grad = load_ahead<V>(g + i);
                return Pair<V>{of_grad, of_grad * (load_ahead<V>(x + i) - c)};
              });
            const auto of = both.value();
            sum_grad += of.first;
            sum_products += of.second;
            count += n;
          });
          const int64_t row = work.unit(*sample) * channels + channel;
          to_affine.weight[row] = work.to_gamma(*sample, channel, sum_products * inverse, sum_grad);
          to_affine.bias[row] = sum_grad;
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
            store_ahead(to + i, a * load<V>(g + i) + (b * (load<V>(from + i) - c) + d));
          });
        }
    }
  });
}

}  // namespace domainnorm
