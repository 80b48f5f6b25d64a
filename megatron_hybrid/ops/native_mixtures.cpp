// The two passes of `mixtures.py`; `native_mixtures.py` calls them.
//
//   mixture_sums      D and E_p[g] of each counted row: each shard read once
//   mixture_gradient  a (p g - p E_p[g]) + c (p - onehot(y)) of every row: each shard read once, the output written once
//
// tanh and log are polynomials, as compilers know no vectors of theirs, and have all digits of a small u.
// Not here: what the letters mean, `divergence.py`.

#include "native.h"

namespace {

constexpr int NUM_SUMS = 2, NUM_NUMBERS = 5, NUM_COEFFICIENTS = 8;
constexpr float SMALLEST = std::numeric_limits<float>::min();  // as in `mixtures.py`
constexpr float INF = std::numeric_limits<float>::infinity();

// o, 1-o, t, s, t (1-o) - s o of `divergence.py`.
struct Mixture {
  float teacher_share, student_share, teacher_term, student_term, slope;
};

// What a loop leaves out: m is p where it does not mix, a term's weight may be 0, and of both terms the slope is.
template <bool Mixes, bool TeacherTerm, bool StudentTerm>
struct Kind {
  static constexpr bool MIXES = Mixes, TEACHER_TERM = TeacherTerm, STUDENT_TERM = StudentTerm;
  static constexpr bool SLOPE = !(TeacherTerm && StudentTerm);
};

// tanh(u/2) and e^-|u|, within 1e-7 of themselves; a NaN stays.
struct Distance {
  float h, e;

  explicit Distance(float u) {
    const float half = 0.5f * u, square = u * u, size = std::abs(u);
    // Chebyshev's fit of (tanh(u/2) - u/2) / (u/2)^3 on |u| <= 1, within 2e-9
    float series = -6.78418286e-06f * square + 8.38778166e-05f;
    series = series * square - 8.42715457e-04f;
    series = series * square + 8.33326712e-03f;
    series = series * square - 8.33333320e-02f;
    const float power = size * -LOG2_E;
    e = power_of_two(power < -100 ? -100 : power);  // its inverse has to be finite
    h = size >= 1 ? std::copysign((1 - e) / (1 + e), u) : half + half * square * series;
  }

  Distance(float h, float e) : h(h), e(e) {}

  Distance operator-() const { return {-h, e}; }

  // e^-u - 1
  float ratio_less_one() const {
    const bool near = std::abs(h) < 0.5f;  // beyond it 1 + h loses digits, and 1 - e does not
    const float above = near ? -2 * h : h > 0 ? e - 1 : 1 - e, below = near ? 1 + h : h > 0 ? 1 : e;
    return above / below;
  }
};

// log(m/p) = log(1 + x), x = o (e^-u - 1), o = other_share; with -u and the shares swapped, log(m/q).
//
// With 1 + x = 2^k f, f in [2^-1/2, 2^1/2): k log 2 + 2 atanh((f-1)/(f+1)), and x for f-1 where k is 0: all digits.
// A NaN stays.
inline float log_of_mixture(const Distance& distance, float other_share, float own_share) {
  constexpr int32_t root_of_half = 0x3f3504f3;  // its bits
  const float x = other_share * distance.ratio_less_one();
  const float y = std::max(1 + x, own_share);  // not 0 where the other share rounds to 1
  int32_t bits;
  std::memcpy(&bits, &y, 4);
  const int32_t k = (bits - root_of_half) >> 23, bits_of_f = bits - (k << 23);
  float f;
  std::memcpy(&f, &bits_of_f, 4);
  const float above = (k == 0) | (x != x) ? x : f - 1, s = above / (2 + above), square = s * s;
  float series = square * (1 / 9.f) + 1 / 7.f;  // |s| is at most 0.172: what it leaves out is 3e-9 of the whole
  series = series * square + 1 / 5.f;
  series = series * square + 1 / 3.f;
  return k * LOG_2 + 2 * (s + s * square * series);
}

struct Column {
  float p, q, u;  // u = log p - log q, finite: see `mixtures.columns`
};

// From logits to `Column`s of one row.
struct Reader {
  Scales scales;
  float m_z, m_w, of_s_z, of_s_w, c_z, c_w, base;

  // numbers: m_z, m_w, log(s_z/s_w), s_z, s_w of the whole vocabulary
  Reader(const Scales& scales, const float* numbers)
      : scales(scales), m_z(numbers[0]), m_w(numbers[1]), of_s_z(1 / numbers[3]), of_s_w(1 / numbers[4]) {
    const Origin origin(m_z, m_w, scales.ratio);
    c_z = origin.c_z, c_w = origin.c_w;
    base = origin.difference(m_z, m_w, scales.ratio) * scales.student + numbers[2];
  }

