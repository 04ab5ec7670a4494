"""What a simulated user tells the service: per decision, requests are gathered and rated about every two seconds.

A rating covers ten requests at least, so that one mistake is not a verdict; what is left over when a decision ends is
rated from five on, or if it is all there was. Reports keep their ids until the service has taken them: sending one
again does nothing.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from demo.users import Experience, Persona

QUEUE_LIMIT, BATCH_LIMIT = 1000, 100
ENOUGH, ENOUGH_AT_THE_END = 10, 5
Report = dict[str, Any]
Send = Callable[[Sequence[Report]], Mapping[str, str]]


class RatingDesk:
    """Gathers experiences from many threads; `flush` turns them into reports and sends what is waiting."""

    def __init__(self, persona: Persona, send: Send | None) -> None:
        self._persona, self._send = persona, send
        self._lock = threading.Lock()
        self._open: dict[str, list[Experience]] = {}
        self._rated: deque[str] = deque(maxlen=8)
        self.waiting: deque[Report] = deque(maxlen=QUEUE_LIMIT)
        self._run, self._count = secrets.token_hex(6), 0
        self.newest_decision: str | None = None
        self.decision_changed = threading.Event()
        self.sent: dict[str, int] = {}
        self.last_rating: float | None = None

    def note(self, decision_id: str, experience: Experience) -> None:
        with self._lock:
            self._open.setdefault(decision_id, []).append(experience)
            if decision_id != self.newest_decision:
                self.newest_decision = decision_id
                self.decision_changed.set()

    def note_refusal(self, experience: Experience) -> None:
        """A refused request names no decision: it counts against the one in force."""
        if self.newest_decision:
            self.note(self.newest_decision, experience)

    def flush(self) -> None:
        """Rate what is ready, and send all that waits; what cannot be sent now waits for the next time."""
        for decision_id, experiences in self._ready_windows().items():
            self.waiting.append(self._report(decision_id, experiences))
        while self._send and self.waiting:
            batch = [self.waiting[index] for index in range(min(len(self.waiting), BATCH_LIMIT))]
            try:
                statuses = self._send(batch)
            except httpx.HTTPError:
                return
            for _ in batch:
                self.waiting.popleft()
            for status in statuses.values():
                self.sent[status] = self.sent.get(status, 0) + 1

    def _ready_windows(self) -> dict[str, list[Experience]]:
        ready = {}
        with self._lock:
            self.decision_changed.clear()
            for decision_id in list(self._open):
                is_over = decision_id != self.newest_decision
                if self._is_enough(decision_id, is_over):
                    ready[decision_id] = self._open.pop(decision_id)
                    self._rated.append(decision_id)
                elif is_over:
                    del self._open[decision_id]
        return ready

    def _is_enough(self, decision_id: str, is_over: bool) -> bool:
        count = len(self._open[decision_id])
        if not is_over:
            return count >= ENOUGH
        return count >= ENOUGH_AT_THE_END or decision_id not in self._rated

    def _report(self, decision_id: str, experiences: Sequence[Experience]) -> Report:
        self._count += 1
        rating = self.last_rating = self._persona.rate(experiences)
        return {"id": f"sim-{self._run}-{self._count}", "decision_id": decision_id, "rating": round(rating, 4)}


def feedback_sender(service_url: str, key: str) -> Send:
    """Sends reports to the feedback API as the app that holds `key`; returns the status of each by id.

    Raises httpx.HTTPError where trying again may help; a refusal for good is a status like any other.
    """
    client = httpx.Client(base_url=service_url, headers={"Authorization": f"Bearer {key}"}, timeout=10, trust_env=False)

    def send(reports: Sequence[Report]) -> Mapping[str, str]:
        reply = client.post("/api/v1/feedback/batch", json={"items": list(reports)})
        if reply.is_client_error and reply.status_code not in {408, 429}:
            print(f"ratings refused: {reply.status_code} {reply.text[:300]}", flush=True)
            return {report["id"]: "refused" for report in reports}
        reply.raise_for_status()
        return {result["id"]: result["status"] for result in reply.json()["results"]}

    return send
