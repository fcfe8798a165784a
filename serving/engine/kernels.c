/* The per-pixel arithmetic, fused. Every function has a plain form in Python, which is its oracle in the tests and takes its
 * place where this file was not compiled.
 *
 * Layout: statistics are [rows][channels][columns], so that every inner loop runs along a row and the
 * compiler vectorises it. Compiled without -ffast-math: the rounding trick in exp_nonpositive needs it so.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))
#define TILE 256 /* columns that are worked on together: what they take, of all classes, is in the first cache. */

const int penumbra_interface = 5; /* INTERFACE of kernels.py: a build of other arguments is not called. */

/* exp(x) for x <= 0: 2^n * e^r with |r| <= ln 2 / 2 and a polynomial of degree 6; relative error < 1e-7. */
INLINE float exp_nonpositive(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* log(x) for normal x > 0: exponent plus a polynomial on the mantissa in [sqrt 1/2, sqrt 2). */
INLINE float log_positive(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= (int32_t)((uint32_t)e << 23);
    float m;
    memcpy(&m, &bits, 4);
    m -= 1.0f;
    float p = 7.0376836e-2f;
    p = p * m - 1.1514610e-1f;
    p = p * m + 1.1676998e-1f;
    p = p * m - 1.2420141e-1f;
    p = p * m + 1.4249323e-1f;
    p = p * m - 1.6668057e-1f;
    p = p * m + 2.0000714e-1f;
    p = p * m - 2.4999994e-1f;
    p = p * m + 3.3333331e-1f;
    float z = m * m, n = (float)e;
    return (p * m * z - 2.12194440e-4f * n - 0.5f * z) + m + 0.693359375f * n;
}

/* Where output pixel i of `size` lies in an input of `length`, as in bilinear resizing; in float, as torch
 * computes it, so that a published net's numbers are met to the last digits. */
INLINE void source(long i, long length, long size, int align_corners, long *below, float *fraction) {
    float scale = align_corners ? (size > 1 ? (float)(length - 1) / (float)(size - 1) : 0.0f) : (float)length / (float)size;
    float at = align_corners ? scale * (float)i : scale * ((float)i + 0.5f) - 0.5f;
    if (at < 0) at = 0;
    *below = (long)at;
    if (*below > length - 1) *below = length - 1;
    *fraction = at - (float)*below;
}

#define NORMALISE(type) \
    for (long y = 0; y < rows; y++) { \
        const type *restrict from = (const type *)(pixels + y * stride); \
        for (long i = 0; i < length; i++) out[y * length + i] = (float)from[i] * factor[i] + offset[i]; \
    }

/* out[row][i] = pixels[row][i] * factor[i] + offset[i], rounded twice as in the plain form, and held within least[i] and
 * most[i] unless those are NULL; a row of pixels is `stride` bytes after the one before. kind: 0 is uint8, 1 uint16,
 * 2 int16 and 3 float. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
FOR_EACH_CPU void penumbra_normalise(
    const char *restrict pixels, long kind, long stride, long rows, long length, const float *restrict factor,
    const float *restrict offset, const float *restrict least, const float *restrict most, float *restrict out) {
    switch (kind) {
        case 0: NORMALISE(uint8_t) break;
        case 1: NORMALISE(uint16_t) break;
        case 2: NORMALISE(int16_t) break;
        default: NORMALISE(float)
    }
    for (long y = 0; least && y < rows; y++)
        for (long i = 0; i < length; i++) {
            float v = out[y * length + i] < least[i] ? least[i] : out[y * length + i];
            out[y * length + i] = v > most[i] ? most[i] : v;
        }
}

/* What the resizing of a window's logits [K][fh][fw] to [K][h][w] needs, whatever the sample: where its columns come from,
 * and scratch rows. `held` says for each sample which two rows of logits `wide` holds, widened: row j in place j % 2. */
typedef struct {
    long K, fh, fw, h, w;
    int align_corners;
    float scale;
    long *held;
    int32_t *at;
    float *fraction, *e, *line, *wide;
} Resize;

/* Allocates for S samples, in one block that begins at `held`. Returns 0, or 1 when out of memory. */
INLINE int begin_resize(Resize *r, long S) {
    long K = r->K, w = r->w, floats = 2 * w + K * TILE + r->fw + 1 + 2 * S * K * w;
    r->held = malloc(2 * S * sizeof *r->held + floats * sizeof(float));
    if (!r->held) return 1;
    for (long i = 0; i < 2 * S; i++) r->held[i] = -1;
    r->at = (int32_t *)(r->held + 2 * S);
    r->fraction = (float *)(r->at + w), r->e = r->fraction + w, r->line = r->e + K * TILE, r->wide = r->line + r->fw + 1;
    for (long x = 0; x < w; x++) {
        long below;
        source(x, r->fw, w, r->align_corners, &below, &r->fraction[x]);
        r->at[x] = (int32_t)below;
    }
    return 0;
}

/* Adds the softmax of row y of sample s, resized, to out[K][w], and its entropy (nats) to the row after those.
 *
 * A row of logits is widened once and used by every output row that lies beside it. */
INLINE void add_row(const Resize *r, const float *restrict logits, long s, long y, float *restrict out) {
    const long K = r->K, fh = r->fh, fw = r->fw, w = r->w;
    const int32_t *restrict at = r->at;
    const float *restrict fraction = r->fraction;
    float *restrict e = r->e, *restrict line = r->line, *restrict nats = out + K * w;
    long row;
    float fy;
    source(y, fh, r->h, r->align_corners, &row, &fy);
    long next = row + 1 < fh ? row + 1 : row;
    for (long j = row; j <= next; j++) {
        if (r->held[2 * s + j % 2] == j) continue;
        r->held[2 * s + j % 2] = j;
        for (long k = 0; k < K; k++) {
            const float *from = logits + ((s * K + k) * fh + j) * fw;
            float *restrict to = r->wide + ((2 * s + j % 2) * K + k) * w;
            for (long i = 0; i < fw; i++) line[i] = from[i] * r->scale;
            line[fw] = line[fw - 1];
            for (long x = 0; x < w; x++) to[x] = line[at[x]] + (line[at[x] + 1] - line[at[x]]) * fraction[x];
        }
    }
    for (long x0 = 0; x0 < w; x0 += TILE) {
        long n = w - x0 < TILE ? w - x0 : TILE;
        const float *a = r->wide + (2 * s + row % 2) * K * w + x0, *b = r->wide + (2 * s + next % 2) * K * w + x0;
        float top[TILE], sum[TILE], dot[TILE], inverse[TILE];
        for (long x = 0; x < n; x++) top[x] = e[x] = a[x] + (b[x] - a[x]) * fy;
        for (long k = 1; k < K; k++)
            for (long x = 0; x < n; x++) {
                float v = a[k * w + x] + (b[k * w + x] - a[k * w + x]) * fy;
                e[k * TILE + x] = v;
                top[x] = v > top[x] ? v : top[x];
            }
        for (long x = 0; x < n; x++) sum[x] = dot[x] = 0;
        for (long k = 0; k < K; k++)
            for (long x = 0; x < n; x++) {
                float d = e[k * TILE + x] - top[x], v = exp_nonpositive(d);
                e[k * TILE + x] = v;
                sum[x] += v;
                dot[x] += v * d;
            }
        for (long x = 0; x < n; x++) {
            inverse[x] = 1.0f / sum[x];
            nats[x0 + x] += log_positive(sum[x]) - dot[x] * inverse[x];
        }
        for (long k = 0; k < K; k++)
            for (long x = 0; x < n; x++) out[k * w + x0 + x] += e[k * TILE + x] * inverse[x];
    }
}

/* Adds, for output rows [y0, y1), the softmax of every resized sample to the first K channels of stats[h][C][w], and its
 * entropy (nats) to the next; `first` sets them. logits: [S][K][fh][fw]. Returns 0, or 1 when out of memory. */
FOR_EACH_CPU int penumbra_accumulate(
    const float *restrict logits, long S, long K, long fh, long fw, float *restrict stats, long C, long h, long w,
    long y0, long y1, int first, int align_corners, float inverse_temperature) {
    Resize r = {K, fh, fw, h, w, align_corners, inverse_temperature};
    if (begin_resize(&r, S)) return 1;
    for (long y = y0; y < y1; y++) {
        float *restrict out = stats + y * C * w;
        if (first) memset(out, 0, (K + 1) * w * sizeof *out);
        for (long s = 0; s < S; s++) add_row(&r, logits, s, y, out);
    }
    free(r.held);
    return 0;
}

/* Adds a window's piece[rows][C][w] to the canvas, a ring of R rows [C][W]: row i and column j of it to row y + i, modulo
 * R, and column x + j, for i in [i0, i1) and j in [j0, j1). Where y + i >= fresh_y and x + j >= fresh_x the canvas is set.
 * The weight is row[i] * column[j], of the first `sums` channels times `scale`. */
FOR_EACH_CPU void penumbra_blend(
    float *canvas, long R, long C, long W, const float *piece, long w, long y, long x, long i0, long i1, long j0, long j1,
    const float *row, const float *column, long fresh_y, long fresh_x, long sums, float scale) {
    for (long i = i0; i < i1; i++) {
        long fresh = y + i < fresh_y || fresh_x - x > j1 ? j1 : fresh_x - x < j0 ? j0 : fresh_x - x;
        for (long c = 0; c < C; c++) {
            float *restrict to = canvas + ((y + i) % R * C + c) * W + x;
            const float *restrict from = piece + (i * C + c) * w;
            float weight = c < sums ? row[i] * scale : row[i];
            for (long j = j0; j < fresh; j++) to[j] += from[j] * (weight * column[j]);
            for (long j = fresh; j < j1; j++) to[j] = from[j] * (weight * column[j]);
        }
    }
}

/* Reads a row of an answer, out of channels that lie `stride` apart: K mean probabilities, the mean entropy of the samples,
 * and extra maps. `planes` and all else are as `penumbra_read_out` has them; the row is the one of this number there.
 *
 * is_one: there was one sample, whose own entropy counts in the sums: it is that of the mean but for rounding. is_lean: no
 * margin, entropy or disagreement is wanted, nor any label withheld, so that no logarithm is taken here. */
INLINE void read_row(
    const float *restrict prob, long stride, long C, long K, long W, long row, const float *restrict threshold,
    uint8_t *restrict out, const int64_t *restrict planes, const uint8_t *restrict hidden, long channel, int is_one,
    int is_lean) {
    float c[TILE], second[TILE], nats[TILE], units[TILE];
    int32_t best[TILE];
    const float *restrict expected = prob + K * stride;
    int64_t *restrict sums = planes[6 + C - K] < 0 ? NULL : (int64_t *)(out + planes[6 + C - K]);
    int64_t sum[3] = {0, 0, 0};
    for (long i = 4; i < 7 + C - K - 1; i++) { /* what is only copied */
        if (planes[i] < 0 || i == 5) continue;
        long count = i == 6 ? K : 1, first = i == 6 ? 0 : i == 4 ? K : K + i - 6;
        for (long k = 0; k < count; k++)
            memcpy(out + planes[i] + (row * count + k) * W * 4, prob + (first + k) * stride, W * 4);
    }
    for (long x0 = 0; x0 < W; x0 += TILE) {
        long n = W - x0 < TILE ? W - x0 : TILE, at = row * W + x0;
        for (long x = 0; x < n; x++) { best[x] = 0; second[x] = 0; c[x] = -1; nats[x] = 0; }
        for (long k = 0; k < K; k++) {
            const float *restrict p = prob + k * stride + x0;
            for (long x = 0; x < n; x++) {
                float v = p[x] > 0 ? p[x] : 0, was = c[x];
                if (!is_lean) {
                    float safe = v > 1e-37f ? v : 1.0f, beaten = v > was ? was : v;
                    nats[x] -= safe == 1.0f ? 0.0f : v * log_positive(safe);
                    second[x] = beaten > second[x] ? beaten : second[x];
                }
                best[x] = v > was ? (int32_t)k : best[x];
                c[x] = v > was ? v : was;
            }
        }
        for (long x = 0; x < n; x++) {
            out[planes[0] + at + x] = !is_lean && nats[x] > threshold[best[x]] ? 255 : (uint8_t)best[x];
            second[x] = c[x] - second[x];
        }
        const float *restrict entropy = is_one ? expected + x0 : nats, *restrict own = prob + channel * stride + x0;
        for (long i = 0; sums && i < (channel < 0 ? 2 : 3); i++) {
            for (long x = 0; x < n; x++) {
                float v = i == 0 ? 1.0f - c[x] : i == 1 ? entropy[x] : own[x] < 32768.0f ? own[x] : 32768.0f;
                units[x] = (v > -32768.0f ? v : -32768.0f) * 16777216.0f;
            }
            for (long x = 0; hidden && x < n; x++)
                if (hidden[at + x]) units[x] = 0;
            for (long x = 0; x < n; x++) sum[i] += (int64_t)units[x];
        }
        if (planes[1] >= 0) memcpy(out + planes[1] + at * 4, c, n * 4);
        if (planes[2] >= 0) memcpy(out + planes[2] + at * 4, second, n * 4);
        if (planes[3] >= 0) memcpy(out + planes[3] + at * 4, nats, n * 4);
        if (planes[5] < 0) continue;
        for (long x = 0; x < n; x++) {
            float beyond = nats[x] - expected[x0 + x];
            c[x] = beyond > 0 ? beyond : 0;
        }
        memcpy(out + planes[5] + at * 4, c, n * 4);
    }
    if (sums) memcpy(sums + 3 * row, sum, sizeof sum);
}

/* Reads rows y to y + rows of a canvas, a ring of R rows [C][W] of mean probabilities, mean sample entropies and extra
 * maps, into planes of `out`, which begin at these bytes and are not wanted where that is negative: labels, confidence,
 * margin, entropy, expected entropy, entropy beyond it, probabilities [rows][K][W], the extra maps, and sums [rows][3].
 * Ties go to the lowest class; labels are 255 above the `threshold` of their class; zero probabilities add no entropy, and
 * what is no number counts as zero. In the map at `channel` it counts for the most.
 *
 * Sums are of 1 - confidence, of the entropy, and of the map at `channel`, or 0 where that is negative, in units of 2^-24
 * and without the pixels that are hidden[rows][W]; that may be NULL. */
FOR_EACH_CPU void penumbra_read_out(
    const float *restrict canvas, long R, long C, long K, long W, long y, long rows, const float *restrict threshold,
    uint8_t *restrict out, const int64_t *restrict planes, const uint8_t *restrict hidden, long channel) {
    for (long row = 0; row < rows; row++)
        read_row(canvas + (y + row) % R * C * W, W, C, K, W, row, threshold, out, planes, hidden, channel, 0, 0);
}

/* Reads rows [begin, end) of a picture's answer out of the logits [K][fh][fw] of its only sample in its only window [h][w],
 * in which it lies from row y0 and column x0 on; extras: [C - K - 1][h][w]. The rest is as in `penumbra_accumulate` and
 * `penumbra_read_out`, whose bytes it gives but for the sum of entropies. Returns 0, or 1 when out of memory. */
FOR_EACH_CPU int penumbra_answer(
    const float *restrict logits, long C, long K, long fh, long fw, const float *restrict extras, long h, long w, long y0,
    long x0, long W, long begin, long end, int align_corners, float inverse_temperature, const float *restrict threshold,
    uint8_t *restrict out, const int64_t *restrict planes, const uint8_t *restrict hidden, long channel) {
    Resize r = {K, fh, fw, h, w, align_corners, inverse_temperature};
    float *restrict stats = malloc(C * w * sizeof *stats);
    if (!stats || begin_resize(&r, 1)) { free(stats); return 1; }
    int is_lean = planes[2] < 0 && planes[3] < 0 && planes[5] < 0;
    for (long k = 0; k < K; k++) is_lean &= threshold[k] > 3.4e38f;
    for (long row = begin; row < end; row++) {
        memset(stats, 0, (K + 1) * w * sizeof *stats);
        add_row(&r, logits, 0, y0 + row, stats);
        for (long c = K + 1; c < C; c++)
            memcpy(stats + c * w, extras + ((c - K - 1) * h + y0 + row) * w, w * sizeof *stats);
        if (is_lean) read_row(stats + x0, w, C, K, W, row, threshold, out, planes, hidden, channel, 1, 1);
        else read_row(stats + x0, w, C, K, W, row, threshold, out, planes, hidden, channel, 1, 0);
    }
    free(stats);
    free(r.held);
    return 0;
}
