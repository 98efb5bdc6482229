// A linear-Gaussian chain with Gaussian sites: filter, smoother and their adjoint in two passes, without autodiff through time.
//
//   x_0 ~ N(0, P0),  x_k = A x_{k-1} + q_k,  q_k ~ N(0, Q),  f_k = H x_k,  site_k(f) = exp(nat1^T f - f^T nat2 f / 2)
//
// Forward, covariance form, for any PSD nat2 (singular ones too). With mu = H m, V = H P H^T of the prediction:
//   U = (I + nat2 V)^-1,  g = nat1 - nat2 mu,  e = U g,  W = U nat2,  m <- m + P H^T e,  P <- P - P H^T W H P  (filtered),
//   log Z += log|U|/2 + (nat1 + g)^T mu / 2 + g^T V e / 2.
// Backward (modified Bryson-Frazier; no covariance is inverted, so coincident times and singular P0 are fine). r and N say what the sites after
// k make of its filtered state: smoothed mean m + P r, covariance P - P N P. Taken of the filtered, not of the predicted state, the difference
// loses no digits where sites are precise. Through the site of k, with B = P H^T of the filtered P and K = B nat2:
//   r <- r + H^T (e - K^T r),  N <- N - H^T K^T N - N K H + H^T (W + K^T N K) H,  and between points  r <- A^T r,  N <- A^T N A.
// r and N are the adjoints of log Z: with G = r r^T - N after the site of k + 1 and before its transition,
//   d/dP0 = G/2,  d/dQ = G/2,  d/dA = r m^T + G A P  (m, P filtered at k).
// The smoothed moments are themselves derivatives of log Z in the sites, so run on dual numbers with a tangent on the sites the same two passes
// give the adjoint of the moments.
//
// Compiled for D states and C latents, so that small loops unroll; with ONES, H is that matrix of zeros and ones (row by row).
#include <cmath>
#include <cstdint>

#if !defined(D) || !defined(C)
#error "compile with -DD=<states> -DC=<latents>"
#endif

static constexpr bool SMALL = D <= 4;
#if D <= 4
#define INLINE inline __attribute__((always_inline))  // small arrays are to stay in registers
#else
#define INLINE inline
#endif
#if D <= 16
#define LOCAL
#else
#define LOCAL static thread_local  // large matrices: the stack of a thread may be small
#endif

#ifdef ONES
static constexpr bool ones[C * D] = {ONES};
#endif

// A value and its tangent, in one vector of two.
typedef double Pair __attribute__((vector_size(16)));
struct Dual {
    Pair p;
    Dual() = default;
    Dual(Pair p) : p(p) {}
    Dual(double v, double t = 0) : p{v, t} {}
    double v() const { return p[0]; }
    double t() const { return p[1]; }
    Dual& operator+=(Dual o) { p += o.p; return *this; }
    Dual& operator-=(Dual o) { p -= o.p; return *this; }
};
static INLINE Dual operator+(Dual a, Dual b) { return a.p + b.p; }
static INLINE Dual operator-(Dual a, Dual b) { return a.p - b.p; }
static INLINE Dual operator*(double a, Dual b) { return a * b.p; }
static INLINE Dual operator*(Dual a, Dual b) { return a.v() * b.p + b.v() * Pair{0, a.t()}; }
static INLINE Dual operator/(Dual a, Dual b) { double i = 1 / b.v(), q = a.v() * i; return {q, (a.t() - q * b.t()) * i}; }
static INLINE double value(double a) { return a; }
static INLINE double value(Dual a) { return a.v(); }

// log of a product of many numbers, NaN where one of them is negative; the logarithm is taken now and then.
struct LogProduct {
    double product = 1, sum = 0, tangent = 0;
    void times(double v) {
        if (v > 1e100) { sum += std::log(v); return; }
        product *= v;
        if (!(product > 1e-100 && product < 1e100)) { sum += std::log(product); product = 1; }
    }
    void times(Dual d) { times(d.v()); tangent += d.t() / d.v(); }
    template <class T> T log() const;
};

