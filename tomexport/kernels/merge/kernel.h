// Merge, fused: what reference.py computes, in float32, without the |A| x |B| matrix.
//
//   directions  sum the groups of each token's signal, scale to length 1; B lies in panels
//   match       register tiles of A x B with a running maximum for each row of A
//   choose      the r best rows of A, by their r-th best score; slots and sizes
//   reduce      one pass over x; a slot of one token is a copy; where asked for, LayerNorm of it
//
// Napkin for N = 197, C = 192, D = 64 at 32 multiply-adds a cycle: `match` is 0.7 M of them, 22 k
// cycles; the others stream 0.45 MB through the caches, about as long.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "operator.h"
#include "simd.h"
#include "slots.h"

namespace tomexport {

class Merge {
  public:
    static constexpr const char *kName = "Merge";
    static constexpr bool kFollowed = true;
    // `raster`: slots stand in the order of their first tokens.
    static constexpr Attribute kAttributes[] = {{"r"}, {"n_prefix"}, {"raster", true}};
    enum In { kX, kSize, kSignal };
    static constexpr Port kInputs[] = {{"x", Type::kReal, "BNC"},
                                       {"size", Type::kFloat, "SN1"},
                                       {"signal", Type::kReal, "BGND"},
                                       kNormWeight, kNormOffset};
    enum Out { kMerged, kMergedSize, kTarget };
    static constexpr Port kOutputs[] = {{"x", Type::kReal, "BMC"},
                                        {"size", Type::kFloat, "BM1"},
                                        {"target", Type::kInteger, "BN"},
                                        kNorm, kLogSize};

    explicit Merge(const std::int64_t *attributes)
        : r_(attributes[0]), prefix_(attributes[1]), raster_(attributes[2] != 0) {}

    std::int64_t removed() const { return r_; }

    const char *refusal(std::int64_t n_tokens) const {
        if (n_tokens > std::numeric_limits<std::int32_t>::max()) return "2^31 tokens or more";
        if (r_ < 0 || prefix_ < 0 || prefix_ > n_tokens || r_ > (n_tokens - prefix_) / 2)
            return "r must be 0 to half of the tokens after the prefix";
        return nullptr;
    }

    template <class T> void run(const Call &call, const Threads &threads) const {
        thread_local Workspace workspace;
        const Image<T> m = layout<T>(call, workspace);
        if (r_ == 0) return identity(m);
        const std::size_t n_tiles = static_cast<std::size_t>(m.rows / kRows);
        const std::size_t n_members = std::min({threads.most(), n_tiles, Team::kMembers});
        Team team(n_members);
        threads.run(n_members, [&](std::size_t member) {
            const auto each = [&](int phase, std::int64_t count, std::int64_t grain, const auto &f) {
                team.phase(phase, member, count, grain, [&f](std::int64_t begin, std::int64_t end) {
                    for (; begin < end; ++begin) f(begin);
                });
            };
            each(0, (std::max(m.rows, m.columns) + kLanes - 1) / kLanes, 1, [&](std::int64_t i) { fill(m, i * kLanes); });
            each(1, m.rows / kRows, 1, [&](std::int64_t i) { match_rows(m, i * kRows); });
            each(2, 1, 1, [&](std::int64_t) { choose(m); });
            each(3, m.n - r_, kSlots, [&](std::int64_t slot) { m.slots.reduce(slot); });
        });
    }

  private:
    // A tile is kRows rows of A by a panel of B, which is kVectors vectors of columns.
    static constexpr int kRows = kRegisters >= 32 ? 8 : 6, kVectors = 2;
    static constexpr std::int64_t kColumns = kVectors * kLanes;
    static constexpr std::int64_t kSlots = 16;  // slots that are reduced as one piece of work

    std::int64_t r_, prefix_;
    bool raster_;

    template <class T> struct Image {
        std::int64_t n, groups, dims;
        std::int64_t first_a, first_b;       // A is first_a, first_a + 2, …; B likewise
        std::int64_t n_a, n_b, slot_b;       // |A|, |B|, the first slot of B
        std::int64_t rows, columns, width;   // |A|, |B|, D rounded up to tiles, panels, vectors
        const T *signal;
        Integers target;
        Slots<T> slots;
        float *a, *b;           // directions: (rows, width) and (columns / kColumns, D, kColumns)
        float *row;             // (columns / lanes, width) a token on its way into its panel
        float *best;            // (rows) the largest similarity of each row of A
        std::int32_t *partner;  // (rows) the column of B where it is
        std::uint32_t *rank;    // (|A| rounded up to vectors) sort keys, ascending is better
        std::int32_t *number;   // (M) the place of a slot in raster order, or −1
    };

    static std::int64_t up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

