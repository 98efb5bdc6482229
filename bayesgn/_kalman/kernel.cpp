// A linear-Gaussian chain with Gaussian sites: filter, smoother and their adjoint in two passes, without autodiff through time.
//
//   x_0 ~ N(0, P0),  x_k = A x_{k-1} + q_k,  q_k ~ N(0, Q),  f_k = H x_k,  site_k(f) = exp(nat1^T f - f^T nat2 f / 2)
//
// Forward (covariance form, any PSD nat2, singular ones too): with mu = H m, V = H P H^T, S = I + nat2 V,
//   e = S^-1 (nat1 - nat2 mu),  W = S^-1 nat2,  m <- m + P H^T e,  P <- P - P H^T W H P,
//   log Z += -log|S|/2 + nat1^T mu - mu^T nat2 mu / 2 + g^T V S^-1 g / 2,  g = nat1 - nat2 mu.
// Backward (modified Bryson-Frazier; no covariance is inverted, so coincident times and singular P0 are fine):
//   r = H^T e + M^T r,  N = H^T W H + M^T N M,  M = I - P H^T W H;  between points r <- A^T r,  N <- A^T N A;
//   smoothed: m + P r,  P - P N P  (m, P predicted).  r and N are the adjoints of log Z:
//   d/dP0 = G/2,  d/dQ = G/2,  d/dA = r m_f^T + G A P_f,  G = r r^T - N  (m_f, P_f filtered).
// Run on dual numbers with a tangent on the sites, the same two passes give the adjoint of the smoothed moments.
//
// Compiled for one state dimension D and one number of latents C, so that all small loops unroll.
#include <cmath>
#include <cstdint>
#include <vector>

#ifndef D
#error "compile with -DD=<states> -DC=<latents>"
#endif

struct Dual {
    double v, t;  // value and tangent
    Dual(double v = 0, double t = 0) : v(v), t(t) {}
    Dual& operator+=(Dual o) { v += o.v; t += o.t; return *this; }
    Dual& operator-=(Dual o) { v -= o.v; t -= o.t; return *this; }
};
static inline Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.t + b.t}; }
static inline Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.t - b.t}; }
static inline Dual operator-(Dual a) { return {-a.v, -a.t}; }
static inline Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.v * b.t + a.t * b.v}; }
static inline Dual operator*(double a, Dual b) { return {a * b.v, a * b.t}; }
static inline Dual operator*(Dual a, double b) { return {a.v * b, a.t * b}; }
static inline Dual operator/(Dual a, Dual b) { double q = a.v / b.v; return {q, (a.t - q * b.t) / b.v}; }
static inline Dual log(Dual a) { return {std::log(a.v), a.t / a.v}; }
static inline double value(double a) { return a; }
static inline double value(Dual a) { return a.v; }
using std::log;

// S [C C], right-hand sides B [C K] overwritten by S^-1 B; returns log det S (NaN where it is not positive). Partial pivoting.
template <class T, int K>
static inline T solve(T (&S)[C][C], T (&B)[C][K]) {
    T logdet = T(0.0);
    int sign = 1;
    for (int p = 0; p < C; ++p) {
        int best = p;
        for (int i = p + 1; i < C; ++i)
            if (std::fabs(value(S[i][p])) > std::fabs(value(S[best][p]))) best = i;
        if (best != p) {
            sign = -sign;
            for (int j = 0; j < C; ++j) { T s = S[p][j]; S[p][j] = S[best][j]; S[best][j] = s; }
            for (int j = 0; j < K; ++j) { T s = B[p][j]; B[p][j] = B[best][j]; B[best][j] = s; }
        }
        T pivot = S[p][p];
        if (value(pivot) < 0) { sign = -sign; logdet += log(-pivot); } else logdet += log(pivot);
        for (int i = p + 1; i < C; ++i) {
            T l = S[i][p] / pivot;
            for (int j = p + 1; j < C; ++j) S[i][j] -= l * S[p][j];
            for (int j = 0; j < K; ++j) B[i][j] -= l * B[p][j];
        }
    }
    for (int p = C - 1; p >= 0; --p)
        for (int j = 0; j < K; ++j) {
            T s = B[p][j];
            for (int i = p + 1; i < C; ++i) s -= S[p][i] * B[i][j];
            B[p][j] = s / S[p][p];
        }
    return sign > 0 ? logdet : T(std::nan(""));
}

template <class T>
struct Point {          // what the forward pass leaves for the backward one
    T m[D], P[D][D];    // predicted
    T e[C], W[C][C];
};

