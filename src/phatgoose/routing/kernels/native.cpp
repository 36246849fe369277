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
#if defined(__AMX_BF16__) && defined(__linux__)
#define TILES
#include <unistd.h>
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
constexpr int PANEL = 1 << 17;  // bytes of vectors that a cache keeps
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
#ifdef __AVX512F__  // in two steps; GCC takes five
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (floats)_mm512_slli_epi32(wide, 16);
#else
    halves bits;
    memcpy(&bits, p, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
#endif
}
inline void store_some(float* p, floats v) { memcpy(p, &v, sizeof v); }

// 2 LANES numbers in the order in which they come apart most cheaply: of bfloat16 those at even
// places, which are the lower halves of words, then those at odd ones.
struct Two { floats left, right; };
inline Two load_two(const float* p) { return {load_some(p), load_some(p + LANES)}; }
inline Two load_two(const bf16* p) {
    words both;
    memcpy(&both, p, sizeof both);
    return {(floats)(both << 16), (floats)(both & 0xffff0000)};
}
inline void store_two(float* p, Two v) { store_some(p, v.left), store_some(p + LANES, v.right); }
inline words round_some(floats v) {  // as `store`; the lower halves mean nothing
    words bits = (words)v, is_nan = (words)(v != v);
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~is_nan) | (0x7fc00000 & is_nan);
}
inline void store_two(bf16* p, Two v) {
    words both = (round_some(v.left) >> 16) | (round_some(v.right) & 0xffff0000);
    memcpy(p, &both, sizeof both);
}

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
#ifdef __AVX__
#ifdef __AVX512F__
    __m256d upper = _mm512_extractf64x4_pd((__m512d)v, 1);
    __m256 all = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm256_castpd_ps(upper));
#else
    __m256 all = (__m256)v;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

#ifdef __AVX512F__
// The sums of 16 registers, each added up in the order of `sum`: folded to halves of a register
// beside each other, then quarters, eighths, and numbers.
template <int M, int R>
inline __m512 sums_of_16(const floats (&v)[M][R]) {
    auto halves = [&](int p, int q) {
        __m512 a = (__m512)v[p / R][p % R], b = (__m512)v[q / R][q % R];
        return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    };
    auto quarters = [&](int p) {
        __m512 a = halves(p, p + 4), b = halves(p + 8, p + 12);
        return (__m512d)(_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    auto eighths = [&](int p) {
        __m512d a = quarters(p), b = quarters(p + 1);
        return (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    };
    __m512 a = eighths(0), b = eighths(2);
    return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
}
#endif

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
                if constexpr (M <= 2) __builtin_prefetch(rows + (i + R) * n + at, 0, 2);
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
            if constexpr (M <= 2) __builtin_prefetch(rows + (i + R) * n + at, 0, 2);
            for (int m = 0; m < M; m++) total[m][i] = add_product(total[m][i], a[m], b);
        }
    }
#ifdef __AVX512F__
    if constexpr (M * R == 16) {
        __m512 sums = sums_of_16(total);
        for (int m = 0; m < M; m++) memcpy(out[m], (char*)&sums + m * R * 4, R * 4);
    } else
#endif
    for (int m = 0; m < M; m++)
        for (int i = 0; i < R; i++) out[m][i] = sum(total[m][i]);
    for (int m = 0; m < M && at < n; m++)
        for (int i = 0; i < R; i++)
            for (index_t j = at; j < n; j++)
                out[m][i] = add_product(out[m][i], to_float(u[m][j]), to_float(rows[i * n + j]));
}

// out[m][i] = u_m . row_i for M tokens and `count` rows, R at a time and then fewer.
template <class T, int M, int R = LANES == 16 ? 16 / M : M == 4 ? ROWS : 4>
void dots(const T* const* u, const T* rows, index_t count, index_t n, float* const* out) {
    float* place[M];
    index_t i = 0;
    for (; i + R <= count; i += R) {
        for (int m = 0; m < M; m++) place[m] = out[m] + i;
        dot_block<T, M, R>(u, rows + i * n, n, place);
    }
    if constexpr (R > 1) {
        for (int m = 0; m < M; m++) place[m] = out[m] + i;
        if (i < count) dots<T, M, R / 2>(u, rows + i * n, count - i, n, place);
    }
}

