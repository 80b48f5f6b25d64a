// The two passes of `eager.py` over fp32 or bf16 logits on a CPU; `native.py` builds and calls them.
//
//   stats     m_z, s_z, m_w, s_w, A, B, z_y, w_y of each counted row: an online softmax, each shard read once
//   gradient  e (a (d - k) + b) - c onehot(y) of every row: each shard read once, the output written once
//
// A thread takes rows, and sums a row in chunks that stay in the first-level cache between their maxima and their sums.
// The loops are plain C++ that compilers turn into vectors of any width: no intrinsics, no headers of torch, built in
// about a second. Sums are fp32 within a chunk and float64 across; the gradient is rounded once, into the logits' type.
//
// d is (z - c_z) - (w - c_w), with c as `eager._difference` chooses it, for the maxima so far: see `triton_kernels.py`.
// Comparisons are written so that a NaN passes through; nothing where e is 0, whatever it multiplies.
// Not here: shapes, strides other than those of rows, other types, other divergences.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t CHUNK = 2048;  // columns, read twice: 16 KB of fp32 from both shards, half of a first-level cache
constexpr float LOWEST = std::numeric_limits<float>::lowest(), FAR = 1e20f;  // as in `eager.py`, as the next two
constexpr float STEPS = 1024, MOST_SHIFT = 1 << 20;
constexpr int NUM_STATS = 8, NUM_COEFFICIENTS = 6;

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

// One row's statistics so far, A about the origin and without the student's scale.
template <typename T, bool TEACHER>
struct Row {
  float m_z = LOWEST, m_w = LOWEST;
  double s_z = 0, s_w = 0, a = 0, b = 0;

  void add(const T* z, const T* w, int64_t count, const Scales& scales) {
    raise(z, w, count, scales);
    const auto [student_scale, teacher_scale, ratio, floor] = scales;
    const float m_z = this->m_z, m_w = this->m_w;
    const auto [c_z, c_w] = Origin(m_z, m_w, ratio);
    const float to_z = student_scale * LOG2_E, to_w = teacher_scale * LOG2_E;
    float sum_z = 0, sum_w = 0, sum_a = 0, sum_b = 0;
#pragma omp simd reduction(+ : sum_z, sum_w, sum_a, sum_b)
    for (int64_t j = 0; j < count; j++) {
      const float z_j = z[j], t = bounded((z_j - m_z) * to_z), e = power_of_two(t);
      sum_z += e;
      sum_b += e * t;  // e is 0 where t is not the true one
      if constexpr (TEACHER) {
        const float w_j = w[j] < floor ? floor : static_cast<float>(w[j]);
        sum_w += power_of_two(bounded((w_j - m_w) * to_w));
        sum_a += e == 0 ? 0 : e * ((z_j - c_z) - (w_j - c_w) * ratio);
      }
    }
    s_z += sum_z, s_w += sum_w, a += sum_a, b += sum_b * LOG_2;
  }

  // The maxima with these columns; what is summed already moves to the new ones.
  void raise(const T* z, const T* w, int64_t count, const Scales& scales) {
    float top_z = m_z, top_w = m_w;
#pragma omp simd reduction(max : top_z, top_w)
    for (int64_t j = 0; j < count; j++) {
      top_z = z[j] > top_z ? static_cast<float>(z[j]) : top_z;
      if constexpr (TEACHER) top_w = w[j] > top_w ? static_cast<float>(w[j]) : top_w;
    }
    if (TEACHER && top_w < scales.floor) top_w = scales.floor;
    if (top_z == m_z && top_w == m_w) return;
    const Origin before(m_z, m_w, scales.ratio), after(top_z, top_w, scales.ratio);
    const float down = (m_z - top_z) * scales.student, factor = exponential(down);
    if (factor == 0 || s_z == 0) {  // mass that underflows adds nothing, even where its moment is infinite
      s_z = a = b = 0;
    } else {
      a = factor * (a + after.difference(before.c_z, before.c_w, scales.ratio) * s_z);
      b = factor * (b + down * s_z);
      s_z *= factor;
    }
    s_w *= exponential((m_w - top_w) * scales.teacher);
    m_z = top_z, m_w = top_w;
  }
};

// The logits of one row, and what it means there.
struct Place {
  const void *student, *teacher;
  int64_t own, width;  // column of the target, which may lie elsewhere; columns below the vocabulary's end
};

template <typename T, bool TEACHER>
void stats_of_row(const Place& row, const Scales& scales, float* out) {
  const T *z = static_cast<const T*>(row.student), *w = static_cast<const T*>(row.teacher);
  Row<T, TEACHER> sums;
  for (int64_t start = 0; start < row.width; start += CHUNK)
    sums.add(z + start, TEACHER ? w + start : nullptr, std::min(CHUNK, row.width - start), scales);
  const bool here = row.own >= 0 && row.own < row.width;
  // A maximum ignores NaN, the sums do not.
  out[0] = std::isnan(sums.s_z) ? float(sums.s_z) : sums.m_z;
  out[1] = sums.s_z;
  out[5] = sums.b;
  out[6] = here ? float(z[row.own]) : 0;
  out[2] = out[3] = out[4] = out[7] = 0;
  if constexpr (TEACHER) {
    const double rest = Origin(sums.m_z, sums.m_w, scales.ratio).difference(sums.m_z, sums.m_w, scales.ratio);
    out[2] = std::isnan(sums.s_w) ? float(sums.s_w) : sums.m_w;
    out[3] = sums.s_w;
    out[4] = sums.s_z == 0 ? 0 : (sums.a - rest * sums.s_z) * scales.student;
    out[7] = here ? std::max(float(w[row.own]), scales.floor) : 0;
  }
}