template <> inline double LogProduct::log<double>() const { return sum + std::log(product); }
template <> inline Dual LogProduct::log<Dual>() const { return {sum + std::log(product), tangent}; }

// Small matrices are worked with by their lower triangle, larger ones by whole rows, which vectorise.
static constexpr int upto(int i) { return SMALL ? i + 1 : D; }

// H x for the D entries of x: at(j).
template <class T, class F>
static INLINE T times_H(const double* h, int o, F at) {
#ifdef ONES
    (void)h;
    T s = T(0.0);
    bool first = true;
    for (int j = 0; j < D; ++j)
        if (ones[o * D + j]) {
            s = first ? at(j) : s + at(j);
            first = false;
        }
    return s;
#else
    T s = h[o * D] * at(0);
    for (int j = 1; j < D; ++j) s += h[o * D + j] * at(j);
    return s;
#endif
}

// add(j, h_j) for the entries of row o of H that are not zero.
template <class F>
static INLINE void each_H(const double* h, int o, F add) {
    for (int j = 0; j < D; ++j) {
#ifdef ONES
        (void)h;
        if (ones[o * D + j]) add(j, 1.0);
#else
        add(j, h[o * D + j]);
#endif
    }
}

// A X, or A^T X. Transitions of several latents are block diagonal: zeros are passed over.
template <bool transposed, class T>
static INLINE void product(const double* A, const T (&X)[D][D], T (&AX)[D][D]) {
    for (int i = 0; i < D; ++i) {
        for (int j = 0; j < D; ++j) AX[i][j] = T(0.0);
        for (int k = 0; k < D; ++k) {
            double a = transposed ? A[k * D + i] : A[i * D + k];
            if (!SMALL && a == 0.0) continue;
            for (int j = 0; j < D; ++j) AX[i][j] += a * X[k][j];
        }
    }
}

// X <- A X A^T (or A^T X A) + Q for symmetric X; Q may be null.
template <bool transposed, class T>
static INLINE void congruence(const double* A, const double* Q, T (&X)[D][D]) {
    LOCAL T AX[D][D];
    product<transposed>(A, X, AX);
    if (SMALL) {
        for (int i = 0; i < D; ++i)
            for (int j = 0; j <= i; ++j) {
                T s = Q ? T(Q[i * D + j]) : T(0.0);
                for (int l = 0; l < D; ++l) s += (transposed ? A[l * D + j] : A[j * D + l]) * AX[i][l];
                X[i][j] = X[j][i] = s;
            }
        return;
    }
    LOCAL T XA[D][D];
    for (int i = 0; i < D; ++i)
        for (int j = 0; j < D; ++j) XA[i][j] = AX[j][i];
    product<transposed>(A, XA, X);
    for (int i = 0; i < D; ++i)
        for (int j = 0; j <= i; ++j) X[i][j] = X[j][i] = Q ? X[i][j] + T(Q[i * D + j]) : X[i][j];
}

template <bool transposed, class T>
static INLINE void transform(const double* A, T (&x)[D]) {  // x <- A x, or A^T x
    T y[D];
    for (int i = 0; i < D; ++i) {
        T s = T(0.0);
        for (int j = 0; j < D; ++j) s += (transposed ? A[j * D + i] : A[i * D + j]) * x[j];
        y[i] = s;
    }
    for (int i = 0; i < D; ++i) x[i] = y[i];
}

// X Y for [C C] and [C K].
template <int K, class T, class S>
static INLINE void times(const S* X, const T (&Y)[C][K], T (&XY)[C][K]) {
    for (int o = 0; o < C; ++o) {
        for (int i = 0; i < K; ++i) XY[o][i] = X[o * C] * Y[0][i];
        for (int p = 1; p < C; ++p)
            for (int i = 0; i < K; ++i) XY[o][i] += X[o * C + p] * Y[p][i];
    }
}

