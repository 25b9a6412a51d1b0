"""The types of the artifacts that stages exchange, so that KFP refuses an SFT model where a policy belongs, and its UI names both.

KFP accepts only schema titles of the namespaces system and google (kfp.dsl.types.type_utils.validate_schema_title of kfp 2.17). A
parameter of type kfp.dsl.Artifact accepts every type.
"""

from kfp.dsl import Artifact


class BaseModel(Artifact):
    schema_title = "system.RlhfBaseModel"
    schema_version = "0.0.1"


class SftModel(Artifact):
    schema_title = "system.RlhfSftModel"
    schema_version = "0.0.1"


class RewardModel(Artifact):
    schema_title = "system.RlhfRewardModel"
    schema_version = "0.0.1"


class Policy(Artifact):
    schema_title = "system.RlhfPolicy"
    schema_version = "0.0.1"


class PolicyManifest(Artifact):
    """The manifest of a policy without its weights."""

    schema_title = "system.RlhfPolicyManifest"
    schema_version = "0.0.1"


class Tokenizer(Artifact):
    """The files of a model without its weights."""

    schema_title = "system.RlhfTokenizer"
    schema_version = "0.0.1"


class Demonstrations(Artifact):
    schema_title = "system.RlhfDemonstrations"
    schema_version = "0.0.1"


class Preferences(Artifact):
    schema_title = "system.RlhfPreferences"
    schema_version = "0.0.1"


class Prompts(Artifact):
    schema_title = "system.RlhfPrompts"
    schema_version = "0.0.1"


class Code(Artifact):
    """A folder of the user's Python functions."""

    schema_title = "system.RlhfCode"
    schema_version = "0.0.1"


class Judge(Artifact):
    schema_title = "system.RlhfJudge"
    schema_version = "0.0.1"


class Checks(Artifact):
    schema_title = "system.RlhfChecks"
    schema_version = "0.0.1"


class Evaluation(Artifact):
    schema_title = "system.RlhfEvaluation"
    schema_version = "0.0.1"
