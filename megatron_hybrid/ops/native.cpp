// The two passes of `eager.py`; `native.py` builds and calls them.
//
//   stats     m_z, s_z, m_w, s_w, A, B, z_y, w_y of each counted row: an online softmax, each shard read once
//   gradient  e (a (d - k) + b) - c onehot(y) of every row: each shard read once, the output written once
//
// d is (z - c_z) - (w - c_w), with c as `eager._difference` chooses it, for the maxima so far: see `triton_kernels.py`.
// Nothing where e is 0, whatever it multiplies.
// Not here: other divergences, `native_mixtures.cpp`.

#include "native.h"

namespace {

constexpr int NUM_STATS = 8, NUM_COEFFICIENTS = 6;

struct Maxima {
  float z, w;
};

// top where x is NaN.
inline float larger(float x, float top) { return x > top ? x : top; }

// What a column adds to s_z, s_w, A and B.
struct Terms {
  float s_z, s_w, a, b;

  void operator+=(const Terms& other) { s_z += other.s_z, s_w += other.s_w, a += other.a, b += other.b; }
};

// One row's statistics so far, A about the origin and without the student's scale.
template <typename T, bool TEACHER>
struct Row {
  const Scales scales;
  Maxima m{LOWEST, LOWEST};
  double s_z = 0, s_w = 0, a = 0, b = 0;

  explicit Row(const Scales& scales) : scales(scales) {}

  // Of these columns and all before them.
  Maxima maxima(const T* z, const T* w, int64_t count) const {
    float top_z = m.z, top_w = m.w;
#pragma omp simd reduction(max : top_z, top_w)
    for (int64_t j = 0; j < count; j++) {
      top_z = larger(z[j], top_z);
      if constexpr (TEACHER) top_w = larger(w[j], top_w);
    }
    return {top_z, top_w};
  }

  // Sums columns whose maxima are known; returns those of as many others, which memory brings meanwhile.
  Maxima add(const T* z, const T* w, const T* next_z, const T* next_w, int64_t count) {
    const float m_z = m.z, m_w = m.w, ratio = scales.ratio, floor = scales.floor;
    const float to_z = scales.student * LOG2_E, to_w = scales.teacher * LOG2_E;
    const Origin origin(m_z, m_w, ratio);
    const auto of = [=](float z, float w) {
      const float t = bounded((z - m_z) * to_z), e = power_of_two(t);
      Terms terms{e, 0, 0, e * t};  // e is 0 where t is not the true one
      if constexpr (TEACHER) {
        w = w < floor ? floor : w;
        terms.s_w = power_of_two(bounded((w - m_w) * to_w));
        terms.a = e == 0 ? 0 : e * ((z - origin.c_z) - (w - origin.c_w) * ratio);
      }
      return terms;
    };
    float sum_z = 0, sum_w = 0, sum_a = 0, sum_b = 0, top_z = m_z, top_w = m_w;
#pragma omp simd reduction(+ : sum_z, sum_w, sum_a, sum_b) reduction(max : top_z, top_w)
    for (int64_t j = 0; j < count / LANES<T>; j++) {
      const int64_t i = j * LANES<T>;
      const auto z_j = Word<T>::at(z + i), w_j = TEACHER ? Word<T>::at(w + i) : Word<T>();
      const auto next_z_j = Word<T>::at(next_z + i), next_w_j = TEACHER ? Word<T>::at(next_w + i) : Word<T>();
      Terms terms = of(z_j.low(), w_j.low());
      top_z = larger(next_z_j.low(), top_z);
      if constexpr (TEACHER) top_w = larger(next_w_j.low(), top_w);
      if constexpr (LANES<T> == 2) {
        terms += of(z_j.high(), w_j.high());
        top_z = larger(next_z_j.high(), top_z);
        if constexpr (TEACHER) top_w = larger(next_w_j.high(), top_w);
      }
      sum_z += terms.s_z, sum_b += terms.b;
      if constexpr (TEACHER) sum_w += terms.s_w, sum_a += terms.a;
    }
    Terms sums{sum_z, sum_w, sum_a, sum_b};
    if (count % LANES<T>) {
      const int64_t last = count - 1;
      sums += of(z[last], TEACHER ? float(w[last]) : 0);
      top_z = larger(next_z[last], top_z);
      if constexpr (TEACHER) top_w = larger(next_w[last], top_w);
    }
    s_z += sums.s_z, s_w += sums.s_w, a += sums.a, b += sums.b * LOG_2;
    return {top_z, top_w};
  }

