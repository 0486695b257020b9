"""Triton kernels of `ddim.process.device_noise`: numpy's Philox 4x64-10, its uniform numbers and its float32 ziggurat.

Importing this module imports triton; `ddim.process.device_noise` imports it at the first draw on a GPU.

An automaton that reads one word at a time converts a stream of 32-bit words to normal numbers. Its state is the role
of the next word:

    0 START    the first word of a number; accepted immediately in 98.8 % of cases
    1 WEDGE    the uniform number of the wedge test; START follows, whether accepted or not
    2, 3       the first and the second uniform number of the tail, for a positive number; 2 follows if the
               pair is rejected, else START
    4, 5       the same for a negative number

The transition of a word from each state depends only on that word and the word before it, so all words are classified
in parallel. The states are computed by fixed-point iteration: every state is initialised to START, and every word
passes its next state on until nothing changes. Each state is determined by the one before it, so the true states are
the only fixed point and the result is exact. Initial states are wrong only near words that are not accepted
immediately; five to ten passes are usual.
"""

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)
TAIL_START = tl.constexpr(3.6541528853610088)
TAIL_INVERSE = tl.constexpr(0.27366123732975828)


@triton.jit
def _philox(seed, index, draw, block):
    """The four uint64 of the Philox blocks with indices `block` (uint64) of one stream.

    numpy increments the counter before its first block, hence the + 1.
    """
    c0 = block + 1
    c1 = tl.zeros_like(block)
    c2 = tl.zeros_like(block)
    c3 = c1 + draw
    k0 = c1 + seed
    k1 = c1 + index
    m0 = tl.full(block.shape, MULTIPLIER_0, tl.uint64)
    m1 = tl.full(block.shape, MULTIPLIER_1, tl.uint64)
    w0 = tl.full(block.shape, WEYL_0, tl.uint64)
    w1 = tl.full(block.shape, WEYL_1, tl.uint64)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def _key(keys, draw, sample):
    """The stream key of one sample: seed, index and draw number, uint64."""
    seed = tl.load(keys + 2 * sample).to(tl.uint64)
    index = tl.load(keys + 2 * sample + 1).to(tl.uint64)
    return seed, index, tl.load(draw).to(tl.uint64)


@triton.jit
def _low(word):
    """The first 32-bit word of a 64-bit one."""
    return (word & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _high(word):
    """The second 32-bit word of a 64-bit one."""
    return (word >> 32).to(tl.uint32)


@triton.jit
def _unit(word):
    """numpy's next_float: a multiple of 2^-24 in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _exponential(word):
    """-log1p(-u) of numpy's next_float u, correctly rounded: 1 - u is exact in float64."""
    return (-tl.log(1.0 - _unit(word).to(tl.float64))).to(tl.float32)


@triton.jit
def _tail(word):
    """The distance of a tail number from the start of the tail."""
    return _exponential(word) * TAIL_INVERSE


@triton.jit
def _scaled(word, wi):
    """The signed number that a first word encodes."""
    x = (word >> 9).to(tl.int32).to(tl.float32) * tl.load(wi + (word & 0xFF))
    return tl.where((word & 0x100) != 0, -x, x)


@triton.jit
def _classify(before, word, ki, wi, fi):
    """The transitions of a word: for each state s, the next state in bits 4 s to 4 s + 2, and bit 4 s + 3 set if a
    number ends."""
    box = word & 0xFF
    at_once = (word >> 9) < tl.load(ki + box)
    sign = (word >> 17) & 1
    start = tl.where(at_once, 8, tl.where(box == 0, 2 + 2 * sign, 1)).to(tl.uint32)
    # Wedge: the previous word gave the box and x.
    box = before & 0xFF
    bottom = tl.load(fi + box)
    top = tl.load(fi + tl.maximum(box.to(tl.int32) - 1, 0))
    x = _scaled(before, wi).to(tl.float64)
    height = (top - bottom) * _unit(word) + bottom  # float32, as in numpy; compiled without fused multiply-add
    wedge = tl.where(height.to(tl.float64) < tl.exp(-0.5 * x * x), 8, 0).to(tl.uint32)
    # Tail: the previous word gave the distance.
    beyond = _tail(before)
    limit = _exponential(word)
    accepted = limit + limit > beyond * beyond
    positive = tl.where(accepted, 8, 2).to(tl.uint32)
    negative = tl.where(accepted, 8, 4).to(tl.uint32)
    return start | (wedge << 4) | (3 << 8) | (positive << 12) | (5 << 16) | (negative << 20)


@triton.jit
def _value(state, before, word, wi):
    """The number that ends at a word, given the state in which the word is read."""
    tail = TAIL_START + _tail(before)
    return tl.where(
        state >= 2,
        tl.where(state == 3, tail, -tail),
        tl.where(state == 1, _scaled(before, wi), _scaled(word, wi)),
    ).to(tl.float32)


@triton.jit
def _shift(x, first):
    """The elements shifted by one position, with `first` in front."""
    place = tl.arange(0, x.shape[0])
    return tl.where(place == 0, first, tl.gather(x, tl.maximum(place - 1, 0), 0))


@triton.jit
def _last(x):
    """The last element."""
    place = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(place == x.shape[0] - 1, x, 0), 0).to(tl.uint32)


