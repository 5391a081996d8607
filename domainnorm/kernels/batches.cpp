// Whole normalization batches: moments, merge and affine in one call, and all gradients in another; called by
// compiled_batches.py; library.py checks what comes in. The layers' own merge of rows is the reference.

#include "batches_last.h"
#include "batches_rows.h"

using namespace domainnorm;

#define BATCHES(NAME, T)                                                                                            \
  extern "C" void normalize_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,            \
                                   Batches batches, Numbers weight, Numbers bias, Tables tables, Towards towards) { \
    const Work<T> work(parts, number, channels, threads, batches, weight, bias, tables);                            \
    (parts->last ? normalize_last<T> : normalize_rows<T>)(work, tables, towards);                                   \
  }                                                                                                                 \
  extern "C" void normalize_gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,   \
                                            Batches batches, Numbers weight, Numbers bias, Tables tables,           \
                                            void* to_weight, void* to_bias) {                                       \
    const Work<T> work(parts, number, channels, threads, batches, weight, bias, tables);                            \
    const AffineGradient<One<T>> affine(work.each() ? work.samples.size() : batches.groups, channels, work.each(),  \
                                        to_weight, to_bias);                                                        \
    (parts->last ? gradient_last<T> : gradient_rows<T>)(work, tables, affine);                                      \
    affine.put();                                                                                                   \
  }

BATCHES(float32, float)
BATCHES(float64, double)
BATCHES(bfloat16, bfloat16)
