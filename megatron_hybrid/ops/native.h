// What the passes over fp32 and bf16 logits on a CPU share: types, exp, origins, rows over threads. See `native.py`.
//
// A thread takes rows, and sums a row in chunks that stay in the first-level cache between two reads. The loops are plain
// C++ that compilers turn into vectors of any width: no intrinsics, no headers of torch, built in about a second. Sums
// are fp32 within a chunk and float64 across; gradients are rounded once, into the logits' type. Comparisons are
// written so that a NaN passes through.
// Not here: shapes, strides other than those of rows, other types.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t CHUNK = 2048;  // columns, read twice: 16 KB of fp32 from both shards, half of a first-level cache
constexpr float LOWEST = std::numeric_limits<float>::lowest(), FAR = 1e20f;  // as in `eager.py`, as the next two
constexpr float STEPS = 1024, MOST_SHIFT = 1 << 20;

struct BFloat16 {
  uint16_t bits;

  void operator=(float value) {  // not a constructor: compilers make no vectors of copies of a struct
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t rounded = wide + 0x7fff + ((wide >> 16) & 1);         // to nearest, ties to even
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>(rounded >> 16);  // a NaN must not become an infinity
  }

  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
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

// As GCC's code calls OpenMP, and every OpenMP can be called: task(data) on so many threads, this one among them.
using Parallel = void (*)(void (*task)(void*), void* data, unsigned num_threads, unsigned flags);

// body(first, last) on shares of n rows, which `threads` threads take in turn: those of the OpenMP that torch has loaded.
// They stay awake for milliseconds after torch's own operators, and threads of ours would share the cores with them: next
// to a product the passes took half as long again. More than one share for each, as another process may slow one down.
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
  if (threads == 1) return body(0, n);
  Work work{body, n, std::max<int64_t>(1, n / (threads * shares))};
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel) return parallel(Work::take, &work, threads, 0);
  std::vector<std::thread> others;  // a torch without OpenMP
  others.reserve(threads);
  try {
    while (--threads > 0) others.emplace_back(Work::take, &work);
  } catch (const std::system_error&) {  // the system starts no more of them: those there are take all shares
  }
  Work::take(&work);
  for (auto& other : others) other.join();
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
