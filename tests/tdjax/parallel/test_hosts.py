"""Several processes as one run: what is refused before they look for each other. What they do
together is in tests/tdjax/train/test_hosts.py."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from train_cases import mesh

from tdjax.errors import UsageError
from tdjax.parallel import hosts

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "a,b",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "`coordinator` is given without `processes` and `process_id`"),
        ((None, None, 0), "`process_id` is given without `coordinator` and `processes`"),
        (("a", 2, 0), "`coordinator` is 'a'"),
        (("a:b", 2, 0), "`coordinator` is 'a:b'"),
        (("a:1", 0, 0), "`processes` is 0"),
        (("a:1", 2, 2), "`process_id` is 2\nwith 2 processes it is 0 to 1"),
        (("[::1]:1", 2, -1), "`process_id` is -1"),
    ],
)
def test_what_does_not_fit_together_is_refused(given, message):
    with pytest.raises(UsageError) as error:
        hosts.join(*given)
    assert str(error.value).startswith(message) and len(str(error.value).splitlines()) == 3


def test_the_launcher_is_known_by_what_it_tells(monkeypatch):
    for name in (*SLURM, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    assert hosts.launcher() is None and hosts.join() == 1
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert hosts.launcher() == "slurm"
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.launcher() is None
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # the shell of an allocation
    assert hosts.launcher() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1.0;tcp://10.0.0.1:1")
    assert hosts.launcher() == "ompi"
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    monkeypatch.setattr(hosts, "_installed", lambda name: False)
    with pytest.raises(UsageError, match="mpi4py is not installed"):
        hosts.launcher()


def test_alone_everything_is_as_it_was(tmp_path):
    hosts.leave()
    assert hosts.first() and hosts.agreed(lambda: "text") == "text"
    assert hosts.every(lambda: 3) == 3 and not hosts.apart(mesh(fsdp=4))
    assert hosts.share_compile_cache() is None
    poll = hosts.Poll(None)
    assert [poll.greatest(n) for n in (0, 2, 1)] == [0, 2, 1]
    rows = np.arange(8.0).reshape(4, 2)
    placed = hosts.place(rows, NamedSharding(mesh(fsdp=4), PartitionSpec("fsdp")))
    assert len(placed.sharding.device_set) == 4 and (hosts.whole(placed) == rows).all()
    with pytest.raises(jax.errors.JaxRuntimeError), hosts.lost():
        raise jax.errors.JaxRuntimeError("INTERNAL: of this process alone")


@pytest.mark.slow
def test_others_that_do_not_come_are_waited_for_for_a_time():
    words = 'from tdjax.parallel import hosts; hosts.join("localhost:9", 2, 1, seconds=1)'
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "error: `coordinator` localhost:9 was not reached by all processes"
    )
