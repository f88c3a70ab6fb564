// The segment tree for Python (native_tree.py): lists of whole numbers travel as bytes of int64.

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "common/checks.h"
#include "kv_tree/kv_tree.h"

namespace appo {
namespace {

namespace ffi = tvm::ffi;

class TreeObj : public ffi::Object {
 public:
  explicit TreeObj(int64_t max_blocks) : tree(max_blocks) {}

  SegmentTree tree;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("appo.SegmentTree", TreeObj, ffi::Object);
};
class Tree : public ffi::ObjectRef {
 public:
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(Tree, ffi::ObjectRef, TreeObj);
  SegmentTree& get_tree() const { return const_cast<TreeObj*>(get())->tree; }
};

// Whole numbers that Python handed over.
class Numbers {
 public:
  Numbers(const ffi::Bytes& bytes, const char* name) : values_(bytes.size() / sizeof(int64_t)) {
    TVM_FFI_CHECK(bytes.size() % sizeof(int64_t) == 0, ValueError)
        << name << " are not whole int64 numbers";
    if (bytes.size() > 0) std::memcpy(values_.data(), bytes.data(), bytes.size());
  }
  const int64_t* data() const { return values_.data(); }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }

 private:
  std::vector<int64_t> values_;
};

ffi::Bytes bytes_of(const std::vector<int64_t>& values) {
  return ffi::Bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

Tree tree_new(int64_t max_blocks) { return Tree(ffi::make_object<TreeObj>(max_blocks)); }

int64_t tree_add(Tree tree, ffi::Bytes ids) {
  const Numbers tokens(ids, "ids");
  return tree.get_tree().add(tokens.data(), tokens.size());
}

int64_t tree_fork(Tree tree, int64_t seq, int64_t at) { return tree.get_tree().fork(seq, at); }

void tree_extend(Tree tree, int64_t seq, ffi::Bytes ids) {
  const Numbers tokens(ids, "ids");
  tree.get_tree().extend(seq, tokens.data(), tokens.size());
}

void tree_truncate(Tree tree, int64_t seq, int64_t length) {
  tree.get_tree().truncate(seq, length);
}
void tree_release(Tree tree, int64_t seq) { tree.get_tree().release(seq); }
int64_t tree_evict(Tree tree, int64_t seq) { return tree.get_tree().evict(seq); }

int64_t tree_evict_path(Tree tree, int64_t seq, ffi::Bytes keep) {
  const Numbers pairs(keep, "keep");  // node, own positions
  std::unordered_map<int64_t, int64_t> stay;
  for (int64_t i = 0; i + 1 < pairs.size(); i += 2) stay[pairs.data()[i]] = pairs.data()[i + 1];
  return tree.get_tree().evict_path(seq, stay);
}

void tree_new_version(Tree tree, int64_t version) { tree.get_tree().new_version(version); }

int64_t tree_length(Tree tree, int64_t seq) { return tree.get_tree().get(seq)->length(); }
int64_t tree_base(Tree tree, int64_t seq) { return tree.get_tree().get(seq)->base; }
int64_t tree_kv(Tree tree, int64_t seq) { return tree.get_tree().kv(seq); }
bool tree_stale(Tree tree, int64_t seq) {
  const Node* leaf = tree.get_tree().get(seq);
  return tree.get_tree().stale(leaf, leaf->length());
}

ffi::Bytes tree_tokens(Tree tree, int64_t seq) {
  std::vector<int64_t> all;
  const Node* leaf = tree.get_tree().get(seq);
  all.reserve(leaf->length());
  for (const Step& step : tree.get_tree().path(tree.get_tree().get(seq))) {
    all.insert(all.end(), step.node->tokens.begin(), step.node->tokens.begin() + step.count);
  }
  return bytes_of(all);
}

ffi::Bytes tree_path(Tree tree, int64_t seq) {
  std::vector<int64_t> pairs;
  for (const Step& step : tree.get_tree().path(tree.get_tree().get(seq))) {
    pairs.insert(pairs.end(), {step.node->id, step.count});
  }
  return bytes_of(pairs);
}

ffi::Bytes tree_blocks_of(Tree tree, int64_t node) {
  return bytes_of(tree.get_tree().node(node, "blocks_of").blocks);
}

ffi::Bytes tree_free_blocks(Tree tree) {
  BlockList& blocks = tree.get_tree().blocks();
  std::vector<int64_t> free;
  for (int64_t block = 0, end = blocks.span(); block < end; ++block) {
    if (blocks.owner[block] == kFree) free.push_back(block);
  }
  return bytes_of(free);
}

// version, tokens held, capacity, used, peak, span, sequences, nodes, number of the open layout (0:
// none).
ffi::Bytes tree_counts(Tree tree) {
  SegmentTree& t = tree.get_tree();
  BlockList& b = t.blocks();
  return bytes_of({t.version, t.tokens_held, b.capacity(), b.used, b.peak, b.span(),
                   t.live_sequences(), t.live_nodes(), t.open_layout()});
}

// Blocks lacking (if not 0, that is all), number of the layout, decode rows, then the number of
// items of each table.
ffi::Bytes opened(const SegmentTree& tree, int64_t lacking) {
  std::vector<int64_t> sizes{lacking};
  if (lacking == 0) {
    sizes.insert(sizes.end(), {tree.open_layout(), tree.tables().decode_rows});
    for (const auto* table : tree.tables().all())
      sizes.push_back(static_cast<int64_t>(table->size()));
  }
  return bytes_of(sizes);
}

ffi::Bytes tree_plan(Tree tree, ffi::Bytes seqs, int64_t budget) {
  const Numbers named(seqs, "seqs");
  return opened(tree.get_tree(), tree.get_tree().plan(named.data(), named.size(), budget));
}

ffi::Bytes tree_layout(Tree tree, ffi::Bytes units) {
  const Numbers rows(units, "units");  // node, start, count
  return opened(tree.get_tree(), tree.get_tree().layout(rows.data(), rows.size() / 3));
}

// All tables of the open layout, one after the other.
void tree_tables(Tree tree, ffi::TensorView out) {
  int64_t total = 0;
  for (const auto* table : tree.get_tree().tables().all())
    total += static_cast<int64_t>(table->size());
  check_vector(out, "out", kDLInt, 64, total);
  auto* to = data<int64_t>(out);
  for (const auto* table : tree.get_tree().tables().all())
    to = std::copy(table->begin(), table->end(), to);
}

void tree_commit(Tree tree, int64_t number) { tree.get_tree().commit(number); }
void tree_abort(Tree tree, int64_t number) { tree.get_tree().abort(number); }

int64_t tree_need(Tree tree, ffi::Bytes seqs, ffi::Bytes ends) {
  const Numbers named(seqs, "seqs"), to(ends, "ends");
  TVM_FFI_CHECK(named.size() == to.size(), ValueError) << "seqs and ends differ in length";
  return tree.get_tree().need(named.data(), to.data(), named.size());
}

void tree_check(Tree tree, ffi::Bytes slots) {
  const Numbers rows(slots, "slots");
  tree.get_tree().check(rows.data(), rows.size());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_new, tree_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_add, tree_add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_fork, tree_fork);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_extend, tree_extend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_truncate, tree_truncate);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_release, tree_release);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_evict, tree_evict);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_evict_path, tree_evict_path);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_new_version, tree_new_version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_length, tree_length);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_base, tree_base);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_kv, tree_kv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_stale, tree_stale);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_tokens, tree_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_path, tree_path);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_blocks_of, tree_blocks_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_free_blocks, tree_free_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_counts, tree_counts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_plan, tree_plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_layout, tree_layout);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_tables, tree_tables);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_commit, tree_commit);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_abort, tree_abort);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_need, tree_need);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kv_tree_check, tree_check);

}  // namespace appo
