"""Settings of what scores responses, shared by the rewards of PPO (rewards.py) and the judges (judge.py)."""

import json
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from components.rlhf.config.base import BaseConfig, Count, NonNegative, Positive, PositiveInt

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Column = Annotated[str, Field(min_length=1, max_length=200)]
Retries = Annotated[Count, Field(le=20)]
Concurrency = Annotated[PositiveInt, Field(le=256)]


class Function(BaseConfig):
    """A Python function score(prompts, responses) or score(prompts, responses, columns): one number for each response, higher is better."""

    TEXTS = frozenset({"source"})

    kind: Literal["function"]
    """function: a Python function."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    """MODULE:FUNCTION, such as mine:score: of mine.py next to the params file, else of an installed package."""
    source: str = ""
    """Source of the module; empty is the file next to the params file, which submitting copies here, or an installed package."""
    timeout_seconds: Positive = 600.0
    """Seconds that one call, with all responses, may take."""
    memory_gib: Positive | None = None
    """Memory of its process and those it starts, in GiB, above which they are ended and started anew; null is half of the pod's."""


class ExactMatch(BaseConfig):
    """1 if the response is the text of a column of the data, else 0; white space around both does not count."""

    kind: Literal["exact_match"]
    """exact_match: the response equals the text of a column."""
    column: Column = "answer"
    """Column of the data with the right answer."""
    after: str = ""
    """Compare what follows the last occurrence of this text, such as ####; empty compares the whole response."""
    ignore_case: bool = False
    """Compare without regard to upper and lower case."""


class Regex(BaseConfig):
    """1 if a regular expression is found in the response or, with a column, if what it extracts is the text of that column, else 0."""

    kind: Literal["regex"]
    """regex: a regular expression is found in the response, or extracts the text of a column."""
    pattern: Annotated[str, Field(min_length=1)]
    """Regular expression of Python's re, searched for anywhere; (?s) lets . match line breaks, (?i) ignores case."""
    column: Column | None = None
    """Column with the right answer: the last match, of which the first group if there is one, must equal it; null needs a match only."""

    @field_validator("pattern")
    @classmethod
    def _require_regular_expression(cls, pattern: str) -> str:
        return require_regular_expression(pattern)


class Numeric(BaseConfig):
    """1 if the last number or formula of the response has the value of a column, by the library math-verify, else 0."""

    kind: Literal["numeric"]
    """numeric: the number or LaTeX formula at the end of the response has the value of a column."""
    column: Column = "answer"
    """Column of the data with the right answer, a number or a LaTeX formula."""


class JsonSchema(BaseConfig):
    """1 if the response is JSON that satisfies a JSON schema, else 0; it may stand in a fenced code block."""

    TEXTS = frozenset({"schema_text"})

    kind: Literal["json_schema"]
    """json_schema: the response is JSON that satisfies a schema."""
    schema_file: str | None = None
    """File with the schema, relative to the params file. Submitting replaces it by schema_text."""
    schema_text: str = ""
    """The schema itself, as JSON text or as a section."""
    column: Column | None = None
    """Column of the data with the schema of each prompt, as JSON text."""

    @field_validator("schema_text", mode="before")
    @classmethod
    def _write_section_as_text(cls, schema: Any) -> Any:
        return json.dumps(schema, ensure_ascii=False) if isinstance(schema, dict) else schema

    @field_validator("schema_text")
    @classmethod
    def _require_schema(cls, text: str) -> str:
        if text and (problem := schema_problem(text)):
            raise ValueError(f"it is no JSON schema ({problem}); correct it")
        return text

    @model_validator(mode="after")
    def _require_one_source(self) -> "JsonSchema":
        if sum((bool(self.schema_file), bool(self.schema_text), bool(self.column))) != 1:
            raise ValueError("set one of schema_file, schema_text and column")
        return self


class Command(BaseConfig):
    """A command of the user for each response, which it reads from standard input; the exit code or a printed number is the score."""

    kind: Literal["command"]
    """command: a command of your own, such as a sandbox that runs the response."""
    command: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, max_length=100)]
    """The program and its arguments, such as [python, check.py]; it runs without a shell."""
    score: Literal["exit_code", "printed"] = "exit_code"
    """exit_code: 1 if the command exits with 0, else 0; printed: the number in the last line that it prints."""
    timeout_seconds: Positive = 10.0
    """Seconds that the command may take for one response, after which it is ended and the score is 0."""
    max_concurrency: Concurrency = 2
    """Maximum number of commands at a time, in each process of the stage."""


