"""Messages to the webhook of the user, such as an incoming webhook of Slack, Teams or Mattermost."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from components.rlhf.text.redaction import redact

URL_VARIABLE = "RLHF_WEBHOOK_URL"
ATTEMPTS, TIMEOUT_SECONDS = 3, 10.0


def as_plain_text(text: str) -> str:
    """Text without what Slack and Mattermost take for a mention or a link, such as <!channel>, which would call everybody."""
    return re.sub(r"<(?=[!@#a-z])", "< ", text)


def post_message(url: str, message: Mapping[str, str]) -> str:
    """POST a JSON object; return why it was not delivered, or "". The URL is a secret and is in no text."""
    if not url.startswith(("https://", "http://")):
        return "RLHF_WEBHOOK_URL is not an http(s) URL; correct WEBHOOK_URL in the Secret"
    data, problem = redact(json.dumps(message)).encode(), ""
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return ""
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            problem = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
            time.sleep(attempt)
    return f"the message could not be posted to the webhook ({problem})"
