// Moments of the rows of a tensor, affines of them, and their gradients, on a CPU.
//
// A tensor is `samples` x `channels` x `length` numbers. A row lies in one piece, or with `last` the channels of each
// place lie side by side. Numbers of rows are (samples, channels) in any case, of one tensor after the other.

#pragma once

#include "vectors.h"

namespace domainnorm {

struct Size {
  int64_t samples, channels, length, threads;
  int64_t rows() const { return samples * channels; }
  int64_t elements() const { return rows() * length; }
  template <class T>
  One<T> of(Numbers numbers, int64_t row) const {
    return ((const One<T>*)numbers.at)[row / channels * numbers.step + row % channels];
  }
};


// Rows that lie in one piece.

// Short rows are taken together while they stay in a cache: what follows the numbers of a row then waits for no other.
constexpr int64_t TOGETHER = 64;

template <class T>
void row_moments(const T* x, One<T>* mean, One<T>* var, Size size) {
  const int64_t length = size.length, most = std::clamp<int64_t>(TILE / std::max<int64_t>(length, 1), 1, TOGETHER);
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    One<T> own[TOGETHER];
    double rest[TOGETHER], squares_of[TOGETHER];  // of a tile
    for (int64_t first = begin; first < end; first += most) {
      const int64_t rows = std::min(most, end - first);
      double centre[TOGETHER] = {}, squares[TOGETHER] = {};  // of the tiles so far, merged as Moments.merge does
      for (int64_t done = 0; done < length; done += TILE) {
        const int64_t n = std::min(TILE, length - done);
        const T* tile = x + first * length + done;
        for (int64_t row = 0; row < rows; ++row)
          own[row] = sum<T>(n, [at = tile + row * length](int64_t i, auto v) { return load_ahead<decltype(v)>(at + i); });
        for (int64_t row = 0; row < rows; ++row) own[row] /= n;
        for (int64_t row = 0; row < rows; ++row) {
          const auto of = sum<T>(n, [at = tile + row * length, c = own[row]](int64_t i, auto v) {
            auto beyond = load<decltype(v)>(at + i) - c;
            return Pair<decltype(v)>{beyond, beyond * beyond};
          });
          rest[row] = of.first;
          squares_of[row] = of.second;
        }
        for (int64_t row = 0; row < rows; ++row)
          merge(own[row], rest[row], squares_of[row], n, done, centre[row], squares[row]);
      }
      for (int64_t row = 0; row < rows; ++row) {
        mean[first + row] = centre[row];
        var[first + row] = squares[row] / std::max<int64_t>(length, 1);
      }
    }
  });
}

template <class T>
void row_affine(const T* x, T* y, Numbers scale, Numbers centre, Numbers shift, Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const One<T> a = size.of<T>(scale, row), b = size.of<T>(shift, row), c = size.of<T>(centre, row);
      const T* from = x + row * size.length;
      T* to = y + row * size.length;
      each<T>(size.length, [=](int64_t i, auto v) { store_ahead(to + i, a * (load<decltype(v)>(from + i) - c) + b); });
    }
  });
}

template <class T>
void row_sums(const T* grad, const T* x, Numbers centre, One<T>* total, One<T>* products, Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const One<T> c = size.of<T>(centre, row);
      double sum_grad = 0, sum_products = 0;
      for (int64_t done = 0; done < size.length; done += TILE) {
        const int64_t n = std::min(TILE, size.length - done), first = row * size.length + done;
        const T *g = grad + first, *of = x + first;
        const auto both = sum<T>(n, [=](int64_t i, auto v) {
          using V = decltype(v);
          const V of_grad = load_ahead<V>(g + i);
          return Pair<V>{of_grad, of_grad * (load_ahead<V>(of + i) - c)};
        });
        sum_grad += both.first;
        sum_products += both.second;
      }
      total[row] = sum_grad;
      products[row] = sum_products;
    }
  });
}

template <class T>
void row_gradient(const T* grad, const T* x, T* out, Numbers scale, Numbers centre, Numbers to_mean, Numbers to_var,
                  Size size) {
  parallel(size.rows(), size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const One<T> a = size.of<T>(scale, row), b = 2 * size.of<T>(to_var, row) / size.length;
      const One<T> c = size.of<T>(centre, row), d = size.of<T>(to_mean, row) / size.length;
      const T *g = grad + row * size.length, *from = x + row * size.length;
      T* to = out + row * size.length;
      each<T>(size.length, [=](int64_t i, auto v) {
        using V = decltype(v);
        store_ahead(to + i, a * load<V>(g + i) + (b * (load<V>(from + i) - c) + d));
      });
    }
  });
}