// U = S^-1 for S [C C], by elimination with partial pivoting; returns its determinant.
template <class T>
static INLINE T invert(T (&S)[C][C], T (&U)[C][C]) {
    if (C == 1) {
        U[0][0] = T(1.0) / S[0][0];
        return S[0][0];
    }
    T det = T(1.0);
    for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) U[i][j] = T(i == j ? 1.0 : 0.0);
    for (int p = 0; p < C; ++p) {
        int best = p;
        for (int i = p + 1; i < C; ++i)
            if (std::fabs(value(S[i][p])) > std::fabs(value(S[best][p]))) best = i;
        if (best != p) {
            det = -1.0 * det;
            for (int j = 0; j < C; ++j) {
                T s = S[p][j], u = U[p][j];
                S[p][j] = S[best][j], S[best][j] = s;
                U[p][j] = U[best][j], U[best][j] = u;
            }
        }
        det = det * S[p][p];
        T inverse = T(1.0) / S[p][p];
        for (int j = 0; j < C; ++j) S[p][j] = S[p][j] * inverse, U[p][j] = U[p][j] * inverse;
        for (int i = 0; i < C; ++i) {
            if (i == p) continue;
            T l = S[i][p];
            for (int j = 0; j < C; ++j) S[i][j] -= l * S[p][j], U[i][j] -= l * U[p][j];
        }
    }
    return det;
}

// What the forward pass leaves for the backward one; all of the filtered state.
template <class T>
struct Point {
    T mu[C], B[C][D], e[C], W[C][C];  // mu = H m, B = H P
};
template <class T>
struct Belief {  // only where states or the adjoint are asked for
    T m[D], P[D * (D + 1) / 2];
    T cov(int i, int j) const { return i >= j ? P[i * (i + 1) / 2 + j] : P[j * (j + 1) / 2 + i]; }
};

struct Chain {
    int64_t n;
    const int64_t* step;
    const double *A, *Q, *P0, *H;
    int64_t stride;  // of H from point to point
    const double* h(int64_t k) const { return H + k * stride; }
};

// The sites: load(k) puts those of a point into n1 [C] and n2 [C C].
struct Sites {
    using T = double;
    const double *nat1, *nat2;
    void load(int64_t k, double (&n1)[C], double (&n2)[C * C]) const {
        for (int o = 0; o < C; ++o) n1[o] = nat1[k * C + o];
        for (int o = 0; o < C * C; ++o) n2[o] = nat2[k * C * C + o];
    }
};
// Sites with the tangent along which log Z changes as sum d_mean^T m + d_cov : V does with everything else, m and V being its derivatives:
// m = d log Z / d nat1,  V = -2 d log Z / d nat2 - m m^T.
struct MovingSites {
    using T = Dual;
    Sites at;
    const double *mean, *d_mean, *d_cov;  // the latter two may be null
    void load(int64_t k, Dual (&n1)[C], Dual (&n2)[C * C]) const {
        LOCAL double v2[C * C];
        double v1[C];
        at.load(k, v1, v2);
        for (int o = 0; o < C; ++o) {
            double t = d_mean ? d_mean[k * C + o] : 0.0;
            for (int p = 0; p < C; ++p) {
                const double g = d_cov ? d_cov[(k * C + o) * C + p] + d_cov[(k * C + p) * C + o] : 0.0;
                t -= g * mean[k * C + p];
                n2[o * C + p] = {v2[o * C + p], -g};
            }
            n1[o] = {v1[o], t};
        }
    }
};

