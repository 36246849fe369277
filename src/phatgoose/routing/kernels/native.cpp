// Routing and the routed LoRA product for CPUs, as native.py calls them.
//
// Letters as in kernels/__init__.py: T tokens, n inputs, d outputs, E experts, k chosen per token,
// r rank. All tensors are contiguous; products are of the tensors' type, sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Numbers of a register, and as many rows times four tokens as leave all sums in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 3;
#else
constexpr int LANES = 4, ROWS = 2;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int64_t index_t;
struct bf16 { uint16_t bits; };
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* place, float x) { *place = x; }
inline void store(bf16* place, float x) {  // rounds to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    place->bits = is_nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline floats load_some(const float* p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline floats load_some(const bf16* p) {
    halves bits;
    memcpy(&bits, p, sizeof bits);
    words wide = __builtin_convertvector(bits, words) << 16;
    floats v;
    memcpy(&v, &wide, sizeof v);
    return v;
}
inline void store_some(float* p, floats v) { memcpy(p, &v, sizeof v); }

// c + a b, rounded once where the processor can. It is spelt out because a compiler left to itself
// (-ffp-contract) rounds once for some numbers of tokens and twice for others: experts with equal
// gates would then differ, and a token alone would choose otherwise than in a batch.
inline float add_product(float c, float a, float b) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return c + a * b;
#endif
}
inline floats add_product(floats c, floats a, floats b) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return c + a * b;
#endif
}
inline floats all(float x) { return x - floats{}; }

inline float sum(floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    __m256 all = (__m256)v;
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// out[m][i] = u_m . row_i for M tokens and R rows of n numbers each.
template <class T, int M, int R>
inline void dot_block(const T* const* u, const T* rows, index_t n, float* const* out) {
    floats total[M][R];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < R; i++) total[m][i] = floats{};
    index_t at = 0;
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == sizeof(bf16)) {
        for (; at + 32 <= n; at += 32) {
            __m512bh a[M];
            for (int m = 0; m < M; m++) a[m] = (__m512bh)_mm512_loadu_si512(u[m] + at);
            for (int i = 0; i < R; i++) {
                __m512bh b = (__m512bh)_mm512_loadu_si512(rows + i * n + at);
                for (int m = 0; m < M; m++)
                    total[m][i] = (floats)_mm512_dpbf16_ps((__m512)total[m][i], a[m], b);
            }
        }
    }
#endif
    for (; at + LANES <= n; at += LANES) {
        floats a[M];
        for (int m = 0; m < M; m++) a[m] = load_some(u[m] + at);
        for (int i = 0; i < R; i++) {
            floats b = load_some(rows + i * n + at);
            for (int m = 0; m < M; m++) total[m][i] = add_product(total[m][i], a[m], b);
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < R; i++) {
            float value = sum(total[m][i]);
            for (index_t j = at; j < n; j++)
                value = add_product(value, to_float(u[m][j]), to_float(rows[i * n + j]));
            out[m][i] = value;
        }
}

template <class T, int M>
void dots(const T* const* u, const T* rows, index_t count, index_t n, float* const* out) {
    constexpr int R = M == 4 ? ROWS : 4;
    float* place[M];
    index_t i = 0;
    for (; i + R <= count; i += R) {
        for (int m = 0; m < M; m++) place[m] = out[m] + i;
        dot_block<T, M, R>(u, rows + i * n, n, place);
    }
    for (; i < count; i++) {
        for (int m = 0; m < M; m++) place[m] = out[m] + i;
        dot_block<T, M, 1>(u, rows + i * n, n, place);
    }
}

// 1 / sqrt(var(u) + eps), the population variance, in two passes.
template <class T>
float inverse_deviation(const T* u, index_t n, float eps) {
    floats total{};
    index_t at = 0;
    for (; at + LANES <= n; at += LANES) total += load_some(u + at);
    float mean = sum(total);
    for (index_t j = at; j < n; j++) mean += to_float(u[j]);
    mean /= n;
    floats squares{};
    for (at = 0; at + LANES <= n; at += LANES) {
        floats centred = load_some(u + at) - mean;
        squares = add_product(squares, centred, centred);
    }
    float variance = sum(squares);
    for (index_t j = at; j < n; j++) {
        float centred = to_float(u[j]) - mean;
        variance = add_product(variance, centred, centred);
    }
    return 1 / std::sqrt(variance / n + eps);
}

