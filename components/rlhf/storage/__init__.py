"""Files that are not KFP artifacts: a storage protocol for folders and S3 buckets, transfers, and packages from PyPI.

Imports: artifacts, config, text.
Packages: boto3, botocore.

It is independent of tensors.
"""