    template <class T> Image<T> layout(const Call &call, Workspace &workspace) const {
        Image<T> m{};
        const Sizes &sizes = call.sizes;
        m.n = sizes['N'], m.groups = sizes['G'], m.dims = sizes['D'];
        m.first_a = prefix_ + prefix_ % 2, m.first_b = prefix_ + 1 - prefix_ % 2;
        m.n_a = (m.n - m.first_a + 1) / 2, m.n_b = (m.n - m.first_b + 1) / 2;
        m.slot_b = prefix_ + m.n_a - r_;
        m.rows = up(m.n_a, kRows), m.columns = up(m.n_b, kColumns), m.width = up(m.dims, kLanes);
        const std::int64_t n_out = sizes['M'];
        const float *size = call.input<float>(kSize);
        m.signal = call.input<T>(kSignal);
        m.target = call.taken(kTarget);
        m.slots = tomexport::slots<Merge, T>(call, size, size, true);
        if (r_ == 0) return m;

        const std::int64_t n_rank = up(m.n_a, kLanes);
        const std::int64_t counts[] = {m.rows * m.width, m.columns * m.dims, m.columns / kLanes * m.width,
                                       m.rows, m.rows, n_rank, n_out, m.n, raster_ ? n_out : 0};
        std::int64_t total = 0;
        for (std::int64_t count : counts) total += count;
        workspace.reserve(static_cast<std::size_t>(total) * 4, std::size(counts));
        m.a = workspace.take<float>(counts[0]);
        m.b = workspace.take<float>(counts[1]);
        m.row = workspace.take<float>(counts[2]);
        m.best = workspace.take<float>(counts[3]);
        m.partner = workspace.take<std::int32_t>(counts[4]);
        m.rank = workspace.take<std::uint32_t>(counts[5]);
        m.slots.first = workspace.take<std::int32_t>(counts[6]);
        m.slots.next = workspace.take<std::int32_t>(counts[7]);
        m.number = workspace.take<std::int32_t>(counts[8]);
        return m;
    }

    template <class T> static void identity(const Image<T> &m) {
        const Slots<T> &s = m.slots;
        std::copy_n(s.x, m.n * s.channels, s.x_out);
        std::copy_n(s.mass, m.n, s.size_out);
        for (std::int64_t i = 0; i < m.n; ++i) m.target.set(i, i), s.follow(i);
    }

    // --- directions

    // The sum of the groups has the direction of their mean. Writes it, and zeros up to `width`.
    template <class T>
    static void sum_groups(const Image<T> &m, std::int64_t token, float *out) {
        const T *in = m.signal + token * m.dims;
        const std::int64_t plane = m.n * m.dims;
        std::int64_t d = 0;
        for (; d + kLanes <= m.dims; d += kLanes) {
            Floats total = load(in + d);
            for (std::int64_t g = 1; g < m.groups; ++g) total += load(in + g * plane + d);
            store(out + d, total);
        }
        for (; d < m.width; ++d) {
            out[d] = 0.f;
            for (std::int64_t g = 0; d < m.dims && g < m.groups; ++g)
                out[d] += load_one(in + g * plane + d);
        }
    }

    // Rows of A and columns of B from `first` on, as many as a vector has lanes; neighbours in memory.
    template <class T> static void fill(const Image<T> &m, std::int64_t first) {
        float *panel = m.b + first / kColumns * kColumns * m.dims + first % kColumns;
        for (std::int64_t i = first; i < first + kLanes; ++i) {
            if (i < m.rows) fill_row(m, i);
            if (i < m.columns) fill_column(m, i, panel + i - first);
        }
        if (first >= m.columns) return;
        Floats scale{};
        for (std::int64_t d = 0; d < m.dims; ++d) {
            const Floats values = load(panel + d * kColumns);
            scale += values * values;
        }
        for (int lane = 0; lane < kLanes; ++lane) scale[lane] = 1.f / std::sqrt(scale[lane]);
        for (float *end = panel + m.dims * kColumns; panel < end; panel += kColumns)
            store(panel, load(panel) * scale);
    }

    template <class T> static void fill_row(const Image<T> &m, std::int64_t row) {
        float *out = m.a + row * m.width;
        sum_groups(m, m.first_a + 2 * std::min(row, m.n_a - 1), out);
        Floats squares{};
        for (std::int64_t d = 0; d < m.width; d += kLanes) squares += load(out + d) * load(out + d);
        const float scale = 1.f / std::sqrt(sum(squares));
        for (std::int64_t d = 0; d < m.width; d += kLanes) store(out + d, load(out + d) * scale);
    }

    template <class T>
    static void fill_column(const Image<T> &m, std::int64_t column, float *out) {
        float *row = m.row + column / kLanes * m.width;
        sum_groups(m, m.first_b + 2 * std::min(column, m.n_b - 1), row);
        for (std::int64_t d = 0; d < m.dims; ++d) out[d * kColumns] = row[d];
    }

