"""What the model reads first: the python tool to the byte, and tools in their own words."""

import pytest

from appo.config import ToolsConfig
from appo.data.prompts import PromptBuilder
from appo.models.resolve import TINY, load_tokenizer
from appo.tools.base import ToolSpec
from appo.tools.table import tool_specs
from appo.types import Task

TASK = Task("t", [{"role": "user", "content": "What is 6*7?"}], "42", tools=("python",))
# As it was before tools brought their own words (9f05734): trained trees depend on every byte.
PYTHON = (
    "<|im_start|>system\n"
    "You answer questions. You may run Python code: write it between <python> and </python>, and what it prints comes "
    "back between <result> and </result>. Write the final answer between <answer> and </answer>.<|im_end|>\n"
    "<|im_start|>user\nWhat is 17*24-9?<|im_end|>\n"
    "<|im_start|>assistant\nLet me compute that.\n<python>print(17*24-9)</python>\n<result>399</result>\n"
    "<answer>399</answer><|im_end|>\n"
    "<|im_start|>user\nWhat is 6*7?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def render(tokenizer, builder, task):
    return tokenizer.apply_chat_template(
        builder.messages(task), tokenize=False, add_generation_prompt=True
    )


def test_the_prompt_of_the_python_tool_to_the_byte(tokenizer):
    builder = PromptBuilder(tokenizer, tools=tool_specs(ToolsConfig()))
    assert render(tokenizer, builder, TASK) == PYTHON
    assert builder.ids(TASK) == tokenizer(PYTHON, add_special_tokens=False)["input_ids"]


def test_without_tools_and_with_a_system_prompt(tokenizer):
    builder = PromptBuilder(tokenizer, tools=tool_specs(ToolsConfig()))
    bare = Task("t", TASK.messages, "42")
    assert builder.messages(bare)[0]["content"] == (
        "You answer questions. Write the final answer between <answer> and </answer>."
    )
    own = Task("t", [{"role": "system", "content": "S"}, *TASK.messages], "42", tools=("python",))
    assert builder.messages(own) == own.messages
    quiet = PromptBuilder(tokenizer, system="", example=False, tools=builder.tools)
    assert quiet.messages(TASK) == TASK.messages


def test_every_tool_of_the_task_is_described(tokenizer):
    shot = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "<look>q</look>"})
    look = ToolSpec("look", "Look {things} up.", 99, lambda: None, shot)
    builder = PromptBuilder(tokenizer, tools=tool_specs(ToolsConfig()) | {"look": look})
    both = Task("t", TASK.messages, "42", tools=("look", "python"))
    system, *rest = builder.messages(both)
    assert system["content"].startswith("You answer questions. Look {things} up. You may run")
    assert rest[:2] == list(shot) and len(rest) == 5
    assert len(builder.messages(TASK)) == 4  # and no other
