"""Vowpal Wabbit as a policy, and the only file that imports it. Learns what neither profiles nor tastes show.

Everything known to break Vowpal Wabbit silently is stopped here: bad and subnormal numbers, feature
injection, truncated models, options that read or write files. It takes examples as text only (parsed examples
leak), and is owned by one thread.

Cost is minus the reward. The expected QoE, which is the prediction and what users like beyond it (``tastes.py``), is a
feature whose weight is taught to be -1 before any feedback, so a new policy follows the prediction; all other weights
start at zero and learn the residual. How far the residual is trusted follows from how well it foretold the leases that
came after (``trust.py``): where what is expected says all there is to say, what the residual learns is noise. As
SquareCB (Foster & Rakhlin, ICML 2020) asks for, the reward of the action taken is learnt by plain least squares on
that action's line; exploration then weighs each candidate by its gap. ``power_t 0`` keeps the learning rate, so that
drift is followed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shlex
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Self

import numpy as np
import pylibvw
import vowpalwabbit
from numpy.typing import NDArray

from selector.errors import CorruptPolicy, InvalidInput, PolicyFailure
from selector.interactions import Action, Candidate, Configuration, Context, Interaction, Prediction, Variant
from selector.policy import SUM_TOLERANCE
from selector.tastes import Tastes
from selector.trust import Trust
from selector.validation import check_candidates, check_context, check_interaction, number, whole

Floats = NDArray[np.float64]
Probes = list[list[float]]

MAGIC = b"edge-qoe vw 1\n"
# One more also where the calibration's rows change: a learner that finds older bytes replays its log.
FEATURE_SCHEMA = 4
PROBE_TOLERANCE = 1e-5
LARGEST_FEATURE = 10.0
LARGEST_TASTES_BYTES = 1 << 28
# Warm examples count a hundredfold each: the weight of the prediction ends at -1 whatever the learning rate.
_WARM_STEPS, _WARM_SHARE = 300, 0.01
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]")


@dataclass(frozen=True, slots=True)
class VwSettings:
    """The arguments that may be chosen; everything else about the learner is fixed.

    ``gamma`` is SquareCB's: larger explores less (1e3 to 1e5 for rewards in [0, 1]); ``epsilon`` its uniform
    floor.
    """

    learning_rate: float = 0.01
    gamma: float = 30000.0
    epsilon: float = 0.002
    l2: float = 0.0
    bits: int = 18
    seed: int = 1

    def __post_init__(self) -> None:
        """Raise InvalidInput naming the setting out of range."""
        number("learning_rate", self.learning_rate, 1e-6, 1.0)
        number("gamma", self.gamma, 1.0, 1e9)
        number("epsilon", self.epsilon, 1e-4, 1.0)
        number("l2", self.l2, 0.0, 0.1)
        whole("bits", self.bits, 10, 24)
        whole("seed", self.seed, 0, 2**31 - 1)

    @classmethod
    def parse(cls, arguments: str) -> Self:
        """Settings from a command line in Vowpal Wabbit's words; whatever is not on the allow-list is
        refused.

        >>> VwSettings.parse("-l 0.1 --gamma_scale 500").learning_rate
        0.1
        >>> VwSettings.parse("--squarecb -f /etc/passwd")
        Traceback (most recent call last):
        ...
        selector.errors.InvalidInput: arguments may not contain '-f'
        """
        try:
            words = shlex.split(arguments.replace("=", " "))
        except ValueError as error:
            raise InvalidInput("arguments", f"cannot be read: {error}") from error
        found: dict[str, float] = {}
        while words:
            word = words.pop(0)
            if word in ("--cb_explore_adf", "--squarecb"):
                continue
            if word not in _ALLOWED:
                raise InvalidInput("arguments", f"may not contain {word[:40]!r}")
            try:
                found[_ALLOWED[word]] = _INTEGERS.get(_ALLOWED[word], float)(words.pop(0))
            except (IndexError, ValueError) as error:
                raise InvalidInput("arguments", f"need a number after {word}") from error
        return cls(**found)  # type: ignore[arg-type]  # integers stay integers by _INTEGERS

    @property
    def arguments(self) -> str:
        """The full command line."""
        return (
            "--quiet --cb_explore_adf --cb_type mtr --squarecb --gamma_exponent 0 --power_t 0 --invariant --noconstant "
            f"--gamma_scale {self.gamma!r} --epsilon {self.epsilon!r} --learning_rate {self.learning_rate!r} "
            f"--l2 {self.l2!r} --bit_precision {self.bits} --random_seed {self.seed} "
            "--cb_min_cost -1 --cb_max_cost 0 " + " ".join(f"--quadratic {pair}" for pair in ("dw", "uw", "xw", "xa"))
        )


_ALLOWED = {
    "-l": "learning_rate",
    "--learning_rate": "learning_rate",
    "--gamma_scale": "gamma",
    "--epsilon": "epsilon",
    "--l2": "l2",
    "-b": "bits",
    "--bit_precision": "bits",
    "--random_seed": "seed",
}
_INTEGERS: dict[str, Any] = {"bits": int, "seed": int}


class VowpalWabbitPolicy:
    """SquareCB over a shortlist. Not thread-safe, not picklable: one owner, everyone else loads its bytes."""

    def __init__(self, settings: VwSettings | None = None) -> None:
        self._settings = settings or VwSettings()
        self._tastes, self._trust = Tastes(), Trust()
        self._workspace: Any = vowpalwabbit.Workspace(self._settings.arguments)
        for step in range(_WARM_STEPS):
            qoe = ((step * 61) % 101) / 100.0
            self._workspace.learn(f"shared |s warm\n0:{_fixed(-qoe)}:{_WARM_SHARE} |p qoe:{_fixed(qoe)}")

    @property
    def settings(self) -> VwSettings:
        """What it was made with."""
        return self._settings

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def probabilities(self, context: Context, candidates: Sequence[Candidate]) -> Floats:
        """SquareCB's distribution, shape (len(candidates),), float64, strictly positive, summing to 1.

        Raises InvalidInput for a context or candidate that must not reach the model, PolicyFailure if the
        model returns no distribution.
        """
        check_context(context)
        check_candidates(candidates)
        share, liking = self._trust.share, self._tastes.liking(context, candidates)
        lines = [_shared_line(context)]
        for each, liked in zip(candidates, (liking.mean + liking.hope).tolist(), strict=True):
            expected = each.prediction.qoe + each.prediction.bonus + liked
            lines.append(_action_line(context, each, expected, share))
        answered, _ = _asked(self._workspace, "\n".join(lines))
        return _distribution(answered, len(candidates))

    def learn(self, interaction: Interaction) -> None:
        """One least-squares step on the action that was taken, then one of the tastes. Raises InvalidInput,
        unchanged."""
        check_interaction(interaction)
        context, chosen = interaction.context, interaction.candidates[interaction.chosen]
        liked = float(self._tastes.liking(context, (chosen,)).mean[0])
        expected = min(max(chosen.prediction.qoe + liked, 0.0), 1.0)
        shared, line = _shared_line(context), _action_line(context, chosen, expected)
        _, (cost, level) = _asked(self._workspace, f"{shared}\n{line}\n|p none")
        self._trust.learn(level - cost - expected, interaction.reward + level - expected)
        self._tastes.learn(context, chosen, interaction.reward - chosen.prediction.qoe)
        self._workspace.learn(f"{shared}\n0:{_fixed(-interaction.reward)}:1 {line}")

    def to_bytes(self) -> bytes:
        """SHA-256, header with settings, model: identical for an identical log."""
        model = _without_prediction_counter(_canonical(self._workspace), self._settings.arguments)
        header = {
            "schema": FEATURE_SCHEMA,
            "settings": asdict(self._settings),
            "trust": asdict(self._trust),
            "tastes": _packed(self._tastes.state()),
        }
        body = json.dumps(header, sort_keys=True).encode() + b"\n" + model
        return MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes, *, digest: str | None = None, probes: Probes | None = None) -> Self:
        """The policy that ``to_bytes`` wrote; checked against its own and, if given, the registered digest
        and probes.

        Raises CorruptPolicy for bytes that are truncated, altered, of another schema, hold a model of other settings
        than they say, or predict something else.
        """
        if not isinstance(data, bytes):
            raise CorruptPolicy(f"must be bytes, is {type(data).__name__}")
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise CorruptPolicy("bytes do not match the registered digest")
        settings, trust, tastes, model = _opened(data)
        policy = cls.__new__(cls)
        policy._settings, policy._trust, policy._tastes = settings, trust, tastes
        policy._workspace = _loaded(model, settings.l2)
        if _options(policy._workspace) != _options_of(settings.arguments):
            raise CorruptPolicy("holds a model of other settings than its header says")
        if probes is not None:
            policy.verify(probes)
        return policy

    def probe_vectors(self) -> Probes:
        """Distributions over a few fixed probes, to be stored with the bytes."""
        return [self.probabilities(context, candidates).tolist() for context, candidates in _probes()]

    def verify(self, probes: Probes) -> None:
        """Raise CorruptPolicy unless the probes come out as they were stored."""
        found = self.probe_vectors()
        try:
            stored = [np.array(probe, dtype=np.float64) for probe in probes]
        except (TypeError, ValueError) as error:
            raise CorruptPolicy(f"has probes that cannot be read: {error}") from error
        if [each.shape for each in stored] != [(len(each),) for each in found] or not all(
            np.allclose(one, other, rtol=0, atol=PROBE_TOLERANCE) for one, other in zip(found, stored, strict=True)
        ):
            raise CorruptPolicy("does not predict its probes")


def _asked(workspace: Any, example: str) -> tuple[object, list[float]]:
    """The distribution over the actions of one example in text, and the predicted cost of each.

    As ``Workspace.predict``, without a Python object per line: those cost three times what the model does.
    """
    lines = workspace._parse(example)
    try:
        pylibvw.vw.predict_multi(workspace, lines)
        return lines[0].get_action_scores(), [line.get_partial_prediction() for line in lines[1:]]
    finally:
        pylibvw.vw._finish_example_multi_ex(workspace, lines)


def escaped(text: str) -> str:
    """Text as a feature name: no character that Vowpal Wabbit reads as syntax, one name per text.

    >>> escaped("a|b:1 c"), escaped("é")
    ('a_7c_b_3a_1_20_c', '_e9_')
    """
    return _UNSAFE.sub(lambda found: f"_{ord(found.group()):x}_", text)


@lru_cache(maxsize=4096)
def _named(prefix: str, text: str) -> str:
    return f"{prefix}_{escaped(text)}"


def _fixed(value: float) -> str:
    """Plain decimals: Vowpal Wabbit reads a cost of -8.023204931024695e-179 as NaN, and stays NaN for good."""
    return f"{value:.6f}"


def _valued(feature: str, value: float) -> str:
    text = _fixed(value)
    return "" if text in ("0.000000", "-0.000000") else f" {feature}:{text}"


def _shared_line(context: Context) -> str:
    parts = ["shared |d ", _named("d", context.device), " |k ", _named("k", context.device_class)]
    parts += [" |u ", _named("u", context.application), " |x always"]
    for key in sorted(context.features):
        value = context.features[key]
        if isinstance(value, str):
            parts.append(f" {_named('f', key)}_is_{escaped(value)}")
        else:
            parts.append(_valued(_named("f", key), _squashed(value)))
    return "".join(parts)


def _squashed(value: float) -> float:
    """Telemetry of any scale within +-LARGEST_FEATURE: linear up to 1, then logarithmic."""
    size = abs(value)
    squashed = size if size <= 1 else min(1.0 + math.log(size) / 4.0, LARGEST_FEATURE)
    return squashed if value > 0 else -squashed


def _action_line(context: Context, candidate: Candidate, expected: float, trust: float = 1.0) -> str:
    """Namespaces: p the QoE that is expected, w the prediction's parts (weights start at zero), a what the action is;
    both scaled by trust."""
    prediction = candidate.prediction
    late = math.log(max(prediction.p95_ms, 1e-3) / context.slo_p95_ms)
    accuracy, names = _of_action(candidate.action)
    return (
        f"|p qoe:{min(max(expected, -1.0), 1.0):.6f}"
        f" |w:{trust:.4f} hit:{prediction.slo_hit_share - 1.0:.6f}"
        f" late:{min(max(late, -3.0), 3.0) / 3.0:.6f} risk:{prediction.slo_violation_probability:.6f}"
        f" cpu:{_squashed(prediction.cpu_ms_per_request / 100.0):.6f}{accuracy} |a:{trust:.4f} {names}"
    )


_MOST_ACTIONS = 4096
_texts: dict[int, tuple[Action, tuple[str, str]]] = {}


def _of_action(action: Action) -> tuple[str, str]:
    """What an action contributes wherever it is a candidate; kept by identity, which is cheaper than its hash."""
    found = _texts.get(id(action))
    if found is not None and found[0] is action:
        return found[1]
    if len(_texts) >= _MOST_ACTIONS:
        _texts.clear()
    variant, configuration = action.variant, action.configuration
    names = _named("v", variant.digest[:12]), _named("c", configuration.key), _named("p", variant.precision)
    text = _valued("accuracy", variant.accuracy - 1.0), " ".join(names)
    _texts[id(action)] = action, text
    return text


def _distribution(predicted: object, count: int) -> Floats:
    if not isinstance(predicted, list) or len(predicted) != count:
        raise PolicyFailure(f"model answered {type(predicted).__name__} for {count} candidates")
    total = math.fsum(predicted)
    if not abs(total - 1.0) <= SUM_TOLERANCE or min(predicted) < -1e-6:
        raise PolicyFailure(f"model answered no distribution: sum {total:g}")
    shares = np.array([max(share, 1e-6) for share in predicted], dtype=np.float64)
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def _saved(workspace: Any) -> bytes:
    """Vowpal Wabbit saves by file name only: a private file, gone before this returns."""
    with tempfile.TemporaryDirectory(prefix="vw-") as folder:
        path = os.path.join(folder, "model")
        workspace.save(path)
        with open(path, "rb") as file:
            return file.read()


def _loaded(model: bytes, l2: float = 0.0) -> Any:
    """The model, with all options that it was made with; ``l2`` is the one that it does not keep."""
    with tempfile.TemporaryDirectory(prefix="vw-") as folder:
        path = os.path.join(folder, "model")
        with open(path, "wb") as file:
            file.write(model)
        try:
            return vowpalwabbit.Workspace(f"--quiet --l2 {l2!r} -i {path}")
        except Exception as error:  # whatever the C++ side throws for bytes that it cannot read
            raise CorruptPolicy(f"model cannot be loaded: {error}") from error


def _options(workspace: Any) -> list[str]:
    """The options of a learner as Vowpal Wabbit understood them, without the file that it was read from; nor a seed of
    0, which a model does not keep."""
    words = workspace.get_arguments().split(" --")
    return [word for word in words if not word.startswith("initial_regressor ") and word != "random_seed 0"]


@lru_cache(maxsize=16)
def _options_of(arguments: str) -> list[str]:
    return _options(vowpalwabbit.Workspace(arguments))


def _canonical(workspace: Any) -> bytes:
    """Saved, loaded and saved again: loading drops loss statistics that depend on where the process
    restarted."""
    return _saved(_loaded(_saved(workspace)))


@lru_cache(maxsize=16)
def _prediction_counter(arguments: str) -> int:
    """Where a model keeps how many examples it has seen, predictions included (unused, since ``power_t`` is
    0).

    Found by comparing an untouched model with one that predicted once: they differ in this one double.
    """
    fresh, asked = vowpalwabbit.Workspace(arguments), vowpalwabbit.Workspace(arguments)
    asked.predict("shared |s x\n|p qoe:1\n|p qoe:0.5")
    before, after = _canonical(fresh), _canonical(asked)
    for offset in range(len(before) - 7):
        elsewhere = before[:offset] + after[offset : offset + 8] + before[offset + 8 :]
        if elsewhere == after and _double(after, offset) == _double(before, offset) + 1:
            return offset
    raise PolicyFailure("this version of Vowpal Wabbit stores models in an unknown form")


def _double(data: bytes, offset: int) -> float:
    return float(struct.unpack_from("<d", data, offset)[0])


def _without_prediction_counter(model: bytes, arguments: str) -> bytes:
    offset = _prediction_counter(arguments)
    return model[:offset] + struct.pack("<d", 1.0) + model[offset + 8 :]


def _packed(state: dict[str, Any]) -> str:
    """A state that may be of ten thousand devices, as short text."""
    return base64.b64encode(zlib.compress(json.dumps(state, sort_keys=True).encode(), 1)).decode()


def _unpacked(text: str) -> Any:
    unpacking = zlib.decompressobj()
    state = unpacking.decompress(base64.b64decode(text, validate=True), LARGEST_TASTES_BYTES)
    if not unpacking.eof:
        raise ValueError("tastes are cut off or too large")
    return json.loads(state)


def _opened(data: bytes) -> tuple[VwSettings, Trust, Tastes, bytes]:
    if not data.startswith(MAGIC):
        raise CorruptPolicy("is no Vowpal Wabbit policy")
    digest, _, body = data[len(MAGIC) :].partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CorruptPolicy("does not match its digest")
    line, _, model = body.partition(b"\n")
    try:
        header = json.loads(line)
        if header["schema"] != FEATURE_SCHEMA:
            raise CorruptPolicy(f"has feature schema {header['schema']}, this code reads {FEATURE_SCHEMA}")
        known = Trust.from_record(header["trust"]), Tastes.from_state(_unpacked(header["tastes"]))
        return _settings_from(header["settings"]), *known, model
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error, InvalidInput) as error:
        raise CorruptPolicy(f"header cannot be read: {error!r}") from error


def _settings_from(record: Mapping[str, Any]) -> VwSettings:
    return VwSettings(**{field.name: record[field.name] for field in fields(VwSettings)})


@lru_cache(maxsize=1)
def _probes() -> tuple[tuple[Context, tuple[Candidate, ...]], ...]:
    def candidate(index: int, qoe: float) -> Candidate:
        variant = Variant(f"{index:064x}", f"probe-{index}", 1_000_000, 0.9 + 0.02 * index)
        prediction = Prediction(10.0 + index, 20.0 + index, 0.2, 5.0, 0.1 * index, qoe, 8.0, slo_hit_share=0.9)
        return Candidate(Action(variant, Configuration(2**index, 1, 1)), prediction)

    contexts: Iterable[Context] = (
        Context("probe-device", "probe-class", "probe", 5.0, 50.0, features={"temperature": 0.6}),
        Context("probe-other", "probe-class", "probe", 50.0, 20.0, features={"network": "wifi"}),
    )
    candidates = tuple(candidate(index, qoe) for index, qoe in enumerate((0.8, 0.79, 0.5, 0.1)))
    return tuple((context, candidates) for context in contexts)