template <class T>
static void product(const double* A, const T (&P)[D][D], T (&AP)[D][D]) {
    for (int i = 0; i < D; ++i) {
        for (int j = 0; j < D; ++j) AP[i][j] = T(0.0);
        for (int k = 0; k < D; ++k) {
            double a = A[i * D + k];
            if (a == 0.0) continue;     // transitions of several latents are block diagonal
            for (int j = 0; j < D; ++j) AP[i][j] += a * P[k][j];
        }
    }
}

template <class T>
static void run(int64_t n, const int64_t* step, const double* A, const double* Q, const double* P0, const double* H, int64_t stride,
                const T* nat1, const T* nat2, T* log_Z, T* mean, T* cov, T* state, T* state_cov, int adjoint,
                T* dA, T* dQ, T* dP0, T* dH) {
    std::vector<Point<T>> points(n);
    T m[D], P[D][D], total = T(0.0);
    for (int i = 0; i < D; ++i) {
        m[i] = T(0.0);
        for (int j = 0; j < D; ++j) P[i][j] = T(P0[i * D + j]);
    }
    for (int64_t k = 0; k < n; ++k) {
        if (k > 0 && step[k] >= 0) {
            const double *a = A + step[k] * D * D, *q = Q + step[k] * D * D;
            T next[D], AP[D][D];
            for (int i = 0; i < D; ++i) {
                T s = T(0.0);
                for (int j = 0; j < D; ++j) s += a[i * D + j] * m[j];
                next[i] = s;
            }
            product(a, P, AP);
            for (int i = 0; i < D; ++i) {
                m[i] = next[i];
                for (int j = 0; j <= i; ++j) {
                    T s = T(q[i * D + j]);
                    for (int l = 0; l < D; ++l) s += a[j * D + l] * AP[i][l];
                    P[i][j] = P[j][i] = s;
                }
            }
        }
        Point<T>& point = points[k];
        const double* h = H + k * stride;
        const T *n1 = nat1 + k * C, *n2 = nat2 + k * C * C;
        T B[D][C], mu[C], V[C][C];
        for (int i = 0; i < D; ++i) {
            point.m[i] = m[i];
            for (int j = 0; j < D; ++j) point.P[i][j] = P[i][j];
        }
        for (int i = 0; i < D; ++i)
            for (int o = 0; o < C; ++o) {
                T s = T(0.0);
                for (int j = 0; j < D; ++j) s += h[o * D + j] * P[i][j];
                B[i][o] = s;                                          // P H^T
            }
        for (int o = 0; o < C; ++o) {
            T s = T(0.0);
            for (int j = 0; j < D; ++j) s += h[o * D + j] * m[j];
            mu[o] = s;
            for (int p = 0; p < C; ++p) {
                T v = T(0.0);
                for (int j = 0; j < D; ++j) v += h[o * D + j] * B[j][p];
                V[o][p] = v;
            }
        }
        T S[C][C], R[C][C + 1], g[C];
        for (int o = 0; o < C; ++o) {
            g[o] = n1[o];
            for (int p = 0; p < C; ++p) {
                g[o] -= n2[o * C + p] * mu[p];
                T s = T(o == p ? 1.0 : 0.0);
                for (int l = 0; l < C; ++l) s += n2[o * C + l] * V[l][p];
                S[o][p] = s;
                R[o][p] = n2[o * C + p];
            }
            R[o][C] = g[o];
        }
        T logdet = solve<T, C + 1>(S, R);
        total -= 0.5 * logdet;
        for (int o = 0; o < C; ++o) {
            point.e[o] = R[o][C];
            T w = T(0.0);
            for (int p = 0; p < C; ++p) {
                point.W[o][p] = 0.5 * (R[o][p] + R[p][o]);
                w += V[o][p] * R[p][C];
            }
            total += 0.5 * (n1[o] + g[o]) * mu[o] + 0.5 * g[o] * w;   // nat1 mu - mu nat2 mu / 2 = (nat1 + g) mu / 2
        }
        T BW[D][C];
        for (int i = 0; i < D; ++i)
            for (int o = 0; o < C; ++o) {
                T s = T(0.0);
                for (int p = 0; p < C; ++p) s += B[i][p] * point.W[p][o];
                BW[i][o] = s;
                m[i] += B[i][o] * point.e[o];
            }
        for (int i = 0; i < D; ++i)
            for (int j = 0; j <= i; ++j) {
                T s = P[i][j];
                for (int o = 0; o < C; ++o) s -= BW[i][o] * B[j][o];
                P[i][j] = P[j][i] = s;
            }
    }
    *log_Z = total;

    T r[D], N[D][D];
    for (int i = 0; i < D; ++i) {
        r[i] = T(0.0);
        for (int j = 0; j < D; ++j) N[i][j] = T(0.0);
    }
    for (int64_t k = n - 1; k >= 0; --k) {
        const Point<T>& point = points[k];
        const double* h = H + k * stride;
        T B[D][C], mu[C], V[C][C];
        for (int i = 0; i < D; ++i)
            for (int o = 0; o < C; ++o) {
                T s = T(0.0);
                for (int j = 0; j < D; ++j) s += h[o * D + j] * point.P[i][j];
                B[i][o] = s;
            }
        for (int o = 0; o < C; ++o) {
            T s = T(0.0);
            for (int j = 0; j < D; ++j) s += h[o * D + j] * point.m[j];
            mu[o] = s;
            for (int p = 0; p < C; ++p) {
                T v = T(0.0);
                for (int j = 0; j < D; ++j) v += h[o * D + j] * B[j][p];
                V[o][p] = v;
            }
        }
        if (k < n - 1 && step[k + 1] >= 0) {                          // from the prediction of k + 1 to the filtered k
            const int64_t u = step[k + 1];
            const double* a = A + u * D * D;
            if (adjoint) {
                T G[D][D], AP[D][D], Pf[D][D], mf[D];
                for (int i = 0; i < D; ++i) {
                    T s = point.m[i];
                    for (int o = 0; o < C; ++o) s += B[i][o] * point.e[o];
                    mf[i] = s;
                    for (int j = 0; j <= i; ++j) {
                        T p = point.P[i][j];
                        for (int o = 0; o < C; ++o)
                            for (int q = 0; q < C; ++q) p -= B[i][o] * point.W[o][q] * B[j][q];
                        Pf[i][j] = Pf[j][i] = p;
                    }
                    for (int j = 0; j < D; ++j) G[i][j] = r[i] * r[j] - N[i][j];
                }
                product(a, Pf, AP);
                T *da = dA + u * D * D, *dq = dQ + u * D * D;
                for (int i = 0; i < D; ++i)
                    for (int j = 0; j < D; ++j) {
                        T s = r[i] * mf[j];
                        for (int l = 0; l < D; ++l) s += G[i][l] * AP[l][j];
                        da[i * D + j] += s;
                        dq[i * D + j] += 0.5 * G[i][j];
                    }
            }
            T NA[D][D], rr[D];
            for (int i = 0; i < D; ++i) {
                T s = T(0.0);
                for (int j = 0; j < D; ++j) s += a[j * D + i] * r[j];
                rr[i] = s;
                for (int j = 0; j < D; ++j) {
                    T v = T(0.0);
                    for (int l = 0; l < D; ++l) v += a[l * D + j] * N[i][l];
                    NA[i][j] = v;
                }
            }
            for (int i = 0; i < D; ++i) {
                r[i] = rr[i];
                for (int j = 0; j <= i; ++j) {
                    T v = T(0.0);
                    for (int l = 0; l < D; ++l) v += a[l * D + i] * NA[l][j];
                    N[i][j] = N[j][i] = v;
                }
            }
        }
        // through the site of k
        T Y[D][C], Z[C], K[C][C], YW[D][C];
        for (int o = 0; o < C; ++o) {
            T s = T(0.0);
            for (int i = 0; i < D; ++i) {
                s += B[i][o] * r[i];
                T y = T(0.0);
                for (int j = 0; j < D; ++j) y += N[i][j] * B[j][o];
                Y[i][o] = y;                                          // N P H^T
            }
            Z[o] = s;                                                 // H P r
        }
        for (int o = 0; o < C; ++o)
            for (int p = 0; p < C; ++p) {
                T s = T(0.0);
                for (int i = 0; i < D; ++i) s += B[i][o] * Y[i][p];
                K[o][p] = s;                                          // H P N P H^T
            }
        T E[C], F[C][C];
        for (int o = 0; o < C; ++o) {
            T s = point.e[o];
            for (int p = 0; p < C; ++p) s -= point.W[o][p] * Z[p];
            E[o] = s;
            for (int p = 0; p < C; ++p) {
                T f = point.W[o][p];
                for (int q = 0; q < C; ++q)
                    for (int l = 0; l < C; ++l) f += point.W[o][q] * K[q][l] * point.W[l][p];
                F[o][p] = f;
            }
        }
        for (int i = 0; i < D; ++i)
            for (int o = 0; o < C; ++o) {
                T s = T(0.0);
                for (int p = 0; p < C; ++p) s += Y[i][p] * point.W[p][o];
                YW[i][o] = s;
            }
        for (int i = 0; i < D; ++i) {
            for (int o = 0; o < C; ++o) r[i] += h[o * D + i] * E[o];
            for (int j = 0; j <= i; ++j) {
                T s = N[i][j];
                for (int o = 0; o < C; ++o) {
                    double hi = h[o * D + i], hj = h[o * D + j];
                    if (hi == 0.0 && hj == 0.0) continue;
                    s -= hj * YW[i][o] + hi * YW[j][o];
                    for (int p = 0; p < C; ++p) s += (hi * h[p * D + j]) * F[o][p];
                }
                N[i][j] = N[j][i] = s;
            }
        }
        // smoothed moments
        T X[D][C];
        for (int i = 0; i < D; ++i)
            for (int o = 0; o < C; ++o) {
                T s = T(0.0);
                for (int j = 0; j < D; ++j) s += N[i][j] * B[j][o];
                X[i][o] = s;
            }
        for (int o = 0; o < C; ++o) {
            T s = mu[o];
            for (int i = 0; i < D; ++i) s += B[i][o] * r[i];
            mean[k * C + o] = s;
            for (int p = 0; p <= o; ++p) {
                T v = 0.5 * (V[o][p] + V[p][o]);
                for (int i = 0; i < D; ++i) v -= B[i][o] * X[i][p];
                cov[(k * C + o) * C + p] = cov[(k * C + p) * C + o] = v;
            }
        }
        if (state || dH) {
            T ms[D], NP[D][D], Ps[D][D];
            for (int i = 0; i < D; ++i) {
                T s = point.m[i];
                for (int j = 0; j < D; ++j) {
                    s += point.P[i][j] * r[j];
                    T v = T(0.0);
                    for (int l = 0; l < D; ++l) v += N[i][l] * point.P[l][j];
                    NP[i][j] = v;
                }
                ms[i] = s;
            }
            for (int i = 0; i < D; ++i)
                for (int j = 0; j <= i; ++j) {
                    T v = point.P[i][j];
                    for (int l = 0; l < D; ++l) v -= point.P[i][l] * NP[l][j];
                    Ps[i][j] = Ps[j][i] = v;
                }
            if (state)
                for (int i = 0; i < D; ++i) {
                    state[k * D + i] = ms[i];
                    for (int j = 0; j < D; ++j) state_cov[(k * D + i) * D + j] = Ps[i][j];
                }
            if (dH) {                                                 // E[(nat1 - nat2 H x) x^T]
                T* dh = dH + k * stride;
                for (int o = 0; o < C; ++o)
                    for (int j = 0; j < D; ++j) {
                        T s = nat1[k * C + o] * ms[j];
                        for (int p = 0; p < C; ++p) {
                            T hx = T(0.0);
                            for (int i = 0; i < D; ++i) hx += h[p * D + i] * (Ps[i][j] + ms[i] * ms[j]);
                            s -= nat2[(k * C + o) * C + p] * hx;
                        }
                        dh[o * D + j] += s;
                    }
            }
        }
    }
    if (adjoint)
        for (int i = 0; i < D; ++i)
            for (int j = 0; j < D; ++j) dP0[i * D + j] = 0.5 * (r[i] * r[j] - N[i][j]);
}

