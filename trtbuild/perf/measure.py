"""One point, measured: driver, telemetry and the server's own statistics put together, and what makes it invalid."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from trtbuild.engines.passport import Passport, verified_digest
from trtbuild.errors import TrtBuildError
from trtbuild.perf.environment import environment, machine_digest
from trtbuild.perf.load import why_unfit
from trtbuild.perf.records import ClientFigures, Driver, Measured, Point, PointSpec
from trtbuild.perf.run_directory import RunDirectory
from trtbuild.perf.statistics import Figures, figures_of, saturation
from trtbuild.perf.targets import Running
from trtbuild.perf.telemetry import TelemetrySampler

# Of the requests that a point asks for, so many must have been kept.
_ENOUGH = 0.5
_STATISTICS_TIMEOUT_S = 5.0


class PointMeasurer:
    """Measures points of one engine that runs, and files them in a run."""

    def __init__(
        self,
        run: RunDirectory,
        passport: Passport,
        running: Running,
        driver: Driver,
        *,
        serving: Mapping[str, Any],
        slo: Mapping[str, float] | None = None,
    ) -> None:
        self._run, self._running, self._driver = run, running, driver
        self._serving, self._slo = dict(serving), dict(slo) if slo is not None else None
        self._digest = verified_digest(passport.data)
        self._engine = engine_facts(passport) | {"serving": self._serving}

    def point_id(self, spec: PointSpec) -> str:
        machine = machine_digest(environment())
        return spec.point_id(self._digest, self._running.executor, machine, self._serving)

    def measure(self, spec: PointSpec) -> Point:
        """The point, complete in the run when this returns; invalid, with why, where it could not be measured.

        Raises `TrtBuildError` where the engine that runs cannot be asked this at all.
        """
        if (why := why_unfit(spec, self._running.target.limits)) is not None:
            raise TrtBuildError(f"{spec.label()}: {why}, as it was loaded here")
        point_id, found_environment = self.point_id(spec), environment(self._running.triton)
        started_at, begun = datetime.now(timezone.utc), time.monotonic()
        before = server_times(self._running.target.grpc, spec.engine)
        sampler = TelemetrySampler(self._run.telemetry(point_id), _process_names(self._running.target.process_ids))
        with sampler:
            measured, failure = self._drive(spec, point_id)
        server = _difference(before, server_times(self._running.target.grpc, spec.engine))
        self._run.write_raw(point_id, measured)
        figures = figures_of(spec, measured.records, measured.window, self._slo)
        why = why_invalid(spec, measured, figures, failure, self._running.why_dead())
        itl = figures.metrics.get("itl_s", {}).get("p50")
        point = Point(
            point_id=point_id,
            spec=spec,
            valid=why is None,
            why_invalid=why,
            engine=self._engine,
            executor=self._running.executor,
            device=self._running.device,
            environment=found_environment,
            started_at=started_at.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - begun, 3),
            slo=self._slo,
            server=server,
            client={**measured.client.to_dict(), "saturated": _saturated(spec, measured, itl) is not None},
            telemetry=sampler.summary(),
            energy_per_token_j=_energy_per_token(sampler.energy_j(), measured),
            notes=measured.notes | ({} if sampler.gpu_missing is None else {"no_gpu_telemetry": sampler.gpu_missing}),
            **vars(figures),
        )
        self._run.add(point)
        return point

    def _drive(self, spec: PointSpec, point_id: str) -> tuple[Measured, str | None]:
        """What was measured, and why not more."""
        try:
            return self._driver.measure(spec, self._running.target, self._run.raw(point_id)), None
        except TrtBuildError as error:
            return Measured([], ClientFigures(None, None)), error.message


def engine_facts(passport: Passport) -> dict[str, Any]:
    """What a report says of the engine."""
    data = passport.data
    return {
        "name": passport.name,
        "digest": verified_digest(data),
        "precision": passport.precision.weights,
        "layout": data["layout"],
        "limits": data["limits"],
        "accuracy": data.get("accuracy") if passport.accuracy_state() in ("passed", "failed") else None,
    }


def why_invalid(
    spec: PointSpec, measured: Measured, figures: Figures, failure: str | None, dead: str | None
) -> str | None:
    """The first thing that keeps the figures from being those of the point; None where nothing does.

    Requests that the server refuses or does not answer in time are a result. Those that fail are not: it is broken.
    """
    if dead is not None or failure is not None:
        return "; ".join(part for part in (dead, failure) if part is not None)
    if measured.why_invalid is not None:
        return measured.why_invalid
    failed = [one.error for one in measured.records if one.error_kind == "failed" and one.error is not None]
    if failed:
        return f"{len(failed)} of {len(measured.records)} requests failed, the first: {failed[0]}"
    if not figures.throughput:
        errors = [one.error for one in measured.records if one.error is not None]
        return f"no request was answered: {errors[0]}" if errors else "no request was answered in the steady part"
    if spec.load.kind != "trace" and figures.num_requests < _ENOUGH * spec.num_requests:
        return f"{figures.num_requests} requests fell into the steady part, {spec.num_requests} were asked for"
    return _saturated(spec, measured, figures.metrics.get("itl_s", {}).get("p50"))


def server_times(address: str | None, model: str) -> dict[str, tuple[int, int]] | None:
    """(count, nanoseconds) so far of Triton's queue and compute; None where no Triton says so."""
    if address is None:
        return None
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    pb: Any = service_pb2
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelStatistics(pb.ModelStatisticsRequest(name=model), timeout=_STATISTICS_TIMEOUT_S)
        if answer.model_stats:
            stats = answer.model_stats[0].inference_stats
            parts = {"queue_s": stats.queue, "compute_s": stats.compute_infer}
            return {name: (part.count, part.ns) for name, part in parts.items()}
    return None


def _difference(
    before: dict[str, tuple[int, int]] | None, after: dict[str, tuple[int, int]] | None
) -> dict[str, float] | None:
    """Mean seconds per request, warm-up included; None where the server counted nothing."""
    if before is None or after is None:
        return None
    counts = {name: after[name][0] - before[name][0] for name in after}
    if min(counts.values()) <= 0:
        return None
    return {name: (after[name][1] - before[name][1]) / counts[name] / 1e9 for name in after}


def _saturated(spec: PointSpec, measured: Measured, itl_s: float | None) -> str | None:
    """In a batch, a request waits for the others of the one before: its delay is no lateness of the client."""
    client = measured.client.to_dict()
    if spec.load.kind == "batch" and client["loop_delay_p99_s"] is None:
        client["send_delay_p99_s"] = None
    return saturation(client, itl_s)


def _process_names(process_ids: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("server", "front_end"), process_ids, strict=False))


def _energy_per_token(energy_j: float | None, measured: Measured) -> float | None:
    """Of everything that the GPUs spent while the point ran, over the tokens that came meanwhile."""
    num_tokens = sum(len(one.token_times_s) for one in measured.records)
    return energy_j / num_tokens if energy_j is not None and num_tokens else None
