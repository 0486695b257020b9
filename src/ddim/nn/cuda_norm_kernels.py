"""The Triton kernels of `ddim.nn.cuda_norm`, which selects and documents them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, unused-ignore"
import triton
import triton.language as tl


@triton.jit
def _added(time, time_row, offset, n, c, here, TIME: tl.constexpr, OFFSET: tl.constexpr):
    """The sum of time and offset that is added to each channel before the norm, float32, (block_c,)."""
    add = c.to(tl.float32) * 0
    if TIME:
        add += tl.load(time + n * time_row + c, mask=here, other=0.0).to(tl.float32)
    if OFFSET:
        add += tl.load(offset + c, mask=here, other=0.0).to(tl.float32)
    return add


@triton.jit
def _over_groups(value, lane, per_group, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """The sum over each channel's group, (block_c,)."""
    member = (lane // per_group)[:, None] == tl.arange(0, BLOCK_G)[None, :]
    total = tl.sum(tl.where(member, value[:, None], 0.0), axis=0)
    return tl.sum(tl.where(member, total[None, :], 0.0), axis=1)


@triton.jit
def _moments(
    x,
    add,
    first,
    last,
    c,
    lane,
    here,
    C,
    per_group,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean of each channel's group over the pixels first..last - 1, and sum of squared deviations, (block_c,) each."""
    pivot = tl.load(x + first * C + c, mask=here, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tile in range(TILES):
        p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & here[None, :]
        value = tl.load(x + p[:, None] * C + c[None, :], mask=mask, other=0.0, eviction_policy="evict_last")
        value = tl.where(mask, value.to(tl.float32) - pivot[None, :], 0.0)
        total += value
        square += value * value
    count = (last - first) * 1.0
    shift = tl.sum(total, axis=0) / count
    spread = tl.sum(square, axis=0) - shift * shift * count
    average = tl.where(here, pivot + shift + add, 0.0)
    mean = _over_groups(average, lane, per_group, BLOCK_C, BLOCK_G) / per_group
    deviation = tl.where(here, average - mean, 0.0)
    squares = tl.where(here, spread, 0.0) + deviation * deviation * count
    return mean, _over_groups(squares, lane, per_group, BLOCK_C, BLOCK_G)


@triton.jit
def _affine(weight, bias, scale_shift, scale_row, n, c, here, C, rstd, SCALE: tl.constexpr):
    """The factor and the term of the affine map of the centred values, (block_c,) each."""
    factor = tl.load(weight + c, mask=here, other=0.0).to(tl.float32) * rstd
    term = tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    if SCALE:
        scale = 1.0 + tl.load(scale_shift + n * scale_row + c, mask=here, other=0.0).to(tl.float32)
        shift = tl.load(scale_shift + n * scale_row + C + c, mask=here, other=0.0).to(tl.float32)
        factor = factor * scale
        term = term * scale + shift
    return factor, term


@triton.jit
def _finished(value, factor, term, SILU: tl.constexpr):
    """Scale and shift the centred values, and apply SiLU if set."""
    out = value * factor[None, :] + term[None, :]
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    return out


@triton.jit
def _apply(
    x,
    y,
    add,
    mean,
    factor,
    term,
    first,
    last,
    c,
    here,
    C,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute and store the output of the pixels first..last - 1."""
    for tile in range(TILES):
        p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & here[None, :]
        index = p[:, None] * C + c[None, :]
        value = tl.load(x + index, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        out = _finished(value + (add - mean)[None, :], factor, term, SILU)
        tl.store(y + index, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_whole(
    x,
    y,
    weight,
    bias,
    time,
    offset,
    scale_shift,
    time_row,
    scale_row,
    P,
    C,
    per_group,
    width,
    chunks,
    eps,
    TIME: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Group norm of one sample and set of groups."""
    n = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    lane = tl.arange(0, BLOCK_C)
    c = chunk * width + lane
    here = (lane < width) & (c < C)
    x += n * P * C
    y += n * P * C
    add = _added(time, time_row, offset, n, c, here, TIME, OFFSET)
    count = P * per_group * 1.0
    if RESIDENT:
        p = tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & here[None, :]
        index = p[:, None] * C + c[None, :]
        value = tl.load(x + index, mask=mask, other=0.0).to(tl.float32) + add[None, :]
        value = tl.where(mask, value, 0.0)
        mean = _over_groups(tl.sum(value, axis=0), lane, per_group, BLOCK_C, BLOCK_G) / count
        value = tl.where(mask, value - mean[None, :], 0.0)
        squares = _over_groups(tl.sum(value * value, axis=0), lane, per_group, BLOCK_C, BLOCK_G)
        rstd = 1.0 / tl.sqrt(squares / count + eps)
        factor, term = _affine(weight, bias, scale_shift, scale_row, n, c, here, C, rstd, SCALE)
        tl.store(y + index, _finished(value, factor, term, SILU).to(y.dtype.element_ty), mask=mask)
    else:
        mean, squares = _moments(x, add, 0, P, c, lane, here, C, per_group, TILES, BLOCK_P, BLOCK_C, BLOCK_G)
        rstd = 1.0 / tl.sqrt(squares / count + eps)
        factor, term = _affine(weight, bias, scale_shift, scale_row, n, c, here, C, rstd, SCALE)
        _apply(x, y, add, mean, factor, term, 0, P, c, here, C, SILU, TILES, BLOCK_P)


@triton.jit
def group_norm_moments(
    x,
    moments,
    time,
    offset,
    time_row,
    P,
    C,
    per_group,
    width,
    chunks,
    splits,
    span,
    TIME: tl.constexpr,
    OFFSET: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The moments of one part of the pixels, float32, (n, splits, 2, C): for each channel the moments of its group."""
    split = tl.program_id(0) % splits
    chunk = (tl.program_id(0) // splits) % chunks
    n = (tl.program_id(0) // (splits * chunks)).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    c = chunk * width + lane
    here = (lane < width) & (c < C)
    add = _added(time, time_row, offset, n, c, here, TIME, OFFSET)
    first = split * span
    last = tl.minimum(first + span, P)
    mean, squares = _moments(
        x + n * P * C, add, first, last, c, lane, here, C, per_group, TILES, BLOCK_P, BLOCK_C, BLOCK_G
    )
    row = moments + (n * splits + split) * 2 * C
    tl.store(row + c, mean, mask=here)
    tl.store(row + C + c, squares, mask=here)


@triton.jit
def group_norm_merged(
    x,
    y,
    moments,
    weight,
    bias,
    time,
    offset,
    scale_shift,
    time_row,
    scale_row,
    P,
    C,
    per_group,
    width,
    chunks,
    splits,
    span,
    eps,
    TIME: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge the moments of all parts and store the output of one part."""
    split = tl.program_id(0) % splits
    chunk = (tl.program_id(0) // splits) % chunks
    n = (tl.program_id(0) // (splits * chunks)).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    c = chunk * width + lane
    here = (lane < width) & (c < C)
    s = tl.arange(0, BLOCK_S)
    valid = (s < splits)[:, None] & here[None, :]
    row = moments + n * splits * 2 * C + s[:, None] * (2 * C) + c[None, :]
    means = tl.load(row, mask=valid, other=0.0)
    squares_of_parts = tl.load(row + C, mask=valid, other=0.0)
    pixels = tl.where(s < splits, tl.minimum(span, P - s * span), 0).to(tl.float32)
    mean = tl.sum(means * pixels[:, None], axis=0) / P
    deviation = means - mean[None, :]
    total = tl.sum(squares_of_parts + deviation * deviation * (pixels * per_group)[:, None], axis=0)
    rstd = 1.0 / tl.sqrt(total / (P * per_group * 1.0) + eps)
    add = _added(time, time_row, offset, n, c, here, TIME, OFFSET)
    factor, term = _affine(weight, bias, scale_shift, scale_row, n, c, here, C, rstd, SCALE)
    first = split * span
    last = tl.minimum(first + span, P)
    _apply(x + n * P * C, y + n * P * C, add, mean, factor, term, first, last, c, here, C, SILU, TILES, BLOCK_P)


@triton.jit
def add_biased(a, b, bias, other, out, rows, C, OTHER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """a + b + bias + other of rows of channels, summed in float32."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < C
    add = tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    if OTHER:
        add += tl.load(other + c, mask=here, other=0.0).to(tl.float32)
    mask = (r < rows)[:, None] & here[None, :]
    index = r[:, None] * C + c[None, :]
    value = tl.load(a + index, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(b + index, mask=mask, other=0.0).to(tl.float32) + add[None, :]
    tl.store(out + index, value.to(out.dtype.element_ty), mask=mask)
