// Runs the fused kernel on the cases of a file, as a runtime would, and writes what it computes:
//   native_cases CASES RESULTS
// A case is the ten numbers of `Sizes`, then x, size and signal, weight and offset of a LayerNorm; a
// result is x, size and target, and then what follows: the normalised x and the logarithm of size.
// Every array has a heap block of exactly its size, so that sanitizers see each step past its end.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include "merge/kernel.h"

namespace {

using namespace tomexport;

struct Sizes {
    std::int64_t r, n_prefix, raster, n_batch, n_tokens, n_channels, n_groups, n_dims, n_sizes, is_bfloat16;
};

template <class T> struct Result {
    std::vector<T> x;
    std::vector<float> size;
    std::vector<std::int64_t> target;
    std::vector<T> norm;
    std::vector<T> log_size;
};

constexpr float kEpsilon = 1e-6f;

template <class T> std::vector<T> read(std::istream &in, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    in.read(reinterpret_cast<char *>(values.data()), static_cast<std::streamsize>(count * sizeof(T)));
    return values;
}

template <class T> void write(std::ostream &out, const std::vector<T> &values) {
    out.write(reinterpret_cast<const char *>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(T)));
}

template <class T> bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

template <class T> bool same(const Result<T> &a, const Result<T> &b) {
    return same(a.x, b.x) && same(a.size, b.size) && same(a.target, b.target);
}

// All at once, each in a thread of its own.
void together(void *, Threads::Task task, std::size_t n, void *data) {
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < n; ++i) threads.emplace_back(task, data, i);
    for (std::thread &thread : threads) thread.join();
}

// One after the other, the last first: nobody may wait for those who have not begun.
void backwards(void *, Threads::Task task, std::size_t n, void *data) {
    while (n--) task(data, n);
}

// What follows is computed only if the call has a weight.
template <class T>
Result<T> compute(const Merge &op, Call<T> call, const Threads &threads) {
    const std::int64_t n_out = call.n_batch * (call.n_tokens - op.removed());
    Result<T> result{std::vector<T>(static_cast<std::size_t>(n_out * call.n_channels)),
                     std::vector<float>(static_cast<std::size_t>(n_out)),
                     std::vector<std::int64_t>(static_cast<std::size_t>(call.n_batch * call.n_tokens)),
                     {}, {}};
    call.x_out = result.x.data();
    call.size_out = result.size.data();
    call.target = result.target.data();
    if (call.norm_weight) {
        result.norm.resize(result.x.size()), result.log_size.resize(result.size.size());
        call.norm_out = result.norm.data(), call.log_size_out = result.log_size.data();
    }
    run(op, call, threads);
    return result;
}

template <class T> const char *run_case(const Sizes &s, std::istream &in, std::ostream &out) {
    const auto x = read<T>(in, s.n_batch * s.n_tokens * s.n_channels);
    const auto size = read<float>(in, s.n_sizes * s.n_tokens);
    const auto signal = read<T>(in, s.n_batch * s.n_groups * s.n_tokens * s.n_dims);
    const auto weight = read<float>(in, s.n_channels), offset = read<float>(in, s.n_channels);
    if (!in) return "the file ends too early";

    const Merge op(s.r, s.n_prefix, s.raster != 0);
    if (const char *why = op.refusal(s.n_tokens)) return why;
    Call<T> call{};
    call.n_batch = s.n_batch, call.n_tokens = s.n_tokens, call.n_channels = s.n_channels;
    call.n_groups = s.n_groups, call.n_dims = s.n_dims;
    call.one_size = s.n_sizes == 1;
    call.x = x.data(), call.size = size.data(), call.signal = signal.data();

    const Result<T> plain = compute(op, call, Threads::none());
    call.norm_weight = weight.data(), call.norm_offset = offset.data(), call.epsilon = kEpsilon;
    const Result<T> alone = compute(op, call, Threads::none());
    if (!same(plain, alone)) return "the result depends on what follows";
    for (const Threads &threads : {Threads(4, nullptr, together), Threads(4, nullptr, backwards)}) {
        const Result<T> other = compute(op, call, threads);
        if (!same(alone, other) || !same(alone.norm, other.norm) || !same(alone.log_size, other.log_size))
            return "the result depends on the threads";
    }
    write(out, alone.x), write(out, alone.size), write(out, alone.target);
    write(out, alone.norm), write(out, alone.log_size);
    return nullptr;
}

}  // namespace

int main(int, char **argv) {
    std::ifstream in(argv[1], std::ios::binary);
    std::ofstream out(argv[2], std::ios::binary);
    Sizes sizes;
    for (int index = 0; in.read(reinterpret_cast<char *>(&sizes), sizeof sizes); ++index) {
        const char *why = sizes.is_bfloat16 ? run_case<BFloat16>(sizes, in, out) : run_case<float>(sizes, in, out);
        if (!why) continue;
        std::fprintf(stderr, "case %d: %s\n", index, why);
        return 1;
    }
    return 0;
}
