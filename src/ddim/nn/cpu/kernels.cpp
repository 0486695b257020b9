// Float32 kernels for a U-Net in channels-last memory: what its layers cost most on a CPU without bf16 matrix units.
//
// Each output number is one chain of operations whatever the batch and the number of threads, so that a sample's bits
// depend on neither.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12;
#elif defined(__AVX__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 8;
#endif
constexpr int NV = 2, NR = NV * VL;

typedef float vf __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

static inline vf load(const float* p) { return *(const vf*)p; }
static inline void store(float* p, vf v) { *(vf*)p = v; }
static inline vf all(float x) { return x - vf{}; }  // x + 0 would be an addition, as -0 + 0 is 0

// What is added to a sum before it is stored; any may be null.
struct After {
  const float* bias;      // (N)
  const float* time;      // (batch or 1, N)
  int64_t time_stride;    // between samples, 0 where there is one for all
  const float* residual;  // the output's shape
};

// C[i] (M rows, NR columns) = sum over taps and k of rows[tap][i][k] B[tap][k], B packed.
template <int M>
static inline void tile(int taps, int K, const float* const* rows, const float* B, vf (&c)[M][NV]) {
  for (int i = 0; i < M; i++)
    for (int j = 0; j < NV; j++) c[i][j] = vf{};
  for (int tap = 0; tap < taps; tap++, rows += MR)
    for (int k = 0; k < K; k++, B += NR) {
      vf b[NV];
      for (int j = 0; j < NV; j++) b[j] = load(B + j * VL);
      for (int i = 0; i < M; i++) {
        vf a = all(rows[i][k]);
        for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
      }
    }
}

template <int M>
static inline void tile_plain(int K, const float* const* rows, const float* B, float* C, int64_t ldc) {
  vf c[M][NV];
  tile<M>(1, K, rows, B, c);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < NV; j++) store(C + i * ldc + j * VL, c[i][j]);
}

template <int M>
static inline void tile_after(int taps, int K, const float* const* rows, const float* B, float* const* out, int column,
                              int N, const After& after, const int64_t* sample) {
  vf c[M][NV];
  tile<M>(taps, K, rows, B, c);
  int width = std::min(NR, N - column);
  for (int i = 0; i < M; i++) {
    alignas(64) float sum[NR];
    for (int j = 0; j < NV; j++) store(sum + j * VL, c[i][j]);
    const float* time = after.time ? after.time + sample[i] * after.time_stride + column : nullptr;
    const float* residual = after.residual ? after.residual + (out[i] - out[0]) : nullptr;
    float* to = out[i] + column;
    for (int n = 0; n < width; n++) {
      float value = sum[n];
      if (after.bias) value += after.bias[column + n];
      if (time) value += time[n];
      if (residual) value += residual[column + n];
      to[n] = value;
    }
  }
}

template <int M = MR>
struct Rows {
  static void plain(int m, int K, const float* const* rows, const float* B, float* C, int64_t ldc) {
    if (m == M) tile_plain<M>(K, rows, B, C, ldc);
    else Rows<M - 1>::plain(m, K, rows, B, C, ldc);
  }
  static void after(int m, int taps, int K, const float* const* rows, const float* B, float* const* out, int column,
                    int N, const After& a, const int64_t* sample) {
    if (m == M) tile_after<M>(taps, K, rows, B, out, column, N, a, sample);
    else Rows<M - 1>::after(m, taps, K, rows, B, out, column, N, a, sample);
  }
};
template <>
struct Rows<0> {
  static void plain(int, int, const float* const*, const float*, float*, int64_t) {}
  static void after(int, int, int, const float* const*, const float*, float* const*, int, int, const After&,
                    const int64_t*) {}
};

// exp to 1e-7, after Cephes.
static inline vf exponential(vf x) {
  x = x < all(-87.0f) ? all(-87.0f) : (x > all(88.0f) ? all(88.0f) : x);
  vf scaled = x * 1.44269504088896341f;
  vi whole = __builtin_convertvector(scaled + (scaled < vf{} ? all(-0.5f) : all(0.5f)), vi);
  vf n = __builtin_convertvector(whole, vf);
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi bits = (whole + 127) << 23;
  vf power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

static inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }

