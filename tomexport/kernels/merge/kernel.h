// Merge, fused: what reference.py computes, in float32, without the |A| x |B| matrix.
//
//   directions  sum the groups of each token's signal, scale to length 1; B lies in panels
//   match       register tiles of A x B with a running maximum for each row of A
//   choose      the r best rows of A, by selection; slots and sizes
//   reduce      one pass over x; a slot of one token is a copy
//
// Napkin for N = 197, C = 192, D = 64 at 32 multiply-adds a cycle: `match` is 0.7 M of them, 22 k
// cycles; the others stream 0.45 MB through the caches, about as long.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "operator.h"
#include "simd.h"

namespace tomexport {

class Merge {
  public:
    static constexpr const char *kName = "Merge";

    Merge(std::int64_t r, std::int64_t n_prefix) : r_(r), prefix_(n_prefix) {}

    std::int64_t removed() const { return r_; }

    // Why it cannot be computed for so many tokens, or nullptr.
    const char *refusal(std::int64_t n_tokens) const {
        if (n_tokens > std::numeric_limits<std::int32_t>::max()) return "there are 2^31 tokens or more";
        if (r_ < 0 || prefix_ < 0 || prefix_ > n_tokens || r_ > (n_tokens - prefix_) / 2)
            return "r must be 0 to half of the tokens after the prefix";
        return nullptr;
    }

    // Computes image `index` of a call.
    void run(const Call &call, std::int64_t index, const Threads &threads) const {
        thread_local Workspace workspace;
        const Image m = layout(call, index, workspace);
        if (r_ == 0) return identity(m);
        directions(m, threads);
        match(m, threads);
        choose(m);
        reduce(m, threads);
    }

  private:
    // A tile is kRows rows of A by a panel of B, which is kVectors vectors of columns.
    static constexpr int kRows = kRegisters >= 32 ? 8 : 6, kVectors = 2;
    static constexpr std::int64_t kColumns = kVectors * kLanes;

    std::int64_t r_, prefix_;

    struct Image {
        std::int64_t n, channels, groups, dims;
        std::int64_t width;             // D rounded up to whole vectors
        std::int64_t first_a, first_b;  // A is first_a, first_a + 2, …; B likewise
        std::int64_t n_a, n_b, slot_b;  // |A|, |B|, the first slot of B
        const float *x, *size, *signal;
        float *x_out, *size_out;
        std::int64_t *target;
        float *a, *b;           // directions: (rows, width) and (panels, width, kColumns)
        float *row;             // (panels, width) a token of each panel on its way there
        float *best;            // (rows) the largest similarity of each row of A
        std::int32_t *partner;  // (rows) the column of B where it is
        std::uint64_t *rank;    // (|A|) sort keys
        std::int32_t *first;    // (M) the token that a slot begins with
        std::int32_t *next;     // (N) the token that shares its slot and comes after it, or −1
    };

    static std::int64_t up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

    Image layout(const Call &c, std::int64_t index, Workspace &workspace) const {
        Image m{};
        m.n = c.n_tokens, m.channels = c.n_channels, m.groups = c.n_groups;
        m.dims = c.n_dims, m.width = up(m.dims, kLanes);
        m.first_a = prefix_ + prefix_ % 2, m.first_b = prefix_ + 1 - prefix_ % 2;
        m.n_a = (m.n - m.first_a + 1) / 2, m.n_b = (m.n - m.first_b + 1) / 2;
        m.slot_b = prefix_ + m.n_a - r_;
        const std::int64_t n_out = m.n - r_;
        m.x = c.x + index * m.n * m.channels;
        m.size = c.size + (c.one_size ? 0 : index * m.n);
        m.signal = c.signal + index * m.groups * m.n * m.dims;
        m.x_out = c.x_out + index * n_out * m.channels;
        m.size_out = c.size_out + index * n_out;
        m.target = c.target + index * m.n;
        if (r_ == 0) return m;

        const std::int64_t rows = up(m.n_a, kRows), columns = up(m.n_b, kColumns);
        const std::int64_t n_floats = (rows + columns + columns / kColumns) * m.width + rows;
        workspace.reserve(n_floats * sizeof(float) + (rows + n_out + m.n) * sizeof(std::int32_t) +
                          m.n_a * sizeof(std::uint64_t), 8);
        m.a = workspace.take<float>(rows * m.width);
        m.b = workspace.take<float>(columns * m.width);
        m.row = workspace.take<float>(columns / kColumns * m.width);
        m.best = workspace.take<float>(rows);
        m.partner = workspace.take<std::int32_t>(rows);
        m.rank = workspace.take<std::uint64_t>(m.n_a);
        m.first = workspace.take<std::int32_t>(n_out);
        m.next = workspace.take<std::int32_t>(m.n);
        return m;
    }

