"""The files of deploy/: what their linters and schemas say, and what the SLURM script does with an exit code."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from alignx_jax import command_line

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
# Of JobSet v1alpha2, by its CustomResourceDefinition; what is inside a job's template is Kubernetes' own.
JOBSET = {"coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy"}
JOBSET |= {"suspend", "ttlSecondsAfterFinished"}
RULE = {"action", "name", "onJobFailureReasons", "targetReplicatedJobs"}


def tool(name: str, *arguments: str) -> None:
    program = shutil.which(name, path=str(pathlib.Path(sys.executable).parent))
    assert program, f"{name} is not installed; pip install -r requirements-dev.txt"
    result = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout, result.stdout + result.stderr


def test_linters_have_nothing_to_say():
    tool("yamllint", "--strict", "--config-file=deploy/.yamllint", "deploy", "mkdocs.yml")
    tool("shellcheck", "deploy/slurm.sbatch", ".ci/run")
    tool("hadolint", "deploy/Dockerfile")


def load(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def test_kubernetes_files_fit_their_schemas():
    kubernetes_validate.validate(load("gke-storage.yaml"), "1.33", strict=True)
    jobset = load("gke-jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= JOBSET and set(jobset["spec"]["failurePolicy"]) <= {"maxRestarts", "rules"}
    assert all(set(rule) <= RULE for rule in jobset["spec"]["failurePolicy"]["rules"])
    for job in jobset["spec"]["replicatedJobs"]:
        assert set(job) == {"name", "replicas", "template"}
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(whole, "1.33", strict=True)


def test_the_jobset_runs_a_command_of_the_program_on_all_its_chips():
    (job,) = load("gke-jobset.yaml")["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    home = f"--config={ROOT}/configs"
    config = command_line.parse([flag.replace("--config=/opt/alignx_jax/configs", home) for flag in container["args"]])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts, chips = job["template"]["spec"]["completions"], container["resources"]["limits"]["google.com/tpu"]
    assert config.mesh == f"{rows * columns}x1" and hosts * chips == rows * columns
    assert config.training.rows % (rows * columns) == 0 and hosts == job["template"]["spec"]["parallelism"]
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == load("gke-storage.yaml")["metadata"]["name"]


def test_the_image_holds_what_its_entry_point_needs():
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT"))
    assert yaml.safe_load(entry.removeprefix("ENTRYPOINT")) == ["python", "/opt/alignx_jax/run.py"]
    left_out = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert not {"run.py", "configs", "alignx_jax", "requirements.txt"} & set(left_out)


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [(0, 0, False), (1, 0, False), (70, 0, False), (75, 0, True), (69, 3, True)]
)
def test_slurm_starts_again_what_goes_on(tmp_path, code, restarts, again):
    check(tmp_path, code, restarts, again)


def test_slurm_does_not_start_again_for_ever(tmp_path):
    check(tmp_path, 75, 100, False)


def check(tmp_path: pathlib.Path, code: int, restarts: int, again: bool) -> None:
    """Runs the script with stand-ins for SLURM's programs, which write down how they were called."""
    programs, log = tmp_path / "programs", tmp_path / "log"
    programs.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, end in (("srun", code), ("scontrol", 0)):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {shlex.quote(str(log))}\nexit {end}\n')
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    script = ["bash", str(DEPLOY / "slurm.sbatch"), "--stage=1", "--mesh=2x8x1"]
    assert subprocess.run(script, env=environment).returncode == code
    calls = ["srun python run.py --stage=1 --mesh=2x8x1"] + ["scontrol requeue 7"] * again
    assert log.read_text().splitlines() == calls
