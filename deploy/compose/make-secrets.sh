#!/usr/bin/env bash
# Makes the secrets of deploy/compose, each in a file of secrets/; what is there already stays as it is.
#
# Containers read them as users of their own, so the files are readable and the directory is its owner's only.
set -euo pipefail
cd "$(dirname "$0")"
umask 077
mkdir -p secrets

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

# write NAME TEXT
write() {
    if [[ ! -e "secrets/$1" ]]; then
        printf '%s' "$2" >"secrets/$1.new"
        chmod 0444 "secrets/$1.new"
        mv "secrets/$1.new" "secrets/$1"
        echo "made secrets/$1"
    fi
}

write postgres-password "$(random)"
password="$(<secrets/postgres-password)"
write ledger-url "postgresql://lora_sweeps:$password@postgres:5432/lora_sweeps"
write mlflow-url "postgresql://lora_sweeps:$password@postgres:5432/mlflow"
write s3-access-key "$(random)"
write s3-secret-key "$(random)"
write ray-token "$(random)"
