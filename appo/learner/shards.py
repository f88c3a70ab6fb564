"""What a checkpoint holds of the learner: float32 masters and Adam moments, each rank its own part.

DeepSpeed cuts parameters into slices that depend on the stage and on the number of ranks, and its
checkpoints load only into the same cut. Here every rank writes the slices it owns under the name of
the parameter and their place in it (`MasterSlice`), without talking to anyone, and a reader takes
what it needs from whichever files have it. So one path serves every stage and any number of ranks,
and it is exact: masters and moments are copied bit by bit, and the weights the model computes with
are the masters rounded, as after every step. Frozen weights are not written: the base model has
them.

`zero/rank_R.pt` is read with `weights_only` (no code runs) and memory-mapped (only what is needed
is read).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from appo.errors import CheckpointError

FOLDER = "zero"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass
class MasterSlice:
    """Elements start … start+numel-1 of a flattened parameter.

    This rank keeps the master copy of them.

    `flat` is the tensor that the optimiser steps (float32, often many parameters end to end); the
    part begins at `at`.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    at: int

    def view(self, of: Tensor) -> Tensor:
        """The part in `of`, a tensor laid out like `flat`: the master itself or a moment."""
        return of.detach().view(-1).narrow(0, self.at, self.numel)


def master_slices(engine: Any, lm: nn.Module) -> Iterator[MasterSlice]:
    """The slices of this rank, in the order of the model's parameters.

    At stage 0 each rank has all of everything.
    """
    zero = engine.optimizer
    for name, p in lm.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_id"):  # stage 3: equal parts, the last one padded
            group, at, size = zero.grad_position[zero.get_param_id(p)]
            whole: int = p.ds_numel  # type: ignore[attr-defined]  # set by DeepSpeed
            start = min(size * engine.global_rank, whole)
            if numel := min(size, whole - start):
                yield MasterSlice(name, start, numel, zero.fp32_partitioned_groups_flat[group], at)
        elif hasattr(p, "_hp_mapping"):  # stages 1 and 2: a cut through all parameters end to end
            if (part := p._hp_mapping) is not None:
                (flat,) = zero.param_groups[part.param_group_index]["params"]
                own, in_flat = part.lp_fragment_address, part.hp_fragment_address
                yield MasterSlice(name, own.start, own.numel, flat, in_flat.start)
        else:
            yield MasterSlice(name, 0, p.numel(), p, 0)


def save_shard(path: Path, engine: Any, lm: nn.Module, rank: int) -> None:
    """Write this rank's slices and random states. At stage 0 rank 0 writes the slices for all."""
    state, step = _adam(engine), 0
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("master", *MOMENTS)}
    places = {}
    if rank == 0 or engine.zero_optimization_stage() > 0:
        for part in master_slices(engine, lm):
            places[part.name] = (part.start, part.numel)
            tensors["master"][part.name] = part.view(part.flat)
            if moments := state.get(part.flat):
                step = int(moments["step"])
                for kind in MOMENTS:
                    tensors[kind][part.name] = part.view(moments[kind])
    (path / FOLDER).mkdir(exist_ok=True)
    torch.save(
        {"step": step, "places": places, "rng": _random_states(), **tensors}, _file(path, rank)
    )


def load_shards(path: Path, engine: Any, lm: nn.Module, rank: int, saved_ranks: int) -> None:
    """Fill this rank's masters and moments from the files of `saved_ranks` ranks.

    The model is filled with them. Collective.

    Random states: a rank that the checkpoint knows goes on where it stopped; any other starts from
    a seed made of rank 0's state and its own number. Raises CheckpointError when a file is missing
    or damaged, or lacks elements.
    """
    missing = [r for r in range(saved_ranks) if not _file(path, r).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: it was written by {saved_ranks} ranks, and {_file(path, missing[0]).relative_to(path)} is missing"
            + (f" (as are {len(missing) - 1} more)" if missing[1:] else "")
            + "; copy the whole folder, or resume from an older checkpoint"
        )
    wanted = {part.name: part for part in master_slices(engine, lm)}
    left = {name: part.numel for name, part in wanted.items()}
    order = sorted(range(saved_ranks), key=lambda r: r != rank)  # with the same cut, ours is enough
    for r in order:
        if any(left.values()):
            shard = _read(_file(path, r))
            for name, part in wanted.items():
                left[name] -= _take(shard, part, _adam(engine))
    if any(left.values()):
        name = next(n for n, k in left.items() if k)
        raise CheckpointError(
            f"{path}: {left[name]} of {wanted[name].numel} elements of {name} are in none of the {saved_ranks} shards"
        )
    _masters_to_model(engine)
    _restore_random_states(path, rank, saved_ranks)


def _take(shard: dict[str, Any], part: MasterSlice, state: Any) -> int:
    """Copy what `shard` has of `part`; returns the number of elements."""
    start, numel = shard["places"].get(part.name, (0, 0))
    low, high = max(start, part.start), min(start + numel, part.start + part.numel)
    if low >= high:
        return 0
    here, there = slice(low - part.start, high - part.start), slice(low - start, high - start)
    part.view(part.flat)[here].copy_(shard["master"][part.name][there])
    if not shard["step"]:
        state.pop(part.flat, None)  # saved before the first step: Adam had not begun
        return high - low
    moments = state[part.flat]
    moments["step"] = torch.tensor(float(shard["step"]), device=part.flat.device)  # for fused AdamW
    for kind in MOMENTS:
        if kind not in moments:
            moments[kind] = torch.zeros_like(part.flat, requires_grad=False)
        part.view(moments[kind])[here].copy_(shard[kind][part.name][there])
    return high - low


def _masters_to_model(engine: Any) -> None:
    """The model's weights are the masters, rounded: what DeepSpeed does at the end of a step.

    Collective.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # gathers the parameters that stay whole
    elif stage:
        zero.update_lp_params()


def _adam(engine: Any) -> Any:
    """The state of torch's AdamW under DeepSpeed's optimiser.

    Flat tensor → {"step", "exp_avg", "exp_avg_sq"}.
    """
    optimizer = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer).state


def _file(path: Path, rank: int) -> Path:
    return path / FOLDER / f"rank_{rank}.pt"


def _read(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged zip raises half a dozen kinds
        raise CheckpointError(f"{file} cannot be read: {error}") from error


# -- random states


def _random_states() -> dict[str, Any]:
    """States of torch's, numpy's and Python's generators in types that `weights_only` reads."""
    state: Any = np.random.get_state()  # a tuple whose second entry is the array
    name, keys, *rest = state
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(path: Path, rank: int, saved_ranks: int) -> None:
    states = _read(_file(path, rank if rank < saved_ranks else 0))["rng"]
    if rank >= saved_ranks:
        seed = zlib.crc32(states["torch"].numpy().tobytes() + f"rank {rank}".encode())
        torch.manual_seed(seed)  # on every device
        np.random.seed(seed)
        random.seed(seed)
        return
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
