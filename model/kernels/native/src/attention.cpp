// Attention with a running softmax, in one order of additions for a row whatever the batch, chunk or thread count.
//
// Two forms of the same function. Expanded: keys and values of every head, for prompts; half to a third of the
// arithmetic. Absorbed: queries brought to the latent that all heads share, for generated tokens and for rows
// that read a selection; a third of the memory. Which one computes a row is decided by its position alone.
#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "gemm.h"
#include "tile.h"

namespace {

constexpr int BLOCK = 64;        // keys of one softmax step
constexpr int KEYS = 8;          // keys of one small product: as many as there are registers for their addresses
constexpr int PARTITION = 128;   // keys that one thread takes of a row: fixed places, added up in order

inline float max_lanes(VecF v) {
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = std::max(best, v[i]);
  return best;
}

}  // namespace

struct ExpandedShape {
  int num_heads, nope, rope, value, latent;
  int64_t row_stride;  // floats from a cache row to the next
};

namespace {

constexpr int FILL = 3 * BLOCK;  // keys that a thread expands at a time: whole tiles and whole blocks
constexpr int ROW_BLOCK = 8 * ROWS;

// Keys and values of one head in the order in which the products read them.
struct HeadKeys {
  int width, value_padded;
  std::vector<float> keys;    // [keys/BLOCK][width][BLOCK]; zeros where there is no key
  std::vector<float> values;  // [keys padded][value_padded]

  HeadKeys(const ExpandedShape& s, int total)
      : width(s.nope + s.rope), value_padded(round_up(s.value, LANES)), keys((size_t)round_up(total, FILL) * width),
        values((size_t)round_up(total, FILL) * value_padded) {}

  const float* key_block(int block) const { return &keys[(size_t)block * BLOCK * width]; }
  const float* value_row(int key) const { return &values[(size_t)key * value_padded]; }

  void put(const ExpandedShape& s, int key, int column, float value) {
    if (column < s.nope) keys[((size_t)(key / BLOCK) * width + column) * BLOCK + key % BLOCK] = value;
    else if (column < s.nope + s.value) values[(size_t)key * value_padded + column - s.nope] = value;
  }

  // Keys [from, from + FILL): the head's part of the latents (expand: its panels), and their rope keys.
  void fill(const ExpandedShape& s, const Weight& expand, int from, int total, const float* cache, const int64_t* ids) {
    const int count = std::min(FILL, total - from);
    const float* latent[FILL];
    for (int i = 0; i < count; i++) latent[i] = cache + ids[from + i] * s.row_stride;
    float tile[TILE_ROWS * PANEL];
    for (int p = 0; p < expand.num_panels(); p++)
      for (int r = 0; r < count; r += TILE_ROWS) {
        const int m = std::min(TILE_ROWS, count - r);
        multiply_tile(expand, p, Rows{latent + r, nullptr, nullptr}, m, tile, PANEL);
        for (int j = 0; j < PANEL; j++)
          for (int i = 0; i < m; i++) put(s, from + r + i, p * PANEL + j, tile[i * PANEL + j]);
      }
    for (int i = 0; i < count; i++)
      for (int j = 0; j < s.rope; j++)
        keys[((size_t)((from + i) / BLOCK) * width + s.nope + j) * BLOCK + (from + i) % BLOCK] = latent[i][s.latent + j];
  }
};

// Softmax state of the rows of one block and head.
struct RowBlock {
  alignas(64) float score[ROW_BLOCK * BLOCK];
  alignas(64) float total[ROW_BLOCK][LANES];
  float best[ROW_BLOCK], keep[ROW_BLOCK];
  std::vector<float> sum;  // (rows, value_padded)
};

// Scores of one block of keys to shares, and what is kept of the sums so far.
void soften(RowBlock& s, int num_rows, int first_position, int first_key) {
  for (int r = 0; r < num_rows; r++) {
    float* row = s.score + r * BLOCK;
    const int visible = std::min(BLOCK, first_position + r + 1 - first_key);
    for (int i = std::max(visible, 0); i < BLOCK; i++) row[i] = -INFINITY;
    VecF high = load(row);
    for (int i = LANES; i < BLOCK; i += LANES) high = larger(high, load(row + i));
    const float best = std::max(s.best[r], max_lanes(high));
    s.keep[r] = s.best[r] == -INFINITY ? 0.f : vec_exp(splat(s.best[r] - best))[0];
    s.best[r] = best;
    VecF total = load(s.total[r]) * s.keep[r];
    for (int i = 0; i < BLOCK; i += LANES) {
      const VecF share = vec_exp(load(row + i) - best);
      store(row + i, share);
      total += share;
    }
    store(s.total[r], total);
  }
}

// Rows [begin, begin + num_rows) of one head: out + r * H * value of the r-th.
void attend_rows(const ExpandedShape& s, const HeadKeys& head, RowBlock& state, const float* q, int begin, int num_rows,
                 int first_position, float* out) {
  const size_t q_stride = (size_t)s.num_heads * head.width, stride = head.value_padded;
  std::fill(state.sum.begin(), state.sum.end(), 0.f);
  for (int r = 0; r < num_rows; r++) state.best[r] = -INFINITY, store(state.total[r], VecF{});
  const float* rows = q + begin * q_stride;
  const float* score = state.score;
  const auto query = [=](int from) { return [=](int m, int k) { return rows[(from + m) * q_stride + k]; }; };
  const auto share = [=](int from) { return [=](int m, int k) { return score[(from + m) * BLOCK + k]; }; };
  for (int b = 0; b * BLOCK < first_position + begin + num_rows; b++) {
    const float *keys = head.key_block(b), *values = head.value_row(b * BLOCK);
    multiply<ROWS>(num_rows, query, [=](int column) { return Strided{keys + column, BLOCK}; }, head.width, BLOCK / LANES,
                   state.score, BLOCK, nullptr);
    soften(state, num_rows, first_position + begin, b * BLOCK);
    multiply<ROWS>(num_rows, share, [=](int column) { return Strided{values + column, stride}; }, BLOCK,
                   head.value_padded / LANES, state.sum.data(), stride, state.keep);
  }
  for (int r = 0; r < num_rows; r++) {
    const float inverse = 1.f / sum_lanes(load(state.total[r]));
    float* to = out + (size_t)(begin + r) * s.num_heads * s.value;
    for (int o = 0; o < s.value; o++) to[o] = state.sum[r * stride + o] * inverse;
  }
}

}  // namespace

