"""One tree as text.

The question, each root with its calls and results, and under it what every branch did instead.

What a branch inherited is not shown again; `branch at token t` says where it left its root.
Everything a model or a tool wrote is escaped and elided, so a tree of any length stays readable and
harmless in a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from appo.observability.card import elide, escape, wrap
from appo.types import Leaf, RolloutTree, ToolCall

Text = Callable[[Sequence[int]], str]

MAX_LINES = 6  # of one piece of text, before its middle is left out


def render_tree(tree: RolloutTree, text: Text, width: int = 100) -> str:
    """Lines of at most `width` columns (for text of single-width characters).

    text: token ids to text.
    """
    width = max(width, 40)
    lines = _header(tree, width)
    for i in tree.roots:
        lines += ["", *_leaf(tree, i, text, width, "")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def stored_text(data: dict[str, Any]) -> Text:
    """The `text` of a tree that was saved with it.

    Looks ids up in what trees.jsonl holds next to them.

    Ids that were saved without text become their count.
    """
    known: dict[tuple[int, ...], str] = {}
    for node in data["nodes"]:
        if "text" in node:
            known[tuple(node["token_ids"])] = node["text"]
    for leaf in data["leaves"]:
        if "token" in leaf:
            known[tuple(leaf["token_id"])] = leaf["token"]

    def text(ids: Sequence[int]) -> str:
        return known.get(tuple(ids), f"({len(ids)} tokens)" if ids else "")

    return text


# -- parts ---------------------------------------------------------------------------------------


def _header(tree: RolloutTree, width: int) -> list[str]:
    rewards = [leaf.reward for leaf in tree.leaves if leaf.reward is not None]
    unique, total = tree.unique_tokens(), tree.total_tokens()
    facts = [
        f"step {tree.step}",
        escape(tree.task.task_id),
        f"{_plural(len(tree.roots), 'root', 's')} + {_plural(len(tree.branches), 'branch', 'es')}",
        f"mean reward {sum(rewards) / len(rewards):.2f}" if rewards else "not graded",
        f"{unique:,} tokens for {total:,}" + (f" ({total / unique:.1f}x)" if unique else ""),
    ]
    question = next(
        (m["content"] for m in reversed(tree.task.messages) if m.get("role") == "user"), ""
    )
    return [
        *wrap(" · ".join(facts), width),
        "",
        *_labelled("question", str(question), width, ""),
        *_labelled("answer", str(tree.task.answer), width, ""),
    ]


def _plural(n: int, noun: str, ending: str) -> str:
    return f"{n} {noun}{ending if n != 1 else ''}"


def _leaf(tree: RolloutTree, index: int, text: Text, width: int, margin: str) -> Iterator[str]:
    """A leaf: its headline, the nodes it added, and the leaves that branched off it."""
    leaf = tree.leaves[index]
    yield from _hang(_headline(tree, leaf, text), margin, width)
    children = sorted(
        (i for i, x in enumerate(tree.leaves) if x.parent_leaf == index),
        key=lambda i: (tree.leaves[i].split, tree.leaves[i].branch),
    )
    inner = margin + ("│   " if children else "    ")
    calls = _calls(tree, leaf)
    for number in own_nodes(tree, index):
        node = tree.nodes[number]
        words = text(node.token_ids)
        if node.role == "tool":
            yield from _labelled(_call_label(calls.get(number)), words, width, inner)
        else:
            yield from _text(words, width, inner)
    if leaf.grade_error:
        yield from _labelled("grader", leaf.grade_error, width, inner)
    for i in children:
        last = i == children[-1]
        sub = list(_leaf(tree, i, text, width - 4, ""))
        yield margin + ("└── " if last else "├── ") + sub[0]
        yield from (margin + ("    " if last else "│   ") + line for line in sub[1:])


def own_nodes(tree: RolloutTree, leaf: int) -> list[int]:
    """Nodes on the way to a leaf that its parent leaf does not share, in order.

    Without the prompt.
    """
    inherited: set[int] = set()
    parent = tree.leaves[leaf].parent_leaf
    if parent is not None:
        inherited = set(_chain(tree, tree.leaves[parent].node))
    chain = _chain(tree, tree.leaves[leaf].node)
    return [n for n in chain if n not in inherited and tree.nodes[n].role != "prompt"]


def _chain(tree: RolloutTree, node: int) -> list[int]:
    chain = [node]
    while (parent := tree.nodes[chain[-1]].parent) is not None:
        chain.append(parent)
    return chain[::-1]


def _calls(tree: RolloutTree, leaf: Leaf) -> dict[int, ToolCall]:
    """Tool node → its call.

    Results come in the order of the calls; one over the budget has no call behind it.
    """
    chain = _chain(tree, leaf.node)
    # A fork at the very start of a tool node would inherit nothing of it.
    used = [a for a, b in pairwise(chain) if tree.nodes[b].fork_at > 0] + [leaf.node]
    tools = [n for n in used if tree.nodes[n].role == "tool"]
    return dict(zip(tools, leaf.tool_calls, strict=False))


def _headline(tree: RolloutTree, leaf: Leaf, text: Text) -> str:
    sampled = sum(k for n, k in tree.walk(leaf.node) if n.sampled)
    facts = [
        f"reward {leaf.reward:.2f}" if leaf.reward is not None else "not graded",
        leaf.finish.value if leaf.finish else "unfinished",
        f"{sampled:,} sampled",
    ]
    tail = "  " + " · ".join(facts)
    if leaf.parent_leaf is None or leaf.split is None:
        return f"root {leaf.root}{tail}"
    ids = tree.trajectory(leaf.parent_leaf).response_ids[leaf.split : leaf.split + 1]
    token = elide(escape(text([int(t) for t in ids])), 24)
    why = leaf.branch_rule or "?"
    if leaf.branch_score is not None:
        why += f", {leaf.branch_score:.2f}"
    return f'↳ branch at token {leaf.split} "{token}" ({why}){tail}'


def _call_label(call: ToolCall | None) -> str:
    if call is None:
        return "no call"
    return escape(call.tool) if call.ok else f"{escape(call.tool)} ({call.error_kind or 'failed'})"


def _labelled(label: str, words: str, width: int, margin: str) -> Iterator[str]:
    """`label  text`, continued under the text."""
    head = f"{label}  "
    for i, line in enumerate(_text(words, width - len(head), "")):
        yield f"{margin}{head if i == 0 else ' ' * len(head)}{line}"


def _text(words: str, width: int, margin: str) -> Iterator[str]:
    room = max(width - len(margin), 16)
    for line in wrap(elide(escape(words.strip("\n")), MAX_LINES * room), room):
        yield margin + line


def _hang(line: str, margin: str, width: int) -> Iterator[str]:
    first, *rest = wrap(line, width - len(margin))
    yield margin + first
    yield from (f"{margin}    {more}" for more in rest)


def rank_for_display(tree: RolloutTree) -> tuple[bool, bool, int]:
    """Sort key of how much a tree shows.

    It shows most if its leaves were rewarded differently, called tools, and it has branches.
    """
    rewards = {leaf.reward for leaf in tree.leaves}
    return len(rewards) > 1, any(leaf.tool_calls for leaf in tree.leaves), len(tree.branches)
