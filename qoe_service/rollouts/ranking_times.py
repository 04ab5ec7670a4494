"""How long rankings took, as one histogram for all processes: workers rank, web processes are scraped."""

from __future__ import annotations

from bisect import bisect_left

from django.db.models import F

from qoe_service.observability import RANKING_BUCKETS_S, take_rankings
from qoe_service.rollouts.models import RankingTime


def store() -> None:
    """Add the rankings that this process observed since the last call."""
    for seconds in take_rankings():
        bucket = bisect_left(RANKING_BUCKETS_S, seconds)
        row = RankingTime.objects.filter(bucket=bucket)
        if not row.update(count=F("count") + 1, total_s=F("total_s") + seconds):
            RankingTime.objects.bulk_create([RankingTime(bucket=bucket)], ignore_conflicts=True)
            row.update(count=F("count") + 1, total_s=F("total_s") + seconds)


def histogram() -> tuple[list[tuple[float, int]], float]:
    """Cumulative counts by upper bound in seconds, and the sum of all times."""
    rows = {row.bucket: row for row in RankingTime.objects.all()}
    cumulative, total = [], 0
    for bucket, bound in enumerate(RANKING_BUCKETS_S):
        total += rows[bucket].count if bucket in rows else 0
        cumulative.append((bound, total))
    return cumulative, sum(row.total_s for row in rows.values())
