// What happens to a row between two matrix products: norms, rotary embedding, SwiGLU, the gate's choice.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace {

constexpr int SERIAL_VALUES = 16384;  // fewer values than this are not worth a second thread

int threads_for(int64_t num_values, int num_threads) { return num_values < SERIAL_VALUES ? 1 : num_threads; }

float square_sum(const float* x, int width, float centre) {
  VecF sum = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    const VecF v = load(x + i) - centre;
    sum += v * v;
  }
  float total = sum_lanes(sum);
  for (; i < width; i++) total += (x[i] - centre) * (x[i] - centre);
  return total;
}

void rms_norm_row(const float* x, const float* weight, int width, float eps, float* out) {
  const float factor = 1.f / std::sqrt(square_sum(x, width, 0.f) / width + eps);
  for (int i = 0; i < width; i++) out[i] = x[i] * factor * weight[i];
}

void rotate_pairs(float* x, const float* cos, const float* sin, int half, int step, int apart) {
  for (int i = 0; i < half; i++) {
    float* first = x + i * step;
    const float a = *first, b = first[apart];
    first[0] = a * cos[i] - b * sin[i];
    first[apart] = a * sin[i] + b * cos[i];
  }
}

}  // namespace

// x (R, D) += delta (R, D) unless null; out (R, D) = x / sqrt(mean(x^2) + eps) * weight. Strides count floats.
extern "C" void moray_rms_norm(float* x, int64_t x_stride, const float* delta, const float* weight, float eps, int num_rows, int width,
                               float* out, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for((int64_t)num_rows * width, num_threads))
  for (int r = 0; r < num_rows; r++) {
    float* row = x + r * x_stride;
    if (delta)
      for (int i = 0; i < width; i++) row[i] += delta[(size_t)r * width + i];
    rms_norm_row(row, weight, width, eps, out + (size_t)r * width);
  }
}

// out (R, F) = silu(x[:, :F]) * x[:, F:], x (R, 2F).
extern "C" void moray_silu_multiply(const float* x, int num_rows, int width, float* out, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for((int64_t)num_rows * width, num_threads))
  for (int r = 0; r < num_rows; r++) {
    const float *gate = x + (size_t)r * 2 * width, *up = gate + width;
    float* to = out + (size_t)r * width;
    int i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, vec_silu(load(gate + i)) * load(up + i));
    for (; i < width; i++) to[i] = vec_silu(splat(gate[i]))[0] * up[i];
  }
}

// Rotates 2 * half values of each head, from x + r * stride + h * head_stride + begin, in place. Interleaved pairs
// (2i, 2i + 1), or half-split ones (i, half + i). Then multiplies the `width` values of each head by `scale`.
extern "C" void moray_rotate(float* x, int num_rows, int num_heads, int64_t stride, int64_t head_stride, int begin, int half,
                             int is_interleaved, const float* cos, const float* sin, int width, float scale, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for((int64_t)num_rows * stride, num_threads))
  for (int r = 0; r < num_rows; r++)
    for (int h = 0; h < num_heads; h++) {
      float* head = x + r * stride + h * head_stride;
      rotate_pairs(head + begin, cos + (size_t)r * half, sin + (size_t)r * half, half, is_interleaved ? 2 : 1,
                   is_interleaved ? 1 : half);
      for (int i = 0; i < width && scale != 1.f; i++) head[i] *= scale;
    }
}

struct CacheShape {
  int latent, rope, index, is_int8;
  float eps, index_eps;
};