    static void identity(const Image &m) {
        std::copy_n(m.x, m.n * m.channels, m.x_out);
        std::copy_n(m.size, m.n, m.size_out);
        for (std::int64_t i = 0; i < m.n; ++i) m.target[i] = i;
    }

    // --- directions

    static void directions(const Image &m, const Threads &threads) {
        threads.split(up(m.n_b, kColumns), kColumns, [&m](std::int64_t begin, std::int64_t end) {
            for (; begin < end; begin += kColumns) fill_panel(m, begin);
        });
        threads.split(up(m.n_a, kRows), 6 * kRows, [&m](std::int64_t begin, std::int64_t end) {
            for (; begin < end; ++begin) fill_row(m, begin);
        });
    }

    // The sum of the groups has the direction of their mean. Writes it, and zeros up to whole vectors.
    static void sum_groups(const Image &m, std::int64_t token, float *out) {
        const float *in = m.signal + token * m.dims;
        const std::int64_t plane = m.n * m.dims;
        std::int64_t d = 0;
        for (; d + kLanes <= m.dims; d += kLanes) {
            Floats total = load(in + d);
            for (std::int64_t g = 1; g < m.groups; ++g) total += load(in + g * plane + d);
            store(out + d, total);
        }
        for (; d < m.width; ++d) {
            out[d] = 0.f;
            for (std::int64_t g = 0; d < m.dims && g < m.groups; ++g) out[d] += in[g * plane + d];
        }
    }

    static void fill_row(const Image &m, std::int64_t row) {
        float *out = m.a + row * m.width;
        sum_groups(m, m.first_a + 2 * std::min(row, m.n_a - 1), out);
        Floats squares{};
        for (std::int64_t d = 0; d < m.width; d += kLanes) squares += load(out + d) * load(out + d);
        const float scale = 1.f / std::sqrt(sum(squares));
        for (std::int64_t d = 0; d < m.width; d += kLanes) store(out + d, load(out + d) * scale);
    }

    static void fill_panel(const Image &m, std::int64_t column) {
        float *panel = m.b + column * m.width, *row = m.row + column / kColumns * m.width;
        for (std::int64_t lane = 0; lane < kColumns; ++lane) {
            sum_groups(m, m.first_b + 2 * std::min(column + lane, m.n_b - 1), row);
            for (std::int64_t d = 0; d < m.dims; ++d) panel[d * kColumns + lane] = row[d];
        }
        Floats scale[kVectors] = {};
        const std::int64_t size = m.dims * kColumns;
        for (std::int64_t i = 0; i < size; i += kColumns)
            for (int v = 0; v < kVectors; ++v) {
                const Floats values = load(panel + i + v * kLanes);
                scale[v] += values * values;
            }
        for (int v = 0; v < kVectors; ++v)
            for (int lane = 0; lane < kLanes; ++lane) scale[v][lane] = 1.f / std::sqrt(scale[v][lane]);
        for (std::int64_t i = 0; i < size; i += kColumns)
            for (int v = 0; v < kVectors; ++v) {
                float *at = panel + i + v * kLanes;
                store(at, load(at) * scale[v]);
            }
    }

    // --- match

    static void match(const Image &m, const Threads &threads) {
        threads.split(up(m.n_a, kRows), 2 * kRows, [&m](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; row += kRows) match_rows(m, row);
        });
    }

    static void match_rows(const Image &m, std::int64_t row) {
        Floats best[kRows];
        Ints partner[kRows];
        for (int i = 0; i < kRows; ++i) {
            best[i] = Floats{} - std::numeric_limits<float>::infinity();
            partner[i] = Ints{};
        }
        for (std::int64_t column = 0; column < m.n_b; column += kColumns) {
            if (m.n_b - column > kLanes) tile<kVectors>(m, row, column, best, partner);
            else tile<1>(m, row, column, best, partner);
        }
        for (int i = 0; i < kRows; ++i) {
            float value = best[i][0];
            std::int32_t where = partner[i][0];
            for (int lane = 1; lane < kLanes; ++lane) {
                const bool tie = best[i][lane] == value && partner[i][lane] < where;
                if (best[i][lane] > value || tie) value = best[i][lane], where = partner[i][lane];
            }
            m.best[row + i] = value, m.partner[row + i] = where;
        }
    }

