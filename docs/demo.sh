#!/usr/bin/env bash
# The whole product in small, on real colonoscopy images: shards, training, registry, pictures. Run by `make demo`.
set -euo pipefail
: "${DEMO:=demo}" "${BIN:=.venv/bin}" "${PROMPT:=Generate an image with a large polyp.}"
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$PWD/$DEMO/mlflow.db}" HF_HUB_OFFLINE=1
mkdir -p "$DEMO"
SECONDS=0

"$BIN/medsynth" shards write tests/data/colonoscopy --format medvqa --samples-per-shard 100 --out "$DEMO/shards"
"$BIN/medsynth" shards inspect "$DEMO/shards"
"$BIN/medsynth" train recipes/msdm-demo.yaml --set "data.shards=$DEMO/shards" --set "cluster.storage=$DEMO/runs"
"$BIN/medsynth" generate --model models:/msdm-demo/latest --prompt "$PROMPT" \
    --guidance-scale 3.5 --num-images 8 --seed 0 --out "$DEMO/samples"

cat <<END

The demo took $((SECONDS / 60)) min $((SECONDS % 60)) s. Its figures stand in the table above.
  Eight pictures of "$PROMPT": $DEMO/samples
  How pictures became better in training:  $DEMO/runs/*/pictures
  Everything that was recorded:            $BIN/mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI
END