template <class Given, class T = typename Given::T>
static T filter(const Chain& chain, const Given& sites, Point<T>* points, Belief<T>* beliefs) {
    LOCAL T P[D][D];
    T m[D], total = T(0.0);
    LogProduct dets;
    for (int i = 0; i < D; ++i) {
        m[i] = T(0.0);
        for (int j = 0; j < D; ++j) P[i][j] = T(chain.P0[i * D + j]);
    }
    for (int64_t k = 0; k < chain.n; ++k) {
        const int64_t step = chain.step[k];
        if (k > 0 && step >= 0) {
            transform<false>(chain.A + step * D * D, m);
            congruence<false>(chain.A + step * D * D, chain.Q + step * D * D, P);
        }
        const double* h = chain.h(k);
        LOCAL T n2[C * C];
        T n1[C];
        sites.load(k, n1, n2);
        LOCAL T B[C][D], V[C][C], S[C][C], U[C][C], W[C][C];
        T mu[C], g[C], e[C];
        for (int o = 0; o < C; ++o) {
            mu[o] = times_H<T>(h, o, [&](int j) { return m[j]; });
            for (int i = 0; i < D; ++i) B[o][i] = times_H<T>(h, o, [&](int j) { return P[j][i]; });
        }
        for (int o = 0; o < C; ++o)
            for (int p = 0; p < C; ++p) V[o][p] = times_H<T>(h, p, [&](int j) { return B[o][j]; });
        times(n2, V, S);
        for (int o = 0; o < C; ++o) {
            S[o][o] += T(1.0);
            g[o] = n1[o];
            for (int p = 0; p < C; ++p) g[o] -= n2[o * C + p] * mu[p];
        }
        dets.times(invert(S, U));
        for (int o = 0; o < C; ++o) {
            e[o] = T(0.0);
            for (int p = 0; p < C; ++p) e[o] += U[o][p] * g[p];
            for (int p = 0; p <= o; ++p) {
                T w = T(0.0);
                for (int l = 0; l < C; ++l) w += U[o][l] * n2[l * C + p];
                W[o][p] = W[p][o] = w;
            }
        }
        Point<T>& point = points[k];
        for (int o = 0; o < C; ++o) {
            T shift = T(0.0);
            for (int p = 0; p < C; ++p) {
                shift += V[o][p] * e[p];
                point.W[o][p] = W[o][p];
            }
            point.e[o] = e[o];
            point.mu[o] = mu[o] + shift;
            total += 0.5 * ((n1[o] + g[o]) * mu[o] + g[o] * shift);  // nat1 mu - mu nat2 mu / 2 = (nat1 + g) mu / 2
        }
        LOCAL T WB[C][D];
        times(&W[0][0], B, WB);
        for (int o = 0; o < C; ++o)
            for (int i = 0; i < D; ++i) {
                m[i] += B[o][i] * e[o];
                T s = U[0][o] * B[0][i];  // U^T H P = H P - V W H P, without the cancellation
                for (int p = 1; p < C; ++p) s += U[p][o] * B[p][i];
                point.B[o][i] = s;
            }
        for (int i = 0; i < D; ++i)
            for (int o = 0; o < C; ++o)
                for (int j = 0; j < upto(i); ++j) P[i][j] -= WB[o][i] * B[o][j];
        for (int i = 0; i < D; ++i)
            for (int j = 0; j < i; ++j) P[j][i] = P[i][j];
        if (beliefs)
            for (int i = 0; i < D; ++i) {
                beliefs[k].m[i] = m[i];
                for (int j = 0; j <= i; ++j) beliefs[k].P[i * (i + 1) / 2 + j] = P[i][j];
            }
    }
    return total - 0.5 * dets.template log<T>();
}

// Where results go; all but mean and cov may be null. Of numbers: the moments, and weight times the derivatives of log Z. Of dual numbers:
// (weight times the value + the tangent) of the derivatives of log Z, those in nat1 and nat2 in the place of mean and cov.
struct Results {
    double *mean, *cov, *state, *state_cov, *A, *Q, *P0, *H, weight;
    double of(double x) const { return weight * x; }
    double of(Dual x) const { return weight * x.v() + x.t(); }
};

// Of the step that led to k + 1: a is its transition, r and N belong to the prediction of k + 1.
template <class T>
static INLINE void step_adjoint(const double* a, const Belief<T>& belief, const T (&r)[D], const T (&N)[D][D], const Results& out, int64_t u) {
    LOCAL T G[D][D], AP[D][D], P[D][D], dA[D][D];
    for (int i = 0; i < D; ++i)
        for (int j = 0; j <= i; ++j) {
            G[i][j] = G[j][i] = r[i] * r[j] - N[i][j];
            P[i][j] = P[j][i] = belief.cov(i, j);
        }
    product<false>(a, P, AP);
    for (int i = 0; i < D; ++i) {
        for (int j = 0; j < D; ++j) dA[i][j] = r[i] * belief.m[j];
        for (int l = 0; l < D; ++l)
            for (int j = 0; j < D; ++j) dA[i][j] += G[i][l] * AP[l][j];
        for (int j = 0; j < D; ++j) {
            out.A[u + i * D + j] += out.of(dA[i][j]);
            out.Q[u + i * D + j] += 0.5 * out.of(G[i][j]);
        }
    }
}