// out (R, H, value) of rows at positions first_position + r, each reading the keys at positions up to its own.
//   expand: for each head (nope + value, latent), behind each other; q (R, H, nope + rope), scaled and rotated;
//   ids: the cache rows of the positions
extern "C" void moray_attend_expanded(const ExpandedShape* shape, const Weight* expand, const float* q, int num_rows,
                                      int first_position, const float* cache, const int64_t* ids, float* out, int num_threads) {
  const ExpandedShape s = *shape;
  const int total = first_position + num_rows, row_blocks = (num_rows + ROW_BLOCK - 1) / ROW_BLOCK;
  HeadKeys head(s, total);
#pragma omp parallel num_threads(num_threads)
  {
    RowBlock state;
    state.sum.resize((size_t)ROW_BLOCK * head.value_padded);
    for (int h = 0; h < s.num_heads; h++) {
      const Weight mine = expand->of_head(h);
#pragma omp for schedule(static)
      for (int from = 0; from < total; from += FILL) head.fill(s, mine, from, total, cache, ids);
#pragma omp for schedule(dynamic)
      for (int back = 0; back < row_blocks; back++) {
        const int begin = (row_blocks - 1 - back) * ROW_BLOCK;
        attend_rows(s, head, state, q + (size_t)h * head.width, begin, std::min(ROW_BLOCK, num_rows - begin), first_position,
                    out + (size_t)h * s.value);
      }
    }
  }
}

struct AbsorbedShape {
  int num_heads, latent, width;  // width: latent and rope key together
  int64_t row_stride;            // floats from a cache row to the next
};

namespace {

// What one partition of a row's keys gives: heads are lanes, padded.
struct Partial {
  std::vector<float> best, total, sum;  // (Hp), (Hp), (H, C)
  void resize(int padded, int heads, int latent) {
    best.resize(padded), total.resize(padded), sum.resize((size_t)heads * latent);
  }
};

struct AbsorbedScratch {
  std::vector<float> query;  // [width][Hp]
  std::vector<float> score;  // [BLOCK][Hp]
  std::vector<float> keep;   // (Hp)
};

void transpose_query(const AbsorbedShape& s, const float* q, int padded, std::vector<float>& to) {
  to.resize((size_t)s.width * padded);  // lanes without a head stay zero
  for (int x = 0; x < s.width; x += LANES)
    for (int h = 0; h < s.num_heads; h++)
      for (int i = x; i < std::min(x + LANES, s.width); i++) to[(size_t)i * padded + h] = q[(size_t)h * s.width + i];
}

// Keys that will be read next: their rows come from memory while others are computed, a few lines at a time, so that
// arithmetic and memory go side by side.
struct Ahead {
  const int64_t* ids;
  int count;
};

// Where the rows of one block of keys lie, and those of the next one.
struct Block {
  const float* rows[BLOCK];
  const float* next[BLOCK];
  int keys, num_next;

