// The row stage of the fused loss for CPUs: torch_rows.py in C, a row at a time, four or five sweeps over it in cache.
//
// torch_rows.py states the closed forms and defines every column; names here are the same. What differs is only how digits are
// kept: of the two probabilities of an id the larger one is exp() of its logarithm, the smaller one follows from
// expm1(-|d|), which cannot overflow.
//
// Built on demand by c_rows.py. Sums go through float lanes to double every BLOCK ids.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 512
#define SCRATCH(V) (5 * (V) + 7)  // floats: amid's five rows, which are more than taid's four and seven numbers a block
#define LOG_ZERO -1e30f
#define INLINE static inline __attribute__((always_inline))
#define FOR_BLOCKS for (long start = 0, end; end = start + BLOCK < V ? start + BLOCK : V, start < V; start += BLOCK)

enum {
  TAID, FORWARD_KL, REVERSE_KL, JSD, TVD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, ADAPTIVE_KL, DKD, CTKD, ABKD, AMID, SFT,
  MIXTURE_TAID  // TAID with another mixture than 1; the rest in the order of objective_table.py
};

// Both structures are mirrored in c_rows.py.
typedef struct {
  const float *bias;     // or NULL
  float scale, softcap;  // softcap 0: none
} Finish;

typedef struct {
  int32_t objective;
  float share;       // kd_ratio
  float alpha, beta; // of dkd, abkd and amid
  double parameter;  // t, beta, skew, head_mass, the temperature, or amid's share
  double mixture;
  int32_t half;      // whether the tiles are bfloat16 and not float
  Finish student, teacher;
} Task;

typedef struct {
  float objective, kl, cross_entropy, entropy, correct, teacher_cross_entropy, target_cross_entropy, temperature_gradient;
} Columns;

// --- elementary functions, good to about an ulp, of a form that compilers vectorise ---------------------------------

// Of a NaN in second place the result is NaN: one in the logits has to reach the loss.
INLINE float max_(float a, float b) { return a > b ? a : b; }
INLINE float min_(float a, float b) { return a < b ? a : b; }
INLINE float bits_to_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE int32_t float_to_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA 1
#endif

typedef struct {
  float exp, expm1, expm1_minus_x;
} Exp;

// exp(x), exp(x) - 1 and exp(x) - 1 - x for x <= 88. x = n log 2 + r, exp(r) by its series. From n = -127 down, 2^n is 0.
INLINE Exp exponential(float x) {
  const float clamped = max_(-88.0f, x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // the sum's last bits are n
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const float series =
      r * r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * (1.38888889e-3f + r * 1.98412698e-4f)))));
  const float power = bits_to_float((float_to_bits(shifted) - 0x4b400000 + 127) << 23);
  const float expm1 = power * (series + r) + (power - 1.0f);
  Exp result;
  result.exp = power + power * (series + r);
  result.expm1 = expm1;
  result.expm1_minus_x = n == 0.0f ? series : expm1 - x;
  return result;
}

// exp(x) alone, for x <= 0; n goes into the exponent's bits. Where they have no room for it, the result is 0.
INLINE float exp_(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
#ifdef FMA
  const float r = __builtin_fmaf(n, -0.693147181f, x);  // the product is not rounded, and log 2 by 2e-9
#else
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
#endif
  const float series =
      1.0f + r * (1.0f + r * (0.499999934f + r * (1.66665198e-1f + r * (4.16683978e-2f + r * (8.36881717e-3f + r * 1.3814391e-3f)))));
  const float power = bits_to_float((uint32_t)float_to_bits(series) + ((uint32_t)float_to_bits(shifted) << 23));
  return x < -87.0f ? 0.0f : power;
}

// log(whole + lost) for a normal number `whole`, and `lost` what its last place does not hold.
INLINE float log_(float whole, float lost) {
  const int32_t bits = float_to_bits(whole);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt 1/2, sqrt 2)
  const float mantissa = bits_to_float(bits - (exponent << 23));
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f), ss = s * s;
  const float atanh = 2.0f * s * (1.0f + ss * (3.33333333e-1f + ss * (2.0e-1f + ss * (1.42857143e-1f + ss * 1.11111111e-1f))));
  return (float)exponent * 0.693147181f + (atanh + lost / whole);
}

// --- what every objective needs ---------------------------------------------------------------------------------------

INLINE float widened(uint16_t half) { return bits_to_float((uint32_t)half << 16); }

