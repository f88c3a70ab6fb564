"""How csrc/ is laid out: which folder may include which, and what the folders hold."""

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SHARED = {"common": set(), "common/simd": {"common"}}
USES = {"decoder": {"segment_attention", "sampling"}}  # of other operations; the rest use none
MOST_FILES = 25


def sources():
    return [p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h")]


def folder(path):
    return path.parent.relative_to(CSRC).as_posix()


def included(path):
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.M)


def test_includes_are_paths_from_csrc():
    missing = [
        (p.name, name) for p in sources() for name in included(p) if not (CSRC / name).is_file()
    ]
    assert sources()
    assert not missing


def test_no_folder_includes_one_above_it():
    wrong = []
    for path in sources():
        own = folder(path)
        may = SHARED.get(own, {*SHARED, *USES.get(own, ())}) | {own}
        wrong += [(own, name) for name in included(path) if Path(name).parent.as_posix() not in may]
    assert not wrong


def test_folders_are_of_a_size_to_look_through():
    sizes = {}
    for path in sources():
        sizes[folder(path)] = sizes.get(folder(path), 0) + 1
    assert "." not in sizes
    assert not {name: n for name, n in sizes.items() if n > MOST_FILES}


def test_files_of_an_instruction_set_are_known_by_name():
    """CMake compiles these alone with wide instructions: intrinsics elsewhere would not compile or not run."""
    wide = {p for p in sources() if p.name.startswith("kernels_") and p.suffix == ".cpp"}
    assert {p.stem.removeprefix("kernels_") for p in wide} == {"avx2", "avx512", "avx512_bf16"}
    vectors = {"common/simd/avx2.h", "common/simd/avx512.h", "common/simd/avx512_bf16.h"}
    users = {p for p in sources() if p.suffix == ".cpp" and vectors & set(included(p))}
    assert users
    assert users <= wide