extern "C" {
// Values; with adjoint != 0 also d log Z / d(A, Q, P0, H). state, dH may be null.
void smooth(int64_t n, const int64_t* step, const double* A, const double* Q, const double* P0, const double* H, int64_t stride,
            const double* nat1, const double* nat2, double* log_Z, double* mean, double* cov, double* state, double* state_cov,
            int adjoint, double* dA, double* dQ, double* dP0, double* dH) {
    run<double>(n, step, A, Q, P0, H, stride, nat1, nat2, log_Z, mean, cov, state, state_cov, adjoint, dA, dQ, dP0, dH);
}

// The same along a tangent of the sites: every output is a pair (value, tangent), as are nat1 and nat2.
void smooth_dual(int64_t n, const int64_t* step, const double* A, const double* Q, const double* P0, const double* H, int64_t stride,
                 const double* nat1, const double* nat2, double* log_Z, double* mean, double* cov,
                 double* dA, double* dQ, double* dP0, double* dH) {
    run<Dual>(n, step, A, Q, P0, H, stride, (const Dual*)nat1, (const Dual*)nat2, (Dual*)log_Z, (Dual*)mean, (Dual*)cov, nullptr, nullptr, 1,
              (Dual*)dA, (Dual*)dQ, (Dual*)dP0, (Dual*)dH);
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