// The k highest of `affinity` [E], best first, and the softmax of those k times `scale`.
void choose(const float* affinity, index_t E, index_t k, float scale, index_t* experts,
            float* weights) {
    for (index_t j = 0; j < k; j++) experts[j] = j, weights[j] = -INFINITY;
    for (index_t e = 0; e < E; e++) {
        float x = affinity[e];
        if (!(x > weights[k - 1])) continue;
        index_t j = k - 1;
        for (; j > 0 && x > weights[j - 1]; j--)
            experts[j] = experts[j - 1], weights[j] = weights[j - 1];
        experts[j] = e, weights[j] = x;
    }
    float highest = weights[0], total = 0;
    for (index_t j = 0; j < k; j++) total += weights[j] = std::exp((weights[j] - highest) * scale);
    for (index_t j = 0; j < k; j++) weights[j] /= total;
}

// How experts are chosen: a site's vectors [E, n], and what affinity is taken to be.
template <class T>
struct Router {
    const T* vectors;
    index_t n, E, k;
    float eps;
    bool standardised;

    // From the dot products with one token's u: its experts and their weights.
    void decide(const T* u, float* affinity, index_t* experts, float* weights) const {
        float scale = 1;
        if (standardised) scale = inverse_deviation(u, n, eps) / std::sqrt(float(n));
        else for (index_t e = 0; e < E; e++) affinity[e] = std::fabs(affinity[e]);
        choose(affinity, E, k, scale, experts, weights);
    }

    // One token, its experts shared out among the threads: decoding.
    void route_one(const T* u, index_t* experts, float* weights) const {
        std::vector<float> affinity(E);
        const index_t block = 16;
#pragma omp parallel for schedule(static) if (E * n > 60000)
        for (index_t e = 0; e < E; e += block) {
            float* out = affinity.data() + e;
            dots<T, 1>(&u, vectors + e * n, std::min(block, E - e), n, &out);
        }
        decide(u, affinity.data(), experts, weights);
    }

    void route(const T* u, index_t tokens, index_t* experts, float* weights) const {
        if (tokens == 1) return route_one(u, experts, weights);
#pragma omp parallel if (tokens * E * n > 60000)
        {
            std::vector<float> affinities(4 * E);
#pragma omp for schedule(static)
            for (index_t first = 0; first < tokens; first += 4) {
                int count = int(std::min<index_t>(4, tokens - first));
                const T* row[4];
                float* out[4];
                for (int m = 0; m < count; m++) {
                    row[m] = u + (first + m) * n;
                    out[m] = affinities.data() + m * E;
                }
                if (count == 4) dots<T, 4>(row, vectors, E, n, out);
                else for (int m = 0; m < count; m++) dots<T, 1>(row + m, vectors, E, n, out + m);
                for (int m = 0; m < count; m++)
                    decide(row[m], out[m], experts + (first + m) * k, weights + (first + m) * k);
            }
        }
    }
};

// Four, two or one (token, expert) pairs of an expert, `first` their index in Pairs::place.
struct Some { index_t expert, first; int count; };

// The (token, expert) pairs of some tokens, those of one expert together; weight 0 is left out.
struct Pairs {
    std::vector<index_t> place;  // index into experts and weights, [pairs]
    std::vector<Some> some;      // as many at a time as there are
    index_t used = 0;            // experts that have any
    Pairs(const index_t* experts, const float* weights, index_t from, index_t to, index_t k,
          index_t E) {
        std::vector<index_t> start(E + 1, 0);
        for (index_t p = from; p < to; p++)
            if (weights[p] != 0) start[experts[p] + 1]++;
        for (index_t e = 0; e < E; e++) start[e + 1] += start[e];
        place.resize(start[E]);
        some.reserve(start[E]);
        std::vector<index_t> next(start.begin(), start.end() - 1);
        for (index_t p = from; p < to; p++)
            if (weights[p] != 0) place[next[experts[p]]++] = p;
        for (index_t e = 0; e < E; e++) {
            used += start[e + 1] > start[e];
            for (index_t q = start[e]; q < start[e + 1];) {
                index_t left = start[e + 1] - q;
                int count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                while (count > 1 && has_one_token_twice(q, count, k)) count /= 2;
                some.push_back({e, q, count});
                q += count;
            }
        }
    }
    // A token that chose an expert twice: its rows of y would be added to at once, and one be lost.
    bool has_one_token_twice(index_t q, int count, index_t k) const {
        for (int m = 1; m < count; m++)
            if (place[q + m] / k == place[q + m - 1] / k) return true;
        return false;
    }
};