// Smoothed mean and covariance of the state at k.
template <class T>
static INLINE void smoothed(const Belief<T>& belief, const T (&r)[D], const T (&N)[D][D], T (&x)[D], T (&X)[D][D]) {
    LOCAL T P[D][D], NP[D][D];
    for (int i = 0; i < D; ++i)
        for (int j = 0; j < D; ++j) {
            P[i][j] = belief.cov(i, j);
            NP[i][j] = T(0.0);
        }
    for (int i = 0; i < D; ++i)
        for (int l = 0; l < D; ++l)
            for (int j = 0; j < D; ++j) NP[i][j] += N[i][l] * P[l][j];
    for (int i = 0; i < D; ++i) {
        x[i] = belief.m[i];
        for (int j = 0; j < D; ++j) x[i] += P[i][j] * r[j];
        for (int j = 0; j <= i; ++j) {
            T s = P[i][j];
            for (int l = 0; l < D; ++l) s -= P[i][l] * NP[l][j];
            X[i][j] = X[j][i] = s;
        }
    }
}

static INLINE void put_moments(const Results& out, int64_t k, const double (&m)[C], const double (&V)[C][C]) {
    for (int o = 0; o < C; ++o) {
        out.mean[k * C + o] = m[o];
        for (int p = 0; p < C; ++p) out.cov[(k * C + o) * C + p] = V[o][p];
    }
}
static INLINE void put_moments(const Results& out, int64_t k, const Dual (&m)[C], const Dual (&V)[C][C]) {
    for (int o = 0; o < C; ++o) {
        out.mean[k * C + o] = out.of(m[o]);
        for (int p = 0; p < C; ++p) out.cov[(k * C + o) * C + p] = -0.5 * out.of(V[o][p] + m[o] * m[p]);
    }
}

