/* Convolutional decoders of image tokenizers, for native.c: features of one image to its pixels, in one call.

   Images are stored pixel by pixel, the channels of a pixel side by side and filled up to a multiple of eight. A 3x3
   convolution reads a copy with a border of zeros, in which the three pixels of a line that an output needs are one row of
   3 * in numbers; its inputs are counted line by line. A layer is one phase; the sums of a pixel are taken in the same
   order for every number of threads. */

#pragma once

enum { CONVOLVE, SPREAD, MEASURE, NORMALISE, ATTEND };
enum { MAIN, OTHER, BORDERED, FLAT, QUERY, KEY, VALUE, BUFFERS };

/* The result has `scale` times the pixels a side of the features. CONVOLVE: `lines` 3 or 1, `weights` packed, `bias` filled up to whole blocks; the result is added to what is there where
   `add`. SPREAD: copies with a border, each pixel `factor` times a side. MEASURE: mean and squared distance from it of
   each channel of each line. NORMALISE: group norm by these, and SiLU where `to` has a border. ATTEND: one head. */
typedef struct {
    int32_t kind, from, to, in, out, scale, lines, add, bf16, factor, groups;
    float eps;
    const void *weights;
    const float *gain, *bias;
} Layer;

/* `scratch`: for each thread 2 * channels numbers and QUERIES * (pixels of attention + LANES). */
typedef struct {
    const Layer *layers;
    int32_t count, height, width, threads;
    float *buffers[BUFFERS], *measures, *scratch;
    int64_t own;
} Image;

INLINE int filled(int channels) {
    return (channels + LANES - 1) / LANES * LANES;
}

/* Whether this thread is in the phase that is being worked on; if not, that phase is over, and so may be the call. */
static int is_current(const Worker *me) {
    return me->threads == 1 || phase_of(atomic_load(&team.place)) == me->phase;
}

/* One block of outputs of some pixels of a line, `step` numbers apart. */
INLINE void convolve_pixels(const Layer *layer, int block, const float *x, int64_t line, int inputs, int step,
                            const int pixels, const int bf16, float *y, int stride) {
    wide sums[2 * MOST_TOGETHER];
    const wide *bias = (const wide *)(layer->bias + (int64_t)block * BLOCK);
    UNROLL for (int p = 0; p < pixels; p++) {
        sums[2 * p] = bias[0];
        sums[2 * p + 1] = bias[1];
    }
    int64_t place = (int64_t)block * layer->lines * inputs * BLOCK;
    for (int l = 0; l < layer->lines; l++) {
        const float *from = x + l * line;
        for (int i = 0; i < inputs; i++, place += BLOCK) {
            wide low, high;
            if (bf16) {
                words pairs = *(const words *)((const uint16_t *)layer->weights + place);
                low = (wide)(pairs << 16);
                high = (wide)(pairs & 0xffff0000u);
            } else {
                low = *(const wide *)((const float *)layer->weights + place);
                high = *(const wide *)((const float *)layer->weights + place + WIDE);
            }
            UNROLL for (int p = 0; p < pixels; p++) {
                wide number = all_wide(from[(int64_t)p * step + i]);
                sums[2 * p] = fused_wide(number, low, sums[2 * p]);
                sums[2 * p + 1] = fused_wide(number, high, sums[2 * p + 1]);
            }
        }
    }
    UNROLL for (int p = 0; p < pixels; p++) {
        const float *sum = (const float *)(sums + 2 * p);
        float *to = y + (int64_t)p * stride + (int64_t)block * BLOCK;
        for (int i = 0; i < BLOCK && block * BLOCK + i < stride; i += LANES) {
            vec eight = *(const vec *)(sum + i);
            *(vec *)(to + i) = layer->add ? (vec)(*(vec *)(to + i) + eight) : eight;
        }
    }
}

