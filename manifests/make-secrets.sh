#!/usr/bin/env bash
# Writes overlays/OVERLAY/secrets/* from the committed *.example files, with new random passwords. Never overwrites a file, because a
# running server keeps the password that it started with. Usage: manifests/make-secrets.sh OVERLAY
set -euo pipefail
umask 077
here=$(cd "$(dirname "$0")" && pwd)
folder=$here/overlays/${1:-}/secrets
if [[ -z ${1:-} || ! -d $folder ]]; then
  echo "make-secrets.sh: expected the name of an overlay: $(ls "$here/overlays" | paste -sd ' ')" >&2
  exit 2
fi
for example in "$folder"/*.example; do
  if [[ -e ${example%.example} ]]; then
    echo "make-secrets.sh: ${example%.example} exists; delete it, and the volumes of its servers, to create new passwords" >&2
    exit 1
  fi
done
s3_secret_key=$(openssl rand -hex 24)
postgres_password=$(openssl rand -hex 24)
for example in "$folder"/*.example; do
  sed -e "s/@S3_SECRET_KEY@/$s3_secret_key/g" -e "s/@POSTGRES_PASSWORD@/$postgres_password/g" "$example" >"${example%.example}"
done
grep -l CHANGE-ME $(ls -d "$folder"/*.env) | sed 's/^/replace every CHANGE-ME in /' || true