// total[m] += sum over i < r of c[m][i] B_i, for M tokens and `columns` of B's rows of d numbers.
template <class T, int M>
void expand(float* const* total, const float* const* c, const T* B, index_t r, index_t d,
            index_t columns) {
    index_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) {
        floats left[M], right[M];
        for (int m = 0; m < M; m++) {
            left[m] = load_some(total[m] + j);
            right[m] = load_some(total[m] + j + LANES);
        }
        for (index_t i = 0; i < r; i++) {
            floats b = load_some(B + i * d + j), b_next = load_some(B + i * d + j + LANES);
            for (int m = 0; m < M; m++) {
                left[m] = add_product(left[m], all(c[m][i]), b);
                right[m] = add_product(right[m], all(c[m][i]), b_next);
            }
        }
        for (int m = 0; m < M; m++) {
            store_some(total[m] + j, left[m]);
            store_some(total[m] + j + LANES, right[m]);
        }
    }
    for (; j < columns; j++)
        for (int m = 0; m < M; m++)
            for (index_t i = 0; i < r; i++)
                total[m][j] = add_product(total[m][j], c[m][i], to_float(B[i * d + j]));
}

// Columns of B at a time: few, so that the running sums stay in the cache; but long rows where
// experts have few tokens, since then B comes from memory.
index_t tile_of(const Pairs& pairs, index_t d, index_t threads) {
    bool sparse = index_t(pairs.place.size()) < 16 * pairs.used;
    index_t least = sparse ? 1 : (d + 127) / 128;
    index_t turns = (least + threads - 1) / threads * threads;  // as many for each thread
    return ((d + turns - 1) / turns + 31) / 32 * 32;
}

// Adds the weighted updates of the tokens `from` to `to` to their rows of y. Threads share out A by
// experts and B by columns, so that each of them is read from memory once.
template <class T>
void update_some(T* y, const T* u, const index_t* experts, const float* weights, const T* A,
                 const T* B, index_t from, index_t to, index_t k, index_t E, index_t r, index_t n,
                 index_t d, index_t threads) {
    Pairs pairs(experts, weights, from * k, to * k, k, E);
    std::vector<float> inner(pairs.place.size() * r);
    const index_t tile = tile_of(pairs, d, threads), turns = pairs.some.size();
#pragma omp parallel if (index_t(inner.size()) * (n + d) > 60000)
    {
#pragma omp for schedule(static)
        for (index_t f = 0; f < turns; f++) {
            const auto [e, q, count] = pairs.some[f];
            const T* row[4];
            float* out[4];
            for (int m = 0; m < count; m++) {
                row[m] = u + pairs.place[q + m] / k * n;
                out[m] = inner.data() + (q + m) * r;
            }
            const T* rows = A + e * r * n;
            if (count == 4) dots<T, 4>(row, rows, r, n, out);
            else if (count == 2) dots<T, 2>(row, rows, r, n, out);
            else dots<T, 1>(row, rows, r, n, out);
            for (index_t i = 0; i < count * r; i++) out[0][i] *= weights[pairs.place[q + i / r]];
        }
        // In long rows sums of float32 go straight to y; else they stand together, in the cache.
        const bool direct = sizeof(T) == sizeof(float) && tile > 256;
        std::unique_ptr<float[]> own(direct ? nullptr : new float[(to - from) * tile]);
#pragma omp for schedule(static)
        for (index_t first = 0; first < d; first += tile) {
            index_t columns = std::min(tile, d - first), step = direct ? d : tile;
            float* sums = direct ? (float*)(y + from * d + first) : own.get();
            if (!direct) std::fill_n(sums, (to - from) * tile, 0.0f);
            for (const auto& [e, q, count] : pairs.some) {
                float* total[4];
                const float* c[4];
                for (int m = 0; m < count; m++) {
                    total[m] = sums + (pairs.place[q + m] / k - from) * step;
                    c[m] = inner.data() + (q + m) * r;
                }
                const T* rows = B + e * r * d + first;
                if (count == 4) expand<T, 4>(total, c, rows, r, d, columns);
                else if (count == 2) expand<T, 2>(total, c, rows, r, d, columns);
                else expand<T, 1>(total, c, rows, r, d, columns);
            }
            for (index_t t = from; t < to && !direct; t++)
                for (index_t j = 0, at = t * d + first; j < columns; j++)
                    store(y + at + j, to_float(y[at + j]) + sums[(t - from) * tile + j]);
        }
    }
}