extern "C" {

int ddim_vector() { return VL; }
int ddim_panel() { return NR; }

// Convolution of (batch, H, W, C) by taps, `side` x `side`, with stride and offset, to (batch, Ho, Wo, N).
// `up` reads the input at twice its size, nearest neighbour. B: panels of NR columns, (N / NR, side^2, C, NR).
void ddim_conv(const float* x, const float* B, const float* bias, const float* time, int64_t time_stride,
               const float* residual, float* y, int64_t batch, int64_t H, int64_t W, int64_t C, int64_t N, int64_t Ho,
               int64_t Wo, int side, int stride, int offset, int up, int threads) {
  const int taps = side * side;
  const int64_t rows = batch * Ho * Wo, panels = (N + NR - 1) / NR;
  const int64_t strips = (rows + MR - 1) / MR, height = H << up, width = W << up;
  const int64_t chunk = std::max<int64_t>(1, 96 / MR), chunks = (strips + chunk - 1) / chunk;
  // Few rows and many columns are divided by columns, else by rows.
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(panels, (4 * threads + chunks - 1) / chunks));
  const std::vector<float> zeros(C, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t part = 0; part < chunks; part++)
    for (int64_t share = 0; share < shares; share++) {
      const int64_t p0 = panels * share / shares, p1 = panels * (share + 1) / shares;
      std::vector<const float*> from(chunk * taps * MR);
      std::vector<float*> to(chunk * MR);
      std::vector<int64_t> sample(chunk * MR);
      const int64_t s0 = part * chunk, s1 = std::min(strips, s0 + chunk);
      for (int64_t r = s0 * MR; r < std::min(rows, s1 * MR); r++) {
        const int64_t b = r / (Ho * Wo), oh = r / Wo % Ho, ow = r % Wo, at = r - s0 * MR;
        to[at] = y + r * N;
        sample[at] = b;
        for (int tap = 0; tap < taps; tap++) {
          const int64_t h = oh * stride + tap / side - offset, w = ow * stride + tap % side - offset;
          const bool inside = h >= 0 && h < height && w >= 0 && w < width;
          from[(at / MR * taps + tap) * MR + at % MR] =
              inside ? x + ((b * H + (h >> up)) * W + (w >> up)) * C : zeros.data();
        }
      }
      for (int64_t p = p0; p < p1; p++)
        for (int64_t s = s0; s < s1; s++) {
          const int m = (int)std::min<int64_t>(MR, rows - s * MR);
          After after{bias, time, time_stride, residual ? residual + s * MR * N : nullptr};
          Rows<>::after(m, taps, (int)C, &from[(s - s0) * taps * MR], B + p * taps * C * NR, &to[(s - s0) * MR],
                        (int)(p * NR), (int)N, after, &sample[(s - s0) * MR]);
        }
    }
}

// The 3x3 convolution with stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016): a quarter of the
// products. C and N are multiples of VL. U: (36, N / NR, C, NR); scratch: `ddim_winograd_scratch` floats.
struct Shape {
  int64_t H, W, C, N, up;  // H and W are the output's; the input's are half of them where `up`
  int64_t th, tw, tiles, panels, Np, block;
  bool shared;  // whether all threads work on one block of tiles, else each on its own
};

static Shape shape_of(int64_t batch, int64_t H, int64_t W, int64_t C, int64_t N, int up, int threads) {
  Shape s{H, W, C, N, up, (H + 3) / 4, (W + 3) / 4, 0, (N + NR - 1) / NR, 0, 0, false};
  s.tiles = batch * s.th * s.tw;
  s.Np = s.panels * NR;
  s.shared = threads > 1 && s.tiles < 4 * MR * threads;
  // Tiles at a time: few enough for the second cache where the weights fit there too, else enough to pay for reading
  // the weights.
  const int64_t bytes = 36 * 4 * C * s.Np <= (4 << 20) ? 1 << 20 : 8 << 20;
  const int64_t wanted = std::max<int64_t>(MR, bytes / (36 * 4 * (C + s.Np)) / MR * MR);
  const int64_t share = s.shared ? s.tiles : (s.tiles + threads - 1) / threads;
  s.block = std::min(wanted, (share + MR - 1) / MR * MR);
  return s;
}

int64_t ddim_winograd_scratch(int64_t batch, int64_t H, int64_t W, int64_t C, int64_t N, int threads) {
  const Shape s = shape_of(batch, H, W, C, N, 0, threads);
  return (s.shared ? 1 : threads) * 36 * s.block * (C + s.Np);
}