// Intel's tiles (AMX): one instruction takes 16 rows times 16 tokens, 32 numbers deep.
#ifdef TILES
// Linux lends them to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
const bool has_tiles = syscall(158, 0x1023, 18) == 0;
// out[m E + i] = u_m . row_i for M <= 16 tokens, whose numbers come in `pairs` [n / 2, M], and
// `count` rows; 32 divides n. Every sum is in one order, whatever stands beside it.
void tile_dots(const uint32_t* pairs, index_t M, const bf16* rows, index_t count, index_t n,
               float* out, index_t E) {
    const index_t high = std::min<index_t>(16, count);
    alignas(64) uint8_t shapes[64] = {1};  // from 16 on bytes of a row, from 48 on rows of a tile
    for (int tile = 0; tile < 7; tile++) {  // 0 to 3 are sums, 4 and 5 rows, 6 tokens
        shapes[16 + 2 * tile] = tile == 4 || tile == 5 ? 64 : 4 * M;
        shapes[48 + tile] = tile == 6 ? 16 : high;
    }
    asm volatile("" ::"r"(shapes) : "memory");  // GCC doesn't know what the next lines read
    _tile_loadconfig(shapes);
    for (index_t i = 0; i < count; i += 64) {
        float sums[4][16][16];
        index_t first[4];  // of 16 rows; where there are no more, the last ones again
        for (int g = 0; g < 4; g++) first[g] = std::min(i + 16 * g, count - high);
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (index_t at = 0; at < n; at += 32) {
            _tile_loadd(6, pairs + at / 2 * M, 4 * M);
            _tile_loadd(4, rows + first[0] * n + at, 2 * n);
            _tile_loadd(5, rows + first[1] * n + at, 2 * n);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(4, rows + first[2] * n + at, 2 * n);
            _tile_loadd(5, rows + first[3] * n + at, 2 * n);
            _tile_dpbf16ps(2, 4, 6); _tile_dpbf16ps(3, 5, 6);
        }
        _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
        for (index_t m = 0; m < M; m++)
            for (int g = 0; g < 4; g++)
                for (index_t h = 0; h < high; h++) out[m * E + first[g] + h] = sums[g][h][m];
    }
    _tile_release();
}
#else
const bool has_tiles = false;
inline void tile_dots(const uint32_t*, index_t, const bf16*, index_t, index_t, float*, index_t) {}
#endif

// out[m] = 1 / sqrt(var(u_m) + eps) for M tokens u [M, n], the population variance, in two passes.
template <class T, int M>
void inverse_deviations(const T* u, index_t n, float eps, float* out) {
    floats total[M] = {}, squares[M] = {};
    float mean[M];
    index_t at = 0;
    for (; at + LANES <= n; at += LANES)
        for (int m = 0; m < M; m++) total[m] += load_some(u + m * n + at);
    for (int m = 0; m < M; m++) {
        mean[m] = sum(total[m]);
        for (index_t j = at; j < n; j++) mean[m] += to_float(u[m * n + j]);
        mean[m] /= n;
    }
    for (at = 0; at + LANES <= n; at += LANES)
        for (int m = 0; m < M; m++) {
            floats centred = load_some(u + m * n + at) - mean[m];
            squares[m] = add_product(squares[m], centred, centred);
        }
    for (int m = 0; m < M; m++) {
        float variance = sum(squares[m]);
        for (index_t j = at; j < n; j++) {
            float centred = to_float(u[m * n + j]) - mean[m];
            variance = add_product(variance, centred, centred);
        }
        out[m] = 1 / std::sqrt(variance / n + eps);
    }
}

