// A libFuzzer target of the native kernel: every call that native.py's checks let through.
//
//   clang++ -std=c++17 -O1 -g -march=native -fsanitize=fuzzer,address,undefined
//           -fno-sanitize-recover=undefined tests/fuzz/kernel.cpp -o kernel && ./kernel corpus
//
// Tensors lie in memory of exactly their size, so that AddressSanitizer sees a step outside. What
// comes back is compared with a plain computation in double precision.

#include "../../src/phatgoose/routing/kernels/native.cpp"

#include <cstdio>
#include <cstdlib>

namespace {

struct Input {
    const uint8_t* at;
    size_t left;
    uint32_t state = 1;  // of what follows the last byte, so that a few bytes make large tensors
    uint8_t byte() {
        if (left) return left--, state = state * 31 + *at, *at++;
        return (state = state * 1664525 + 1013904223) >> 24;
    }
    index_t from(index_t least, index_t most) { return least + byte() % (most - least + 1); }
};

// Small numbers with many ties, and the odd ones.
float number(Input& in) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-42f, -0.0f, 65504.0f};
    uint8_t byte = in.byte();
    return byte < 8 ? odd[byte] : (int(byte) - 131) / 16.0f;
}

template <class T>
std::unique_ptr<T[]> tensor(Input& in, index_t size) {
    std::unique_ptr<T[]> made(new T[size]);
    for (index_t i = 0; i < size; i++) store(&made[i], number(in));
    return made;
}

void wanted(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "wanted: %s\n", what);
    abort();
}

struct Sizes { index_t tokens, n, E, k, r, d; };

// |got - wanted| is within rounding of `size`, the sum of magnitudes; nothing is said of overflow.
template <class T>
bool near(float got, double exact, double size) {
    if (!(size < 1e30)) return true;
    double step = sizeof(T) == sizeof(float) ? 1e-4 : 1e-2;
    return std::fabs(got - exact) <= step * size + 1e-6;
}

// Each token's experts are there, and weigh 1 in all; none that isn't chosen has a higher affinity.
template <class T>
void check_choice(const Sizes& s, const T* u, const T* vectors, bool standardised,
                  const index_t* experts, const float* weights) {
    for (index_t t = 0; t < s.tokens; t++) {
        std::vector<double> affinity(s.E), size(s.E);
        bool plain = true;
        for (index_t e = 0; e < s.E; e++) {
            for (index_t i = 0; i < s.n; i++) {
                double term = double(to_float(u[t * s.n + i])) * to_float(vectors[e * s.n + i]);
                affinity[e] += term, size[e] += std::fabs(term);
            }
            plain = plain && size[e] < 1e30;
            if (!standardised) affinity[e] = std::fabs(affinity[e]);
        }
        double total = 0, least = INFINITY;
        std::vector<bool> chosen(s.E);
        for (index_t j = 0; j < s.k; j++) {
            index_t e = experts[t * s.k + j];
            wanted(e >= 0 && e < s.E, "an expert that is there");
            if (!plain) continue;
            wanted(!chosen[e], "each expert once");
            chosen[e] = true, total += weights[t * s.k + j];
            least = std::min(least, affinity[e] + 1e-4 * size[e] + 1e-6);
        }
        if (!plain) continue;
        wanted(std::fabs(total - 1) < 1e-3, "weights whose sum is 1");
        for (index_t e = 0; e < s.E; e++)
            wanted(chosen[e] || affinity[e] - 1e-4 * size[e] <= least, "the highest affinities");
    }
}

template <class T>
void check_update(const Sizes& s, const T* y, const T* before, const T* u, const index_t* experts,
                  const float* weights, const T* A, const T* B) {
    std::vector<double> exact(s.d), size(s.d);
    for (index_t t = 0; t < s.tokens; t++) {
        for (index_t c = 0; c < s.d; c++) {
            exact[c] = to_float(before[t * s.d + c]);
            size[c] = std::fabs(exact[c]);
        }
        for (index_t p = t * s.k; p < (t + 1) * s.k; p++)
            for (index_t i = 0; i < s.r && weights[p] != 0; i++) {
                const index_t at = experts[p] * s.r + i;
                const T *row = A + at * s.n, *out = B + at * s.d;
                double inner = 0, most = 0;
                for (index_t x = 0; x < s.n; x++) {
                    double term = double(to_float(u[t * s.n + x])) * to_float(row[x]);
                    inner += term, most += std::fabs(term);
                }
                bool overflows = !(most < 1e30);  // or nearly does, in float32
                inner *= weights[p], most *= std::fabs(weights[p]);
                if (overflows || !(most < 1e30)) most = INFINITY;
                for (index_t c = 0; c < s.d; c++) {
                    exact[c] += inner * to_float(out[c]);
                    size[c] += most * std::fabs(to_float(out[c]));
                }
            }
        for (index_t c = 0; c < s.d; c++)
            wanted(near<T>(to_float(y[t * s.d + c]), exact[c], size[c]), "the routed product");
    }
}