static inline void input_row(const vf* d, vf* t) {
  t[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  vf a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1];
  t[1] = a + b;
  t[2] = a - b;
  vf c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  t[3] = c + e;
  t[4] = c - e;
  t[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

static inline void output_row(const vf* m, vf* t) {
  vf a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
  t[0] = m[0] + a + c;
  t[1] = b + 2.0f * d;
  t[2] = a + 4.0f * c;
  t[3] = b + 8.0f * d + m[5];
}

// The transform of input tile i of a block into V (36, block, C).
static inline void input_tile(const Shape& s, const float* x, const float* zeros, int64_t first, int64_t i, float* V) {
  const int64_t at = first + i, b = at / (s.th * s.tw), oh = at / s.tw % s.th * 4 - 1, ow = at % s.tw * 4 - 1;
  const float* from[36];
  for (int r = 0; r < 36; r++) {
    const int64_t h = oh + r / 6, w = ow + r % 6;
    const bool inside = h >= 0 && h < s.H && w >= 0 && w < s.W;
    from[r] = inside ? x + ((b * (s.H >> s.up) + (h >> s.up)) * (s.W >> s.up) + (w >> s.up)) * s.C : zeros;
  }
  for (int64_t c = 0; c < s.C; c += VL) {
    vf d[6][6], t[6][6];
    for (int w = 0; w < 6; w++) {
      vf column[6];
      for (int h = 0; h < 6; h++) column[h] = load(from[h * 6 + w] + c);
      input_row(column, t[w]);
    }
    for (int h = 0; h < 6; h++) {
      vf row[6];
      for (int w = 0; w < 6; w++) row[w] = t[w][h];
      input_row(row, d[h]);
    }
    for (int r = 0; r < 36; r++) store(V + (r * s.block + i) * s.C + c, d[r / 6][r % 6]);
  }
}

// Products of one of the 36 matrices of V and of U, columns of panels p0..p1, into M (36, block, Np).
static inline void multiply(const Shape& s, const float* U, int64_t r, int64_t p0, int64_t p1, int64_t count,
                            const float* V, float* M) {
  for (int64_t p = p0; p < p1; p++)
    for (int64_t i = 0; i < count; i += MR) {
      const int m = (int)std::min<int64_t>(MR, count - i);
      const float* rows[MR];
      for (int j = 0; j < MR; j++) rows[j] = V + (r * s.block + i + std::min(j, m - 1)) * s.C;
      Rows<>::plain(m, (int)s.C, rows, U + (r * s.panels + p) * s.C * NR, M + (r * s.block + i) * s.Np + p * NR, s.Np);
    }
}

// The transform of tile i back to 4 x 4 pixels.
static inline void output_tile(const Shape& s, const After& after, int64_t first, int64_t i, const float* M, float* y) {
  const int64_t at = first + i, b = at / (s.th * s.tw), oh = at / s.tw % s.th * 4, ow = at % s.tw * 4;
  for (int64_t n = 0; n < s.N; n += VL) {
    vf t[6][4], o[4][4], add = after.bias ? load(after.bias + n) : vf{};
    if (after.time) add += load(after.time + b * after.time_stride + n);
    for (int w = 0; w < 6; w++) {
      vf column[6];
      for (int h = 0; h < 6; h++) column[h] = load(M + ((h * 6 + w) * s.block + i) * s.Np + n);
      output_row(column, t[w]);
    }
    for (int h = 0; h < 4; h++) {
      vf row[6];
      for (int w = 0; w < 6; w++) row[w] = t[w][h];
      output_row(row, o[h]);
    }
    for (int h = 0; h < 4 && oh + h < s.H; h++)
      for (int w = 0; w < 4 && ow + w < s.W; w++) {
        const int64_t place = ((b * s.H + oh + h) * s.W + ow + w) * s.N + n;
        vf value = o[h][w] + add;
        if (after.residual) value += load(after.residual + place);
        store(y + place, value);
      }
  }
}

void ddim_winograd(const float* x, const float* U, const float* bias, const float* time, int64_t time_stride,
                   const float* residual, float* y, float* scratch, int64_t batch, int64_t H, int64_t W, int64_t C,
                   int64_t N, int up, int threads) {
  const Shape s = shape_of(batch, H, W, C, N, up, threads);
  const After after{bias, time, time_stride, residual};
  const std::vector<float> zeros(C, 0.0f);
  const int64_t blocks = (s.tiles + s.block - 1) / s.block;
  if (!s.shared) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t k = 0; k < blocks; k++) {
      float *V = scratch + omp_get_thread_num() * 36 * s.block * (C + s.Np), *M = V + 36 * s.block * C;
      const int64_t first = k * s.block, count = std::min(s.block, s.tiles - first);
      for (int64_t i = 0; i < count; i++) input_tile(s, x, zeros.data(), first, i, V);
      for (int64_t r = 0; r < 36; r++) multiply(s, U, r, 0, s.panels, count, V, M);
      for (int64_t i = 0; i < count; i++) output_tile(s, after, first, i, M, y);
    }
    return;
  }
  float *V = scratch, *M = scratch + 36 * s.block * C;
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < s.tiles; first += s.block) {
    const int64_t count = std::min(s.block, s.tiles - first);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) input_tile(s, x, zeros.data(), first, i, V);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < 36; r++) multiply(s, U, r, 0, s.panels, count, V, M);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) output_tile(s, after, first, i, M, y);
  }
}