    // --- match

    template <class T> static void match_rows(const Image<T> &m, std::int64_t row) {
        Floats best[kRows];
        Ints partner[kRows] = {};
        for (Floats &b : best) b = Floats{} - std::numeric_limits<float>::infinity();
        for (std::int64_t column = 0; column < m.n_b; column += kColumns) {
            const bool wide = m.n_b - column > kLanes;
            (wide ? tile<kVectors, T> : tile<1, T>)(m, row, column, best, partner);
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

    // A score that is NaN is not above −∞, so it counts as lower than every number.
    template <int V, class T>
    static void tile(const Image<T> &m, std::int64_t row, std::int64_t column, Floats *best,
                     Ints *partner) {
        const float *a = m.a + row * m.width, *b = m.b + column * m.dims;
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
                index[lane] = static_cast<std::int32_t>(column) + v * kLanes + lane;
            const Ints exists = index < static_cast<std::int32_t>(m.n_b);
            for (int i = 0; i < kRows; ++i) {
                const Ints better = (scores[i][v] > best[i]) & exists;
                best[i] = better ? scores[i][v] : best[i];
                partner[i] = better ? index : partner[i];
            }
        }
    }

    // --- choose

    template <class T> void choose(const Image<T> &m) const {
        const std::int64_t n_rank = up(m.n_a, kLanes);
        for (std::int64_t i = 0; i < m.n_a; ++i) m.rank[i] = descending(m.best[i]);
        std::fill(m.rank + m.n_a, m.rank + n_rank, std::numeric_limits<std::uint32_t>::max());
        const std::uint32_t last = smallest(m.rank, n_rank, r_);
        std::int64_t n_ties = r_;  // how many of those at `last` merge: the first ones
        for (std::int64_t i = 0; i < m.n_a; ++i) n_ties -= m.rank[i] < last;

        std::fill_n(m.slots.next, m.n, -1);
        for (std::int64_t i = 0; i < prefix_; ++i) begin_slot(m, i, i);
        for (std::int64_t j = 0; j < m.n_b; ++j) begin_slot(m, m.slot_b + j, m.first_b + 2 * j);
        std::int64_t n_kept = 0;
        for (std::int64_t i = 0; i < m.n_a; ++i) {
            const std::int64_t token = m.first_a + 2 * i;
            const bool merges = m.rank[i] < last || (m.rank[i] == last && n_ties-- > 0);
            if (merges) join_slot(m, m.slot_b + m.partner[i], token);
            else begin_slot(m, prefix_ + n_kept++, token);
        }
        if (raster_) number_slots(m);
        else if (prefix_ == 0) order_kept(m);
    }

    // Begins the slots again, each when its first token comes.
    template <class T> void number_slots(const Image<T> &m) const {
        std::int32_t n_begun = 0;
        std::fill_n(m.number, m.n - r_, -1);
        std::fill_n(m.slots.next, m.n, -1);
        for (std::int64_t token = 0; token < m.n; ++token) {
            std::int32_t &number = m.number[m.target[token]];
            if (number >= 0) join_slot(m, number, token);
            else begin_slot(m, number = n_begun++, token);
        }
    }

    // Without a prefix, what is kept of A comes by descending score.
    template <class T> static void order_kept(const Image<T> &m) {
        const auto rank = [&m](std::int32_t token) { return m.rank[(token - m.first_a) / 2]; };
        std::stable_sort(m.slots.first, m.slots.first + m.slot_b, [&rank](std::int32_t p, std::int32_t q) {
            return rank(p) < rank(q);
        });
        for (std::int64_t slot = 0; slot < m.slot_b; ++slot) begin_slot(m, slot, m.slots.first[slot]);
    }

    // The k-th smallest of n keys, bit by bit: what is below it is counted, nothing is moved.
    static std::uint32_t smallest(const std::uint32_t *keys, std::int64_t n, std::int64_t k) {
        std::uint32_t found = 0;
        for (int bit = 31; bit >= 0; --bit) {
            const std::uint32_t middle = found + ((1u << bit) - 1);
            std::int32_t count = 0;
            for (std::int64_t i = 0; i < n; ++i) count += keys[i] <= middle;
            if (count < k) found += 1u << bit;
        }
        return found;
    }

    template <class T>
    static void begin_slot(const Image<T> &m, std::int64_t slot, std::int64_t token) {
        m.target.set(token, slot);
        m.slots.first[slot] = static_cast<std::int32_t>(token);
    }

    template <class T>
    static void join_slot(const Image<T> &m, std::int64_t slot, std::int64_t token) {
        std::int32_t *const next = m.slots.next, head = m.slots.first[slot];
        m.target.set(token, slot);
        next[token] = next[head];
        next[head] = static_cast<std::int32_t>(token);
    }
};

}  // namespace tomexport
