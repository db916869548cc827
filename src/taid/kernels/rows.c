// The row stage of the fused loss for CPUs: rows.py in C, a row at a time, four or five sweeps over it in cache.
//
// rows.py states the closed forms and defines every column; names here are the same. What differs is only how digits are
// kept: of the two probabilities of an id the larger one is exp() of its logarithm, the smaller one follows from
// expm1(-|d|), which cannot overflow.
//
// Built on demand by native.py. Sums go through float lanes to double every BLOCK ids.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 512
#define LOG_ZERO -1e30f
#define INLINE static inline __attribute__((always_inline))
#define FOR_BLOCKS for (long start = 0, end; end = start + BLOCK < V ? start + BLOCK : V, start < V; start += BLOCK)

enum { SFT, TAID, FORWARD_KL, REVERSE_KL, JSD, TVD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, ADAPTIVE_KL, DKD, CTKD };

// Both structures are mirrored in native.py.
typedef struct {
  const float *bias;     // or NULL
  float scale, softcap;  // softcap 0: none
} Finish;

typedef struct {
  int32_t objective;
  float share;       // kd_ratio
  float alpha, beta; // of dkd
  double parameter;  // t, beta, skew, head_mass, or the temperature
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

INLINE float exp_(float x) { return exponential(x).exp; }


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

INLINE float at(const float *z, long v) { return max_(LOG_ZERO, z[v]); }

// From products to logits; the slope d logits / d product goes to `slope` where there is a softcap.
INLINE void finish(float *z, long V, const Finish *f, float *slope) {
  if (!f->bias && f->scale == 1.0f && f->softcap == 0.0f) return;
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

INLINE float maximum(const float *z, long V) {
  float top = LOG_ZERO;
#pragma omp simd reduction(max : top)
  for (long v = 0; v < V; v++) top = z[v] > top ? z[v] : top;
  return top;
}

typedef struct {
  float top, log_normaliser, mean;  // of (z - top) / T: log sum exp, and its mean under the softmax
  float per_sum;                    // 1 / sum exp
} Norm;

// The exponentials go to `exps`: what is needed twice is kept, because a load is cheaper.
INLINE Norm normalise(const float *z, long V, float per_T, float *exps) {
  const float top = maximum(z, V);
  double sum = 0, weighted = 0;
  FOR_BLOCKS {
    float s = 0, w = 0;
#pragma omp simd reduction(+ : s, w)
    for (long v = start; v < end; v++) {
      const float x = (at(z, v) - top) * per_T, e = exp_(x);
      s += e;
      w += e * x;
      exps[v] = e;
    }
    sum += s;
    weighted += w;
  }
  return (Norm){top, __builtin_log(sum), weighted / sum, 1 / sum};
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

// (1 - t) x + t w, rounded alike wherever it stands: where the compiler may choose, one place differs from the next by the
// rounding of a product, and exp() of a difference that should be 0 is off by 6e-4 for logits of 1e4.
INLINE float mixed(float x, float w, float t) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(t, w, (1 - t) * x);
#else
  return (1 - t) * x + t * w;
#endif
}

typedef struct {
  float difference, kl;  // q - p, and the term of KL(p || q)
} Gap;

// Of q, p and d = log q - log p: where they are near, by the series of exp(d) - 1 - d, because there q - p loses digits.
INLINE Gap gap(float q, float p, float d) {
  const int near = d > -0.5f && d < 0.5f;
  const float tail = 1.38888889e-3f + d * (1.98412698e-4f + d * 2.48015873e-5f);
  const float series = d * d * (0.5f + d * (1.66666667e-1f + d * (4.16666667e-2f + d * (8.33333333e-3f + d * tail))));
  const float difference = near ? p * (d + series) : q - p;
  return (Gap){difference, near ? p * series : difference - p * d};
}

// On entry `exps` holds those of the student.
INLINE void taid(
    float *z_q, const float *z_p, long V, Norm nq, float top_p, float t, float share, float *exps, Norm *teacher, Columns *out
) {
  float *exps_t = exps + V, *exps_p = exps + 2 * V;
  float top = LOG_ZERO;
  double sum_p = 0, sum_t = 0;
  FOR_BLOCKS {
    float s = 0, m = LOG_ZERO;
#pragma omp simd reduction(+ : s) reduction(max : m)
    for (long v = start; v < end; v++) {
      const float x = at(z_q, v) - nq.top, w = at(z_p, v) - top_p, z_t = mixed(x, w, t);
      s += exps_p[v] = exp_(w);
      m = z_t > m ? z_t : m;
    }
    sum_p += s;
    top = max_(top, m);
  }
  FOR_BLOCKS {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (long v = start; v < end; v++) s += exps_t[v] = exp_(mixed(at(z_q, v) - nq.top, at(z_p, v) - top_p, t) - top);
    sum_t += s;
  }
  *teacher = (Norm){top_p, __builtin_log(sum_p), 0, 1 / sum_p};
  const float to_target = t == 0 ? 0 : top + ((float)__builtin_log(sum_t) - nq.log_normaliser);
  const float to_teacher = teacher->log_normaliser - nq.log_normaliser;
  const float per_q = nq.per_sum, per_p = teacher->per_sum, per_t = 1 / sum_t;
  double objective = 0, kl = 0, target = 0;
  FOR_BLOCKS {
    float o = 0, k = 0, c = 0;
#pragma omp simd reduction(+ : o, k, c)
    for (long v = start; v < end; v++) {
      const float x = at(z_q, v) - nq.top, w = at(z_p, v) - top_p, log_q = x - nq.log_normaliser;
      const float q = exps[v] * per_q, p = exps_p[v] * per_p, p_t = exps_t[v] * per_t;
      const float d_p = x - w + to_teacher, d_t = t * (x - w) + to_target;
      const Gap to_p_t = gap(q, p_t, d_t);
      o += to_p_t.kl;
      k += gap(q, p, d_p).kl;
      c -= p_t * log_q;
      z_q[v] = share * to_p_t.difference + (1 - share) * q;
    }
    objective += o;
    kl += k;
    target += c;
  }
  out->objective = objective;
  out->kl = kl;
  out->target_cross_entropy = target;
}

typedef struct {
  double forward, both, moment;  // KL(p || q), KL both ways, the terms of KL(p || q) times z_p
} Sums;

// Writes per_q q + per_difference (q - p) over the student's logits, at a temperature; `exps` as the normalisers left them.
INLINE Sums to_teacher(
    float *z_q, const float *z_p, long V, Norm nq, Norm np, const float *exps, float per_T, float per_difference, float per_q
) {
  const float *exps_p = exps + V, to_teacher = np.log_normaliser - nq.log_normaliser;
  Sums sums = {0, 0, 0};
  FOR_BLOCKS {
    float f = 0, g = 0, b = 0;
#pragma omp simd reduction(+ : f, g, b)
    for (long v = start; v < end; v++) {
      const float x = (at(z_q, v) - nq.top) * per_T, w = (at(z_p, v) - np.top) * per_T, d = x - w + to_teacher;
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
  double kl = 0;
  FOR_BLOCKS {
    float k = 0;
#pragma omp simd reduction(+ : k)
    for (long v = start; v < end; v++) {
      const float d = at(z_q, v) - nq.top - (at(z_p, v) - np.top) + (np.log_normaliser - nq.log_normaliser);
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
    *f = s * r.p * p_to_m + rest * r.q * q_to_m;
    return rest * q_to_m;
  }
  if (objective == SKEW_FORWARD_KL) {
    *f = rest * r.difference + r.p * p_to_m;
    return rest * rest * q_minus_p / mixture;
  }
  *f = r.q * q_to_m - rest * r.difference;
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
        const float w = at(z_p, v) - np.top;
        m += w > middle ? exp_(w - np.log_normaliser) : 0.0f;
      }
      mass += m;
    }
    if (mass >= head_mass) low = middle; else high = middle;
  }
  double head = 0, whole = 0;
  FOR_BLOCKS {
    float h = 0, a = 0;
#pragma omp simd reduction(+ : h, a)
    for (long v = start; v < end; v++) {
      const float x = at(z_q, v) - nq.top, w = at(z_p, v) - np.top;
      const float d = x - w - (nq.log_normaliser - np.log_normaliser);
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
  const float offset = nq.log_normaliser - np.log_normaliser;
  long likeliest = 0;
  while (likeliest + 1 < V && z_q[likeliest] < nq.top) likeliest++;
  const float w_top = at(z_p, likeliest) - np.top, d_top = -w_top - offset;
  float unused;
  const float x_top = derivative(objective, s, d_top, pair(-nq.log_normaliser, w_top - np.log_normaliser, d_top), &unused);
  double loss = 0, kl = 0, mean_x = 0;
  FOR_BLOCKS {
    float f = 0, k = 0, m = 0;
#pragma omp simd reduction(+ : f, k, m)
    for (long v = start; v < end; v++) {
      const float x_q = at(z_q, v) - nq.top, w = at(z_p, v) - np.top, d = x_q - w - offset;
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

// --- a row ------------------------------------------------------------------------------------------------------------

static void row(float *z_q, float *z_p, long V, long y, const Task *task, float *scratch, Columns *out, int gradient) {
  const float share = task->share;
  const double a = task->parameter;
  float *slope = scratch, *exps = scratch + V;
  memset(out, 0, sizeof *out);
  finish(z_q, V, &task->student, slope);
  if (z_p) finish(z_p, V, &task->teacher, NULL);
  const Norm nq = normalise(z_q, V, 1, exps);
  out->correct = z_q[y] >= nq.top;
  out->cross_entropy = nq.log_normaliser - (at(z_q, y) - nq.top);
  out->entropy = nq.log_normaliser - nq.mean;
  if (z_p) {
    const int objective = share > 0 ? task->objective : SFT;
    const float label_p = at(z_p, y);
    Norm np;
    if (objective == TAID)
      taid(z_q, z_p, V, nq, maximum(z_p, V), a, share, exps, &np, out);
    else
      np = normalise(z_p, V, 1, exps + V);
    out->teacher_cross_entropy = np.log_normaliser - (label_p - np.top);
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
      case DKD: dkd(z_q, z_p, V, y, nq, np, a, task->alpha, task->beta, share, exps, out); break;
      default: out->kl = to_teacher(z_q, z_p, V, nq, np, exps, 1, 0, 1).forward;  // the gradient is q
    }
  } else if (gradient) {
    for (long v = 0; v < V; v++) z_q[v] = exps[v] * nq.per_sum;
  }
  if (!gradient) return;
  z_q[y] -= 1 - share;
  if (task->student.softcap != 0.0f)
    for (long v = 0; v < V; v++) z_q[v] *= slope[v];
  else if (task->student.scale != 1.0f)
    for (long v = 0; v < V; v++) z_q[v] *= task->student.scale;
}

// Returns 0, or 1 where memory for a thread's scratch rows is missing.
int taid_rows(
    float *student, float *teacher, const int64_t *labels, long M, long V, long student_stride, long teacher_stride,
    const Task *task, Columns *columns, int gradient
) {
  int failed = 0;
#pragma omp parallel
  {
    float *scratch = malloc(5 * V * sizeof(float));
    if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (long m = 0; m < M; m++)
      if (scratch)
        row(student + m * student_stride, teacher ? teacher + m * teacher_stride : NULL, V, labels[m], task, scratch, columns + m,
            gradient);
    free(scratch);
  }
  return failed;
}
