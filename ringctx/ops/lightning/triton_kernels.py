# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Triton kernels of chunked linear attention: three, for forward and backward.

One idea: outputs and the gradients of q, k and v are one product with the roles changed. A row of x
attends rows of y in its own chunk, collects z, and adds what lies beyond the chunk:

    out = [(X Y^T) . M] Z + w (X A)        x    y    z    A      rows see    w
    outputs                                q    k    v    S      the past    scale exp(b)
    gradient of q                          dO   v    k    S^T    the past    scale exp(b)
    gradient of k                          v    dO   q    G^T    the future  exp(b_C - b)
    gradient of v                          k    q    dO   G      the future  exp(b_C - b)

The other two sum what each chunk gives to the state (or to its gradient), and run a state through
the chunks of a fragment. No kernel holds more than a few tiles, whatever the head dims.
Price: backward computes Q K^T once and dO V^T twice; states are read in fp32 by each of the four.

The grid runs over a table of (start, length) of chunks. Rows beyond a chunk's length and columns
beyond a head dim are masked in every load and store. Sums and states are fp32; operands of products
have the dtype of the inputs, and those in fp32 are multiplied without TF32.
Shapes: B batch, T tokens, H heads, N chunks, tensors `[B, T, H, D]`, contiguous. Runs in Triton's
interpreter too, where loop variables are ints (and bf16 is not to be trusted).
"""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "attend_chunks", "run_states", "sum_chunks"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run on the CPU, in Triton's interpreter."""


@triton.jit
def _clock(per_head, running, row, length, token, head, H):
    """Rate, time and rest of rows: the log decay from j to i is rate * (time + rest of i - of j).

    Time 0 is before the first row. The rest is what fp32 leaves of a float64 time: without it, the
    error of a weight would grow with the decay since the chunk's first row.
    """
    if running is None:
        rate = tl.load(per_head + head).to(tl.float32)
        time = (row + 1).to(tl.float32)
        rest = time * 0.0
    else:
        rate = 1.0
        exact = tl.load(running + (token + row) * H + head, mask=row < length, other=0.0)
        time = exact.to(tl.float32)
        rest = (exact - time.to(exact.dtype)).to(tl.float32)
    return rate, time, rest


@triton.jit
def _load_rows(base, row, column, length, H, D: tl.constexpr):
    """Rows of one head, in memory `[rows, H, D]`; zeros beyond the chunk and the head dim."""
    inside = (row < length)[:, None] & (column < D)[None, :]
    return tl.load(base + row[:, None] * (H * D) + column[None, :], mask=inside, other=0.0)


