"""Creates the bucket BUCKET, unless it exists, in the S3 store of the environment, and waits up to WAIT_S seconds for the store."""

import os
import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

bucket = os.environ["BUCKET"]
deadline = time.monotonic() + float(os.environ.get("WAIT_S", "300"))
s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=20))
while True:
    try:
        if bucket not in {existing["Name"] for existing in s3.list_buckets()["Buckets"]}:
            s3.create_bucket(Bucket=bucket)
        s3.put_object(Bucket=bucket, Key=".ready", Body=b"")  # the store responds before it accepts objects
        break
    except (BotoCoreError, ClientError) as error:
        if time.monotonic() > deadline:
            sys.exit(f"bucket {bucket} could not be created in time; last error: {error}")
        time.sleep(3)
print(f"bucket {bucket} exists and accepts objects")
