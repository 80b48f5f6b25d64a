// What the passes over fp32 and bf16 logits on a CPU share: types, exp, origins, rows over threads. See `native.py`.
//
// A thread takes rows, and sums a row in chunks that stay in the first-level cache between two reads. The loops are plain
// C++ that compilers turn into vectors of any width: no intrinsics, no headers of torch, built in some seconds. Sums are
// fp32 within a chunk and float64 across; gradients are rounded once, into the logits' type. Comparisons are written so
// that a NaN passes through.
// Not here: shapes, strides other than those of rows, other types.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t CHUNK = 2048;  // columns, read twice: 16 KB of fp32 from both shards, half of a first-level cache
constexpr float LOWEST = std::numeric_limits<float>::lowest(), FAR = 1e20f;  // as in `eager.py`, as the next two
constexpr float STEPS = 1024, MOST_SHIFT = 1 << 20;

inline float number_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

constexpr uint32_t HIGH = 0xffff0000;

// The bits of a number whose upper half is the nearest bf16, of two the even one.
inline uint32_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);  // a NaN must not become an infinity
}

struct BFloat16 {
  uint16_t bits;

  void operator=(float value) { bits = rounded(value) >> 16; }  // no constructor: compilers copy no structs by vectors

  operator float() const { return number_of(static_cast<uint32_t>(bits) << 16); }
};

// What the loops of the reverse KL take at once: a column of fp32, or two of bf16, halves that need no shuffles.
template <typename T>
constexpr int64_t LANES = 4 / sizeof(T);

template <typename T>
struct Word {
  uint32_t bits = 0;

  static Word at(const T* columns) {
    Word word;
    std::memcpy(&word.bits, columns, 4);
    return word;
  }

  float low() const { return number_of(LANES<T> == 1 ? bits : bits << 16); }
  float high() const { return number_of(bits & HIGH); }  // of bf16
};

// 2^t for t in [LEAST_POWER, 0], within 2e-7; exactly 1 at 0 and exactly 0 from -126.5 down.
constexpr float LEAST_POWER = -127, LOG2_E = 1.44269504f, LOG_2 = 0.693147181f;

inline float power_of_two(float t) {
  constexpr float shift = 12582912 + 127;  // its last bit is 1: a sum is rounded to the next integer, biased by 127
  const float shifted = t + shift, f = t - (shifted - shift);  // |f| <= 1/2
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, 4);
  float p = 0.00132647242f * f + 0.00967151324f;
  p = p * f + 0.0555073376f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  return power * (p * f + 1);
}

// t in the range of `power_of_two`; a NaN stays.
inline float bounded(float t) { return t < LEAST_POWER ? LEAST_POWER : t; }

inline float exponential(float x) { return power_of_two(bounded(x * LOG2_E)); }

// What is taken off z and w before their difference: `eager._difference`.
struct Origin {
  float c_z, c_w;

  Origin(float m_z, float m_w, float ratio) : c_z(m_z), c_w(m_w) {
    if (ratio != 1) return;
    const float shift = std::min(std::max(m_z - m_w, -MOST_SHIFT), MOST_SHIFT);
    const float step = std::nearbyint(shift * STEPS) / STEPS;
    const bool student_is_farther = std::abs(m_z) >= std::abs(m_w);
    c_z = student_is_farther ? step : 0;
    c_w = student_is_farther ? 0 : -step;
  }

  // d about (z, w), less d about this origin.
  double difference(float z, float w, float ratio) const { return (double(z) - c_z) - (double(w) - c_w) * ratio; }
};

struct Scales {
  float student, teacher, ratio, floor;  // 1 / temperature of each, the second over the first, the teacher's floor
};

// The logits of one row, and what it means there.
struct Place {
  const void *student, *teacher;
  int64_t own, width;  // column of the target, which may lie elsewhere; columns below the vocabulary's end
};

// How GCC's programs call OpenMP, which others offer as well: task(data) on so many threads, this one among them.
using Parallel = void (*)(void (*task)(void*), void* data, unsigned num_threads, unsigned flags);

// body(first, last) on shares of n rows, which `threads` threads take in turn: more shares than threads, because another
// process may slow one down. The threads are those of the OpenMP that torch has loaded (this one alone where it has none):
// they stay awake for milliseconds after torch's own work, and threads of ours would share the cores with them.
template <typename Body>
void share_rows(int64_t n, int64_t threads, const Body& body) {
  constexpr int64_t shares = 8;
  struct Work {
    const Body& body;
    int64_t n, step;
    std::atomic<int64_t> next{0};

    static void take(void* data) {
      Work& work = *static_cast<Work*>(data);
      for (int64_t begin; (begin = work.next.fetch_add(work.step)) < work.n;)
        work.body(begin, std::min(begin + work.step, work.n));
    }
  };
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads == 1 || !parallel) return body(0, n);
  Work work{body, n, std::max<int64_t>(1, n / (threads * shares))};
  parallel(Work::take, &work, threads, 0);
}

// [rows, v/tp] of fp32 or, with `bytes` 2, of bf16; `stride` bytes from row to row. No data: no teacher.
struct Logits {
  char* data;
  int64_t stride, bytes;

  char* row(int64_t i) const { return data ? data + i * stride : nullptr; }
};

// The rows of a gradient pass: out [num_rows, columns], which may be the student; position [num_rows]: which counted
// row each is, -1 for none, or none: all of them, in order. target [n] are global ids, `first` that of column 0.
struct Rows {
  const Logits *student, *teacher, *out;
  const int64_t* target;
  const int32_t* position;
  int64_t num_rows, columns, first, width;

  // of_row(place, i, out) writes the counted row i up to `width`; everything else becomes 0.
  template <typename OfRow>
  void write(int64_t threads, OfRow of_row) const {
    const int64_t bytes = student->bytes;
    share_rows(num_rows, threads, [this, bytes, of_row](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const int64_t i = position ? position[row] : row, written = i < 0 ? 0 : width;
        if (written > 0) of_row(Place{student->row(row), teacher->row(row), target[i] - first, width}, i, out->row(row));
        std::memset(out->row(row) + written * bytes, 0, (columns - written) * bytes);
      }
    });
  }
};

}  // namespace