template <class Given, class T = typename Given::T>
static void smoother(const Chain& chain, const Given& sites, const Point<T>* points, const Belief<T>* beliefs, const Results& out) {
    LOCAL T N[D][D];
    T r[D];
    for (int i = 0; i < D; ++i) {
        r[i] = T(0.0);
        for (int j = 0; j < D; ++j) N[i][j] = T(0.0);
    }
    for (int64_t k = chain.n - 1; k >= 0; --k) {
        if (k < chain.n - 1 && chain.step[k + 1] >= 0) {
            const int64_t u = chain.step[k + 1] * D * D;
            if (out.A) step_adjoint(chain.A + u, beliefs[k], r, N, out, u);
            transform<true>(chain.A + u, r);
            congruence<true>(chain.A + u, nullptr, N);
        }
        const Point<T>& point = points[k];
        const double* h = chain.h(k);
        LOCAL T n2[C * C];
        T n1[C];
        sites.load(k, n1, n2);
        LOCAL T Y[C][D], K[C][C], V[C][C];
        T z[C], m[C];
        for (int o = 0; o < C; ++o) {
            for (int i = 0; i < D; ++i) Y[o][i] = point.B[o][0] * N[0][i];  // H P N
            for (int j = 1; j < D; ++j)
                for (int i = 0; i < D; ++i) Y[o][i] += point.B[o][j] * N[j][i];
            z[o] = T(0.0);
            for (int i = 0; i < D; ++i) z[o] += point.B[o][i] * r[i];  // H P r
            m[o] = point.mu[o] + z[o];
        }
        for (int o = 0; o < C; ++o)
            for (int p = 0; p <= o; ++p) {
                T s = T(0.0);
                for (int i = 0; i < D; ++i) s += point.B[o][i] * Y[p][i];
                K[o][p] = K[p][o] = s;  // H P N P H^T
                V[o][p] = V[p][o] = times_H<T>(h, o, [&](int j) { return point.B[p][j]; }) - s;
            }
        put_moments(out, k, m, V);
        if (out.state) {
            LOCAL T X[D][D];
            T x[D];
            smoothed(beliefs[k], r, N, x, X);
            for (int i = 0; i < D; ++i) {
                out.state[k * D + i] = value(x[i]);
                for (int j = 0; j < D; ++j) out.state_cov[(k * D + i) * D + j] = value(X[i][j]);
            }
        }
        if (out.H) {  // E[(nat1 - nat2 f) x^T] = (nat1 - nat2 E f) E x^T - nat2 Cov(f, x)
            LOCAL T HX[C][D], LHX[C][D];
            T x[D];
            for (int j = 0; j < D; ++j) {
                x[j] = beliefs[k].m[j];
                for (int l = 0; l < D; ++l) x[j] += beliefs[k].cov(j, l) * r[l];
                for (int o = 0; o < C; ++o) {
                    HX[o][j] = point.B[o][j];
                    for (int l = 0; l < D; ++l) HX[o][j] -= Y[o][l] * beliefs[k].cov(l, j);
                }
            }
            times(n2, HX, LHX);
            for (int o = 0; o < C; ++o) {
                T g = n1[o];
                for (int p = 0; p < C; ++p) g -= n2[o * C + p] * m[p];
                for (int j = 0; j < D; ++j) out.H[k * chain.stride + o * D + j] += out.of(g * x[j] - LHX[o][j]);
            }
        }
        // through the site of k
        LOCAL T LY[C][D], LK[C][C], F[C][C];
        T E[C];
        times(n2, Y, LY);
        times(n2, K, LK);
        for (int o = 0; o < C; ++o) {
            E[o] = point.e[o];
            for (int p = 0; p < C; ++p) {
                E[o] -= n2[o * C + p] * z[p];
                T s = point.W[o][p];
                for (int l = 0; l < C; ++l) s += LK[o][l] * n2[l * C + p];
                F[o][p] = s;
            }
        }
        for (int o = 0; o < C; ++o)
            each_H(h, o, [&](int i, double hi) {
                r[i] += hi * E[o];
                for (int j = 0; j < D; ++j) N[i][j] -= hi * LY[o][j];
                for (int j = 0; j < D; ++j) N[j][i] -= hi * LY[o][j];
                for (int p = 0; p < C; ++p) each_H(h, p, [&](int j, double hj) { N[i][j] += (hi * hj) * F[o][p]; });
            });
    }
    if (out.P0)
        for (int i = 0; i < D; ++i)
            for (int j = 0; j < D; ++j) out.P0[i * D + j] = 0.5 * out.of(r[i] * r[j] - N[i][j]);
}

static constexpr int LANES = 8;

// y <- A y (or A^T y) for LANES vectors at once.
template <bool transposed>
static INLINE void transform(const double* A, double (&x)[D][LANES]) {
    double y[D][LANES] = {};
    for (int i = 0; i < D; ++i)
        for (int j = 0; j < D; ++j)
            for (int z = 0; z < LANES; ++z) y[i][z] += (transposed ? A[j * D + i] : A[i * D + j]) * x[j][z];
    for (int i = 0; i < D; ++i)
        for (int z = 0; z < LANES; ++z) x[i][z] = y[i][z];
}