  // What is summed already moves to new maxima.
  void raise(Maxima top) {
    if (TEACHER && top.w < scales.floor) top.w = scales.floor;
    if (top.z == m.z && top.w == m.w) return;
    const Origin before(m.z, m.w, scales.ratio), after(top.z, top.w, scales.ratio);
    const float down = (m.z - top.z) * scales.student, factor = exponential(down);
    if (factor == 0 || s_z == 0) {  // mass that underflows adds nothing, even where its moment is infinite
      s_z = a = b = 0;
    } else {
      a = factor * (a + after.difference(before.c_z, before.c_w, scales.ratio) * s_z);
      b = factor * (b + down * s_z);
      s_z *= factor;
    }
    s_w *= exponential((m.w - top.w) * scales.teacher);
    m = top;
  }
};

template <typename T, bool TEACHER>
void stats_of_row(const Place& row, const Scales& scales, float* out) {
  const T *z = static_cast<const T*>(row.student), *w = static_cast<const T*>(row.teacher);
  Row<T, TEACHER> sums(scales);
  Maxima top = sums.maxima(z, w, std::min(CHUNK, row.width));
  for (int64_t start = 0; start < row.width; start += CHUNK) {
    const int64_t count = std::min(CHUNK, row.width - start);
    const int64_t next = std::min(start + CHUNK, row.width - count);  // not behind the row's end: maxima may repeat
    sums.raise(top);
    top = sums.add(z + start, TEACHER ? w + start : nullptr, z + next, TEACHER ? w + next : nullptr, count);
  }
  const bool here = row.own >= 0 && row.own < row.width;
  // A maximum ignores NaN, the sums do not.
  out[0] = std::isnan(sums.s_z) ? float(sums.s_z) : sums.m.z;
  out[1] = sums.s_z;
  out[5] = sums.b;
  out[6] = here ? float(z[row.own]) : 0;
  out[2] = out[3] = out[4] = out[7] = 0;
  if constexpr (TEACHER) {
    const double rest = Origin(sums.m.z, sums.m.w, scales.ratio).difference(sums.m.z, sums.m.w, scales.ratio);
    out[2] = std::isnan(sums.s_w) ? float(sums.s_w) : sums.m.w;
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
  const float scale = scales.student, ratio = scales.ratio, floor = scales.floor;
  const Origin origin(m_z, m_w, ratio);
  const float base = origin.difference(m_z, m_w, ratio) * scale + k, to_z = scale * LOG2_E;
  const auto at = [=](float z, float w) {
    float slope = b;
    if constexpr (TEACHER) {
      w = w < floor ? floor : w;
      float d = z - origin.c_z;
      d = d < -FAR ? -FAR : d;  // -inf less -inf would be NaN
      d = (d - (w - origin.c_w) * ratio) * scale;
      d = d < -FAR ? -FAR : d;
      d = d > FAR ? FAR : d;
      slope += a * (d - base);
    }
    return power_of_two(bounded((z - m_z) * to_z)) * slope;
  };
  const int64_t words = row.width / LANES<T>, last = row.width - 1;
  const bool here = row.own >= 0 && row.own < row.width;
  // First, because the row may be overwritten: c off before the single rounding.
  const float at_target = here ? at(student[row.own], TEACHER ? float(teacher[row.own]) : 0) - c : 0;
  const auto write = [at](const T* student, const T* teacher, T* out) {
    const auto z = Word<T>::at(student), w = TEACHER ? Word<T>::at(teacher) : Word<T>();
    if constexpr (LANES<T> == 1) {
      *out = at(z.low(), w.low());
    } else {
      const uint32_t both = rounded(at(z.low(), w.low())) >> 16 | (rounded(at(z.high(), w.high())) & HIGH);
      std::memcpy(out, &both, 4);
    }
  };
#pragma omp simd
  for (int64_t j = 0; j < words; j++) write(student + j * LANES<T>, teacher + j * LANES<T>, out + j * LANES<T>);
  if (row.width % LANES<T>) out[last] = at(student[last], TEACHER ? float(teacher[last]) : 0);
  if (here) out[row.own] = at_target;
}

}  // namespace

extern "C" {

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

// coefficients [n, 6]: m_z, m_w, k, a, b, c of each counted row.
void gradient(const Rows* rows, const Scales* scales, const float* coefficients, int64_t threads) {
  const bool teacher = rows->teacher->data;
  const auto of_row = rows->student->bytes == 2 ? teacher ? gradient_of_row<BFloat16, true> : gradient_of_row<BFloat16, false>
                      : teacher                 ? gradient_of_row<float, true>
                                                : gradient_of_row<float, false>;
  rows->write(threads, [=](const Place& row, int64_t i, void* out) {
    of_row(row, *scales, coefficients + i * NUM_COEFFICIENTS, out);
  });
}
}
