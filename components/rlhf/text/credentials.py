"""What in a text gives access to something. Settings refuse it, because they travel into pipelines, reports and MLflow;
whatever writes text hides it (edges/secrets.py)."""

import re

# What stands before the host: https://USER:PASSWORD@HOST, https://TOKEN@HOST.
ADDRESS = re.compile(r"(?<=://)[^\s/?#'\"<>]+(?=@)")
# A signed address (S3, GCS, Azure), or a key in its query.
SIGNED = re.compile(
    r"(?i)(?<=[?&;])((?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid|access_token|token"
    r"|api_?key|key|secret|password)=)[^&\s#'\"<>]+"
)
# Environment variables: HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, RLHF_WEBHOOK_URL; no HF_TOKEN_PATH, which names a
# file, and no AWS_ACCESS_KEY_ID or MLFLOW_TRACKING_USERNAME: a name is no secret, and often a common word.
NAME = re.compile(
    r"(?i)(?:.*_)?(?:token|secret|password|passwd|passphrase|pat|key|cookies?|webhook|webhook_url)|.*secret.*key|.*connection_string"
)


def contains_credentials(text: str) -> bool:
    """Whether a text holds an address with a user, a password or a signature in it."""
    return "://" in text and bool(ADDRESS.search(text) or SIGNED.search(text))


def is_secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return NAME.fullmatch(variable) is not None