template <typename T, bool TEACHER>
void gradient_of_row(const Place& row, const Scales& scales, const float* coefficients, void* to) {
  const T *student = static_cast<const T*>(row.student), *teacher = static_cast<const T*>(row.teacher);
  T* out = static_cast<T*>(to);
  const float m_z = coefficients[0], m_w = coefficients[1], k = coefficients[2];
  const float a = coefficients[3], b = coefficients[4], c = coefficients[5];
  const auto [scale, teacher_scale, ratio, floor] = scales;
  const Origin origin(m_z, m_w, ratio);
  const auto [c_z, c_w] = origin;
  const float base = origin.difference(m_z, m_w, ratio) * scale + k, to_z = scale * LOG2_E;
  const auto at = [=](float z, float w) {
    float slope = b;
    if constexpr (TEACHER) {
      w = w < floor ? floor : w;
      float d = z - c_z;
      d = d < -FAR ? -FAR : d;  // -inf less -inf would be NaN
      d = (d - (w - c_w) * ratio) * scale;
      d = d < -FAR ? -FAR : d;
      d = d > FAR ? FAR : d;
      slope += a * (d - base);
    }
    return power_of_two(bounded((z - m_z) * to_z)) * slope;
  };
  const bool here = row.own >= 0 && row.own < row.width;
  // First, because the row may be overwritten: c off before the single rounding.
  const float at_target = here ? at(student[row.own], TEACHER ? float(teacher[row.own]) : 0) - c : 0;
#pragma omp simd
  for (int64_t j = 0; j < row.width; j++) out[j] = at(student[j], TEACHER ? float(teacher[j]) : 0);
  if (here) out[row.own] = at_target;
}

// Asks for large pages of memory that is about to be written: mapping a new gradient by pages of 4 KB takes longer than
// computing it. Where they are refused, or are what every process gets, nothing changes.
void ask_for_large_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t size = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + size - 1) / size * size;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / size * size;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// body(first, last) on each of `threads` shares of n rows. Threads of its own: whichever OpenMP torch has loaded, a
// second one would keep a second set of threads spinning beside it.
template <typename Body>
void share_rows(int64_t n, int64_t threads, Body body) {
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; t++) others.emplace_back(body, n * t / threads, n * (t + 1) / threads);
  body(0, n / threads);
  for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

// [rows, v/tp] of fp32 or, with `bytes` 2, of bf16; `stride` bytes from row to row. No data: no teacher.
struct Logits {
  char* data;
  int64_t stride, bytes;

  char* row(int64_t i) const { return data ? data + i * stride : nullptr; }
};

// stats [n, 8] of the counted rows; rows [n] of the logits, none: all of them, in order. target [n] are global ids.
void stats(const Logits* student, const Logits* teacher, const int64_t* target, const int64_t* rows, int64_t n,
           int64_t first, int64_t width, const Scales* scales, float* out, int64_t threads) {
  const auto of_row = student->bytes == 2 ? teacher->data ? stats_of_row<BFloat16, true> : stats_of_row<BFloat16, false>
                      : teacher->data     ? stats_of_row<float, true>
                                          : stats_of_row<float, false>;
  share_rows(n, threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = rows ? rows[i] : i;
      of_row({student->row(row), teacher->row(row), target[i] - first, width}, *scales, out + i * NUM_STATS);
    }
  });
}

// out [num_rows, columns], which may be the student; position [num_rows]: which counted row each is, -1 for none, or
// none: all of them, in order. coefficients [n, 6]: m_z, m_w, k, a, b, c.
void gradient(const Logits* student, const Logits* teacher, const Logits* out, const int64_t* target,
              const int64_t* position, int64_t num_rows, int64_t columns, int64_t first, int64_t width,
              const Scales* scales, const float* coefficients, int64_t threads) {
  const int64_t bytes = student->bytes;
  const auto of_row = bytes == 2      ? teacher->data ? gradient_of_row<BFloat16, true> : gradient_of_row<BFloat16, false>
                      : teacher->data ? gradient_of_row<float, true>
                                      : gradient_of_row<float, false>;
  if (out->data != student->data) ask_for_large_pages(out->data, (num_rows - 1) * out->stride + columns * bytes);
  share_rows(num_rows, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t i = position ? position[row] : row, written = i < 0 ? 0 : width;
      if (written > 0)
        of_row({student->row(row), teacher->row(row), target[i] - first, width}, *scales,
               coefficients + i * NUM_COEFFICIENTS, out->row(row));
      std::memset(out->row(row) + written * bytes, 0, (columns - written) * bytes);
    }
  });
}
}