INLINE void convolve_line(const Layer *layer, int block, const float *x, int64_t line, int width, const int bf16,
                          float *y) {
    const int step = filled(layer->in), inputs = layer->lines * step, stride = filled(layer->out);
    for (int done = 0, n; done < width; done += n) {
        const float *from = x + (int64_t)done * step;
        float *to = y + (int64_t)done * stride;
        const int left = width - done;
        n = left >= 8 && MOST_TOGETHER >= 8 ? 8 : left >= 4 ? 4 : 1;
        if (n == 8) convolve_pixels(layer, block, from, line, inputs, step, MOST_TOGETHER < 8 ? 1 : 8, bf16, to, stride);
        else if (n == 4) convolve_pixels(layer, block, from, line, inputs, step, 4, bf16, to, stride);
        else convolve_pixels(layer, block, from, line, inputs, step, 1, bf16, to, stride);
    }
}

static void convolve(const Layer *layer, const Image *image, int height, int width, int item) {
    const int block = item / height, line = item % height, in = filled(layer->in), out = filled(layer->out);
    const int64_t wide_line = (int64_t)(layer->lines == 3 ? width + 2 : width) * in;
    const float *x = image->buffers[layer->from] + line * wide_line;
    float *y = image->buffers[layer->to] + (int64_t)line * width * out;
    if (layer->bf16) convolve_line(layer, block, x, wide_line, width, 1, y);
    else convolve_line(layer, block, x, wide_line, width, 0, y);
}

/* The lines of a bordered image that belong to a line of it, with their border, zeroed where they are border. */
static float *bordered_line(float *image, int line, int height, int width, int channels) {
    const int64_t size = (int64_t)(width + 2) * channels;
    float *own = image + (line + 1) * size;
    if (line == 0) memset(image, 0, sizeof(float) * size);
    if (line == height - 1) memset(own + size, 0, sizeof(float) * size);
    memset(own, 0, sizeof(float) * channels);
    memset(own + size - channels, 0, sizeof(float) * channels);
    return own + channels;
}

static void spread(const Layer *layer, const Image *image, int height, int width, int line) {
    const int channels = filled(layer->in), factor = layer->factor;
    const float *from = image->buffers[layer->from] + (int64_t)(line / factor) * (width / factor) * channels;
    float *to = bordered_line(image->buffers[layer->to], line, height, width, channels);
    for (int p = 0; p < width; p++)
        memcpy(to + (int64_t)p * channels, from + (int64_t)(p / factor) * channels, sizeof(float) * channels);
}

/* Means of the channels of a line, then their summed squared distances from these. */
static void measure(const Layer *layer, const Image *image, int width, int line) {
    const int channels = filled(layer->in);
    const float *x = image->buffers[layer->from] + (int64_t)line * width * channels;
    float *means = image->measures + (int64_t)line * 2 * channels;
    for (int c = 0; c < channels; c += LANES) {
        vec sum = {0}, squares = {0};
        for (int p = 0; p < width; p++) sum += *(const vec *)(x + (int64_t)p * channels + c);
        const vec mean = sum / (float)width;
        for (int p = 0; p < width; p++) {
            vec apart = *(const vec *)(x + (int64_t)p * channels + c) - mean;
            squares = fused(apart, apart, squares);
        }
        *(vec *)(means + c) = mean;
        *(vec *)(means + channels + c) = squares;
    }
}

/* What a channel is multiplied by, and what is added, from the measures of all lines. */
static void normalisation(const Layer *layer, const Image *image, int height, int width, float *factors, float *terms) {
    const int channels = filled(layer->in), each = layer->in / layer->groups;
    for (int first = 0; first < layer->in; first += each) {
        double mean = 0, squares = 0;
        for (int line = 0; line < height; line++)
            for (int c = first; c < first + each; c++) mean += image->measures[(int64_t)line * 2 * channels + c];
        mean /= (double)height * each;
        for (int line = 0; line < height; line++)
            for (int c = first; c < first + each; c++) {
                const float *measured = image->measures + (int64_t)line * 2 * channels + c;
                squares += measured[channels] + width * (measured[0] - mean) * (measured[0] - mean);
            }
        const double scale = 1 / sqrt(squares / ((double)height * width * each) + layer->eps);
        for (int c = first; c < first + each; c++) {
            factors[c] = (float)(scale * layer->gain[c]);
            terms[c] = (float)(layer->bias[c] - mean * scale * layer->gain[c]);
        }
    }
    for (int c = layer->in; c < channels; c++) factors[c] = terms[c] = 0;
}