// Smoothed means of up to LANES sets of nat1 [., n, C] over the gains B that filter() left: with B = U^T H P of the prediction,
// m <- m + B^T (nat1 - nat2 H m) forward, mean = H m + B r and r <- r + H^T (nat1 - nat2 mean) backward.
static void several(const Chain& chain, const Point<double>* points, int lanes, const double* nat1, const double* nat2, double* mean) {
    const int64_t set = chain.n * C;  // from one set to the next
    double x[D][LANES] = {}, g[C][LANES];
    for (int64_t k = 0; k < chain.n; ++k) {
        if (k > 0 && chain.step[k] >= 0) transform<false>(chain.A + chain.step[k] * D * D, x);
        const double *h = chain.h(k), *n2 = nat2 + k * C * C;
        for (int o = 0; o < C; ++o)
            for (int z = 0; z < LANES; ++z) g[o][z] = z < lanes ? nat1[z * set + k * C + o] : 0.0;
        for (int p = 0; p < C; ++p)
            for (int z = 0; z < LANES; ++z) {
                const double f = times_H<double>(h, p, [&](int j) { return x[j][z]; });
                for (int o = 0; o < C; ++o) g[o][z] -= n2[o * C + p] * f;
            }
        for (int o = 0; o < C; ++o)
            for (int i = 0; i < D; ++i)
                for (int z = 0; z < LANES; ++z) x[i][z] += points[k].B[o][i] * g[o][z];
        for (int o = 0; o < C; ++o)
            for (int z = 0; z < lanes; ++z) mean[z * set + k * C + o] = times_H<double>(h, o, [&](int j) { return x[j][z]; });
    }
    double r[D][LANES] = {};
    for (int64_t k = chain.n - 1; k >= 0; --k) {
        if (k < chain.n - 1 && chain.step[k + 1] >= 0) transform<true>(chain.A + chain.step[k + 1] * D * D, r);
        const double *h = chain.h(k), *n2 = nat2 + k * C * C;
        for (int o = 0; o < C; ++o)
            for (int z = 0; z < LANES; ++z) g[o][z] = z < lanes ? nat1[z * set + k * C + o] : 0.0;
        for (int p = 0; p < C; ++p) {
            double f[LANES] = {};
            for (int i = 0; i < D; ++i)
                for (int z = 0; z < LANES; ++z) f[z] += points[k].B[p][i] * r[i][z];
            for (int z = 0; z < lanes; ++z) {
                f[z] += mean[z * set + k * C + p];
                mean[z * set + k * C + p] = f[z];
            }
            for (int o = 0; o < C; ++o)
                for (int z = 0; z < LANES; ++z) g[o][z] -= n2[o * C + p] * f[z];
        }
        for (int o = 0; o < C; ++o)
            each_H(h, o, [&](int i, double hi) {
                for (int z = 0; z < LANES; ++z) r[i][z] += hi * g[o][z];
            });
    }
}