@triton.jit
def _load_state(base, row, column, X: tl.constexpr, Z: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A tile of a matrix `[X, Z]`; in memory `[Z, X]` if transposed."""
    inside = (row < X)[:, None] & (column < Z)[None, :]
    row_stride: tl.constexpr = 1 if TRANSPOSED else Z
    column_stride: tl.constexpr = X if TRANSPOSED else 1
    place = row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(base + place, mask=inside, other=0.0)


@triton.jit
def _add_product(total, x, wide):
    """Total + x @ wide, where `wide` is fp32 and may lie outside the range of fp16."""
    if x.dtype == tl.float16:
        largest = tl.max(tl.abs(wide))
        unit = tl.where(largest > 1e-30, largest, 1.0)
        total += tl.dot(x, (wide / unit).to(tl.float16)) * unit
    else:
        total = tl.dot(x, wide.to(x.dtype), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["B", "T", "H"])
def attend_chunks(
    out,
    partial,
    dots,
    companion,
    x,
    y,
    z,
    beyond,
    per_head,
    running,
    starts,
    lengths,
    scale,
    B,
    T,
    H,
    X: tl.constexpr,
    Z: tl.constexpr,
    CHUNK: tl.constexpr,
    FUTURE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_Z: tl.constexpr,
):
    """Out = partial + [(X Y^T) . M] Z + w (X A), and dots = companion . out, row by row.

    Grid: N * B * H * row tiles * tiles of Z. partial, (dots, companion), (y, z) and beyond are left
    out where None. `dots` is `[tiles of Z, B, T, H]`: a part of the sum by each tile.
    """
    tiles: tl.constexpr = (Z + TILE_Z - 1) // TILE_Z
    blocks: tl.constexpr = CHUNK // TILE_ROWS
    program = tl.program_id(0)
    tile = program % tiles
    first_row = program // tiles % blocks * TILE_ROWS
    program = program // (tiles * blocks)
    head, batch, chunk = program % H, program // H % B, program // H // B
    token = batch.to(tl.int64) * T + tl.load(starts + chunk)
    length = tl.load(lengths + chunk)
    row = first_row + tl.arange(0, TILE_ROWS)
    column = tile * TILE_Z + tl.arange(0, TILE_Z)
    rate, time, rest = _clock(per_head, running, row, length, token, head, H)
    x_rows = x + (token * H + head) * X
    z_rows = (token * H + head) * Z

    total = tl.zeros([TILE_ROWS, TILE_Z], tl.float32)
    if beyond is not None:
        state = beyond + ((chunk.to(tl.int64) * B + batch) * H + head) * (X * Z)
        for first in range(0, X, TILE_X):
            place = first + tl.arange(0, TILE_X)
            x_tile = _load_rows(x_rows, row, place, length, H, X)
            total = _add_product(total, x_tile, _load_state(state, place, column, X, Z, TRANSPOSED))
        if FUTURE:
            _, end, end_rest = _clock(per_head, running, length - 1, length, token, head, H)
            to_end = rate * (end - time + (end_rest - rest))
            weight = tl.exp(tl.where(row < length, to_end, float("-inf")))
        else:
            weight = tl.exp(tl.where(row < length, rate * time, float("-inf"))) * scale
        total *= weight[:, None]

    if y is not None:
        y_rows = y + (token * H + head) * X
        first_key = first_row if FUTURE else 0
        last_key = CHUNK if FUTURE else first_row + TILE_ROWS
        for first in range(first_key, last_key, TILE_KEYS):
            key = first + tl.arange(0, TILE_KEYS)
            products = tl.zeros([TILE_ROWS, TILE_KEYS], tl.float32)
            for first_place in range(0, X, TILE_X):
                place = first_place + tl.arange(0, TILE_X)
                x_tile = _load_rows(x_rows, row, place, length, H, X)
                y_tile = _load_rows(y_rows, key, place, length, H, X)
                products = tl.dot(x_tile, tl.trans(y_tile), products, input_precision="ieee")
            _, key_time, key_rest = _clock(per_head, running, key, length, token, head, H)
            passed = time[:, None] - key_time[None, :] + (rest[:, None] - key_rest[None, :])
            if FUTURE:
                visible = (row[:, None] <= key[None, :]) & (key < length)[None, :]
                passed = -passed
            else:
                visible = (row[:, None] >= key[None, :]) & (row < length)[:, None]
            # Masked before exp: what lies outside may be beyond its range.
            weights = tl.exp(tl.where(visible, rate * passed, float("-inf"))) * scale
            z_tile = _load_rows(z + z_rows, key, column, length, H, Z)
            attended = (products * weights).to(z_tile.dtype)
            total = tl.dot(attended, z_tile, total, input_precision="ieee")

    inside = (row < length)[:, None] & (column < Z)[None, :]
    offset = z_rows + row[:, None] * (H * Z) + column[None, :]
    if partial is not None:
        total += tl.load(partial + offset, mask=inside, other=0.0)
    if dots is not None:
        other = tl.load(companion + offset, mask=inside, other=0.0).to(tl.float32)
        place = ((tile.to(tl.int64) * B * T + token) + row) * H + head
        tl.store(dots + place, tl.sum(total * other, axis=1), mask=row < length)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "T", "H"])
def sum_chunks(
    out,
    x,
    y,
    per_head,
    running,
    starts,
    lengths,
    scale,
    B,
    T,
    H,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    TO_END: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_X: tl.constexpr,
    TILE_Y: tl.constexpr,
):
    """Out[n] = (w X)^T Y of chunk n, `[N, B, H, X, Y]`; w = exp(b_C - b) or else scale exp(b).

    Grid: N * B * H * tiles of X * tiles of Y.
    """
    x_tiles: tl.constexpr = (X + TILE_X - 1) // TILE_X
    y_tiles: tl.constexpr = (Y + TILE_Y - 1) // TILE_Y
    program = tl.program_id(0)
    y_place = program % y_tiles * TILE_Y + tl.arange(0, TILE_Y)
    x_place = program // y_tiles % x_tiles * TILE_X + tl.arange(0, TILE_X)
    program = program // (x_tiles * y_tiles)
    head, batch, chunk = program % H, program // H % B, program // H // B
    token = batch.to(tl.int64) * T + tl.load(starts + chunk)
    length = tl.load(lengths + chunk)
    x_rows = x + (token * H + head) * X
    y_rows = y + (token * H + head) * Y
    _, end, end_rest = _clock(per_head, running, length - 1, length, token, head, H)

    total = tl.zeros([TILE_X, TILE_Y], tl.float32)
    for first in range(0, CHUNK, TILE_ROWS):
        row = first + tl.arange(0, TILE_ROWS)
        rate, time, rest = _clock(per_head, running, row, length, token, head, H)
        passed = end - time + (end_rest - rest) if TO_END else time
        weight = tl.exp(tl.where(row < length, rate * passed, float("-inf")))
        if not TO_END:
            weight *= scale
        x_tile = _load_rows(x_rows, row, x_place, length, H, X)
        y_tile = _load_rows(y_rows, row, y_place, length, H, Y)
        weighted = (x_tile.to(tl.float32) * weight[:, None]).to(x_tile.dtype)
        total = tl.dot(tl.trans(weighted), y_tile, total, input_precision="ieee")

    inside = (x_place < X)[:, None] & (y_place < Y)[None, :]
    out += ((chunk.to(tl.int64) * B + batch) * H + head) * (X * Y)
    tl.store(out + x_place[:, None] * Y + y_place[None, :], total, mask=inside)


@triton.jit
def _load_update(updates, decays, chunk, place, size, row_stride, decay_stride):
    """What a chunk adds, and the factor it puts on the state; 0 and 1 where size is 0."""
    number = chunk.to(tl.int64)
    update = tl.load(updates + number * row_stride, mask=place < size, other=0.0)
    decay = tl.load(decays + number * decay_stride, mask=size > 0, other=0.0)
    return update, tl.exp(decay.to(tl.float32))


@triton.jit(do_not_specialize=["B", "H", "decay_batch"])
def run_states(
    states,
    incoming,
    leaving,
    of_chunk,
    firsts,
    sources,
    targets,
    B,
    H,
    decay_batch,
    SIZE: tl.constexpr,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Put into `states[n]`, which holds what chunk n adds, the state before it was added.

    Grid: fragments * B * H * tiles of SIZE = K * V. States come from slot `sources[fragment]` of
    incoming (None: zeros) and go to slot `targets[fragment]` of leaving; negative: no slot.
    """
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    program = tl.program_id(0)
    place = program % tiles * TILE + tl.arange(0, TILE)
    program = program // tiles
    head, batch, fragment = program % H, program // H % B, program // H // B
    stride = B.to(tl.int64) * H * SIZE
    offset = (batch.to(tl.int64) * H + head) * SIZE + place
    states += offset
    of_chunk += batch % decay_batch * H + head
    decay_stride = decay_batch * H
    begin, end = tl.load(firsts + fragment), tl.load(firsts + fragment + 1)

    state = tl.zeros([TILE], tl.float32)
    if incoming is not None:
        slot = tl.load(sources + fragment).to(tl.int64)
        # A size of 0 masks everything: the interpreter cannot join a scalar and a tile of bits.
        size = tl.where(slot >= 0, SIZE, 0)
        state = tl.load(incoming + slot * stride + offset, mask=place < size, other=0.0)
    # Four chunks at a time, loads first, so that a state does not wait for each of them in turn.
    for step in range(0, end - begin, 4):
        if BACKWARD:
            c0, c1, c2, c3 = end - 1 - step, end - 2 - step, end - 3 - step, end - 4 - step
        else:
            c0, c1, c2, c3 = begin + step, begin + step + 1, begin + step + 2, begin + step + 3
        left = end - begin - step
        s1 = tl.where(left > 1, SIZE, 0)
        s2 = tl.where(left > 2, SIZE, 0)
        s3 = tl.where(left > 3, SIZE, 0)
        u0, d0 = _load_update(states, of_chunk, c0, place, SIZE, stride, decay_stride)
        u1, d1 = _load_update(states, of_chunk, c1, place, s1, stride, decay_stride)
        u2, d2 = _load_update(states, of_chunk, c2, place, s2, stride, decay_stride)
        u3, d3 = _load_update(states, of_chunk, c3, place, s3, stride, decay_stride)
        tl.store(states + c0.to(tl.int64) * stride, state, mask=place < SIZE)
        state = state * d0 + u0
        tl.store(states + c1.to(tl.int64) * stride, state, mask=place < s1)
        state = state * d1 + u1
        tl.store(states + c2.to(tl.int64) * stride, state, mask=place < s2)
        state = state * d2 + u2
        tl.store(states + c3.to(tl.int64) * stride, state, mask=place < s3)
        state = state * d3 + u3

    slot = tl.load(targets + fragment).to(tl.int64)
    size = tl.where(slot >= 0, SIZE, 0)
    tl.store(leaving + slot * stride + offset, state, mask=place < size)
