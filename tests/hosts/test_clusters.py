"""Two real processes, without flags, in the environment that each kind of cluster gives them: JAX detects, we join.

What a process would ask over the network (Google's metadata server, Kubernetes) is answered by modules that stand in.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys

import pytest

from tests import processes

FIRST_PORT, PORTS = 61440, 4096  # where JAX has its own, by the number of a SLURM or Open MPI job
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TPU = {"JAX_FORCE_TPU_INIT": "1"}  # JAX takes this for the host of a TPU

JOIN = """
import os
import jax
from alignx_jax import hosts
from alignx_jax.config import HostsConfig
if "TPU_WORKER_ID" not in os.environ:  # GKE sets the other; elsewhere JAX does where it sees no chip, as here
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)
hosts.initialize(HostsConfig())
print(hosts.index(), hosts.count(), hosts.gather("numbers", hosts.index()), jax.process_index(), jax.process_count())
"""
REQUESTS = """
import json, os
from types import SimpleNamespace

def get(url, **options):
    return SimpleNamespace(status_code=200, text=json.loads(os.environ["METADATA"])[url.rpartition("/")[2]])
"""
KUBERNETES = """
import socket
from types import SimpleNamespace as Made
from jax._src.clusters import K8sCluster

meta = Made(name="train", labels={"job-name": "train"}, owner_references=[Made(kind="Job", controller=True)])
pods = {"status.podIP=127.0.0.1": Made(items=[Made(metadata=meta, spec=Made(subdomain="alignx"))])}
jobs = {"train": Made(metadata=meta, spec=Made(parallelism=2))}
config = Made(load_incluster_config=lambda: None)
client = Made(
    CoreV1Api=lambda: Made(list_namespaced_pod=lambda namespace, field_selector: pods[field_selector]),
    BatchV1Api=lambda: Made(read_namespaced_job=lambda name, namespace: jobs[name]),
    exceptions=Made(ApiException=OSError),
)

# Of the cluster's name service, and a file that a pod has.
socket.gethostbyname = {"pod": "127.0.0.1", "train-0.alignx": "127.0.0.1"}.__getitem__
K8sCluster._namespace = lambda: "default"
found = K8sCluster.get_coordinator_address

def address(**options):
    name, port = found(**options).split(":")
    return f"{socket.gethostbyname(name)}:{port}"

K8sCluster.get_coordinator_address = address
"""


def slurm(index: int, job: int) -> dict:
    """`srun` of SLURM 22.05."""
    own = {"SLURM_PROCID": index, "SLURM_LOCALID": index}
    return own | {"SLURM_JOB_ID": job, "SLURM_NTASKS": 2, "SLURM_STEP_NODELIST": "localhost"}


def open_mpi(index: int, job: int) -> dict:
    """`mpirun` of Open MPI 4.1."""
    own = {"OMPI_COMM_WORLD_RANK": index, "OMPI_COMM_WORLD_LOCAL_RANK": index}
    address = f"{job * PORTS}.0;tcp://127.0.0.1:33393;tcp6://[::1]:50397"
    return own | {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_MCA_orte_hnp_uri": address}


def gke_slice(index: int, job: int) -> dict:
    """A TPU slice of two hosts."""
    own = {"TPU_WORKER_ID": index, "METADATA": json.dumps({"tpu-env": ""})}
    return TPU | own | {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2"}


def gke_slices(index: int, job: int) -> dict:
    """Two TPU slices of a host each, as a JobSet starts them."""
    own = {"TPU_WORKER_ID": 0, "TPU_PROCESS_ADDRESSES": "there", "MEGASCALE_SLICE_ID": index}
    return TPU | own | {"MEGASCALE_NUM_SLICES": 2, "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}


def gke_gpus(index: int, job: int) -> dict:
    """An indexed Job of two pods behind a headless service."""
    return {"JOB_COMPLETION_INDEX": index, "HOSTNAME": "pod"}


def tpu_pod(index: int, job: int) -> dict:
    """TPU VMs, which no variable tells anything."""
    ends = "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.2"
    metadata = {"agent-worker-number": str(index), "worker-network-endpoints": ends, "tpu-env": "A: 'b'\n"}
    return TPU | {"METADATA": json.dumps(metadata)}


def free_job() -> int:
    """A number of a job whose port is free."""
    while True:
        job = random.randrange(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", FIRST_PORT + job)):
            return job


@pytest.mark.parametrize("cluster", [slurm, open_mpi, gke_slice, gke_slices, gke_gpus, tpu_pod])
def test_processes_find_each_other_without_flags(tmp_path, cluster):
    (tmp_path / "requests.py").write_text(REQUESTS)
    (tmp_path / "kubernetes.py").write_text(KUBERNETES)
    job = free_job()
    port = {} if cluster in (slurm, open_mpi) else {"JAX_COORDINATOR_PORT": processes.free_port()}
    pod = {} if cluster is tpu_pod else POD
    running = []
    for index in range(2):
        own = {name: str(value) for name, value in (cluster(index, job) | port | pod).items()}
        environment = os.environ | own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{tmp_path}:{processes.ROOT}"}
        command = [sys.executable, "-c", JOIN]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
    done = processes.finish(running, 60)
    assert [(code, out.splitlines()[-1:]) for code, out, _ in done] == [(0, [f"{n} 2 [0, 1] {n} 2"]) for n in (0, 1)], (
        done
    )