  Block(const AbsorbedShape& s, const float* cache, const int64_t* ids, int keys, const Ahead& ahead)
      : keys(keys), num_next(std::min(BLOCK, ahead.count)) {
    for (int i = 0; i < keys; i++) rows[i] = cache + ids[i] * s.row_stride;
    for (int i = 0; i < num_next; i++) next[i] = cache + ahead.ids[i] * s.row_stride;
  }
};

constexpr int LINE = 16;  // floats of a cache line

// score[i][0:LANES) = rows[i] . query, for M keys and the heads of one vector; fetches lines of `next` on the way.
template <int M>
inline void score_keys(const float* const* rows, const float* const* next, const float* query, int padded, int width, float* score) {
  VecF even[M] = {}, odd[M] = {};
  int k = 0;
  for (; k + LINE <= width; k += LINE) {
    if (next)
      for (int m = 0; m < M; m++) __builtin_prefetch(next[m] + k, 0, 2);
#pragma GCC unroll 8
    for (int j = k; j < k + LINE; j += 2) {
      const VecF first = load(query + (size_t)j * padded), second = load(query + (size_t)(j + 1) * padded);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) even[m] += first * rows[m][j];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) odd[m] += second * rows[m][j + 1];
    }
  }
  for (; k < width; k++)
    for (int m = 0; m < M; m++) even[m] += load(query + (size_t)k * padded) * rows[m][k];
  for (int m = 0; m < M; m++) store(score + m * padded, even[m] + odd[m]);
}

template <int M>
inline void score_some(int num_keys, const float* const* rows, const float* const* next, const float* query, int padded, int width,
                       float* score) {
  if (num_keys == M) return score_keys<M>(rows, next, query, padded, width, score);
  if constexpr (M > 1) score_some<M - 1>(num_keys, rows, next, query, padded, width, score);
}

void attend_partition(const AbsorbedShape& s, const float* cache, const int64_t* ids, int count, const Ahead& ahead,
                      AbsorbedScratch& t, Partial& to) {
  const int padded = round_up(s.num_heads, LANES);
  std::fill(to.best.begin(), to.best.end(), -INFINITY);
  std::fill(to.total.begin(), to.total.end(), 0.f);
  std::fill(to.sum.begin(), to.sum.end(), 0.f);
  for (int from = 0; from < count; from += BLOCK) {
    const Block block(s, cache, ids + from, std::min(BLOCK, count - from),
                      from + BLOCK < count ? Ahead{ids + from + BLOCK, count - from - BLOCK} : ahead);
    const int keys = block.keys;
    for (int i = 0; i < keys; i += KEYS)
      for (int v = 0; v < padded; v += LANES)
        score_some<KEYS>(std::min(KEYS, keys - i), block.rows + i, v == 0 && i + KEYS <= block.num_next ? block.next + i : nullptr,
                         t.query.data() + v, padded, s.width, &t.score[(size_t)i * padded + v]);
    for (int h = 0; h < padded; h += LANES) {
      const VecF old = load(&to.best[h]);
      VecF best = old;
      for (int i = 0; i < keys; i++) best = larger(best, load(&t.score[(size_t)i * padded + h]));
      const VecF keep = vec_exp(old - best);
      VecF total = load(&to.total[h]) * keep;
      for (int i = 0; i < keys; i++) {
        const VecF share = vec_exp(load(&t.score[(size_t)i * padded + h]) - best);
        store(&t.score[(size_t)i * padded + h], share);
        total += share;
      }
      store(&to.best[h], best), store(&to.total[h], total), store(&t.keep[h], keep);
    }
    const float* score = t.score.data();
    const auto share = [=](int first) { return [=](int m, int k) { return score[(size_t)k * padded + first + m]; }; };
    const int whole = s.latent / LANES * LANES, step = COLUMN_VECS * LANES;
    // A few columns of all keys stay in the first-level cache while every head reads them.
    for (int c = 0; c < whole; c += step)
      multiply<ROWS>(s.num_heads, share, [&](int column) { return Gathered{block.rows, c + column}; }, keys,
                     std::min(step, whole - c) / LANES, to.sum.data() + c, s.latent, t.keep.data());
    for (int h = 0; h < s.num_heads; h++)
      for (int c = whole; c < s.latent; c++) {
        float sum = to.sum[(size_t)h * s.latent + c] * t.keep[h];
        for (int i = 0; i < keys; i++) sum += score[(size_t)i * padded + h] * block.rows[i][c];
        to.sum[(size_t)h * s.latent + c] = sum;
      }
  }
}

