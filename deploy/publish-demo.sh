#!/bin/sh
# From MovieLens to a release in $RANKTOWER_STORE, once: a store that has a current release is left as it is.
# Usage: publish-demo.sh FOLDER   (keeps log, run and bundle there)
set -eu
folder=$1

if ranktower releases list --store "$RANKTOWER_STORE" | grep -qw current; then
    echo "the store has a current release: nothing to do"
    exit 0
fi

ranktower data movielens --out "$folder/log"
ranktower train --log "$folder/log" --out "$folder/run"
ranktower export --run "$folder/run" --out "$folder/bundle"
ranktower publish --bundle "$folder/bundle" --items "$folder/log/items.parquet" --users "$folder/log" \
    --index flat --work "$folder/build" --cache "$folder/cache" --store "$RANKTOWER_STORE"