extern "C" {
// Bytes of workspace for each point: values, values with states or adjoint, dual numbers.
void sizes(int64_t* out) {
    out[0] = sizeof(Point<double>);
    out[1] = sizeof(Point<double>) + sizeof(Belief<double>);
    out[2] = sizeof(Point<Dual>) + sizeof(Belief<Dual>);
}

// log Z, mean, cov; states, and weight times the derivatives of log Z in (A, Q, P0, H), where their pointers are not null. work: see sizes.
void smooth(int64_t n, const int64_t* step, const double* A, const double* Q, const double* P0, const double* H, int64_t stride,
            const double* nat1, const double* nat2, char* work, double weight, double* log_Z, double* mean, double* cov, double* state,
            double* state_cov, double* dA, double* dQ, double* dP0, double* dH) {
    const Chain chain = {n, step, A, Q, P0, H, stride};
    const Sites sites = {nat1, nat2};
    auto* points = (Point<double>*)work;
    auto* beliefs = dA || state || dH ? (Belief<double>*)(points + n) : nullptr;
    *log_Z = filter(chain, sites, points, beliefs);
    smoother(chain, sites, points, beliefs, {mean, cov, state, state_cov, dA, dQ, dP0, dH, weight});
}

// The derivatives of weight log Z + sum d_mean^T mean + d_cov : cov in everything, where mean is what smooth() gave; dH may be null.
void adjoint(int64_t n, const int64_t* step, const double* A, const double* Q, const double* P0, const double* H, int64_t stride,
             const double* nat1, const double* nat2, char* work, double weight, const double* mean, const double* d_mean,
             const double* d_cov, double* d_nat1, double* d_nat2, double* dA, double* dQ, double* dP0, double* dH) {
    const Chain chain = {n, step, A, Q, P0, H, stride};
    const MovingSites sites = {{nat1, nat2}, mean, d_mean, d_cov};
    auto* points = (Point<Dual>*)work;
    auto* beliefs = (Belief<Dual>*)(points + n);
    filter(chain, sites, points, beliefs);
    smoother(chain, sites, points, beliefs, {d_nat1, d_nat2, nullptr, nullptr, dA, dQ, dP0, dH, weight});
}

// Means [s n C] of f for each of s sets of nat1 [s n C], s > 0, over the same nat2.
void means(int64_t n, int64_t s, const int64_t* step, const double* A, const double* Q, const double* P0, const double* H, int64_t stride,
           const double* nat1, const double* nat2, char* work, double* mean) {
    const Chain chain = {n, step, A, Q, P0, H, stride};
    auto* points = (Point<double>*)work;
    filter(chain, Sites{nat1, nat2}, points, (Belief<double>*)nullptr);
    for (int64_t first = 0; first < s; first += LANES)
        several(chain, points, s - first < LANES ? (int)(s - first) : LANES, nat1 + first * n * C, nat2, mean + first * n * C);
}

// With F_k = A (I - K_k^T H): x_0 = b_0, x_k = F_{k-1} x_{k-1} + b_k; or, from the end, x_{n-1} = b_{n-1}, x_k = F_k^T x_{k+1} + b_k.
// K [n C D], or one for all with stride 0; b and x [n D].
void gained(int64_t n, int from_the_end, const double* A, const double* H, const double* K, int64_t stride, const double* b, double* x) {
    double y[D], f[C];
    for (int64_t i = 0; i < n; ++i) {
        const int64_t k = from_the_end ? n - 1 - i : i;
        const double* own = b + k * D;
        double* out = x + k * D;
        for (int j = 0; j < D; ++j) out[j] = own[j];
        if (i == 0) continue;
        const double *last = from_the_end ? out + D : out - D, *gain = K + (from_the_end ? k : k - 1) * stride;
        if (from_the_end) {
            for (int j = 0; j < D; ++j) y[j] = 0.0;
            for (int l = 0; l < D; ++l)
                for (int j = 0; j < D; ++j) y[j] += A[l * D + j] * last[l];
            for (int o = 0; o < C; ++o) {
                double s = 0.0;
                for (int j = 0; j < D; ++j) s += gain[o * D + j] * y[j];
                f[o] = s;
            }
            for (int o = 0; o < C; ++o) each_H(H, o, [&](int j, double h) { y[j] -= h * f[o]; });
            for (int j = 0; j < D; ++j) out[j] += y[j];
        } else {
            for (int o = 0; o < C; ++o) f[o] = times_H<double>(H, o, [&](int j) { return last[j]; });
            for (int j = 0; j < D; ++j) {
                double s = last[j];
                for (int o = 0; o < C; ++o) s -= gain[o * D + j] * f[o];
                y[j] = s;
            }
            for (int j = 0; j < D; ++j) {
                double s = 0.0;
                for (int l = 0; l < D; ++l) s += A[j * D + l] * y[l];
                out[j] += s;
            }
        }
    }
}

// x_k = A x_{k-1} + noise_k for s independent paths [s n D]; noise_0 is x_0. Where step < 0 the point repeats the one before.
void propagate(int64_t n, int64_t s, const int64_t* step, const double* A, const double* noise, double* x) {
    for (int64_t p = 0; p < s; ++p) {
        const double* q = noise + p * n * D;
        double* y = x + p * n * D;
        for (int64_t k = 0; k < n; ++k)
            for (int i = 0; i < D; ++i) {
                double v;
                if (k == 0) v = q[i];
                else if (step[k] < 0) v = y[(k - 1) * D + i];
                else {
                    const double* a = A + step[k] * D * D;
                    v = q[k * D + i];
                    for (int j = 0; j < D; ++j) v += a[i * D + j] * y[(k - 1) * D + j];
                }
                y[k * D + i] = v;
            }
    }
}
}