// To bfloat16, to the nearest and of two as near to the even one.
INLINE uint16_t narrowed(float x) {
  const uint32_t bits = float_to_bits(x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Of an id that is no token, whose logit is -inf: exp() of LOG_ZERO is 0 too, and it survives 0 * x and x - x.
INLINE float at(const float *z, long v) { return max_(LOG_ZERO, z[v]); }

// The logits of a block as floats: their own memory, or copies.
INLINE float *floats(void *z, long start, long end, int half, float *copies) {
  if (!half) return (float *)z + start;
  for (long v = start; v < end; v++) copies[v - start] = max_(LOG_ZERO, widened(((uint16_t *)z)[v]));
  return copies;
}

INLINE float logit(const void *z, long v, int half) {
  return max_(LOG_ZERO, half ? widened(((uint16_t *)z)[v]) : ((float *)z)[v]);
}

INLINE void narrow(const float *x, uint16_t *half, long n) {
  for (long v = 0; v < n; v++) half[v] = narrowed(x[v]);
}

INLINE int is_finished(const Finish *f) { return !f->bias && f->scale == 1.0f && f->softcap == 0.0f; }

// From products to logits; the slope d logits / d product goes to `slope` where there is a softcap.
INLINE void finish(float *z, long V, const Finish *f, float *slope) {
  if (is_finished(f)) return;
  if (f->bias)
    for (long v = 0; v < V; v++) z[v] += f->bias[v];
  for (long v = 0; v < V; v++) z[v] *= f->scale;
  if (f->softcap == 0.0f) return;
  const float cap = f->softcap;
#pragma omp simd
  for (long v = 0; v < V; v++) {
    const float x = z[v] / cap, e = exponential(-2.0f * (x < 0 ? -x : x)).expm1;
    const float tanh = (x < 0 ? e : -e) / (2.0f + e);
    z[v] = cap * tanh;
    if (slope) slope[v] = f->scale * (1.0f - tanh * tanh);
  }
}

// The maximum; from here on, no logit is less than LOG_ZERO.
INLINE float maximum(float *z, long V) {
  float top = LOG_ZERO, bottom = LOG_ZERO;
#pragma omp simd reduction(max : top) reduction(min : bottom)
  for (long v = 0; v < V; v++) {
    top = z[v] > top ? z[v] : top;
    bottom = z[v] < bottom ? z[v] : bottom;
  }
  if (bottom < LOG_ZERO)
    for (long v = 0; v < V; v++) z[v] = at(z, v);
  return top;
}

typedef struct {
  float top, log_normaliser, mean;  // of (z - top) / T: log sum exp, and its mean under the softmax
  float per_sum;                    // 1 / sum exp
  double exact;                     // log_normaliser
} Norm;

INLINE Norm norm(float top, double sum, double weighted) {
  const double log_sum = __builtin_log(sum);
  return (Norm){top, log_sum, weighted / sum, 1 / sum, log_sum};
}

// log normaliser of a less that of b. Rounded first, they would be 5e-7 off, which is the same for all ids and so no noise.
INLINE float less(Norm a, Norm b) { return a.exact - b.exact; }

// The first place of a value, or 0 where it is nowhere: of NaN, or in a row of NaN.
INLINE long first(const float *x, long V, float value) {
  FOR_BLOCKS {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (long v = start; v < end; v++) found |= x[v] == value;
    if (!found) continue;
    while (x[start] != value) start++;
    return start;
  }
  return 0;
}

// The exponentials go to `exps`: what is needed twice is kept, because a load is cheaper.
INLINE Norm normalise(float *z, long V, float per_T, float *exps) {
  const float top = maximum(z, V);
  double sum = 0, weighted = 0;
  FOR_BLOCKS {
    float s = 0, w = 0, ones = 0;  // counted apart: where one id has nearly all, what the others have keeps its digits
#pragma omp simd reduction(+ : s, w, ones)
    for (long v = start; v < end; v++) {
      const float x = (z[v] - top) * per_T, e = exp_(x);
      ones += x == 0.0f ? 1.0f : 0.0f;
      s += x == 0.0f ? 0.0f : e;
      w += e * x;
      exps[v] = e;
    }
    sum += (double)s + ones;
    weighted += w;
  }
  return norm(top, sum, weighted);
}

typedef struct {
  float q, p, difference;          // q - p
  float forward, reverse;          // terms of KL(p || q) and KL(q || p), none negative
  float smaller_to_larger, expm1;  // e^-|d| and e^-|d| - 1
} Pair;

// Of log q, log p and d = log q - log p, which is known to more digits than their difference.
INLINE Pair pair(float log_q, float log_p, float d) {
  const int q_larger = d >= 0;
  const float larger = exp_(q_larger ? log_q : log_p), x = q_larger ? -d : d;
  const Exp e = exponential(x);
  const float smaller = larger * e.exp, gap = larger * e.expm1;
  const float from_larger = larger * e.expm1_minus_x;                          // larger (e^x - 1 - x)
  const float from_smaller = larger * (x * x - e.expm1_minus_x * (1.0f - x));  // smaller (e^-x - 1 + x)
  Pair r;
  r.q = q_larger ? larger : smaller;
  r.p = q_larger ? smaller : larger;
  r.difference = q_larger ? -gap : gap;
  // Far apart, x * x and the rest cancel: there the difference itself is exact enough.
  const float forward = q_larger ? (x < -1.0f ? -gap - smaller * d : from_smaller) : from_larger;
  const float reverse = q_larger ? from_larger : (x < -1.0f ? -gap + smaller * d : from_smaller);
  r.forward = forward;
  r.reverse = reverse;
  r.smaller_to_larger = e.exp;
  r.expm1 = e.expm1;
  return r;
}

// --- q - target: taid, forward_kl, dkd, ctkd --------------------------------------------------------------------------

// (1 - t) x + t w, from the nearer end: exact where x = w, and at t = 0 and 1. Rounded alike wherever it stands: where the
// compiler may choose, one place differs from the next by the rounding of a product, and exp() of a difference that should
// be 0 is off by 6e-4 for logits of 1e4.
INLINE float mixed(float x, float w, float t) {
  const float base = t < 0.5f ? x : w, step = t < 0.5f ? t : t - 1;
#ifdef FMA
  return __builtin_fmaf(step, w - x, base);
#else
  return base + step * (w - x);
#endif
}

typedef struct {
  float difference, kl;  // q - p, and the term of KL(p || q)
} Gap;

// Of q, p and d = log q - log p. Where they are near, q - p and the rest lose digits: with tanh(d / 2) = d (1 / 2 + r)
// they are (q + p) tanh(d / 2) and (q + p) (tanh(d / 2) - d / 2) + d (q - p) / 2.
INLINE Gap gap(float q, float p, float d) {
  const float dd = d * d;
  const float r = dd * (-4.16665507e-2f + dd * (4.16383217e-3f + dd * -4.01820686e-4f));
  const float sum = q + p, rest = sum * r, apart = q - p;
  const float difference = d * (0.5f * sum + rest), kl = d * (0.5f * difference + rest);
  const int near = dd < 0.25f;
  return (Gap){near ? difference : apart, near ? kl : apart - p * d};
}

// Exponentials of a block are relative to its own maxima, because it is in the first cache only now; what makes
// probabilities of them is known when the row's are.
INLINE void taid(
    void *z_q, void *z_p, int half, long V, long y, float t, float share, float *exps, Norm *student, Norm *teacher, Columns *out
) {
  float *exps_p = exps + V, *exps_t = exps + 2 * V, copies[2][BLOCK];
  const long B = (V + BLOCK - 1) / BLOCK, size = half ? 2 : 4;
  float *top_q = exps + 3 * V, *top_p = top_q + B, *top_t = top_p + B;
  float *sum_q = top_t + B, *sum_p = sum_q + B, *sum_t = sum_p + B, *sum_qx = sum_t + B;
  FOR_BLOCKS {
    const long b = start / BLOCK, n = end - start;
    float *x_b = floats(z_q, start, end, half, copies[0]), *w_b = floats(z_p, start, end, half, copies[1]);
    float *e_q = exps + start, *e_p = exps_p + start, *e_t = exps_t + start;
    const float m_q = maximum(x_b, n), m_p = maximum(w_b, n);
    for (long v = end; v < end + BLOCK && v < V; v += 64 / size) {  // the next block comes while this one is computed
      __builtin_prefetch((char *)z_q + v * size, 0, 2);
      __builtin_prefetch((char *)z_p + v * size, 0, 2);
    }
    float s_q = 0, s_p = 0, s_t = 0, s_qx = 0, m_t = 0, highest = 0;
#pragma omp simd reduction(+ : s_q, s_p, s_t, s_qx) reduction(max : highest)
    for (long v = 0; v < n; v++) {
      const float x = x_b[v] - m_q, w = w_b[v] - m_p, e = exp_(x);
      s_q += e_q[v] = e;
      s_qx += e * x;
      s_p += e_p[v] = exp_(w);
      const float z = mixed(x, w, t);
      highest = z > highest ? z : highest;  // above 0 for t > 1 only
      s_t += e_t[v] = exp_(z);
    }
    if (s_t < 1e-17f || highest > 60.0f) {  // the two are so far apart that exponentials relative to 0 are lost
      m_t = LOG_ZERO;
      s_t = 0;
#pragma omp simd reduction(max : m_t)
      for (long v = 0; v < n; v++) {
        const float z = mixed(x_b[v] - m_q, w_b[v] - m_p, t);
        m_t = z > m_t ? z : m_t;
      }
#pragma omp simd reduction(+ : s_t)
      for (long v = 0; v < n; v++) s_t += e_t[v] = exp_(mixed(x_b[v] - m_q, w_b[v] - m_p, t) - m_t);
    }
    top_q[b] = m_q, top_p[b] = m_p, top_t[b] = m_t;
    sum_q[b] = s_q, sum_p[b] = s_p, sum_t[b] = s_t, sum_qx[b] = s_qx;
  }
  const float row_q = maximum(top_q, B), row_p = maximum(top_p, B);
  for (long b = 0; b < B; b++) top_t[b] += mixed(top_q[b] - row_q, top_p[b] - row_p, t);
  const float row_t = maximum(top_t, B);
  double all_q = 0, all_p = 0, all_t = 0, all_qx = 0;
  for (long b = 0; b < B; b++) {
    const float x = top_q[b] - row_q, to_q = exp_(x), to_p = exp_(top_p[b] - row_p), to_t = exp_(top_t[b] - row_t);
    all_q += to_q * sum_q[b];
    all_qx += to_q * (sum_qx[b] + x * sum_q[b]);
    all_p += to_p * sum_p[b];
    all_t += to_t * sum_t[b];
    top_q[b] = to_q, top_p[b] = to_p, top_t[b] = to_t;
  }
  *student = norm(row_q, all_q, all_qx);
  *teacher = norm(row_p, all_p, 0);
  const float to_target = t == 0 ? 0 : row_t + less(norm(row_t, all_t, 0), *student), to_teacher = less(*teacher, *student);
  double objective = 0, kl = 0, target = 0;
  FOR_BLOCKS {
    const long b = start / BLOCK, n = end - start;
    float *x_b = floats(z_q, start, end, half, copies[0]), *w_b = floats(z_p, start, end, half, copies[1]);
    const float *e_q = exps + start, *e_p = exps_p + start, *e_t = exps_t + start;
    const float per_q = top_q[b] / all_q, per_p = top_p[b] / all_p, per_t = top_t[b] / all_t;
    float o = 0, k = 0, c = 0;
#pragma omp simd reduction(+ : o, k, c)
    for (long v = 0; v < n; v++) {
      const float x = x_b[v] - row_q, to_w = x - (w_b[v] - row_p);
      const float q = e_q[v] * per_q, p_t = e_t[v] * per_t;
      const Gap to_p_t = gap(q, p_t, t * to_w + to_target);
      o += to_p_t.kl;
      k += gap(q, e_p[v] * per_p, to_w + to_teacher).kl;
      c += p_t * x;
      x_b[v] = share * to_p_t.difference + (1 - share) * q;
    }
    objective += o;
    kl += k;
    target += c;
    if (half) {
      if (start <= y && y < end) x_b[y - start] -= 1 - share;
      narrow(x_b, (uint16_t *)z_q + start, n);
    }
  }
  out->objective = objective;
  out->kl = kl;
  out->target_cross_entropy = student->log_normaliser - target;
}

typedef struct {
  double forward, both, moment;  // KL(p || q), KL both ways, the terms of KL(p || q) times z_p
} Sums;

// Writes per_q q + per_difference (q - p) over the student's logits, at a temperature; `exps` as the normalisers left them.
INLINE Sums to_teacher(
    float *z_q, const float *z_p, long V, Norm nq, Norm np, const float *exps, float per_T, float per_difference, float per_q
) {
  const float *exps_p = exps + V, to_teacher = less(np, nq);
  Sums sums = {0, 0, 0};
  FOR_BLOCKS {
    float f = 0, g = 0, b = 0;
#pragma omp simd reduction(+ : f, g, b)
    for (long v = start; v < end; v++) {
      const float x = (z_q[v] - nq.top) * per_T, w = (z_p[v] - np.top) * per_T, d = x - w + to_teacher;
      const float q = exps[v] * nq.per_sum;
      const Gap r = gap(q, exps_p[v] * np.per_sum, d);
      const int possible = w > -1e3f;  // if not, p is 0, and w, which both sums contain, is left out of both
      f += r.kl;
      g += r.difference * (possible ? d : x + to_teacher);
      b += possible ? r.kl * w : 0;
      z_q[v] = per_difference * r.difference + per_q * q;
    }
    sums.forward += f;
    sums.both += g;
    sums.moment += b;
  }
  return sums;
}

INLINE double kl_to_teacher(const float *z_q, const float *z_p, long V, Norm nq, Norm np, const float *exps) {
  const float to_teacher = less(np, nq);
  double kl = 0;
  FOR_BLOCKS {
    float k = 0;
#pragma omp simd reduction(+ : k)
    for (long v = start; v < end; v++) {
      const float d = z_q[v] - nq.top - (z_p[v] - np.top) + to_teacher;
      k += gap(exps[v] * nq.per_sum, exps[V + v] * np.per_sum, d).kl;
    }
    kl += k;
  }
  return kl;
}

// The mix with the label needs q at temperature 1: its exponentials are kept in a row of their own.
INLINE void add_label_share(float *g, const float *exps, long V, Norm nq, float share) {
  for (long v = 0; v < V; v++) g[v] = share * g[v] + (1 - share) * (exps[v] * nq.per_sum);
}

INLINE void ctkd(float *z_q, float *z_p, long V, Norm nq, Norm np, float T, float share, float *exps, Columns *out) {
  float *at_T = exps + 2 * V;
  out->kl = kl_to_teacher(z_q, z_p, V, nq, np, exps);
  const Norm mq = normalise(z_q, V, 1 / T, at_T), mp = normalise(z_p, V, 1 / T, at_T + V);
  const Sums s = to_teacher(z_q, z_p, V, mq, mp, at_T, 1 / T, T, 0);
  out->objective = T * T * s.forward;
  out->temperature_gradient = T * (2 * s.forward - s.both - (s.moment - mp.mean * s.forward));
  if (share < 1) add_label_share(z_q, exps, V, nq, share);
}

INLINE float log_add(float a, float b) {
  const float top = max_(a, b), x = min_(a, b) - top;
  return top + __builtin_log1p(__builtin_exp(x));
}

INLINE void dkd(
    float *z_q, float *z_p, long V, long y, Norm nq, Norm np, float T, float alpha, float beta, float share, float *exps, Columns *out
) {
  float *at_T = exps + 2 * V;
  out->kl = kl_to_teacher(z_q, z_p, V, nq, np, exps);
  const float y_q = at(z_q, y) / T, y_p = at(z_p, y) / T;
  z_q[y] = z_p[y] = LOG_ZERO;
  const Norm mq = normalise(z_q, V, 1 / T, at_T), mp = normalise(z_p, V, 1 / T, at_T + V);
  if (mp.top < LOG_ZERO / 2) beta = 0;  // there is no other token
  const float rest_q = mq.top / T + mq.log_normaliser, rest_p = mp.top / T + mp.log_normaliser;
  const float all_q = log_add(y_q, rest_q), all_p = log_add(y_p, rest_p);
  const Pair on = pair(y_q - all_q, y_p - all_p, (y_q - y_p) - (all_q - all_p));
  const Pair off = pair(rest_q - all_q, rest_p - all_p, (rest_q - rest_p) - (all_q - all_p));
  const Sums s = to_teacher(z_q, z_p, V, mq, mp, at_T, 1 / T, T * beta, -T * alpha * on.difference);
  z_q[y] = T * alpha * on.difference;
  out->objective = T * T * (alpha * (on.forward + off.forward) + beta * s.forward);
  if (share < 1) add_label_share(z_q, exps, V, nq, share);
}

// --- J(x): the other objectives ---------------------------------------------------------------------------------------

// base (x - log(1 + x)) of x = change / base: by its series where x is small. `otherwise` is the same, with fewer digits there.
INLINE float excess(float base, float change, float otherwise) {
  const float x = change / base, s = x / (2.0f + x), ss = s * s;
  const float series = base * s * (x - 2.0f * ss * (3.33333333e-1f + ss * (2.0e-1f + ss * (1.42857143e-1f + ss * 1.11111111e-1f))));
  return x > -0.25f && x < 0.25f ? series : otherwise;
}

// x = dF/dq, but for a constant, and the term of the loss in `f`.
INLINE float derivative(int objective, double parameter, float d, Pair r, float *f) {
  const float s = parameter, rest = 1 - parameter;
  const int q_larger = d >= 0;
  if (objective == REVERSE_KL || objective == ADAPTIVE_KL) {
    *f = r.reverse;
    return d;
  }
  if (objective == TVD) {
    *f = 0.5f * (r.difference < 0 ? -r.difference : r.difference);
    return r.difference > 0 ? 0.5f : r.difference < 0 ? -0.5f : 0.0f;
  }
  // m = of_larger larger + of_smaller smaller = larger mixture
  const int smaller_has_s = q_larger == (objective != SKEW_REVERSE_KL);
  const float of_smaller = smaller_has_s ? s : rest, of_larger = smaller_has_s ? rest : s, x = of_smaller * r.expm1;
  const int near = x > -0.5f;
  const float mixture = near ? 1.0f + x : of_larger + of_smaller * r.smaller_to_larger;
  const float ratio = log_(mixture, near ? x - (mixture - 1.0f) : 0.0f);
  const float q_minus_p = q_larger ? -r.expm1 : r.expm1;  // both in units of the larger one
  const float p_to_m = -(ratio + max_(d, 0)), q_to_m = min_(d, 0) - ratio;
  if (objective == JSD) {
    const float to_q = rest * r.difference, to_p = -s * r.difference;
    *f = s * excess(r.p, to_q, to_q + r.p * p_to_m) + rest * excess(r.q, to_p, to_p + r.q * q_to_m);
    return rest * q_to_m;
  }
  if (objective == SKEW_FORWARD_KL) {
    *f = excess(r.p, rest * r.difference, rest * r.difference + r.p * p_to_m);
    return rest * rest * q_minus_p / mixture;
  }
  *f = excess(r.q, -rest * r.difference, r.q * q_to_m - rest * r.difference);
  return q_to_m - s * rest * q_minus_p / mixture;
}

// The weight of forward KL in adaptive_kl: the head's part of sum |p - q|.
INLINE float head_weight(const float *z_q, const float *z_p, long V, Norm nq, Norm np, float head_mass) {
  float low = -104, high = 0;
  for (int i = 0; i < 36; i++) {
    const float middle = (low + high) / 2;
    double mass = 0;
    FOR_BLOCKS {
    float m = 0;
#pragma omp simd reduction(+ : m)
      for (long v = start; v < end; v++) {
        const float w = z_p[v] - np.top;
        m += w > middle ? exp_(w - np.log_normaliser) : 0.0f;
      }
      mass += m;
    }
    if (mass >= head_mass) low = middle; else high = middle;
  }
  const float offset = less(nq, np);
  double head = 0, whole = 0;
  FOR_BLOCKS {
    float h = 0, a = 0;
#pragma omp simd reduction(+ : h, a)
    for (long v = start; v < end; v++) {
      const float x = z_q[v] - nq.top, w = z_p[v] - np.top;
      const float d = x - w - offset;
      const float difference = pair(x - nq.log_normaliser, w - np.log_normaliser, d).difference;
      const float size = difference < 0 ? -difference : difference;
      a += size;
      h += w > low ? size : 0.0f;
    }
    head += h;
    whole += a;
  }
  return whole > 0 ? head / whole : 0.5f;
}

INLINE void jacobian(int objective, float *z_q, float *z_p, long V, Norm nq, Norm np, double s, float share, Columns *out) {
  const float w_head = objective == ADAPTIVE_KL ? head_weight(z_q, z_p, V, nq, np, s) : 0.0f;
  const float offset = less(nq, np);
  const long likeliest = first(z_q, V, nq.top);
  const float w_top = at(z_p, likeliest) - np.top, d_top = -w_top - offset;
  float unused;
  const float x_top = derivative(objective, s, d_top, pair(-nq.log_normaliser, w_top - np.log_normaliser, d_top), &unused);
  double loss = 0, kl = 0, mean_x = 0;
  FOR_BLOCKS {
    float f = 0, k = 0, m = 0;
#pragma omp simd reduction(+ : f, k, m)
    for (long v = start; v < end; v++) {
      const float x_q = z_q[v] - nq.top, w = z_p[v] - np.top, d = x_q - w - offset;
      const Pair r = pair(x_q - nq.log_normaliser, w - np.log_normaliser, d);
      float term;
      const float g = r.q * (derivative(objective, s, d, r, &term) - x_top);
      f += term;
      k += r.forward;
      m += g;
      z_q[v] = w_head * r.difference + (1 - w_head) * g;
      z_p[v] = r.q;
    }
    loss += f;
    kl += k;
    mean_x += m;
  }
  out->kl = kl;
  out->objective = w_head * kl + (1 - w_head) * loss;
  const float per_q = (1 - share) - share * (1 - w_head) * (float)mean_x;
#pragma omp simd
  for (long v = 0; v < V; v++) z_q[v] = share * z_q[v] + per_q * z_p[v];
}

// --- the alpha-mixture and the alpha-beta divergence: taid with a mixture, abkd, amid --------------------------------

// Logits of amid's mean of p and q go over z_q, their exponentials to `exps`. Those logits are log mean - log q on top of q's
// own, so a normaliser as near to q's as p is. What is there of the others receives log mean - log q, log mean - log p, and
// the student's part in the mean's power a.
INLINE Norm alpha_mixture(
    float *z_q, const float *z_p, long V, Norm nq, Norm np, double mixture, double share, float *exps, float *from_q,
    float *from_p, float *of_student
) {
  // Near is the one with the larger share, in units of whose power a the mean's is 1 + s (e^y - 1): there, nothing cancels.
  const int q_near = share < 0.5;
  const float a = (1 - mixture) / 2, per_a = 1 / a, s = q_near ? share : 1 - share, to_teacher = less(np, nq);
  const float if_near = q_near ? 1 - s : 0, if_other = q_near ? 0 : s;
#pragma omp simd
  for (long v = 0; v < V; v++) {
    const float x = z_q[v] - nq.top, w = z_p[v] - np.top, gap = w - x - to_teacher;  // log p - log q
    const float to_other = q_near ? gap : -gap, y = a * to_other;
    const int far = y > 1.0f;  // e^y may overflow: in units of the other one's power, the mean's is s + (1 - s) e^-y
    const Exp e = exponential(far ? -y : y);
    const float change = s * e.expm1, mean = far ? s + (1 - s) * e.exp : 1.0f + change;
    const float log_mean = log_(mean, far ? 0.0f : change - (mean - 1.0f)) * per_a;
    const float from_near = far ? to_other + log_mean : a == 0.0f ? s * to_other : log_mean;
    const float from_other = far ? log_mean : from_near - to_other;
    const float log_ratio_q = q_near ? from_near : from_other, log_ratio_p = q_near ? from_other : from_near;
    // On top of the smaller step: of a masked id, only the other one's logit is a number to count with.
    z_q[v] = __builtin_fabsf(log_ratio_q) < __builtin_fabsf(log_ratio_p) ? x + log_ratio_q : w - to_teacher + log_ratio_p;
    if (from_q) from_q[v] = log_ratio_q;
    if (from_p) from_p[v] = log_ratio_p;
    if (of_student) of_student[v] = (if_near * (far ? e.exp : 1.0f) + if_other * (far ? 1.0f : e.exp)) / mean;
  }
  return normalise(z_q, V, 1, exps);
}

INLINE void mixture_taid(
    float *z_q, float *z_p, long V, Norm nq, Norm np, double mixture, double t, float share, float *exps, Columns *out
) {
  float *from_q = exps + V, *exps_t = exps + 2 * V;
  out->kl = kl_to_teacher(z_q, z_p, V, nq, np, exps);
  const Norm nt = alpha_mixture(z_q, z_p, V, nq, np, mixture, t, exps_t, from_q, NULL, NULL);
  const float to_target = nt.top + less(nt, nq);
  double objective = 0;
  FOR_BLOCKS {
    float o = 0;
#pragma omp simd reduction(+ : o)
    for (long v = start; v < end; v++) {
      const float q = exps[v] * nq.per_sum;
      const Gap r = gap(q, exps_t[v] * nt.per_sum, to_target - from_q[v]);
      o += r.kl;
      z_q[v] = share * r.difference + (1 - share) * q;
    }
    objective += o;
  }
  out->objective = objective;
  out->target_cross_entropy = objective + (nt.log_normaliser - nt.mean);
}

typedef struct {
  float exp, expm1, per, less;  // e^ux, e^ux - 1; the latter and e^ux - 1 - ux over u, for u = 0 in the limit
} Power;

INLINE Power power(float u, float x) {
  const Exp e = exponential(u * x);
  const float per_u = 1.0f / u;
  return (Power){e.exp, e.expm1, u == 0.0f ? x : e.expm1 * per_u, u == 0.0f ? 0.0f : e.expm1_minus_x * per_u};
}

typedef struct {
  float loss, slope;  // a term of the divergence of p from r, and its derivative on log r
} Term;

// Of log r, log p and d = log p - log r: the larger one's power alpha + beta times a function of -|d|. Where that is p, it is
// the function for powers exchanged, because the divergence of p from r is then that of r from p.
INLINE Term alpha_beta(float log_r, float log_p, float d, float alpha, float beta) {
  const int p_larger = d > 0;
  const float x = p_larger ? -d : d, larger = exp_((alpha + beta) * (p_larger ? log_p : log_r)), per_both = 1 / (alpha + beta);
  const Power a = power(alpha, x), b = power(beta, x);
  // Both are the same: the first has no terms of first order in d, the second none that grows with it.
  const float near = (p_larger ? a.less - b.less : b.less - a.less) + (p_larger ? b.expm1 * a.per : a.expm1 * b.per);
  const float far = p_larger ? b.exp * a.per - b.per : a.exp * b.per - a.per;
  const float loss = larger * (x * max_(alpha, beta) > -1.0f ? near : far) * per_both;
  return (Term){loss, larger * (p_larger ? b.exp * a.per : -a.per)};
}

// Writes slopes on log r over the logits of r; returns the divergence. log p - log r is `offset` more than the difference of
// their logits, or, where they are known to more digits, `offset` less `from_p`.
INLINE double slopes(
    float *z_r, const float *z_p, long V, Norm nr, Norm np, const float *from_p, float offset, float alpha, float beta
) {
  double loss = 0;
  FOR_BLOCKS {
    float f = 0;
#pragma omp simd reduction(+ : f)
    for (long v = start; v < end; v++) {
      const float x = z_r[v] - nr.top, w = z_p[v] - np.top, d = offset + (from_p ? -from_p[v] : w - x);
      const Term term = alpha_beta(x - nr.log_normaliser, w - np.log_normaliser, d, alpha, beta);
      f += term.loss;
      z_r[v] = term.slope;
    }
    loss += f;
  }
  return loss;
}

// From slopes on log q to those on its logits, slope - q sum slope, the first step: a multiple of q off the slopes that makes
// the likeliest id's 0. That changes nothing, but without it the two cancel where q is nearly 1 there. Returns what is left
// to take off, a multiple of q's exponentials.
INLINE float centre(float *slope, const float *exps, long V, Norm n) {
  const float of_likeliest = slope[first(exps, V, 1.0f)];
  double sum = 0;
  FOR_BLOCKS {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (long v = start; v < end; v++) s += slope[v] -= of_likeliest * exps[v];
    sum += s;
  }
  return sum * n.per_sum;
}

INLINE void amid(
    int mixes, float *z_q, float *z_p, long V, Norm nq, Norm np, const Task *task, float share, float *exps, Columns *out
) {
  out->kl = kl_to_teacher(z_q, z_p, V, nq, np, exps);
  if (mixes) {
    float *from_p = exps + V, *exps_r = exps + 2 * V, *of_student = exps + 3 * V;
    const Norm nr = alpha_mixture(z_q, z_p, V, nq, np, task->mixture, task->parameter, exps_r, NULL, from_p, of_student);
    out->objective = slopes(z_q, z_p, V, nr, np, from_p, nr.top + less(nr, nq), task->alpha, task->beta);
    const float mean = centre(z_q, exps_r, V, nr);
#pragma omp simd
    for (long v = 0; v < V; v++) z_q[v] = of_student[v] * (z_q[v] - mean * exps_r[v]);
  } else
    out->objective = slopes(z_q, z_p, V, nq, np, NULL, less(nq, np), task->alpha, task->beta);
  const float mean = centre(z_q, exps, V, nq), per_exp = (1 - share) * nq.per_sum - share * mean;
#pragma omp simd
  for (long v = 0; v < V; v++) z_q[v] = share * z_q[v] + per_exp * exps[v];
}

// --- a row ------------------------------------------------------------------------------------------------------------

static void row(void *student, void *teacher, long V, long y, const Task *task, float *scratch, Columns *out, int gradient) {
  const float share = task->share;
  const double a = task->parameter;
  float *z_q = student, *z_p = teacher, *slope = scratch, *exps = scratch + V, *halves = scratch + SCRATCH(V);
  const int given = teacher && share > 0 ? task->objective : SFT, objective = given == TAID && a == 1 ? FORWARD_KL : given;
  Norm nq, np;
  memset(out, 0, sizeof *out);
  // TAID reads and writes halves itself, a block at a time.
  const int direct = task->half && gradient && objective == TAID && is_finished(&task->student) && is_finished(&task->teacher);
  if (task->half && !direct) {
    z_q = floats(student, 0, V, 1, halves);
    if (teacher) z_p = floats(teacher, 0, V, 1, halves + V);
  }
  finish(z_q, V, &task->student, slope);
  if (z_p) finish(z_p, V, &task->teacher, NULL);
  const float label_q = logit(z_q, y, direct), label_p = z_p ? logit(z_p, y, direct) : 0;
  if (direct)
    taid(student, teacher, 1, V, y, a, share, exps, &nq, &np, out);
  else if (objective == TAID)
    taid(z_q, z_p, 0, V, y, a, share, exps, &nq, &np, out);
  else {
    nq = normalise(z_q, V, 1, exps);
    if (z_p) np = normalise(z_p, V, 1, exps + V);
  }
  out->correct = label_q >= nq.top;
  out->cross_entropy = nq.log_normaliser - (label_q - nq.top);
  out->entropy = nq.log_normaliser - nq.mean;
  if (z_p) out->teacher_cross_entropy = np.log_normaliser - (label_p - np.top);
  switch (objective) {
    case TAID: break;
    case FORWARD_KL: out->objective = out->kl = to_teacher(z_q, z_p, V, nq, np, exps, 1, share, 1 - share).forward; break;
    case REVERSE_KL: jacobian(REVERSE_KL, z_q, z_p, V, nq, np, a, share, out); break;
    case JSD: jacobian(JSD, z_q, z_p, V, nq, np, a, share, out); break;
    case TVD: jacobian(TVD, z_q, z_p, V, nq, np, a, share, out); break;
    case SKEW_FORWARD_KL: jacobian(SKEW_FORWARD_KL, z_q, z_p, V, nq, np, a, share, out); break;
    case SKEW_REVERSE_KL: jacobian(SKEW_REVERSE_KL, z_q, z_p, V, nq, np, a, share, out); break;
    case ADAPTIVE_KL: jacobian(ADAPTIVE_KL, z_q, z_p, V, nq, np, a, share, out); break;
    case CTKD: ctkd(z_q, z_p, V, nq, np, a, share, exps, out); break;
    case MIXTURE_TAID: mixture_taid(z_q, z_p, V, nq, np, task->mixture, a, share, exps, out); break;
    case ABKD: amid(0, z_q, z_p, V, nq, np, task, share, exps, out); break;
    case AMID: amid(1, z_q, z_p, V, nq, np, task, share, exps, out); break;
    case DKD: dkd(z_q, z_p, V, y, nq, np, a, task->alpha, task->beta, share, exps, out); break;
    default:  // the gradient is q, and nothing of the teacher may reach it: 0 times NaN is NaN
      if (z_p) out->kl = kl_to_teacher(z_q, z_p, V, nq, np, exps);
      if (gradient)
        for (long v = 0; v < V; v++) z_q[v] = exps[v] * nq.per_sum;
  }
  if (given == TAID && a == 1) out->target_cross_entropy = out->kl + (np.log_normaliser - np.mean);
  if (!gradient || direct) return;
  z_q[y] -= 1 - share;
  if (task->student.softcap != 0.0f)
    for (long v = 0; v < V; v++) z_q[v] *= slope[v];
  else if (task->student.scale != 1.0f)
    for (long v = 0; v < V; v++) z_q[v] *= task->student.scale;
  if (task->half)
    narrow(z_q, student, V);
}

// Returns 0, or 1 where memory for a thread's scratch rows is missing.
int taid_rows(
    char *student, char *teacher, const int64_t *labels, long M, long V, long student_stride, long teacher_stride,
    const Task *task, Columns *columns, int gradient
) {
  const long bytes = task->half ? 2 : 4, scratch_size = SCRATCH(V) + (task->half ? 2 * V : 0);
  int failed = 0;
#pragma omp parallel
  {
    float *scratch = malloc(scratch_size * sizeof(float));
    if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (long m = 0; m < M; m++)
      if (scratch)
        row(student + m * student_stride * bytes, teacher ? teacher + m * teacher_stride * bytes : NULL, V, labels[m], task, scratch,
            columns + m, gradient);
    free(scratch);
  }
  return failed;
}