// Group norm of (batch, P, C), then a scale and a shift of each sample's channel where there are any, then SiLU.
// C is a multiple of VL. The last C2 of the channels may come from another tensor, `x2`.
struct Normed {
  const float *x, *x2, *gamma, *beta, *modulation;
  int64_t modulation_stride;
  float *y, *both;
  int64_t P, C, C2, groups;
  double eps;
  int activate;

  vf at(int64_t row, int64_t c) const {
    return c < C - C2 ? load(x + row * (C - C2) + c) : load(x2 + row * C2 + c - (C - C2));
  }

  // Sums over the groups of pixels p0..p1 of a sample: of the values, or of their squared distance from the mean.
  void sums(int64_t b, int64_t p0, int64_t p1, const double* mean, double* out) const {
    const int64_t size = C / groups;
    std::vector<float> sum(C, 0.0f), middle(C, 0.0f);
    if (mean)
      for (int64_t c = 0; c < C; c++) middle[c] = (float)mean[c / size];
    for (int64_t p = p0; p < p1; p++)
      for (int64_t c = 0; c < C; c += VL) {
        vf value = at(b * P + p, c);
        if (mean) {
          value -= load(&middle[c]);
          value *= value;
        } else if (both) {
          store(both + (b * P + p) * C + c, value);
        }
        store(&sum[c], load(&sum[c]) + value);
      }
    for (int64_t g = 0; g < groups; g++) {
      double total = 0;
      for (int64_t c = g * size; c < (g + 1) * size; c++) total += sum[c];
      out[g] = total;
    }
  }

  void apply(int64_t b, int64_t p0, int64_t p1, const double* mean, const double* variance) const {
    const int64_t size = C / groups;
    std::vector<float> a(C), s(C);
    for (int64_t c = 0; c < C; c++) {
      double scale = gamma[c] / std::sqrt(variance[c / size] + eps), shift = beta[c] - mean[c / size] * scale;
      if (modulation) {
        const float* own = modulation + b * modulation_stride;
        scale *= 1.0 + own[c];
        shift = shift * (1.0 + own[c]) + own[C + c];
      }
      a[c] = (float)scale;
      s[c] = (float)shift;
    }
    for (int64_t p = p0; p < p1; p++)
      for (int64_t c = 0; c < C; c += VL) {
        vf value = at(b * P + p, c) * load(&a[c]) + load(&s[c]);
        store(y + (b * P + p) * C + c, activate ? silu(value) : value);
      }
  }
};

void ddim_norm(const float* x, const float* x2, const float* gamma, const float* beta, const float* modulation,
               int64_t modulation_stride, float* y, float* both, int64_t batch, int64_t P, int64_t C, int64_t C2,
               int64_t groups, float eps, int activate, int threads) {
  constexpr int64_t CHUNK = 64;  // pixels added up in float32
  const Normed n{x, x2, gamma, beta, modulation, modulation_stride, y, both, P, C, C2, groups, eps, activate};
  const int64_t chunks = (P + CHUNK - 1) / CHUNK;
  const int inner = batch >= threads ? 1 : threads, outer = batch >= threads ? threads : 1;
#pragma omp parallel for num_threads(outer) schedule(static)
  for (int64_t b = 0; b < batch; b++) {
    std::vector<double> part(chunks * groups), moments(2 * groups);
    for (int pass = 0; pass < 2; pass++) {
#pragma omp parallel for num_threads(inner) schedule(static) if (inner > 1)
      for (int64_t k = 0; k < chunks; k++)
        n.sums(b, k * CHUNK, std::min(P, (k + 1) * CHUNK), pass ? moments.data() : nullptr, &part[k * groups]);
      for (int64_t g = 0; g < groups; g++) {
        double total = 0;
        for (int64_t k = 0; k < chunks; k++) total += part[k * groups + g];
        moments[pass * groups + g] = total / (double)(P * (C / groups));
      }
    }
#pragma omp parallel for num_threads(inner) schedule(static) if (inner > 1)
    for (int64_t k = 0; k < chunks; k++)
      n.apply(b, k * CHUNK, std::min(P, (k + 1) * CHUNK), moments.data(), &moments[groups]);
  }
}
}
