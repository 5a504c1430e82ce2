"""What training took: from a run as MLflow records it, and from servers that do not tell."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster import runtime
from cluster.nodes import Node
from cluster.tracking import Tracker
from tests.servers import free_port
from trainers.fidelity.cost import cost_of_run
from trainers.fidelity.evaluation import TrainingCost
from trainers.launch import _device

PARAMS = {
    "vae": {"training": {"global_batch_size": 8}},
    "denoiser": {"training": {"global_batch_size": 16}},
    "cluster": {"num_workers": 4, "use_gpu": True},
}


def trained(tags: dict[str, str]) -> Tracker:
    """A run of 100 + 300 seconds on four GPUs, two of which told their power."""
    tracker = Tracker.start(experiment="training", run_name="t", tags=tags)
    tracker.log_params(PARAMS)
    tracker.log_metrics({"vae/images_per_second": 8.0, "system/a/gpu_0_power_usage_watts": 300.0}, 100)
    tracker.log_metrics({"denoiser/images_per_second": 8.0, "system/b/gpu_1_power_usage_watts": 500.0}, 50)
    tracker.log_metrics({"denoiser/images_per_second": 4.0}, 100)
    tracker.log_metrics({"system/a/gpu_0_power_usage_watts": 100.0}, 101)
    return tracker


def test_the_cost_of_a_run_names_its_device(tracking_uri: str) -> None:
    cost = cost_of_run(trained({"device": "H100"}).run_id)
    seconds = 100 + 100 + 200
    assert cost.device == "H100"
    assert cost.gpu_hours == pytest.approx(4 * seconds / 3600)
    assert cost.energy_kwh == pytest.approx((200 + 500) * seconds / 3.6e6)  # the mean of each GPU, summed


def test_a_run_without_the_tag_says_what_its_recipe_says(tracking_uri: str) -> None:
    assert cost_of_run(trained({}).run_id).device == "GPU"


def test_the_device_is_what_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(kind: str | None, num_gpus: int) -> Node:
        return Node(num_gpus=num_gpus, accelerator_type=kind, memory_bytes=None, is_here=False)

    for nodes, expected in (
        ((node(None, 0), node("H100", 8), node("H100", 8)), "H100"),
        ((node("H100", 8), node("A100-80G", 4)), "A100-80G or H100"),
        ((node(None, 1),), "GPU"),
    ):
        monkeypatch.setattr(runtime, "nodes", lambda nodes=nodes: nodes)
        assert _device(use_gpu=True) == expected
        assert _device(use_gpu=False) == "CPU process"


def test_no_run_or_an_unknown_one_costs_nothing_known(tracking_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    assert cost_of_run(None) == TrainingCost()
    assert cost_of_run("0" * 32) == TrainingCost()
    assert not caplog.records


def test_a_server_that_is_down_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    with caplog.at_level(logging.WARNING):
        assert cost_of_run("0" * 32) == TrainingCost()
    assert "the cost of training is left out: no MLflow server answers" in caplog.text
    assert "secret" not in caplog.text


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_refuses_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    try:
        assert cost_of_run("0" * 32) == TrainingCost()
    finally:
        server.shutdown()
        server.server_close()
    assert "the cost of training is left out: MLflow, http://127.0.0.1" in caplog.text
    assert "access refused" in caplog.text
