"""How sessions on a CPU are set up, and who decides."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.engines import open_session
from mope_deploy.engines.onnxruntime import cpu
from mope_deploy.engines.onnxruntime.cpu import CpuSettings, cpu_settings, usable_cores
from mope_deploy.errors import UsageError
from mope_deploy.manifest import Cpu
from tests.device.sensors import lay
from tests.device.test_bundle import rewrite

pytestmark = pytest.mark.device

SIBLINGS = {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}\n" for i in range(8)}


@pytest.mark.parametrize(
    ("files", "allowed", "cores"),
    [
        ({}, range(8), 8),
        ({}, {3, 5}, 2),
        (SIBLINGS, range(8), 4),
        (SIBLINGS, {0, 4, 1}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, range(8), 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, range(8), 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, range(8), 8),
        (
            {
                "proc/self/cgroup": "0::/pods/mine\n",
                "sys/fs/cgroup/pods/mine/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
            },
            range(8),
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            range(8),
            5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000\n",
            },
            range(8),
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            range(8),
            8,
        ),
    ],
)
def test_cores_that_may_be_used(
    files: dict[str, str], allowed: object, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpu, "os", SimpleNamespace(sched_getaffinity=lambda _: allowed, cpu_count=lambda: os.cpu_count())
    )
    assert usable_cores(lay(tmp_path, files)) == cores


def test_who_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "usable_cores", lambda: 7)
    assert cpu_settings() == CpuSettings(7, "the cores of this process", True, True)
    assert cpu_settings(Cpu(3, False)) == CpuSettings(3, "the bundle", False, True)
    assert cpu_settings(Cpu(3, False), threads=1, arena=True, spinning=False) == CpuSettings(
        1, "asked for", True, False
    )
    with pytest.raises(UsageError, match="threads"):
        cpu_settings(Cpu(3, False), threads=0)


def test_the_bundle_s_choice_reaches_the_session(bundle_copy: Path, split_path: Path) -> None:
    build = {"target": None, "profile": {}, "workspace": None, "cpu": {"threads": 3, "arena": False}}
    rewrite(bundle_copy, lambda document: document.update(build=build))
    session = open_session(Bundle.open(bundle_copy))
    options = session._session.get_session_options()  # type: ignore[attr-defined]
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (3, False)
    assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"
    assert session.settings == {"threads": 3, "threads_from": "the bundle", "arena": False, "spinning": True}
    split = open_session(Bundle.open(split_path), threads=2, arena=False)
    for one in (split.main, split.parts["text"]):  # type: ignore[attr-defined]
        options = one._session.get_session_options()
        assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (2, False)
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
