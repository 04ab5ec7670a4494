"""Makes decisions: gathers what is known, asks the selector, and records everything that the choice was made from."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from datetime import datetime

from qoe_service.catalogue import exploration
from qoe_service.catalogue.models import Application
from qoe_service.catalogue.places import isa_of
from qoe_service.catalogue.profiles import profiles_for
from qoe_service.decisions import policies
from qoe_service.decisions.features import actions_of, context_of, formula_of
from qoe_service.decisions.lifecycle import activate
from qoe_service.decisions.models import CalibrationRow, Decision
from qoe_service.errors import Unavailable
from qoe_service.fleet.models import Device
from qoe_service.observability import observe_ranking
from selector import ranking
from selector.errors import PolicyFailure, SelectorError
from selector.interactions import Context, Ranking
from selector.latency import Calibration, scopes_of
from selector.records import as_record, candidates_record
from selector.reward import QoeFormula

__all__ = ["activate", "decide"]


def decide(
    *,
    device: Device,
    application: Application,
    reason: str,
    arrival_rate_rps: float | None,
    cached_digests: Collection[str],
    incumbent_decision: Decision | None,
    trace_id: str,
    now: datetime,
) -> Decision:
    """A new decision for this application on this device, recorded with all it was made from.

    Raises Unavailable when no action is feasible, saying which masks forbid them all: the last decision stays in force.
    """
    started = time.perf_counter()
    decision_id = uuid.uuid4().hex
    context = context_of(
        device=device,
        application=application,
        arrival_rate_rps=arrival_rate_rps,
        cached_digests=cached_digests,
        incumbent=incumbent_decision,
        unmeasured_digests=exploration.unmeasured(device=device, application=application),
    )
    try:
        formula_version, formula = formula_of(application)
        ranked = _rank(decision_id, device, application, context, formula=formula, now=now)
    except SelectorError as error:
        raise Unavailable(f"{application.pk} on {device.name} keeps its last decision: {error}") from error
    observe_ranking(time.perf_counter() - started)
    action = ranked.action
    return Decision.objects.create(
        id=decision_id,
        application=application,
        device=device,
        reason=reason,
        context=as_record(context),
        candidates=candidates_record(ranked.candidates),
        chosen=ranked.chosen,
        action_key=action.key,
        variant_digest=action.variant.digest,
        configuration=as_record(action.configuration),
        propensity=ranked.propensity,
        kind=ranked.kind,
        seed=str(ranked.seed),
        policy_number=ranked.policy_version,
        formula_version=formula_version,
        calibration_revisions=dict(ranked.calibration_revisions),
        trace_id=trace_id,
        decided_at=now,
    )


def _rank(
    decision_id: str, device: Device, application: Application, context: Context, *, formula: QoeFormula, now: datetime
) -> Ranking:
    actions = actions_of(application, isa_of(device.hardware))
    profiles = profiles_for(device=device, application=application)
    calibration = calibration_of(application, context)
    bans = policies.bans_of(application=application, device=device, now=now)
    budget = ranking.Exploration(
        epsilon=application.epsilon,
        holdout=application.holdout,
        slo_violation_limit=application.slo_violation_limit,
        budget=application.exploration_budget,
    )

    def rank_by(champion: policies.Champion) -> Ranking:
        return ranking.rank(
            decision_id=decision_id,
            context=context,
            actions=actions,
            profiles=profiles,
            calibration=calibration,
            formula=formula,
            policy=champion.policy,
            policy_version=champion.number,
            best_fixed=champion.best_fixed,
            exploration=budget,
            bans=bans,
        )

    try:
        with policies.in_use:
            return rank_by(policies.champion(application))
    except PolicyFailure as error:
        policies.note_failure(application, str(error))
        return rank_by(policies.baseline(str(error)))


def calibration_of(application: Application, context: Context) -> Calibration:
    """What was learnt about the device, its class and the fleet."""
    rows = CalibrationRow.objects.filter(application=application, scope__in=scopes_of(context))
    return Calibration.from_rows(dict(rows.values_list("scope", "state")))