template <class T>
struct Kernel;
template <>
struct Kernel<float> {
    static constexpr auto route = route_float32;
    static constexpr auto update = update_float32;
    static constexpr auto both = routed_update_float32;
};
template <>
struct Kernel<bf16> {
    static constexpr auto route = route_bfloat16;
    static constexpr auto update = update_bfloat16;
    static constexpr auto both = routed_update_bfloat16;
};

template <class T>
void one(Input& in) {
    Sizes s{in.from(1, 9), in.from(1, 70), in.from(1, 20), 0, in.from(1, 5), in.from(1, 70)};
    s.k = in.from(1, std::min<index_t>(s.E, 5));
    uint8_t shape = in.byte();
    if (shape % 64 == 1) s.tokens = 1020 + in.from(0, 10), s.n = s.r = 2, s.d = 3, s.k = 1;
    if (shape % 64 == 2) s.d += 230;
    if (shape % 64 == 3) s.E += 30, s.k = s.E;
    index_t threads = in.from(1, 8);
    bool standardised = in.byte() & 1;
    auto u = tensor<T>(in, s.tokens * s.n), vectors = tensor<T>(in, s.E * s.n);
    auto A = tensor<T>(in, s.E * s.r * s.n), B = tensor<T>(in, s.E * s.r * s.d);
    auto before = tensor<T>(in, s.tokens * s.d);
    const index_t size = s.tokens * s.d, pairs = s.tokens * s.k;
    std::unique_ptr<index_t[]> experts(new index_t[pairs]);
    std::unique_ptr<float[]> weights(new float[pairs]);
    std::unique_ptr<T[]> y(new T[size]), whole(new T[size]);

    Kernel<T>::route(u.get(), vectors.get(), s.tokens, s.n, s.E, s.k, 1e-5f, standardised,
                     experts.get(), weights.get(), threads);
    check_choice(s, u.get(), vectors.get(), standardised, experts.get(), weights.get());
    std::copy_n(before.get(), size, y.get());
    wanted(!Kernel<T>::update(y.get(), u.get(), experts.get(), weights.get(), A.get(), B.get(),
                              s.tokens, s.k, s.E, s.r, s.n, s.d, threads), "no complaint");
    check_update(s, y.get(), before.get(), u.get(), experts.get(), weights.get(), A.get(), B.get());
    std::copy_n(before.get(), size, whole.get());
    Kernel<T>::both(whole.get(), u.get(), vectors.get(), A.get(), B.get(), s.tokens, s.n, s.E, s.k,
                    1e-5f, standardised, s.r, s.d, threads);
    wanted(!memcmp(y.get(), whole.get(), size * sizeof(T)), "both in one as one after the other");

    // Experts and weights as a caller may name them: any index, the same one twice, any weight.
    bool good = true;
    for (index_t p = 0; p < pairs; p++) {
        experts[p] = index_t(in.byte() % (s.E + 1)) - (in.byte() == 255);
        good = good && experts[p] >= 0 && experts[p] < s.E;
        weights[p] = in.byte() % 3 ? number(in) : 0;
    }
    std::copy_n(before.get(), size, y.get());
    bool failed = Kernel<T>::update(y.get(), u.get(), experts.get(), weights.get(), A.get(),
                                    B.get(), s.tokens, s.k, s.E, s.r, s.n, s.d, threads);
    wanted(failed != good, "a complaint of an index that names no expert, and of no other");
    if (good)
        check_update(s, y.get(), before.get(), u.get(), experts.get(), weights.get(), A.get(),
                     B.get());
    else wanted(!memcmp(y.get(), before.get(), size * sizeof(T)), "nothing done");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in{data, size};
    if (in.byte() & 1) one<bf16>(in);
    else one<float>(in);
    return 0;
}