@triton.jit
def _words(seed, index, draw, block):
    """The 32-bit words of successive Philox blocks, eight per block, the low half of each uint64 first."""
    a, b, c, d = _philox(seed, index, draw, block)
    # The last axis varies fastest, so this interleaves to a, b, c, d for each block.
    long = tl.join(tl.join(a, c), tl.join(b, d)).reshape(4 * block.shape[0])
    return tl.join(_low(long), _high(long)).reshape(8 * block.shape[0])


@triton.jit
def _next(code, state):
    """The next state after a word with transitions `code` is read in `state`."""
    return (code >> (4 * state)) & 7


@triton.jit(do_not_specialize=["count"])
def normals(keys, draw, ki, wi, fi, out, count, BLOCKS: tl.constexpr):
    """`count` normal numbers of one sample, from BLOCKS Philox blocks at a time until there are enough."""
    sample = tl.program_id(0).to(tl.int64)
    seed, index, number = _key(keys, draw, sample)
    out += sample * count
    block = tl.arange(0, BLOCKS).to(tl.uint64)
    state_before = tl.zeros((), tl.uint32)  # state of the last word read; initial code 0 maps START to START
    code_before = tl.zeros((), tl.uint32)
    word_before = tl.zeros((), tl.uint32)
    done = 0
    while done < count:
        word = _words(seed, index, number, block)
        before = _shift(word, word_before)
        code = _classify(before, word, ki, wi, fi)
        left = _shift(code, code_before)
        state = tl.zeros_like(word)
        changed = 1
        while changed > 0:
            new = _next(left, _shift(state, state_before))
            changed = tl.max((new != state).to(tl.int32), 0)
            state = new
        ends = ((code >> (4 * state + 3)) & 1).to(tl.int32)
        to = done + tl.cumsum(ends, 0) - ends
        tl.store(out + to, _value(state, before, word, wi), mask=(ends != 0) & (to < count))
        done += tl.sum(ends, 0)
        state_before = _last(state)
        code_before = _last(code)
        word_before = _last(word)
        block += BLOCKS


@triton.jit(do_not_specialize=["count"])
def uniforms(keys, draw, out, count, BLOCKS: tl.constexpr):
    """4 x BLOCKS of the `count` uniform numbers of one sample, float64."""
    sample = tl.program_id(0).to(tl.int64)
    seed, index, number = _key(keys, draw, sample)
    block = tl.program_id(1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    out += sample * count
    words = _philox(seed, index, number, block.to(tl.uint64))
    for k in tl.static_range(4):
        to = 4 * block + k
        value = (words[k] >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
        tl.store(out + to, value, mask=to < count)