// One token, its experts shared out among the threads: decoding. Factors are read in order, once.
template <class T>
void update_one(T* y, const T* u, const index_t* experts, const float* weights, const T* A,
                const T* B, index_t k, index_t r, index_t n, index_t d) {
    std::vector<float> sums(k * d, 0.0f);
#pragma omp parallel for schedule(static) if (k * r * (n + d) > 30000)
    for (index_t j = 0; j < k; j++) {
        if (weights[j] == 0) continue;
        std::vector<float> inner(r);
        float *c = inner.data(), *total = sums.data() + j * d;
        dots<T, 1>(&u, A + experts[j] * r * n, r, n, &c);
        for (index_t i = 0; i < r; i++) {
            const T* row = B + (experts[j] * r + i) * d;
            float scale = c[i] * weights[j];
            index_t at = 0;
            for (; at + LANES <= d; at += LANES)
                store_some(total + at,
                           add_product(load_some(total + at), all(scale), load_some(row + at)));
            for (; at < d; at++) total[at] = add_product(total[at], scale, to_float(row[at]));
        }
    }
    for (index_t at = 0; at < d; at++) {
        float total = to_float(y[at]);
        for (index_t j = 0; j < k; j++) total += sums[j * d + at];
        store(y + at, total);
    }
}

template <class T>
void update(T* y, const T* u, const index_t* experts, const float* weights, const T* A,
            const T* B, index_t tokens, index_t k, index_t E, index_t r, index_t n, index_t d,
            index_t threads) {
    if (tokens == 1) return update_one(y, u, experts, weights, A, B, k, r, n, d);
    for (index_t from = 0; from < tokens; from += 1024)  // so many at a time
        update_some(y, u, experts, weights, A, B, from, std::min(tokens, from + 1024), k, E, r, n,
                    d, threads);
}

}  // namespace

#define ENTRIES(T, suffix)                                                                         \
    /* The experts [T, k] and weights [T, k] of each token. */                                     \
    extern "C" void route_##suffix(const T* u, const T* vectors, index_t tokens, index_t n,        \
                                   index_t E, index_t k, float eps, int standardised,              \
                                   index_t* experts, float* weights) {                             \
        Router<T>{vectors, n, E, k, eps, standardised != 0}.route(u, tokens, experts, weights);    \
    }                                                                                              \
    /* y += the weighted updates; 1, and nothing is done, when an index is none of an expert. */    \
    extern "C" int update_##suffix(T* y, const T* u, const index_t* experts, const float* weights, \
                                   const T* A, const T* B, index_t tokens, index_t k, index_t E,   \
                                   index_t r, index_t n, index_t d, index_t threads) {             \
        for (index_t p = 0; p < tokens * k; p++)                                                   \
            if (experts[p] < 0 || experts[p] >= E) return 1;                                       \
        update(y, u, experts, weights, A, B, tokens, k, E, r, n, d, threads);                      \
        return 0;                                                                                  \
    }                                                                                              \
    /* Both in one. */                                                                             \
    extern "C" void routed_update_##suffix(                                                        \
        T* y, const T* u, const T* vectors, const T* A, const T* B, index_t tokens, index_t n,     \
        index_t E, index_t k, float eps, int standardised, index_t r, index_t d,                   \
        index_t threads) {                                                                         \
        std::vector<index_t> experts(tokens * k);                                                  \
        std::vector<float> weights(tokens * k);                                                    \
        Router<T>{vectors, n, E, k, eps, standardised != 0}.route(u, tokens, experts.data(),       \
                                                                  weights.data());                 \
        update(y, u, experts.data(), weights.data(), A, B, tokens, k, E, r, n, d, threads);        \
    }

ENTRIES(float, float32)
ENTRIES(bf16, bfloat16)