    // A score that is NaN is never above the best, so it counts as lower than all others.
    template <int V> static void tile(const Image &m, std::int64_t row, std::int64_t column,
                                      Floats *best, Ints *partner) {
        const float *a = m.a + row * m.width, *b = m.b + column * m.width;
        Floats scores[kRows][V] = {};
        for (std::int64_t d = 0; d < m.dims; ++d, b += kColumns) {
            Floats columns[V];
            for (int v = 0; v < V; ++v) columns[v] = load(b + v * kLanes);
            for (int i = 0; i < kRows; ++i)
                for (int v = 0; v < V; ++v) scores[i][v] += a[i * m.width + d] * columns[v];
        }
        for (int v = 0; v < V; ++v) {
            Ints index;
            for (int lane = 0; lane < kLanes; ++lane)
                index[lane] = static_cast<std::int32_t>(column + v * kLanes + lane);
            const Ints exists = index < static_cast<std::int32_t>(m.n_b);
            for (int i = 0; i < kRows; ++i) {
                const Ints better = (scores[i][v] > best[i]) & exists;
                best[i] = better ? scores[i][v] : best[i];
                partner[i] = better ? index : partner[i];
            }
        }
    }

    // --- choose

    void choose(const Image &m) const {
        for (std::int64_t i = 0; i < m.n_a; ++i)
            m.rank[i] = descending(m.best[i]) << 32 | static_cast<std::uint64_t>(i);
        if (r_ < m.n_a) std::nth_element(m.rank, m.rank + r_, m.rank + m.n_a);
        std::fill_n(m.next, m.n, -1);
        for (std::int64_t i = 0; i < prefix_; ++i) begin_slot(m, i, i);
        for (std::int64_t j = 0; j < m.n_b; ++j) begin_slot(m, m.slot_b + j, m.first_b + 2 * j);

        std::sort(m.rank, m.rank + r_, [](auto p, auto q) { return row_of(p) < row_of(q); });
        if (prefix_) std::sort(m.rank + r_, m.rank + m.n_a, [](auto p, auto q) { return row_of(p) < row_of(q); });
        else std::sort(m.rank + r_, m.rank + m.n_a);
        for (std::int64_t k = r_; k < m.n_a; ++k)
            begin_slot(m, prefix_ + k - r_, m.first_a + 2 * row_of(m.rank[k]));
        for (std::int64_t k = 0; k < r_; ++k) {
            const std::int64_t i = row_of(m.rank[k]);
            join_slot(m, m.slot_b + m.partner[i], m.first_a + 2 * i);
        }
    }
    static std::int64_t row_of(std::uint64_t key) { return static_cast<std::int64_t>(key & 0xffffffffu); }

    // Orders floats the other way round, as unsigned integers; −0 and 0 are the same.
    static std::uint64_t descending(float value) {
        value += 0.f;
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits >> 31 ? bits : ~bits & 0x7fffffffu;
    }

    static void begin_slot(const Image &m, std::int64_t slot, std::int64_t token) {
        m.target[token] = slot;
        m.first[slot] = static_cast<std::int32_t>(token);
        m.size_out[slot] = m.size[token];
    }

    static void join_slot(const Image &m, std::int64_t slot, std::int64_t token) {
        const std::int32_t head = m.first[slot];
        m.target[token] = slot;
        m.next[token] = m.next[head];
        m.next[head] = static_cast<std::int32_t>(token);
        m.size_out[slot] += m.size[token];
    }

    // --- reduce

    void reduce(const Image &m, const Threads &threads) const {
        threads.split(m.n - r_, 48, [&m](std::int64_t begin, std::int64_t end) {
            for (std::int64_t slot = begin; slot < end; ++slot) reduce_slot(m, slot);
        });
    }

    static void reduce_slot(const Image &m, std::int64_t slot) {
        std::int32_t token = m.first[slot];
        float *out = m.x_out + slot * m.channels;
        const float *in = m.x + token * m.channels;
        if (m.next[token] < 0) {
            std::copy_n(in, m.channels, out);
            return;
        }
        for (std::int64_t c = 0; c < m.channels; ++c) out[c] = in[c] * m.size[token];
        while ((token = m.next[token]) >= 0) {
            in = m.x + token * m.channels;
            for (std::int64_t c = 0; c < m.channels; ++c) out[c] += in[c] * m.size[token];
        }
        for (std::int64_t c = 0; c < m.channels; ++c) out[c] /= m.size_out[slot];
    }
};

}  // namespace tomexport