class Endpoint(BaseConfig):
    """A language model behind an OpenAI-compatible API."""

    TEXTS = frozenset({"rubric", "extra_body"})

    kind: Literal["endpoint"]
    """endpoint: a language model behind an OpenAI-compatible API."""
    url: str
    """Base URL of the API: https://api.openai.com/v1, http://vllm.models:8000/v1."""
    model: Annotated[str, Field(pattern=r"^\w")]
    """Name of the model."""
    rubric_file: str | None = None
    """Text file that says what makes a response better; relative to the params file. Submitting replaces it by rubric."""
    rubric: str = ""
    """The rubric itself; empty is a general one (components/rlhf/rewards)."""
    api_key_variable: Variable | None = "OPENAI_API_KEY"
    """Environment variable with the API key, on a cluster a key of the Secret cluster.secrets.judge; null is none, the default for http://."""
    max_tokens: PositiveInt = 512
    """Maximum length of an answer in tokens, reasoning included."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request: {reasoning_effort: low}, vLLM's {structured_outputs: {choice: [A, B]}}; null removes one."""
    max_concurrency: Concurrency = 8
    """Maximum number of requests at a time, in each process of the stage."""
    requests_per_minute: PositiveInt | None = None
    """Rate limit of each process of the stage; null is none. A server that answers 429 is obeyed in any case."""
    timeout_seconds: Positive = 120.0
    """Seconds after which a request without an answer has failed."""
    max_retries: Retries = 6
    """Number of retries of a failed request, with waits that double from 1 second to 60."""
    input_price: NonNegative = 0.0
    """Price of a million input tokens, for the metric cost."""
    output_price: NonNegative = 0.0
    """Price of a million output tokens, in the same currency."""

    @model_validator(mode="before")
    @classmethod
    def _send_no_key_by_default_to_plain_http(cls, content: Any) -> Any:
        if isinstance(content, dict) and str(content.get("url", "")).startswith("http://"):
            return {"api_key_variable": None} | content
        return content

    @field_validator("url")
    @classmethod
    def _require_http(cls, url: str) -> str:
        return http_url(url, example="https://HOST/v1").removesuffix("/chat/completions")

    @field_validator("extra_body")
    @classmethod
    def _reject_own_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        for key in ("model", "messages", "stream", "n"):
            if key in body:
                raise ValueError(f"{key} is set for each request; remove it")
        return body

    @model_validator(mode="after")
    def _require_one_rubric(self) -> "Endpoint":
        if self.rubric and self.rubric_file:
            raise ValueError("rubric and rubric_file are both set; remove one of them")
        return self


def key_variable(section: Any) -> str | None:
    """The environment variable with the key of a server that a reward or judge asks; None if it needs none."""
    variable: str | None = getattr(section, "api_key_variable", None) or getattr(section, "token_variable", None)
    return variable


VERIFIABLE = (ExactMatch, Regex, Numeric, JsonSchema, Command)
RUNS_USER_CODE = (Function, Command)


def column_of(section: Any) -> str | None:
    """The column of the data that a reward or judge reads; None if it names none."""
    column: str | None = getattr(section, "column", None)
    return column


def require_regular_expression(pattern: str) -> str:
    """The pattern. Raises ValueError if it is no regular expression of Python's re."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error}); correct it") from None
    return pattern


def http_url(url: str, *, example: str) -> str:
    """The URL without slashes at its end. Raises ValueError unless it is a plain http or https URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"write it as {example}")
    return url.rstrip("/")


def schema_problem(text: str) -> str:
    """Why a text is no JSON schema, as part of a sentence; empty if it is one. References to other documents are not followed."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    from components.rlhf.text.strict_json import NotJsonError, parse_json

    try:
        schema = parse_json(text)
        if not isinstance(schema, dict | bool):
            return "it is neither an object nor true or false"
        validator_for(schema).check_schema(schema)
    except NotJsonError as error:
        return str(error)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"[:300]
    except RecursionError:
        return "it is nested too deeply"
    return ""
