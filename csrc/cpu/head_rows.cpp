#include "head_rows.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace megatron_kanana::cpu {
namespace {

// Independent partial sums, so that the compiler may keep them in vector lanes.
constexpr int64_t kLanes = 16;

float to_float(uint16_t bfloat16) {
  return std::bit_cast<float>(static_cast<uint32_t>(bfloat16) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// The positions of one tile of one head.
struct TileRows {
  int64_t head;    // over all samples
  int64_t first;   // position
  int64_t count;   // positions that exist
  int64_t offset;  // of the first one in the tensor

  TileRows(const FlashAttentionProblem& problem, const StridedTensor& tensor, int64_t heads,
           int64_t tile) {
    const int64_t tiles = problem.padded_length() / kTile;
    head = tile / tiles;
    first = tile % tiles * kTile;
    count = std::min(kTile, problem.length - first);
    offset = first * tensor.sequence_stride + head / heads * tensor.batch_stride +
             head % heads * tensor.head_stride;
  }
};

void read_row(const StridedTensor& tensor, int64_t offset, float* row) {
  if (tensor.dtype == Dtype::kFloat32) {
    const float* const source = static_cast<const float*>(tensor.data) + offset;
    std::copy(source, source + tensor.width, row);
  } else {
    const uint16_t* const source = static_cast<const uint16_t*>(tensor.data) + offset;
    for (int64_t i = 0; i < tensor.width; ++i) row[i] = to_float(source[i]);
  }
}

void write_row(const float* row, const StridedTensor& tensor, int64_t offset) {
  if (tensor.dtype == Dtype::kFloat32) {
    std::copy(row, row + tensor.width, static_cast<float*>(tensor.data) + offset);
  } else {
    uint16_t* const target = static_cast<uint16_t*>(tensor.data) + offset;
    for (int64_t i = 0; i < tensor.width; ++i) target[i] = to_bfloat16(row[i]);
  }
}

}  // namespace

int64_t count_tiles(const FlashAttentionProblem& problem, const HeadRows& rows) {
  return problem.batch * rows.heads * (problem.padded_length() / kTile);
}

void copy_tile_in(const FlashAttentionProblem& problem, const StridedTensor& tensor,
                  const HeadRows& rows, int64_t tile) {
  const TileRows place(problem, tensor, rows.heads, tile);
  float* row = rows.of_head(problem, place.head) + place.first * rows.stride;
  for (int64_t i = 0; i < kTile; ++i, row += rows.stride) {
    if (i < place.count) {
      read_row(tensor, place.offset + i * tensor.sequence_stride, row);
      std::fill(row + tensor.width, row + rows.width, 0.0f);
    } else {
      std::fill(row, row + rows.width, 0.0f);
    }
  }
}

void copy_tile_out(const FlashAttentionProblem& problem, const HeadRows& rows, int64_t chunks,
                   float factor, const StridedTensor& tensor, int64_t tile) {
  const TileRows place(problem, tensor, rows.heads, tile);
  float* row = rows.of_head(problem, place.head) + place.first * rows.stride;
  for (int64_t i = 0; i < place.count; ++i, row += rows.stride) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* const addend = row + chunk * rows.floats(problem);
      for (int64_t column = 0; column < rows.width; ++column) row[column] += addend[column];
    }
    if (factor != 1.0f) {
      for (int64_t column = 0; column < rows.width; ++column) row[column] *= factor;
    }
    write_row(row, tensor, place.offset + i * tensor.sequence_stride);
  }
}

void delta_of_tile(const FlashAttentionProblem& problem, const StridedTensor& out,
                   const HeadRows& grad_out, float* delta, int64_t tile) {
  const TileRows place(problem, out, grad_out.heads, tile);
  const float* grad_row = grad_out.of_head(problem, place.head) + place.first * grad_out.stride;
  float* const deltas = delta + place.head * problem.padded_length() + place.first;
  std::vector<float> row(grad_out.width);
  for (int64_t i = 0; i < place.count; ++i, grad_row += grad_out.stride) {
    read_row(out, place.offset + i * out.sequence_stride, row.data());
    float sums[kLanes] = {};
    for (int64_t column = 0; column < grad_out.width; column += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += row[column + lane] * grad_row[column + lane];
      }
    }
    deltas[i] = 0.0f;
    for (const float sum : sums) deltas[i] += sum;
  }
}

}  // namespace megatron_kanana::cpu
