"""Secrets that no text holds by chance, in every variable that libraries read them from, and where they turn up."""

from pathlib import Path

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDhubPLANTEDhubPLANTEDhubPLANT",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/aws+secret/PLANTED+aws/secret0123",
    "AWS_SESSION_TOKEN": "PLANTEDsessionPLANTEDsession==",
    "MLFLOW_TRACKING_PASSWORD": 'PLANTED "mlflow" pass&word',
    "MLFLOW_TRACKING_TOKEN": "PLANTED.mlflow.token",
    "RLHF_WEBHOOK_URL": "http://127.0.0.1:9/services/T0PLANTED/B0PLANTEDhook",
    "KFP_TOKEN": "PLANTED-kfp-token",
    "WANDB_API_KEY": "PLANTEDwandbPLANTEDwandb",
    "HTTPS_PROXY": "http://proxyuser:PLANTEDproxy@127.0.0.1:9",
    "NO_PROXY": "*",  # nothing here goes through it
}
MARKS = (b"PLANTED", b"UExBTlRFR")  # the second is the beginning of the first in base64


def files_with_secrets(folder: Path) -> list[str]:
    """Files under a folder that hold a planted secret, or a part of one, in their name or in any byte."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if any(mark in content or mark in str(path).encode() for mark in MARKS):
            found.append(str(path))
    return found