  Column operator()(float z, float w) const {
    w = w < scales.floor ? scales.floor : w;
    float d = z - c_z;
    d = d < -FAR ? -FAR : d;  // -inf less -inf would be NaN
    d = (d - (w - c_w) * scales.ratio) * scales.student;
    d = d < -FAR ? -FAR : d;
    d = d > FAR ? FAR : d;
    const float p = power_of_two(bounded((z - m_z) * (scales.student * LOG2_E))) * of_s_z;
    const float q = power_of_two(bounded((w - m_w) * (scales.teacher * LOG2_E))) * of_s_w;
    return {p, q, d - base};
  }
};

// p g, see `mixtures.weighted_slope`.
template <typename K>
inline float weighted_slope(float p, float q, const Distance& distance, const Mixture& mixture) {
  if constexpr (!K::MIXES) return (p + q) * distance.h;  // m is p
  float g = 0;
  if constexpr (K::SLOPE) {
    const float m = std::max(q * mixture.teacher_share + p * mixture.student_share, SMALLEST);  // 0 where p and q are
    g = (p + q) * distance.h / m * (mixture.slope * mixture.student_share);
  }
  if constexpr (K::STUDENT_TERM)
    g -= mixture.student_term * log_of_mixture(distance, mixture.teacher_share, mixture.student_share);
  return p * g;
}

template <typename T, typename K>
void sums_of_row(const Place& row, const Scales& scales, const Mixture& given, float forbidden, const float* numbers,
                 float* out) {
  const Reader read(scales, numbers);
  const Mixture mixture = given;
  double divergence = 0, mean_slope = 0;
  for (int64_t start = 0; start < row.width; start += CHUNK) {
    const T *z = static_cast<const T*>(row.student) + start, *w = static_cast<const T*>(row.teacher) + start;
    const int64_t count = std::min(CHUNK, row.width - start);
    float sum = 0, sum_of_slopes = 0;
#pragma omp simd reduction(+ : sum, sum_of_slopes)
    for (int64_t j = 0; j < count; j++) {
      const auto [p, q, u] = read(z[j], w[j]);
      const Distance distance(u);
      float terms = K::SLOPE ? (p + q) * distance.h * mixture.slope : 0;
      if constexpr (K::TEACHER_TERM) {
        float log_m_over_q = u <= forbidden && q > 0 ? -INF : u;
        if constexpr (K::MIXES) log_m_over_q = log_of_mixture(-distance, mixture.student_share, mixture.teacher_share);
        terms -= mixture.teacher_term * q * log_m_over_q;
      }
      if constexpr (K::STUDENT_TERM)
        terms -= mixture.student_term * p * log_of_mixture(distance, mixture.teacher_share, mixture.student_share);
      sum += terms;
      sum_of_slopes += weighted_slope<K>(p, q, distance, mixture);
    }
    divergence += sum, mean_slope += sum_of_slopes;
  }
  out[0] = divergence, out[1] = mean_slope;
}

template <typename T, typename K>
void gradient_of_row(const Place& row, const Scales& scales, const Mixture& given, const float* coefficients, void* to) {
  const T *student = static_cast<const T*>(row.student), *teacher = static_cast<const T*>(row.teacher);
  T* out = static_cast<T*>(to);
  const Reader read(scales, coefficients);
  const Mixture mixture = given;
  const float mean = coefficients[5], a = coefficients[6], c = coefficients[7];
  const auto at = [=](float z, float w) {
    const auto [p, q, u] = read(z, w);
    return (weighted_slope<K>(p, q, Distance(u), mixture) - p * mean) * a + p * c;
  };
  const bool here = row.own >= 0 && row.own < row.width;
  // First, because the row may be overwritten: c off before the single rounding.
  const float at_target = here ? at(student[row.own], teacher[row.own]) - c : 0;
#pragma omp simd
  for (int64_t j = 0; j < row.width; j++) out[j] = at(student[j], teacher[j]);
  if (here) out[row.own] = at_target;
}

// use(T, Kind) for the logits' type and the divergence.
template <typename Use>
void choose(const Logits& logits, const Mixture& mixture, Use use) {
  const auto with_type = [&](auto type) {
    if (mixture.teacher_share == 0) return use(type, Kind<false, true, false>());
    if (mixture.teacher_term == 0) return use(type, Kind<true, false, true>());
    if (mixture.student_term == 0) return use(type, Kind<true, true, false>());
    return use(type, Kind<true, true, true>());
  };
  logits.bytes == 2 ? with_type(BFloat16()) : with_type(float());
}

}  // namespace

extern "C" {

// sums [n, 2] of the counted rows; rows [n] of the logits, none: all of them, in order. numbers [n, 5].
void mixture_sums(const Logits* student, const Logits* teacher, const int64_t* rows, int64_t n, int64_t width,
                  const Scales* scales, const Mixture* mixture, float forbidden, const float* numbers, float* sums,
                  int64_t threads) {
  choose(*student, *mixture, [=](auto type, auto kind) {
    share_rows(n, threads, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = rows ? rows[i] : i;
        sums_of_row<decltype(type), decltype(kind)>({student->row(row), teacher->row(row), 0, width}, *scales, *mixture,
                                                    forbidden, numbers + i * NUM_NUMBERS, sums + i * NUM_SUMS);
      }
    });
  });
}

// coefficients [n, 8]: the five numbers, E_p[g], a, c of each counted row.
void mixture_gradient(const Rows* rows, const Scales* scales, const Mixture* mixture, const float* coefficients,
                      int64_t threads) {
  choose(*rows->student, *mixture, [=](auto type, auto kind) {
    rows->write(threads, [=](const Place& row, int64_t i, void* out) {
      gradient_of_row<decltype(type), decltype(kind)>(row, *scales, *mixture, coefficients + i * NUM_COEFFICIENTS, out);
    });
  });
}
}
