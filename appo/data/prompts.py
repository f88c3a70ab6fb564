"""From a task to prompt token ids.

System prompt with the tool protocol, one worked example, the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appo.errors import ConfigError
from appo.tools.base import ToolSpec
from appo.types import Task

SYSTEM = "You answer questions.{tools} Write the final answer between <answer> and </answer>."


@dataclass(frozen=True)
class PromptBuilder:
    """Renders tasks with the model's chat template.

    system   None for the protocol's own text, "" for no system prompt at all
    example  show one worked call of each tool that has one
    tools    by name; what a task may call is described in its system prompt in the tool's own words
    """

    tokenizer: Any
    system: str | None = None
    example: bool = True
    max_prompt_tokens: int | None = None
    tools: Mapping[str, ToolSpec] = field(default_factory=dict)

    def messages(self, task: Task) -> list[dict[str, str]]:
        """The task's own messages behind the protocol's system prompt.

        A system prompt that the task brings takes its place.
        """
        if any(m["role"] == "system" for m in task.messages):
            return task.messages
        tools = [self.tools[name] for name in task.tools if name in self.tools]
        system = self.system
        if system is None:
            system = SYSTEM.format(tools="".join(f" {tool.description}" for tool in tools))
        shots = [dict(m) for tool in tools for m in tool.example] if self.example else []
        head = [{"role": "system", "content": system}] if system else []
        return [*head, *shots, *task.messages]

    def ids(self, task: Task) -> list[int]:
        """Prompt ids ending where the assistant's turn begins.

        Raises ConfigError when longer than allowed.
        """
        out = self.tokenizer.apply_chat_template(
            self.messages(task), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        ids = list(out)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise ConfigError(
                f"prompt of task {task.task_id!r} has {len(ids)} tokens, but only {self.max_prompt_tokens} fit in the "
                "model's context beside rollout.max_new_tokens; shorten the prompt, lower rollout.max_new_tokens or "
                "use a model with a longer context"
            )
        return ids


def result_text(output: str) -> str:
    """How a tool's (already escaped) output is written into the context.

    On a line of its own, as in the example.
    """
    return f"\n<result>{output.strip()}</result>\n"


def budget_text() -> str:
    """The result that a call past the budget gets, in the form of `result_text`."""
    return result_text("error: no tool calls left; answer now")


def encode_plain(tokenizer: Any, text: str) -> Sequence[int]:
    """Ids of text that is inserted mid-sequence: no BOS, no template."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
