"""Kernels of `symmetric_matmul`: products of tiles of symmetric matrices on Hopper GPUs.

Both are persistent and written in Gluon, Triton's language for explicit layouts. Of a program's
nine warps, one fetches pairs of operand tiles through the tensor memory accelerator; two groups of
four take output tiles in turn, so that one group's products hide the other's stores.

An operand tile is one of rows, [128 outer, 64 contracted], or, where the stored one is the mirror
image, one of columns, [64 contracted, 128 outer]; the tensor cores take either.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE = gl.constexpr(128)  # rows and columns of an output tile
DEPTH = gl.constexpr(64)  # contracted elements of a fetched pair
BLOCKS = gl.constexpr(2)  # pairs along a tile
STRIPE = gl.constexpr(8)  # rows of tiles that `matmul` works through column by column
PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(216)
ROWS = gl.constexpr(gl.NVMMASharedLayout.get_default_for([128, 64], gl.float16))
COLUMNS = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 128], gl.float16))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def _own_tiles(total):
    """How many of the output tiles are this program's."""
    return (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _triangle_tile(turn, work):
    """First row of the matrix in the batch, and first row and column of the tile in it."""
    total, tiles, size, _blocks, last_first = work
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    if last_first:
        tile = total - 1 - tile
    within = tile % tiles
    # Rows of the triangle start at 0, 1, 3, 6, ...; the root may be off by one after rounding.
    row = ((gl.sqrt((8 * within + 1).to(gl.float32)) - 1) / 2).to(gl.int32)
    row = gl.where(row * (row + 1) // 2 > within, row - 1, row)
    row = gl.where((row + 1) * (row + 2) // 2 <= within, row + 1, row)
    column = within - row * (row + 1) // 2
    return tile // tiles * size, row * TILE, column * TILE


@gluon.jit
def _striped_tile(turn, work):
    """Entry of the batch, and first row and column of the tile in its matrix."""
    total, row_tiles, column_tiles, last_first = work
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    if last_first:
        tile = total - 1 - tile
    tiles = row_tiles * column_tiles
    within = tile % tiles
    first = within // (STRIPE * column_tiles) * STRIPE
    height = gl.minimum(row_tiles - first, STRIPE)
    within = within % (STRIPE * column_tiles)
    return tile // tiles, (first + within % height) * TILE, within // height * TILE


@gluon.jit
def _allocate(STAGES: gl.constexpr):
    """Operand tiles, and barriers: pair fetched, pair used up, group's turn."""
    a_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, DEPTH], ROWS)
    b_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, DEPTH], ROWS)
    fetched = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(fetched.index(stage), count=1)
        mbarrier.init(used.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(go.index(group), count=1)
    return a_tiles, b_tiles, fetched, used, go


@gluon.jit
def _as_columns(tile):
    """The memory of a tile of rows, 128 x 64, for a tile of columns, 64 x 128."""
    return tile._reinterpret(tile.dtype, [DEPTH, TILE], COLUMNS)


@gluon.jit
def _fetch(rows, columns, tile, barrier, matrix, row, depth, FROM_MIRROR: gl.constexpr):
    """Elements [row : row + 128, depth : depth + 64], or their mirror image if that is stored."""
    if FROM_MIRROR and depth >= row + TILE:
        column_tile = _as_columns(tile)
        tma.async_copy_global_to_shared(columns, [matrix + depth, row], barrier, column_tile)
    else:
        tma.async_copy_global_to_shared(rows, [matrix + row, depth], barrier, tile)


@gluon.jit
def _await_stage(pair, fetched, used, STAGES: gl.constexpr):
    stage = pair % STAGES
    mbarrier.wait(used.index(stage), ((pair // STAGES) & 1) ^ 1)
    mbarrier.expect(fetched.index(stage), 2 * TILE * DEPTH * 2)
    return stage


@gluon.jit
def _accumulate(
    sums,
    pairs,
    start,
    stop,
    first,
    A_COLUMNS: gl.constexpr,
    B_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add the products of the fetched pairs from `start` to `stop`.

    Args:
        first: the first pair of this output tile.
        A_COLUMNS, B_COLUMNS: the operand's tile is one of columns.
    """
    a_tiles, b_tiles, fetched, used, _go = pairs
    for pair in range(start, stop):
        stage = pair % STAGES
        mbarrier.wait(fetched.index(stage), (pair // STAGES) & 1)
        if A_COLUMNS:
            a_tile = _as_columns(a_tiles.index(stage)).permute((1, 0))
        else:
            a_tile = a_tiles.index(stage)
        if B_COLUMNS:
            b_tile = _as_columns(b_tiles.index(stage))
        else:
            b_tile = b_tiles.index(stage).permute((1, 0))
        sums = warpgroup_mma(a_tile, b_tile, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        if pair > first:
            gl.thread_barrier()  # all four warps are done with the pair before this one
            mbarrier.arrive(used.index((pair + STAGES - 1) % STAGES), count=1)
    return sums


@gluon.jit
def _await_turn(pairs, turn, GROUP: gl.constexpr):
    # Barriers tell only even from odd rounds: a group that looked at pairs further ahead would take
    # older ones for its own.
    mbarrier.wait(pairs[4].index(GROUP), ((turn // 2) & 1) ^ (1 - GROUP))


@gluon.jit
def _finish(sums, pairs, stop, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Let the other group begin, and wait for the last product."""
    mbarrier.arrive(pairs[4].index(1 - GROUP), count=1)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    gl.thread_barrier()
    mbarrier.arrive(pairs[3].index((stop + STAGES - 1) % STAGES), count=1)
    return sums


@gluon.jit
def _store(out, row, column, tile, value, TRANSPOSE: gl.constexpr):
    """Store through the shared-memory tile, whose earlier contents are no longer needed."""
    gl.thread_barrier()
    if TRANSPOSE:
        tile.permute((1, 0)).store(value)
    else:
        tile.store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out, [row, column], tile)


@gluon.jit
def _produce_symmetric(
    a_rows, a_columns, b_rows, b_columns, pairs, work, SYMMETRIC: gl.constexpr, STAGES: gl.constexpr
):
    a_tiles, b_tiles, fetched, used, _go = pairs
    total, _tiles, _size, blocks, _last_first = work
    pair = 0
    for turn in range(_own_tiles(total)):
        matrix, row, column = _triangle_tile(turn, work)
        for block in range(blocks):
            stage = _await_stage(pair, fetched, used, STAGES)
            barrier, depth = fetched.index(stage), block * DEPTH
            a_tile, b_tile = a_tiles.index(stage), b_tiles.index(stage)
            _fetch(a_rows, a_columns, a_tile, barrier, matrix, row, depth, SYMMETRIC)
            _fetch(b_rows, b_columns, b_tile, barrier, matrix, column, depth, SYMMETRIC)
            pair += 1


@gluon.jit
def _consume_symmetric(
    GROUP: gl.constexpr,
    addend,
    out,
    own_tile,
    pairs,
    work,
    factors,
    SYMMETRIC: gl.constexpr,
    HAS_ADDEND: gl.constexpr,
    HAS_IDENTITY: gl.constexpr,
    STAGES: gl.constexpr,
):
    out_tile, loaded = own_tile
    total, _tiles, _size, blocks, _last_first = work
    alpha, beta, identity = factors
    phase = 0
    for turn in range(GROUP, _own_tiles(total), 2):
        matrix, row, column = _triangle_tile(turn, work)
        tma.store_wait(0)
        if HAS_ADDEND:
            gl.thread_barrier()
            fence_async_shared()
            mbarrier.expect(loaded, TILE * TILE * 2)
            tma.async_copy_global_to_shared(addend, [matrix + row, column], loaded, out_tile)
        sums = gl.zeros([TILE, TILE], gl.float32, SUMS)
        first = turn * blocks
        stop = first + blocks
        _await_turn(pairs, turn, GROUP)
        if SYMMETRIC:
            # Left of the diagonal tiles both operands are stored; B's mirror images begin first.
            b_end = first + column // DEPTH + BLOCKS
            a_end = first + row // DEPTH + BLOCKS
            sums = _accumulate(sums, pairs, first, b_end, first, False, False, STAGES)
            sums = _accumulate(sums, pairs, b_end, a_end, first, False, True, STAGES)
            sums = _accumulate(sums, pairs, a_end, stop, first, True, True, STAGES)
        else:
            sums = _accumulate(sums, pairs, first, stop, first, False, False, STAGES)
        sums = _finish(sums, pairs, stop, GROUP, STAGES) * alpha
        if HAS_ADDEND:
            mbarrier.wait(loaded, phase)
            phase ^= 1
            sums += beta * out_tile.load(SUMS).to(gl.float32)
        if HAS_IDENTITY:  # noqa: SIM102 (known when compiling; the other only when running)
            if row == column:
                rows = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(1, SUMS)), 1)
                columns = gl.expand_dims(gl.arange(0, TILE, gl.SliceLayout(0, SUMS)), 0)
                sums += gl.where(rows == columns, identity, 0.0)
        _store(out, matrix + row, column, out_tile, sums.to(out.dtype), False)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total", "tiles", "size", "blocks", "last_first"])
def symmetric_matmul_kernel(
    a_rows,
    a_columns,
    b_rows,
    b_columns,
    addend,
    out,
    total,
    tiles,
    size,
    blocks,
    last_first,
    alpha,
    beta,
    identity,
    SYMMETRIC: gl.constexpr,
    HAS_ADDEND: gl.constexpr,
    HAS_IDENTITY: gl.constexpr,
    STAGES: gl.constexpr,
):
    pairs = _allocate(STAGES)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, TILE, TILE], out.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(loaded.index(group), count=1)
    fence_async_shared()
    work = (total, tiles, size, blocks, last_first)
    factors = (alpha, beta, identity)
    tile_0 = (out_tiles.index(0), loaded.index(0))
    tile_1 = (out_tiles.index(1), loaded.index(1))
    gl.warp_specialize(
        [
            (
                _consume_symmetric,
                (
                    0,
                    addend,
                    out,
                    tile_0,
                    pairs,
                    work,
                    factors,
                    SYMMETRIC,
                    HAS_ADDEND,
                    HAS_IDENTITY,
                    STAGES,
                ),
            ),
            (
                _consume_symmetric,
                (
                    1,
                    addend,
                    out,
                    tile_1,
                    pairs,
                    work,
                    factors,
                    SYMMETRIC,
                    HAS_ADDEND,
                    HAS_IDENTITY,
                    STAGES,
                ),
            ),
            (
                _produce_symmetric,
                (a_rows, a_columns, b_rows, b_columns, pairs, work, SYMMETRIC, STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _produce(a_rows, a_columns, b, pairs, work, STAGES: gl.constexpr):
    a_tiles, b_tiles, fetched, used, _go = pairs
    total, row_tiles, _column_tiles, _last_first = work
    size = row_tiles * TILE
    pair = 0
    for turn in range(_own_tiles(total)):
        entry, row, column = _striped_tile(turn, work)
        matrix = entry * size
        for block in range(row_tiles * BLOCKS):
            stage = _await_stage(pair, fetched, used, STAGES)
            barrier, depth = fetched.index(stage), block * DEPTH
            _fetch(a_rows, a_columns, a_tiles.index(stage), barrier, matrix, row, depth, True)
            b_tile = _as_columns(b_tiles.index(stage))
            tma.async_copy_global_to_shared(b, [matrix + depth, column], barrier, b_tile)
            pair += 1


@gluon.jit
def _consume(
    GROUP: gl.constexpr,
    out,
    out_tile,
    pairs,
    work,
    alpha,
    TRANSPOSE_OUT: gl.constexpr,
    STAGES: gl.constexpr,
):
    total, row_tiles, column_tiles, _last_first = work
    blocks = row_tiles * BLOCKS
    for turn in range(GROUP, _own_tiles(total), 2):
        entry, row, column = _striped_tile(turn, work)
        sums = gl.zeros([TILE, TILE], gl.float32, SUMS)
        first = turn * blocks
        stored_end = first + row // DEPTH + BLOCKS
        stop = first + blocks
        _await_turn(pairs, turn, GROUP)
        sums = _accumulate(sums, pairs, first, stored_end, first, False, True, STAGES)
        sums = _accumulate(sums, pairs, stored_end, stop, first, True, True, STAGES)
        sums = _finish(sums, pairs, stop, GROUP, STAGES) * alpha
        tma.store_wait(0)
        if TRANSPOSE_OUT:
            out_row, out_column = entry * column_tiles * TILE + column, row
        else:
            out_row, out_column = entry * row_tiles * TILE + row, column
        _store(out, out_row, out_column, out_tile, sums.to(out.dtype), TRANSPOSE_OUT)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total", "row_tiles", "column_tiles", "last_first"])
def matmul_kernel(
    a_rows,
    a_columns,
    b,
    out,
    total,
    row_tiles,
    column_tiles,
    last_first,
    alpha,
    TRANSPOSE_OUT: gl.constexpr,
    STAGES: gl.constexpr,
):
    pairs = _allocate(STAGES)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, TILE, TILE], out.layout)
    fence_async_shared()
    work = (total, row_tiles, column_tiles, last_first)
    gl.warp_specialize(
        [
            (_consume, (0, out, out_tiles.index(0), pairs, work, alpha, TRANSPOSE_OUT, STAGES)),
            (_consume, (1, out, out_tiles.index(1), pairs, work, alpha, TRANSPOSE_OUT, STAGES)),
            (_produce, (a_rows, a_columns, b, pairs, work, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
