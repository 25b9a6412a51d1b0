"""Patterns of credentials. Settings that contain one are rejected, because they are copied into pipelines, reports and MLflow;
text that is written out is redacted (redaction.py)."""

import re

# User information before the host of a URL: https://USER:PASSWORD@HOST, https://TOKEN@HOST.
USERINFO = re.compile(r"(?<=://)[^\s/?#'\"<>]+(?=@)")
# Signature of a presigned URL (S3, GCS, Azure), or a key in a URL's query.
QUERY_SECRET = re.compile(
    r"(?i)(?<=[?&;])((?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid|access_token|token"
    r"|api_?key|key|secret|password)=)[^&\s#'\"<>]+"
)
# Environment variables such as HF_TOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD and RLHF_WEBHOOK_URL. Not HF_TOKEN_PATH, which
# names a file, nor AWS_ACCESS_KEY_ID or MLFLOW_TRACKING_USERNAME: a user name is not a secret, and often a common word.
SECRET_NAME = re.compile(
    r"(?i).*(?:token|secret|password|passwd|passphrase|apikey|secret.*key|connection_string)"
    r"|(?:.*_)?(?:pat|key|cookies?|webhook|webhook_url)"
)


def contains_credentials(text: str) -> bool:
    """Whether a text contains a URL with a user, a password or a signature."""
    return "://" in text and bool(USERINFO.search(text) or QUERY_SECRET.search(text))


def is_secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return SECRET_NAME.fullmatch(variable) is not None
