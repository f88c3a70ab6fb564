"""A task of your own: a function that returns the tasks of a split: the largest of three numbers.

    cd examples
    appo train tiny steps=1 prompts_per_step=4 eval.questions=16 data.task=own_task:largest

`tools` are the names of the enabled tools, to be handed on to each task that may call them.
Parameters of your own come from data.params (data.params.count=64). The same arguments must give
the same tasks: a run that is resumed checks it.
"""

import random

from appo.types import Task


def largest(*, split: str, seed: int, tools: tuple[str, ...], count: int = 100) -> list[Task]:
    """`count` questions of a split, the same ones for the same arguments."""
    rng = random.Random(f"{seed} {split}")
    low = 0 if split == "train" else 50  # no question of one split stands in the other
    tasks = []
    for i in range(count):
        numbers = rng.sample(range(low, low + 50), 3)
        question = f"Which is the largest: {numbers[0]}, {numbers[1]} or {numbers[2]}?"
        messages = [{"role": "user", "content": question}]
        tasks.append(Task(f"{split}-{i}", messages, str(max(numbers)), tools, grader="exact"))
    return tasks