// Channels side by side: places are taken together while they stay in a cache.

// run(sample, first, channels, tile) for each sample and its channels from one multiple of 64 to another, so that few
// samples have work for all threads; `tile` places of them stay in a cache.
template <class Run>
void each_block(Size size, Run run) {
  const int64_t blocks = size.samples >= size.threads ? 1 : (size.channels + 63) / 64;
  const int64_t width = blocks == 1 ? size.channels : 64;
  parallel(size.samples * blocks, size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * width, channels = std::min(width, size.channels - first);
      run(task / blocks, first, channels, std::max<int64_t>(8, TILE / channels));
    }
  });
}

template <class T>
void last_moments(const T* x, One<T>* mean, One<T>* var, Size size) {
  if (size.length == 1) {
    each<T>(size.rows(), [=](int64_t i, auto v) { store(mean + i, load<decltype(v)>(x + i)); });
    std::fill(var, var + size.rows(), 0);
    return;
  }
  each_block(size, [=](int64_t sample, int64_t first, int64_t channels, int64_t tile) {
    std::vector<One<T>> own(channels), rest(channels), of(channels);  // of a tile
    std::vector<double> centres(channels), squares(channels);
    One<T>*o = own.data(), *r = rest.data(), *s = of.data();
    for (int64_t done = 0; done < size.length; done += tile) {
      const int64_t n = std::min(tile, size.length - done);
      const T* from = x + (sample * size.length + done) * size.channels + first;
      std::fill(own.begin(), own.end(), 0);
      std::fill(rest.begin(), rest.end(), 0);
      std::fill(of.begin(), of.end(), 0);
      for (int64_t place = 0; place < n; ++place) {
        const T* at = from + place * size.channels;
        each<T>(channels, [=](int64_t i, auto v) {
          using V = decltype(v);
          store(o + i, load<V>(o + i) + load<V>(at + i));
        });
      }
      each<T>(channels, [=](int64_t i, auto v) { store(o + i, load<decltype(v)>(o + i) / One<T>(n)); });
      for (int64_t place = 0; place < n; ++place) {
        const T* at = from + place * size.channels;
        each<T>(channels, [=](int64_t i, auto v) {
          using V = decltype(v);
          V beyond = load<V>(at + i) - load<V>(o + i);
          store(r + i, load<V>(r + i) + beyond);
          store(s + i, load<V>(s + i) + beyond * beyond);
        });
      }
      for (int64_t i = 0; i < channels; ++i) merge(own[i], rest[i], of[i], n, done, centres[i], squares[i]);
    }
    const int64_t row = sample * size.channels + first;
    for (int64_t i = 0; i < channels; ++i) {
      mean[row + i] = centres[i];
      var[row + i] = squares[i] / std::max<int64_t>(size.length, 1);
    }
  });
}

template <class T>
void last_sums(const T* grad, const T* x, Numbers centre, One<T>* total, One<T>* products, Size size) {
  each_block(size, [=](int64_t sample, int64_t first, int64_t channels, int64_t tile) {
    std::vector<One<T>> own(channels), of(channels);  // sums of a tile
    std::vector<double> sums(channels), sums_of_products(channels);
    One<T>*o = own.data(), *s = of.data();
    const One<T>* c = of_sample<T>(centre, sample) + first;
    for (int64_t done = 0; done < size.length; done += tile) {
      const int64_t n = std::min(tile, size.length - done);
      const int64_t start = (sample * size.length + done) * size.channels + first;
      std::fill(own.begin(), own.end(), 0);
      std::fill(of.begin(), of.end(), 0);
      for (int64_t place = 0; place < n; ++place) {
        const T *g = grad + start + place * size.channels, *at = x + start + place * size.channels;
        each<T>(channels, [=](int64_t i, auto v) {
          using V = decltype(v);
          const V of_grad = load<V>(g + i);
          store(o + i, load<V>(o + i) + of_grad);
          store(s + i, load<V>(s + i) + of_grad * (load<V>(at + i) - load<V>(c + i)));
        });
      }
      for (int64_t i = 0; i < channels; ++i) {
        sums[i] += own[i];
        sums_of_products[i] += of[i];
      }
    }
    const int64_t row = sample * size.channels + first;
    std::copy(sums.begin(), sums.end(), total + row);
    std::copy(sums_of_products.begin(), sums_of_products.end(), products + row);
  });
}

