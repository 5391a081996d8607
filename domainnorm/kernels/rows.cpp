// Row by row, what plain.py computes; called by compiled.py, which checks what comes in.

#include "rows.h"

using namespace domainnorm;

#define ROWS(NAME, T)                                                                                               \
  extern "C" void moments_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, void* mean,  \
                                 void* var) {                                                                       \
    moments<T>(parts, number, channels, threads, (One<T>*)mean, (One<T>*)var);                                      \
  }                                                                                                                 \
  extern "C" void affine_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,               \
                                Numbers scale, Numbers centre, Numbers shift) {                                     \
    affine<T>(parts, number, channels, threads, scale, centre, shift);                                              \
  }                                                                                                                 \
  extern "C" void sums_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads, void* total,    \
                              void* products, Numbers centre) {                                                     \
    sums<T>(parts, number, channels, threads, (One<T>*)total, (One<T>*)products, centre);                           \
  }                                                                                                                 \
  extern "C" void gradient_##NAME(const Part* parts, int64_t number, int64_t channels, int64_t threads,             \
                                  Numbers scale, Numbers centre, Numbers to_mean, Numbers to_var) {                 \
    gradient<T>(parts, number, channels, threads, scale, centre, to_mean, to_var);                                  \
  }

ROWS(float32, float)
ROWS(float64, double)
ROWS(bfloat16, bfloat16)

extern "C" void use_team(Team of_torch) { team = of_torch; }

// Of the files that this was built from.
extern "C" uint32_t source() { return SOURCE; }
