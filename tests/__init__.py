"""The surroundings of every test, set before any library reads them."""

import os

# No test may reach a hub, nor a server or an account that the surroundings happen to name.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(name, None)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# Ray Train collects reports this often; steps of tiny models should not wait for it.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
# Tiny models gain nothing from threads, and threads that wait for each other starve a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