// Cache rows [latent | rope key | indexer key]: normed latent, rotated keys, layer-normed indexer key, written to
// cache + ids[r] * cache_stride. An INT8 indexer key is bytes around 128 and the factor that brings them back.
//   joined: (R, latent + rope) at joined + r * joined_stride; key (R, index) at key + r * key_stride
extern "C" void moray_cache_rows(const CacheShape* shape, const float* joined, int64_t joined_stride, const float* key,
                                 int64_t key_stride, const float* latent_weight, const float* key_weight, const float* key_bias, const float* cos,
                                 const float* sin, int num_rows, float* cache, int64_t cache_stride, const int64_t* ids,
                                 int num_threads) {
  const CacheShape s = *shape;
  const int half = s.rope / 2;
#pragma omp parallel num_threads(threads_for((int64_t)num_rows * cache_stride, num_threads))
  {
    std::vector<float> whole(s.is_int8 ? s.index : 0);
#pragma omp for schedule(static)
    for (int r = 0; r < num_rows; r++) {
      const float *from = joined + r * joined_stride, *own = key + r * key_stride;
      const float *c = cos + (size_t)r * half, *d = sin + (size_t)r * half;
      float *to = cache + ids[r] * cache_stride, *place = to + s.latent + s.rope;
      rms_norm_row(from, latent_weight, s.latent, s.eps, to);
      std::memcpy(to + s.latent, from + s.latent, s.rope * 4);
      rotate_pairs(to + s.latent, c, d, half, 2, 1);
      float* index = s.is_int8 ? whole.data() : place;
      float mean = 0.f;
      for (int i = 0; i < s.index; i++) mean += own[i];
      mean /= s.index;
      const float factor = 1.f / std::sqrt(square_sum(own, s.index, mean) / s.index + s.index_eps);
      for (int i = 0; i < s.index; i++) index[i] = (own[i] - mean) * factor * key_weight[i] + key_bias[i];
      rotate_pairs(index, c, d, half, 1, half);
      if (s.is_int8) quantise_row(index, s.index, (uint8_t*)place, place + s.index / 4);
    }
  }
}

struct GateShape {
  int num_experts, num_groups, kept_groups, top_k;
  float scaling, floor;
};

namespace {

// The indices of the `count` largest, best first; the earlier one of equals.
void best_of(float* score, int num, int count, int* to) {
  for (int i = 0; i < count; i++) {
    to[i] = (int)(std::max_element(score, score + num) - score);
    score[to[i]] = -INFINITY;
  }
}

}  // namespace

// Chosen experts (R, K), best biased score first, and their weights (R, K), of the gate's logits (R, E).
extern "C" void moray_choose_experts(const GateShape* shape, const float* logits, const float* bias, int num_rows, int32_t* ids,
                                     float* weights, int num_threads) {
  const GateShape s = *shape;
  const int size = s.num_experts / s.num_groups;
#pragma omp parallel num_threads(threads_for((int64_t)num_rows * s.num_experts * 16, num_threads))
  {
    std::vector<float> score(s.num_experts + LANES), choice(s.num_experts), group(s.num_groups);
    std::vector<int> kept(s.num_groups), chosen(s.top_k);
    std::vector<bool> is_kept(s.num_groups);
#pragma omp for schedule(static)
    for (int r = 0; r < num_rows; r++) {
      for (int e = 0; e < s.num_experts; e++) score[e] = -logits[(size_t)r * s.num_experts + e];
      for (int e = 0; e < s.num_experts; e += LANES) store(&score[e], 1.f / (1.f + vec_exp(load(&score[e]))));
      for (int e = 0; e < s.num_experts; e++) choice[e] = score[e] + bias[e];
      for (int g = 0; g < s.num_groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; e++) {
          if (choice[e] > first) second = first, first = choice[e];
          else second = std::max(second, choice[e]);
        }
        group[g] = first + second;
      }
      best_of(group.data(), s.num_groups, s.kept_groups, kept.data());
      is_kept.assign(s.num_groups, false);
      for (int i = 0; i < s.kept_groups; i++) is_kept[kept[i]] = true;
      for (int e = 0; e < s.num_experts; e++)
        if (!is_kept[e / size]) choice[e] = -INFINITY;
      best_of(choice.data(), s.num_experts, s.top_k, chosen.data());
      float total = 0.f;
      for (int e : chosen) total += score[e];
      for (int i = 0; i < s.top_k; i++) {
        ids[(size_t)r * s.top_k + i] = chosen[i];
        weights[(size_t)r * s.top_k + i] = score[chosen[i]] / (total + s.floor) * s.scaling;
      }
    }
  }
}
