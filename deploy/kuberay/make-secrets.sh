#!/usr/bin/env bash
# Makes the secrets that the manifests name, at random, where they are missing: database, s3, redis. The secret of
# Ray's token is KubeRay's to make. Whatever else makes secrets (external-secrets, say) may make these in its place.
#
#   ./make-secrets.sh [NAMESPACE]
set -euo pipefail
namespace="${1:-lora-sweeps}"

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

# make NAME, with a file for each key in the directory $keys
make() {
    if kubectl --namespace "$namespace" get secret "$1" >/dev/null 2>&1; then
        echo "secret/$1 is there already"
    else
        kubectl --namespace "$namespace" create secret generic "$1" --from-file="$keys/$1"
    fi
}

# From files and not from words of a command line, which everybody on this machine could read.
umask 077
keys="$(mktemp -d)"
trap 'rm -rf "$keys"' EXIT
mkdir "$keys"/{database,s3,redis}

password="$(random)"
printf '%s' "$password" >"$keys/database/password"
printf 'postgresql://lora_sweeps:%s@postgres:5432/lora_sweeps' "$password" >"$keys/database/ledger-url"
printf 'postgresql://lora_sweeps:%s@postgres:5432/mlflow' "$password" >"$keys/database/mlflow-url"
random >"$keys/s3/access-key"
random >"$keys/s3/secret-key"
random >"$keys/redis/password"

make database
make s3
make redis
