"""The built-in algorithms, one file each: preset, advantage rule, loss options.

    flat/   independent rollouts of a prompt
    tree/   branches that fork from roots
    turn/   advantages of single turns

To add one, write its file and its line in `ALGORITHMS`. Sources: docs/algorithms.md; paper = arXiv
2606.12384.
"""

from appo.algo.algorithm import Algorithm
from appo.algo.presets.flat.grpo import GRPO
from appo.algo.presets.tree.appo import APPO

ALGORITHMS: dict[str, Algorithm] = {
    "appo": APPO,
    "grpo": GRPO,
}
