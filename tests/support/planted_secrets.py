"""Recognizable secrets in every variable that libraries read them from, and a search for them in files."""

from pathlib import Path

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDhubPLANTEDhubPLANTEDhubPLANT",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/aws+secret/PLANTED+aws/secret0123",
    "AWS_SESSION_TOKEN": "PLANTEDsessionPLANTEDsession==",
    "MLFLOW_TRACKING_PASSWORD": 'PLANTED "mlflow" pass&word',
    "MLFLOW_TRACKING_TOKEN": "PLANTED.mlflow.token",
    "RLHF_WEBHOOK_URL": "http://127.0.0.1:9/services/T0PLANTED/B0PLANTEDhook",
    "KFP_TOKEN": "PLANTED-kfp-token",
    "PGPASSWORD": "PLANTED-postgres",
    "SOMEAPIKEY": "PLANTED-api-key",
    "WANDB_API_KEY": "PLANTEDwandbPLANTEDwandb",
    "HTTPS_PROXY": "http://proxyuser:PLANTEDproxy@127.0.0.1:9",
    "NO_PROXY": "*",  # tests use no proxy
}
MARKS = (b"PLANTED", b"UExBTlRFR")  # the second is the first in base64


def files_with_secrets(folder: Path) -> list[str]:
    """Files under a folder with a planted secret, or a part of one, in their path or content."""
    files = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if any(mark in content or mark in str(path).encode() for mark in MARKS):
            files.append(str(path))
    return files
