"""A reward of your own: a function (answer, gold, meta) -> 0 to 1. Here: near misses count.

    cd examples
    appo train tiny steps=1 prompts_per_step=4 eval.questions=16 reward.grader=own_reward:near

`answer` is the text between the answer tags, `gold` the task's answer, `meta` what else the task
says. It runs in a process of its own with a deadline; an exception is counted and never becomes a
reward of 0.
"""


def near(answer: str, gold: str, meta: dict | None) -> float:
    """1 for the right number, less the farther off it is, 0 for what is no number."""
    try:
        distance = abs(int(answer) - int(gold))
    except ValueError:
        return 0.0
    return 1.0 / (1.0 + distance)