template <class T>
void last_affine(const T* x, T* y, Numbers scale, Numbers centre, Numbers shift, Size size) {
  parallel(size.samples * size.length, size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t n = place / size.length;
      const One<T> *a = of_sample<T>(scale, n), *b = of_sample<T>(shift, n), *c = of_sample<T>(centre, n);
      const T* from = x + place * size.channels;
      T* to = y + place * size.channels;
      each<T>(size.channels, [=](int64_t i, auto v) {
        using V = decltype(v);
        store_ahead(to + i, load<V>(a + i) * (load_ahead<V>(from + i) - load<V>(c + i)) + load<V>(b + i));
      });
    }
  });
}

template <class T>
void last_gradient(const T* grad, const T* x, T* out, Numbers scale, Numbers centre, Numbers to_mean, Numbers to_var,
                   Size size) {
  parallel(size.samples * size.length, size.elements(), size.threads, [=](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int64_t n = place / size.length;
      const One<T> *a = of_sample<T>(scale, n), *b = of_sample<T>(to_var, n), *c = of_sample<T>(centre, n);
      const One<T>*d = of_sample<T>(to_mean, n), share = One<T>(1) / size.length;
      const T *g = grad + place * size.channels, *from = x + place * size.channels;
      T* to = out + place * size.channels;
      each<T>(size.channels, [=](int64_t i, auto v) {
        using V = decltype(v);
        V rest = 2 * load<V>(b + i) * (load_ahead<V>(from + i) - load<V>(c + i)) + load<V>(d + i);
        store_ahead(to + i, load<V>(a + i) * load_ahead<V>(g + i) + share * rest);
      });
    }
  });
}

// Of all parts, whose rows follow each other.

// run(part, size, first) for all parts; `first` is the number of the samples before.
template <class Run>
void each_part(const Part* parts, int64_t number, int64_t channels, int64_t threads, Run run) {
  int64_t samples = 0;
  for (int64_t k = 0; k < number; samples += parts[k++].samples)
    run(parts[k], Size{parts[k].samples, channels, parts[k].length, threads}, samples);
}

template <class T>
Numbers from(Numbers numbers, int64_t sample) {
  return {of_sample<T>(numbers, sample), numbers.step};
}

template <class T>
void moments(const Part* parts, int64_t number, int64_t channels, int64_t threads, One<T>* mean, One<T>* var) {
  each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {
    (part.last ? last_moments<T> : row_moments<T>)((const T*)part.x, mean + first * channels, var + first * channels,
                                                   size);
  });
}

template <class T>
void affine(const Part* parts, int64_t number, int64_t channels, int64_t threads, Numbers scale, Numbers centre,
            Numbers shift) {
  each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {
    (part.last ? last_affine<T> : row_affine<T>)((const T*)part.x, (T*)part.out, from<T>(scale, first),
                                                 from<T>(centre, first), from<T>(shift, first), size);
  });
}

template <class T>
void sums(const Part* parts, int64_t number, int64_t channels, int64_t threads, One<T>* total, One<T>* products,
          Numbers centre) {
  each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {
    (part.last ? last_sums<T> : row_sums<T>)((const T*)part.grad, (const T*)part.x, from<T>(centre, first),
                                             total + first * channels, products + first * channels, size);
  });
}

template <class T>
void gradient(const Part* parts, int64_t number, int64_t channels, int64_t threads, Numbers scale, Numbers centre,
              Numbers to_mean, Numbers to_var) {
  each_part(parts, number, channels, threads, [=](const Part& part, Size size, int64_t first) {
    (part.last ? last_gradient<T> : row_gradient<T>)((const T*)part.grad, (const T*)part.x, (T*)part.out,
                                                     from<T>(scale, first), from<T>(centre, first),
                                                     from<T>(to_mean, first), from<T>(to_var, first), size);
  });
}

}  // namespace domainnorm
