"""Telemetry: names, units and rates, with a fake NVML and real processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_nvml import FakeNvml

from trtbuild.perf.gpu_reader import GpuReader, is_slowed, throttle_names
from trtbuild.perf.telemetry import ProcessGroup, TelemetrySampler, spent_energy_j, summarise

# Burns a core in a child of its own, holds 60 MB there.
BUSY = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'held = bytearray(60 << 20)\\nwhile True: pass'])"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_gpu_columns_have_base_units(tmp_path: Path) -> None:
    nvml = FakeNvml(names=["NVIDIA L40S", "NVIDIA L40S"])
    with TelemetrySampler(tmp_path / "p.csv", nvml=nvml) as sampler:
        time.sleep(0.15)
    row = rows_of(tmp_path / "p.csv")[0]
    expected = {
        "gpu0_utilization_percent": 97, "gpu0_memory_utilization_percent": 41, "gpu0_memory_used_bytes": 3 * 2**30,
        "gpu1_memory_used_bytes": 4 * 2**30, "gpu0_power_w": 123.456, "gpu0_sm_clock_mhz": 2520,
        "gpu0_memory_clock_mhz": 9001, "gpu0_temperature_c": 61, "gpu1_temperature_c": 62,
        "gpu0_energy_j": 9_000_001.5,
    }  # fmt: skip
    assert {name: float(row[name]) for name in expected} == expected
    assert row["gpu0_throttle_reasons"] == "power-cap|thermal-software"
    assert sampler.gpu_missing is None
    assert nvml.calls[-1] == "shutdown"


def test_rate_is_ten_a_second_and_is_reported(tmp_path: Path) -> None:
    with TelemetrySampler(tmp_path / "p.csv", nvml=FakeNvml()) as sampler:
        time.sleep(1.05)
    times = [float(row["time_s"]) for row in rows_of(tmp_path / "p.csv")]
    assert 10 <= len(times) <= 12
    interval = sampler.summary()["sample_interval_s"]
    assert interval["mean"] == pytest.approx((times[-1] - times[0]) / (len(times) - 1), rel=1e-3)
    assert times == sorted(times)


def test_energy_is_what_was_spent_meanwhile(tmp_path: Path) -> None:
    nvml = FakeNvml(energy_step=2000)
    with TelemetrySampler(tmp_path / "p.csv", nvml=nvml) as sampler:
        time.sleep(0.3)
    readings = nvml.calls.count("energy")
    assert sampler.energy_j() == pytest.approx(2.0 * (readings - 1))
    assert sampler.summary()["gpu0_energy_j"]["mean"] == pytest.approx(2.0 * (readings - 1))


def test_energy_of_a_product_without_counter_is_the_integral_of_power() -> None:
    rows: list[dict[str, float | str]] = [{"time_s": t, "gpu0_power_w": w} for t, w in ((0, 100), (1, 200), (3, 200))]
    assert spent_energy_j(rows) == pytest.approx(150 + 400)
    assert spent_energy_j([{"time_s": 0.0}]) is None


def test_what_a_product_lacks_is_left_out_and_asked_once(tmp_path: Path) -> None:
    nvml = FakeNvml(unsupported=("energy", "utilisation"))
    with TelemetrySampler(tmp_path / "p.csv", nvml=nvml) as sampler:
        time.sleep(0.25)
    row = rows_of(tmp_path / "p.csv")[0]
    assert not {"gpu0_energy_j", "gpu0_utilization_percent"} & set(row)
    assert "gpu0_power_w" in row
    assert nvml.calls.count("energy") == 1
    # By power, then: 123.456 W over the time of the rows.
    seconds = float(rows_of(tmp_path / "p.csv")[-1]["time_s"]) - float(row["time_s"])
    assert sampler.energy_j() == pytest.approx(123.456 * seconds, rel=1e-2)


def test_no_driver_is_said_and_gives_no_zeros(tmp_path: Path) -> None:
    with TelemetrySampler(tmp_path / "p.csv", nvml=FakeNvml(broken=True)) as sampler:
        time.sleep(0.12)
    assert sampler.gpu_missing is not None
    assert "Driver Not Loaded" in sampler.gpu_missing
    assert not [name for name in rows_of(tmp_path / "p.csv")[0] if name.startswith("gpu")]
    assert sampler.energy_j() is None
    assert "host_cpu_percent" in sampler.summary()
    assert GpuReader(FakeNvml(names=[])).missing == "NVML sees no GPU"


def test_a_process_counts_with_its_children(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    try:
        time.sleep(0.5)
        with TelemetrySampler(tmp_path / "p.csv", {"server": process.pid}, nvml=FakeNvml()) as sampler:
            time.sleep(1.0)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    summary = sampler.summary()
    assert summary["server_processes"]["max"] == 2
    # One busy core, on a machine that others use too.
    assert 20 < summary["server_cpu_percent"]["mean"] < 110
    assert summary["server_rss_bytes"]["max"] > 60 * 2**20


def test_a_process_that_ends_leaves_empty_cells(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with TelemetrySampler(tmp_path / "p.csv", {"server": process.pid}, nvml=FakeNvml()):
        time.sleep(0.35)
        process.kill()
        process.wait()
        time.sleep(0.35)
    rows = rows_of(tmp_path / "p.csv")
    assert float(rows[1]["server_rss_bytes"]) > 0
    assert rows[-2]["server_rss_bytes"] == ""
    assert float(rows[-2]["host_memory_used_bytes"]) > 0


def test_what_a_child_used_before_it_was_found_is_not_counted_at_once() -> None:
    group = ProcessGroup("server", os.getpid())
    group.read()
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.9)
        group.read()
        # Children are looked for once a second: now it is found, after it has used most of a second.
        time.sleep(0.15)
        found = group.read()
    finally:
        process.kill()
        process.wait()
    assert float(found["server_processes"]) >= 2
    assert float(found["server_cpu_percent"]) < 150


def test_nothing_appears_where_the_point_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TelemetrySampler(tmp_path / "p.csv", nvml=FakeNvml()):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_throttle_reasons_by_name() -> None:
    assert throttle_names(0) == ""
    assert throttle_names(0x1 | 0x40 | 0x8000) == "idle|thermal-hardware|0x8000"
    assert is_slowed("idle|thermal-hardware")
    assert not is_slowed("idle|application-clocks")
    rows: list[dict[str, float | str]] = [
        {"time_s": 0.0, "gpu0_throttle_reasons": ""},
        {"time_s": 0.1, "gpu0_throttle_reasons": "power-cap"},
    ]
    assert summarise(rows)["gpu0_slowed_share"] == {"mean": 0.5, "max": 1.0}


def test_a_child_with_a_column_of_its_own_counts_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    try:
        time.sleep(0.5)
        (child,) = psutil.Process(process.pid).children()
        ids = {"server": process.pid, "worker": child.pid}
        with TelemetrySampler(tmp_path / "p.csv", ids, nvml=FakeNvml()) as sampler:
            time.sleep(0.3)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    summary = sampler.summary()
    assert summary["server_processes"]["max"] == summary["worker_processes"]["max"] == 1
    assert summary["server_rss_bytes"]["max"] < 60 * 2**20 < summary["worker_rss_bytes"]["max"]
