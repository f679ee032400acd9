"""Replicas of Ray Serve on this machine, one of which is killed; and Serve's config file."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import httpx2 as httpx
import pytest
import sqlalchemy as sa
import yaml
from conftest import SCRIPTS
from server_cases import until

from tdjax.errors import UsageError
from tdjax.server.tables import SERVERS, Database

pytest.importorskip("ray")
import ray_app  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from tdjax.server import ray  # noqa: E402

ARGS = {"store": "sqlite:////srv/jobs.sqlite3", "videos": "/srv/videos", "api_keys": "none"}
FILE = Path(__file__).parents[3] / "docs/deploy/serve.yaml"


@contextlib.contextmanager
def replicas(folder, **args):
    """Two replicas, and a client of theirs that asks until it has an answer: (ask, their processes
    so far)."""
    (folder / "videos").mkdir()
    args |= {"store": f"sqlite:///{folder}/jobs.sqlite3", "videos": str(folder / "videos")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | SCRIPTS | {"RAY_AUTH_MODE": "disabled"}
    line = [sys.executable, ray_app.__file__, url.rpartition(":")[2], json.dumps(args)]
    with open(folder / "log", "w") as log, httpx.Client(base_url=url, timeout=30) as client:
        pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
        driver = subprocess.Popen(line, env=environment, **pipes)

        def ask(method, path, **options):
            while True:
                assert driver.poll() is None, (folder / "log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    answer = client.request(method, path, **options)
                    if answer.status_code < 500:
                        return answer

        try:
            until(lambda: "\nready\n" in (folder / "log").read_text() or driver.poll(), 120)
            yield ask, lambda: {int(p.stem) for p in (folder / "videos").glob("*.pid")}
        finally:
            driver.stdin.close()
            driver.wait(60)


@pytest.mark.slow  # a Ray starts, with three replicas
def test_jobs_of_a_replica_that_is_killed_are_made_by_another_one(tmp_path):
    with replicas(tmp_path, model="t2v", api_keys="none", lease=3, drain=0.5) as (ask, processes):
        add = lambda seconds: ask("POST", "/v1/videos", json={"prompt": f"sleep {seconds}"}).json()
        # long enough that neither of the first two can end before one of their makers is killed
        ids = [add(seconds)["id"] for seconds in (8, 8, 1)]
        states = lambda: [job["status"] for job in ask("GET", "/v1/videos").json()["data"]]
        until(lambda: states().count("in_progress") == 2)
        first = processes()
        assert len(first) == 2
        os.kill(min(first), signal.SIGKILL)
        until(lambda: set(states()) == {"completed"}, 60)
        for id in ids:
            content = ask("GET", f"/v1/videos/{id}/content").content
            assert content == f"video of {id} ".encode() * 100
        names = sorted(path.name for path in (tmp_path / "videos").rglob("*.mp4"))
        assert [name.split(".")[0] for name in names] == sorted(ids)
        assert sorted(name.split(".")[1] for name in names) == ["1", "1", "2"]
        until(lambda: len(processes()) == 3, 60)
        running = add(30)["id"]
        until(lambda: ask("GET", f"/v1/videos/{running}").json()["status"] == "in_progress")
    # Replicas that are stopped give back what they were making, and nobody waits for their leases.
    with contextlib.closing(Database(f"sqlite:///{tmp_path}/jobs.sqlite3")) as db:
        assert not db.rows(sa.select(SERVERS))
        jobs = db.rows(sa.text("select status, deaths from tdjax_jobs order by number"))
        assert [tuple(job) for job in jobs[-1:]] == [("queued", 0)]
        assert sorted(job.deaths for job in jobs) == [0, 0, 0, 1]


def test_replicas_follow_jobs():
    config = types.SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    context = types.SimpleNamespace(aggregated_metrics=None, target_num_replicas=3, config=config)
    assert ray.replicas_for_jobs(context) == (3, {})
    context.aggregated_metrics = {"jobs": {"a": 9.0, "b": 10.0}}
    assert ray.replicas_for_jobs(context) == (2.5, {})


def test_the_config_file_is_understood():
    file = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    (application,) = file.applications
    assert application.import_path == f"{ray.__name__}:{ray.app.__name__}"
    made = ray.app(application.args)
    deployment = made._bound_deployment
    (options,) = deployment.init_args
    assert options.model == "turbowan2.1-t2v-1.3b-480p" and options.drain == 60
    (settings,) = application.deployments
    assert settings.name == deployment.name
    policy = settings.autoscaling_config["policy"]["policy_function"]
    assert policy == f"{ray.__name__}:{ray.replicas_for_jobs.__name__}"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"host": "0.0.0.0"}, "have `host`"),
        ({"folder": "/srv"}, "have `folder`"),
        ({"store": None}, "no `store`"),
        ({"api_keys": None}, "no `api_keys`"),
        ({"modle": "demo"}, "did you mean 'model'"),
        ({"lease": "soon"}, "lease"),
        ({"previews": True}, "unknown name"),
        ({"webhooks": ["https://example.org/"]}, "without `webhook_secret`"),
    ],
)
def test_wrong_args_are_told(change, message):
    with pytest.raises(UsageError, match=message) as told:
        ray.app(ARGS | change)
    assert str(told.value).count("\n") == 2