// Partial results in order of their keys: (H, C).
void merge(const AbsorbedShape& s, const Partial* parts, int num_parts, float* out) {
  for (int h = 0; h < s.num_heads; h++) {
    float best = -INFINITY, total = 0.f;
    for (int i = 0; i < num_parts; i++) best = std::max(best, parts[i].best[h]);
    float* to = out + (size_t)h * s.latent;
    std::fill(to, to + s.latent, 0.f);
    for (int i = 0; i < num_parts; i++) {
      const float factor = vec_exp(splat(parts[i].best[h] - best))[0];
      total += parts[i].total[h] * factor;
      const float* from = &parts[i].sum[(size_t)h * s.latent];
      for (int c = 0; c < s.latent; c++) to[c] += from[c] * factor;
    }
    for (int c = 0; c < s.latent; c++) to[c] /= total;
  }
}

// out (R, H, C): each row over the cache rows that it names. q (R, H, width).
void attend_latents(const AbsorbedShape& s, const float* cache, const float* q, int num_rows, const int64_t* const* ids,
                    const int32_t* counts, float* out, int num_threads) {
  const int padded = round_up(s.num_heads, LANES);
  const size_t q_row = (size_t)s.num_heads * s.width, out_row = (size_t)s.num_heads * s.latent;
  const bool is_split = num_rows < 4 * num_threads;  // few rows: threads share them
  std::vector<int> item_row, item_part;
  std::vector<std::vector<Partial>> parts(is_split ? num_rows : 0);
  for (int r = 0; r < num_rows && is_split; r++) {
    parts[r].resize((counts[r] + PARTITION - 1) / PARTITION);
    for (int p = 0; p < (int)parts[r].size(); p++) item_row.push_back(r), item_part.push_back(p);
  }
#pragma omp parallel num_threads(num_threads)
  {
    AbsorbedScratch scratch;
    scratch.score.resize((size_t)BLOCK * padded), scratch.keep.resize(padded);
    const auto compute = [&](int r, int p, Partial& to) {
      to.resize(padded, s.num_heads, s.latent);
      const int begin = p * PARTITION, end = std::min(begin + PARTITION, counts[r]), next = r + num_threads;
      Ahead ahead{ids[r] + end, counts[r] - end};
      if (end == counts[r] && next < num_rows) ahead = {ids[next], counts[next]};
      attend_partition(s, cache, ids[r] + begin, end - begin, ahead, scratch, to);
    };
    if (is_split) {
      int held = -1;
#pragma omp for schedule(dynamic)
      for (int i = 0; i < (int)item_row.size(); i++) {
        const int r = item_row[i];
        if (r != held) transpose_query(s, q + r * q_row, padded, scratch.query), held = r;
        compute(r, item_part[i], parts[r][item_part[i]]);
      }
#pragma omp for schedule(dynamic)
      for (int r = 0; r < num_rows; r++) merge(s, parts[r].data(), (int)parts[r].size(), out + r * out_row);
    } else {
      std::vector<Partial> own;
#pragma omp for schedule(dynamic)
      for (int r = 0; r < num_rows; r++) {
        own.resize((counts[r] + PARTITION - 1) / PARTITION);
        transpose_query(s, q + r * q_row, padded, scratch.query);
        for (int p = 0; p < (int)own.size(); p++) compute(r, p, own[p]);
        merge(s, own.data(), (int)own.size(), out + r * out_row);
      }
    }
  }
}

// Queries brought to the latent, rope part behind: (R, H, width).
void absorb(const AbsorbedShape& s, const Weight* key, const float* q, int num_rows, float* out, int num_threads) {
  const int nope = key->width, rope = s.width - s.latent, heads = s.num_heads;
  moray_gemm(key, heads, q, num_rows, (int64_t)heads * (nope + rope), nope + rope, out, (int64_t)heads * s.width, s.width, num_threads);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows > num_threads)
  for (size_t i = 0; i < (size_t)num_rows * heads; i++)
    std::memcpy(out + i * s.width + s.latent, q + i * (nope + rope) + nope, rope * sizeof(float));
}

}  // namespace

// out (R, H, value): each row over the cache rows that it names. q (R, H, nope + rope), scaled and rotated.
//   key: for each head (latent, nope), value: for each head (value, latent), behind each other
extern "C" void moray_attend_absorbed(const AbsorbedShape* shape, const Weight* key, const Weight* value, const float* cache,
                                      const float* q, int num_rows, const int64_t* const* ids, const int32_t* counts, float* out,
                                      int num_threads) {
  const AbsorbedShape s = *shape;
  const size_t items = (size_t)num_rows * s.num_heads;
  const std::unique_ptr<float[]> absorbed(new float[items * s.width]), latent(new float[items * s.latent]);
  absorb(s, key, q, num_rows, absorbed.get(), num_threads);
  attend_latents(s, cache, absorbed.get(), num_rows, ids, counts, latent.get(), num_threads);
  const int out_head = value->num_columns;
  moray_gemm(value, s.num_heads, latent.get(), num_rows, (int64_t)s.num_heads * s.latent, s.latent, out,
             (int64_t)s.num_heads * out_head, out_head, num_threads);
}
