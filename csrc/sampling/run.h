// The order of the work of sampling, whatever brings the logits. Part of sampling.cpp and of those
// that sample.
//
// The vocabulary is cut into at most kSplits contiguous parts that depend on V alone; statistics
// are kept per part and joined in order. So the bits of a row depend on its logits and its
// parameters: not on other rows, not on threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/scratch.h"
#include "common/team.h"
#include "sampling/sampling.h"

namespace appo {

constexpr int64_t kTile = 256;  // columns whose logits exist at a time
constexpr int64_t kSplits = 32;
constexpr int64_t kSampleRows = 48;  // rows whose tile of logits stays in the caches

struct Sampled {
  int64_t* token;  // -1: NaN or +inf among the logits, or nothing but -inf
  float *logp, *entropy;
};

SampleParams sample_params(int64_t seed, int64_t position, float inv_temp, bool greedy);
Race race_start();
RowStats stats_start();
// The result of a row from the statistics of its splits and the best of each thread; both lie
// `rows` items apart.
void finish_row(const SampleParams& params, const RowStats* stats, int64_t splits, int64_t rows,
                const Race* races, int64_t parts, int64_t lanes, const Sampled& out);

// Samples all rows. tile(first column, columns, first row, rows, memory) returns the logits of at
// most kTile columns and kSampleRows rows, kTile floats apart; it may put them into the memory it
// is handed, which has that size.
template <typename Tile>
void sample_rows(const SampleKernels& k, const std::vector<SampleParams>& params, int64_t vocab,
                 int64_t threads, const Tile& tile, const Sampled& out) {
  const int64_t rows = params.size(), tiles = ceil_div(vocab, kTile),
                splits = std::min(kSplits, tiles);
  const int64_t parts = std::clamp<int64_t>(threads, 1, splits),
                size = std::min(rows, kSampleRows) * kTile;
  const Scratch memory(parts * size);
  std::vector<RowStats> stats(splits * rows, stats_start());
  std::vector<Race> races(parts * rows, race_start());
  run_team(splits, parts, [&](int64_t split, int64_t part) {
    for (int64_t t = tiles * split / splits; t < tiles * (split + 1) / splits; ++t) {
      const int64_t first = t * kTile, columns = std::min(kTile, vocab - first);
      for (int64_t row = 0; row < rows; row += kSampleRows) {
        const int64_t some = std::min(kSampleRows, rows - row);
        const float* x = tile(first, columns, row, some, memory.get() + part * size);
        for (int64_t i = row; i < row + some; ++i, x += kTile) {
          k.absorb(x, columns, first, params[i], stats[split * rows + i], races[part * rows + i]);
        }
      }
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    finish_row(params[i], &stats[i], splits, rows, &races[i], parts, k.lanes,
               {out.token + i, out.logp + i, out.entropy + i});
  }
}

}  // namespace appo
