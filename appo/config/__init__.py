"""Configuration: dataclasses ← recipe (YAML) ← dotted overrides, checked before anything is loaded.

One mechanism. Every key is a field of a dataclass here, with its default, its meaning as a comment,
and a mark where a resumed run may change it (`marks`). A recipe is a YAML file with any subset of
the keys; `key.sub=value` on the command line wins. An unknown key or a wrong type is a
`ConfigError` that says where it stands (file:line), the nearest spelling and what is allowed. The
resolved configuration is written to the run folder, so a run can be read without the code that
started it.

    sections, learner   the dataclasses, each with its check beside it
    schema              `Config`, and what must hold between sections
    load                recipe + overrides → `Config`, and back to YAML
    convert             nested values → dataclasses, by type
    meanings            what each key means, for docs/configuration.md
"""

from appo.config.learner import LearnerConfig as LearnerConfig
from appo.config.learner import LoraConfig as LoraConfig
from appo.config.learner import RunContext as RunContext
from appo.config.learner import check_learner as check_learner
from appo.config.load import RECIPES as RECIPES
from appo.config.load import dump as dump
from appo.config.load import load_config as load_config
from appo.config.load import recipe_names as recipe_names
from appo.config.schema import Config as Config
from appo.config.schema import run_context as run_context
from appo.config.schema import validate as validate
from appo.config.sections import AlgoConfig as AlgoConfig
from appo.config.sections import DataConfig as DataConfig
from appo.config.sections import EvalConfig as EvalConfig
from appo.config.sections import ModelConfig as ModelConfig
from appo.config.sections import PythonToolConfig as PythonToolConfig
from appo.config.sections import RewardSettings as RewardSettings
from appo.config.sections import RolloutConfig as RolloutConfig
from appo.config.sections import ToolsConfig as ToolsConfig
