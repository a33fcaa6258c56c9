// Rounding of weights to INT8: the codes of an output channel and its factor, fitted to each other.
#include <algorithm>

#include "vec.h"

namespace {

constexpr float MOST = 127.f;

// A product of a float and a code is exact in double, and sums of some thousands round alike in nearly any order.
typedef double VecD __attribute__((vector_size(LANES * 8), aligned(8), may_alias));

VecF nearest(VecF x) {
  const VecF magic = splat(12582912.f);  // 1.5 * 2^23 rounds half to even
  x = (x + magic) - magic;
  x = x > splat(MOST) ? splat(MOST) : x;
  return x < splat(-MOST) ? splat(-MOST) : x;
}

// The nearest codes to a factor, with the sums that the factor which fits them best is the quotient of; whether one
// is another than before.
bool round_row(const float* weight, int width, float factor, float* code, double* products, double* squares) {
  VecD product = {}, square = {};
  VecI changed = {};
  for (int i = 0; i < width; i += LANES) {
    const VecF w = load(weight + i), c = nearest(w / factor);
    changed |= c != load(code + i);
    store(code + i, c);
    const VecD exact = __builtin_convertvector(c, VecD);
    product += __builtin_convertvector(w, VecD) * exact;
    square += exact * exact;
  }
  *products = *squares = 0.;
  bool any = false;
  for (int i = 0; i < LANES; i++) *products += product[i], *squares += square[i], any |= changed[i] != 0;
  return any;
}

}  // namespace

// codes (F, D) and factors (F) of weights (F, D). `padded` and `code` hold D values, rounded up to whole vectors.
extern "C" void moray_fit_columns(const float* weights, int num_rows, int width, float smallest, int max_fits, float* padded, float* code,
                                  int8_t* codes, float* factors) {
  const int whole = (width + LANES - 1) / LANES * LANES;
  std::fill(padded, padded + whole, 0.f);
  for (int r = 0; r < num_rows; r++) {
    std::memcpy(padded, weights + (size_t)r * width, width * sizeof(float));
    float largest = 0.f;
    double products, squares;
    for (int i = 0; i < width; i++) largest = std::max(largest, std::abs(padded[i]));
    float factor = largest > smallest ? largest / MOST : 1.f;
    std::fill(code, code + whole, 0.f);
    round_row(padded, whole, factor, code, &products, &squares);
    for (int fit = 0; fit < max_fits; fit++) {
      factor = squares > 0. ? (float)(products / squares) : 1.f;
      if (!round_row(padded, whole, factor, code, &products, &squares)) break;
    }
    for (int i = 0; i < width; i++) codes[(size_t)r * width + i] = (int8_t)code[i];
    factors[r] = factor;
  }
}
