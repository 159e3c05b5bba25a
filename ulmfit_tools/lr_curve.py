from dataclasses import dataclass, field
from typing import Any
import math


@dataclass(frozen=True, kw_only=True)
class LRCurve:
    rates: tuple
    losses: tuple
    start_loss: float
    stopped: str = "end"
    meta: dict = field(default_factory=dict)


def smoothed(losses, beta=0.9):
    total = 0.0
    out = []
    for i, l in enumerate(losses, 1):
        total = beta * total + (1 - beta) * l
        out.append(total / (1 - beta**i))
    return out


def has_diverged(losses):
    if len(losses) < 10:
        return False
    s = smoothed(losses)
    best = min(s)
    noise = 1.4826 * sorted(abs(a - b) / 2**0.5 for a, b in zip(losses[1:], losses))[len(losses) // 2]
    start = sum(losses[:5]) / 5
    return s[-1] > best + max(start - best, 0.5 * abs(start), 4 * noise)