static void normalise_line(const Layer *layer, const Image *image, int height, int width, int line,
                           const float *factors, const float *terms) {
    const int channels = filled(layer->in), active = layer->to == BORDERED;
    const float *x = image->buffers[layer->from] + (int64_t)line * width * channels;
    float *y = image->buffers[layer->to];
    y = active ? bordered_line(y, line, height, width, channels) : y + (int64_t)line * width * channels;
    for (int p = 0; p < width; p++, x += channels, y += channels)
        for (int c = 0; c < channels; c += LANES) {
            vec unit = fused(*(const vec *)(x + c), *(const vec *)(factors + c), *(const vec *)(terms + c));
            *(vec *)(y + c) = active ? silu(unit) : unit;
        }
}

static void attend_pixels(const Layer *layer, const Image *image, int pixels, int first, float *scores) {
    const int dim = layer->in, n = pixels - first < QUERIES ? pixels - first : QUERIES;
    const int64_t width = pixels + LANES;
    const int none[QUERIES] = {0};
    float factors[QUERIES], *out = image->buffers[layer->to] + (int64_t)first * dim;
    score_kept(image->buffers[QUERY] + (int64_t)first * dim, dim, n, image->buffers[KEY], pixels, pixels, 0, dim, scores,
               width);
    for (int q = 0; q < n; q++) factors[q] = soften(scores + q * width, pixels);
    const float *values = image->buffers[VALUE];
    if (n == 4) mix_all(scores, width, 4, values, pixels, 0, none, dim, factors, out, dim);
    else
        for (int q = 0; q < n; q++)
            mix_all(scores + q * width, width, 1, values, pixels, 0, none, dim, factors + q, out + q * dim, dim);
}

static int pieces_of(const Layer *layer, int height, int width) {
    if (layer->kind == CONVOLVE) return (filled(layer->out) + BLOCK - 1) / BLOCK * height;
    return layer->kind == ATTEND ? (height * width + QUERIES - 1) / QUERIES : height;
}

static void run_layers(Worker *me, const void *arguments) {
    const Image *image = arguments;
    float *own = image->scratch + me->thread * image->own;
    for (int i = 0; i < image->count; i++) {
        const Layer *layer = image->layers + i;
        const int known = is_current(me); /* to a thread that comes too late, the layer may be gone */
        const int height = known ? image->height * layer->scale : 1, width = known ? image->width * layer->scale : 1;
        Range part;
        for (int begun = 0; take(me, known ? pieces_of(layer, height, width) : 1, &part); begun = 1) {
            const int channels = filled(layer->in);
            if (layer->kind == NORMALISE && !begun) normalisation(layer, image, height, width, own, own + channels);
            for (int item = part.begin; item < part.end; item++) {
                if (layer->kind == CONVOLVE) convolve(layer, image, height, width, item);
                else if (layer->kind == SPREAD) spread(layer, image, height, width, item);
                else if (layer->kind == MEASURE) measure(layer, image, width, item);
                else if (layer->kind == NORMALISE)
                    normalise_line(layer, image, height, width, item, own, own + channels);
                else attend_pixels(layer, image, height * width, item * QUERIES, own);
            }
        }
    }
}

/* Runs the layers over the features in buffer MAIN; `work`: multiplications of a layer, on average. */
void studio_decode(const Image *image, int64_t work) {
    together(run_layers, image, sizeof *image, image->threads, work);
}
