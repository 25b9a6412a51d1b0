"""Files that are not KFP artifacts: one protocol over a folder and an S3 bucket, transfers, and packages from PyPI.

Rooms: artifacts, config, text.
Packages: boto3, botocore.

It knows nothing of tensors.
"""