// The k highest of `affinity` [E], best first, and the softmax of those k times `scale`.
void choose(const float* affinity, index_t E, index_t k, float scale, index_t* experts,
            float* weights) {
    for (index_t j = 0; j < k; j++) experts[j] = j, weights[j] = -INFINITY;
    for (index_t e = 0; e < E; e++) {
#ifdef __AVX512F__
        if (e + LANES <= E) {  // on to the next that is higher
            __m512 some = _mm512_loadu_ps(affinity + e), least = _mm512_set1_ps(weights[k - 1]);
            unsigned higher = _mm512_cmp_ps_mask(some, least, _CMP_GT_OQ);
            e += higher ? __builtin_ctz(higher) : LANES - 1;
        }
#endif
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
    const bool tiles = sizeof(T) == sizeof(bf16) && n % 32 == 0 && has_tiles;

    // The dot products of M tokens u [M, n] with `count` vectors, the first of them `e`.
    template <int M>
    void score(const T* u, index_t e, index_t count, float* affinity) const {
        const T* row[M];
        float* out[M];
        for (int m = 0; m < M; m++) row[m] = u + m * n, out[m] = affinity + m * E + e;
        dots<T, M>(row, vectors + e * n, count, n, out);
    }
    // Of any number, which tiles take as `pairs`, 16 at a time.
    void score(const T* u, const uint32_t* pairs, index_t tokens, index_t e, index_t count,
               float* affinity) const {
        index_t t = 0;
        for (; t < tokens && tiles; t += 16)
            tile_dots(pairs + t * n / 2, std::min<index_t>(16, tokens - t),
                      (const bf16*)vectors + e * n, count, n, affinity + t * E + e, E);
        for (; t + 4 <= tokens; t += 4) score<4>(u + t * n, e, count, affinity + t * E);
        for (; t < tokens; t++) score<1>(u + t * n, e, count, affinity + t * E);
    }

    // From all dot products of M tokens: their experts and weights.
    template <int M>
    void decide(const T* u, float* affinity, index_t* experts, float* weights) const {
        float scale[M];
        std::fill_n(scale, M, 1.0f);
        if (standardised) inverse_deviations<T, M>(u, n, eps, scale);
        else for (index_t e = 0; e < M * E; e++) affinity[e] = std::fabs(affinity[e]);
        for (int m = 0; m < M; m++) {
            if (standardised) scale[m] /= std::sqrt(float(n));
            choose(affinity + m * E, E, k, scale[m], experts + m * k, weights + m * k);
        }
    }

    // One token, its experts shared out among the threads: decoding.
    void route_one(const T* u, index_t* experts, float* weights) const {
        std::vector<float> affinity(E);
        const index_t block = tiles ? 64 : 16;
#pragma omp parallel for schedule(static) if (E * n > 60000)
        for (index_t e = 0; e < E; e += block)
            score(u, (const uint32_t*)u, 1, e, std::min(block, E - e), affinity.data());
        decide<1>(u, affinity.data(), experts, weights);
    }

    // Many, shared out among the threads; each takes as many vectors at a time as its cache keeps.
    void route(const T* u, index_t tokens, index_t* experts, float* weights,
               index_t threads) const {
        if (tokens == 1) return route_one(u, experts, weights);
        const index_t share = (tokens + threads - 1) / threads;
        const index_t turn = std::min<index_t>(64, (share + 3) / 4 * 4);
        const index_t panel = std::max<index_t>(4, PANEL / (n * sizeof(T)) / 4 * 4);
#pragma omp parallel if (tokens * E * n > 60000)
        {
            std::unique_ptr<float[]> affinities(new float[turn * E]);
            std::vector<uint32_t> pairs(tiles ? turn * n / 2 : 0);
#pragma omp for schedule(dynamic)
            for (index_t from = 0; from < tokens; from += turn) {
                const index_t to = std::min(tokens, from + turn), fours = to - (to - from) % 4;
                auto place = [&](index_t t) { return affinities.get() + (t - from) * E; };
                for (index_t t = from; t < to && tiles; t++) {
                    const index_t m = (t - from) % 16, M = std::min<index_t>(16, to - t + m);
                    uint32_t* const two = pairs.data() + (t - from - m) * n / 2 + m;
                    for (index_t j = 0; j < n / 2; j++) memcpy(two + j * M, u + t * n + 2 * j, 4);
                }
                for (index_t e = 0; e < E; e += panel)
                    score(u + from * n, pairs.data(), to - from, e, std::min(panel, E - e),
                          place(from));
                for (index_t t = from; t < fours; t += 4)
                    decide<4>(u + t * n, place(t), experts + t * k, weights + t * k);
                for (index_t t = fours; t < to; t++)
                    decide<1>(u + t * n, place(t), experts + t * k, weights + t * k);
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

// total[m] += sum over i < r of c[m][i] B_i, for M tokens and `columns` of B's rows of d numbers;
// totals in the order of `load_two`, what is left over at the end in its own. `next` is the next B.
template <class T, int M>
void expand(float* const* total, const float* const* c, const T* B, const T* next, index_t r,
            index_t d, index_t columns) {
    index_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) {
        Two some[M];
        for (int m = 0; m < M; m++) some[m] = load_two(total[m] + j);
        for (index_t i = 0; i < r; i++) {
            const Two b = load_two(B + i * d + j);
            __builtin_prefetch(next + i * d + j, 0, 2);  // too many rows at once for processors
            for (int m = 0; m < M; m++) {
                some[m].left = add_product(some[m].left, all(c[m][i]), b.left);
                some[m].right = add_product(some[m].right, all(c[m][i]), b.right);
            }
        }
        for (int m = 0; m < M; m++) store_two(total[m] + j, some[m]);
    }
    for (; j < columns; j++)
        for (int m = 0; m < M; m++)
            for (index_t i = 0; i < r; i++)
                total[m][j] = add_product(total[m][j], c[m][i], to_float(B[i * d + j]));
}

// y += total for `columns` numbers of both, totals in the order of `expand`.
template <class T>
void add_some(T* y, const float* total, index_t columns) {
    index_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) {
        Two some = load_two(y + j), more = load_two(total + j);
        store_two(y + j, Two{some.left + more.left, some.right + more.right});
    }
    for (; j < columns; j++) store(y + j, to_float(y[j]) + total[j]);
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
            for (int m = 0; m < count; m++)
                for (index_t i = 0; i < r; i++) out[m][i] *= weights[pairs.place[q + m]];
        }
        // In long rows sums of float32 go straight to y; else they stand together, in the cache.
        const bool direct = sizeof(T) == sizeof(float) && tile > 256;
        std::unique_ptr<float[]> own(direct ? nullptr : new float[(to - from) * tile]);
#pragma omp for schedule(static)
        for (index_t first = 0; first < d; first += tile) {
            index_t columns = std::min(tile, d - first), step = direct ? d : tile;
            float* sums = direct ? (float*)(y + from * d + first) : own.get();
            if (!direct) std::fill_n(sums, (to - from) * tile, 0.0f);
            for (index_t f = 0; f < turns; f++) {
                const auto [e, q, count] = pairs.some[f];
                float* total[4];
                const float* c[4];
                for (int m = 0; m < count; m++) {
                    total[m] = sums + (pairs.place[q + m] / k - from) * step;
                    c[m] = inner.data() + (q + m) * r;
                }
                const T* rows = B + e * r * d + first;
                const T* next = B + pairs.some[std::min(f + 1, turns - 1)].expert * r * d + first;
                if (count == 4) expand<T, 4>(total, c, rows, next, r, d, columns);
                else if (count == 2) expand<T, 2>(total, c, rows, next, r, d, columns);
                else expand<T, 1>(total, c, rows, next, r, d, columns);
            }
            for (index_t t = from; t < to && !direct; t++) {
                for (index_t j = 0; j < columns; j += 64 / sizeof(T))
                    __builtin_prefetch(y + (t + 8) * d + first + j, 1, 2);
                add_some(y + t * d + first, sums + (t - from) * tile, columns);
            }
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
                                   index_t* experts, float* weights, index_t threads) {            \
        Router<T> router{vectors, n, E, k, eps, standardised != 0};                                \
        router.route(u, tokens, experts, weights, threads);                                        \
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
        Router<T> router{vectors, n, E, k, eps, standardised != 0};                                \
        router.route(u, tokens, experts.data(), weights.data(), threads);                          \
        update(y, u, experts.data(), weights.data(), A, B, tokens, k, E, r, n, d, threads);        \
    }

ENTRIES(float, float32)
ENTRIES(bf16, bfloat16)
