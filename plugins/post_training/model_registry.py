"""Which version of a registered model is the champion, and how another takes its place, in MLflow's registry.

The alias ``champion`` is what is served; ``previous`` is what was before. MLflow moves an alias in one step
but has no step that compares first, so two promoters at once are told apart by the registry's own order. A
version is registered with the number of the champion that it was compared with; of those that are still
pending against the same champion the lowest number wins, and whoever loses to one that has not moved the
alias yet moves it there. Numbers are given out one after the other, so of two promoters one always sees the
other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from post_training.errors import InvalidRequestError, ModelError
from post_training.tracking import Tracking, answers, of_every_page

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"

TAG_CHAMPION = "post_training.champion"
"""Of the registered model: the version that was promoted last. A deleted version takes its alias along."""

TAG_AGAINST = "post_training.compared_with"
"""Of a version: the champion that it was compared with; 0 is none."""

TAG_CANDIDACY = "post_training.candidacy"
"""Of a version: the retraining's MLflow run, which may promote once."""

TAG_OUTCOME = "post_training.outcome"
"""Of a version: promoted, lost or rolled_back; absent while its promotion is pending."""

TAG_ROLLBACK_REQUEST = "post_training.rollback_request"
"""Of a version that was rolled back: on whose request, and to which version."""

MAX_DESCRIPTION_LENGTH = 5000
"""Characters that MLflow's database holds."""

PROMOTED, LOST, ROLLED_BACK = "promoted", "lost", "rolled_back"

TAG_ROLLBACK = "post_training.rollback"
"""Of the registered model: JSON of its newest rollback, which is finished before there is another."""

_MODEL_URI = re.compile(r"models:/(?P<id>m-[0-9a-f]{32})", re.ASCII)
_ALIAS_URI = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[\w-]+)(?P<rest>(/[^/]+)*)", re.ASCII)


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int
    tags: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def uri(self) -> str:
        """What MLflow, transformers' users and our requests call it."""
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True)
class Candidate:
    """A model that passed its gates.

    :param source: URI of the checkpoint, a logged model.
    :param candidacy: the MLflow run of what made it; the same one is registered once.
    :param against: number of the champion that it was compared with, 0 for none.
    :param tags: its lineage.
    """

    name: str
    source: str
    candidacy: str
    against: int
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""

    @property
    def model_id(self) -> str | None:
        """The logged model's id, which MLflow wants beside its URI."""
        match = _MODEL_URI.fullmatch(self.source)
        return match["id"] if match is not None else None


@dataclass(frozen=True)
class _Rollback:
    """What a rollback does, written before it begins.

    :param request: who asked for it; empty is unknown.
    """

    request: str
    from_version: int
    to_version: int
    done: bool = False


class LostError(ModelError):
    """Another version became champion since the candidate was compared, or it was rolled back.

    :param crowned: a version whose own promotion was cut off, and which was made the champion instead.
    """

    def __init__(self, message: str, crowned: Version | None = None) -> None:
        super().__init__(message)
        self.crowned = crowned


class PromotedBeforeError(ModelError):
    """The candidate's run has promoted already, and what is asked for now is something else."""


class ModelRegistry:
    """Champions. Every method raises RecordUnavailableError when MLflow fails.

    :param tracking: the tracking server, which holds the registry too.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def pinned(self, uri: str) -> str:
        """Return a model's URI with the version's number for an alias; every other URI as it is.

        :raises ModelError: if there is no such alias.
        """
        match = _ALIAS_URI.fullmatch(uri)
        if match is None:
            return uri
        name = match["name"]
        version = self._numbered(name, _number(self._model(name), match["alias"]))
        if version is None:
            raise ModelError(f"no version of the registered model {name!r} is {match['alias']!r}")
        return version.uri + match["rest"]

    def champion(self, name: str) -> Version | None:
        """Return the champion, None where there has never been one.

        :raises ModelError: if it was deleted.
        """
        model = self._model(name)
        found = self._numbered(name, _number(model, CHAMPION))
        if found is not None:
            return found
        was = model.tags.get(TAG_CHAMPION) if model is not None else None
        if was is not None:
            raise ModelError(
                f"the champion of {name!r}, version {was}, was deleted or lost its alias: roll back to"
                f" the one before, or give the alias {CHAMPION!r} to a version"
            )
        return None

    def opponent(self, name: str, candidacy: str | None) -> Version | None:
        """Return what a candidate is compared with: the champion, or what it replaced if that is itself.

        :param candidacy: the candidate's, whose task may be repeated after its promotion.
        :raises ModelError: if the champion was deleted.
        """
        champion = self.champion(name)
        if champion is None or candidacy is None or champion.tags.get(TAG_CANDIDACY) != candidacy:
            return champion
        return self._numbered(name, int(champion.tags.get(TAG_AGAINST, "0")))

    def promote(self, candidate: Candidate) -> Version:
        """Register a candidate and make it the champion; a repeated call finds what the first one did.

        :raises LostError: if another version has become champion, or was registered before against the same.
        :raises PromotedBeforeError: if it was promoted, and another one is the champion by now; or if its run
            has registered another checkpoint.
        :raises InvalidRequestError: if MLflow refuses the name or the source.
        """
        mine = self._registered(candidate)
        if mine.source not in ("", candidate.source):
            raise PromotedBeforeError(
                f"The run has registered {mine.uri} of another checkpoint before: start a new run instead."
            )
        outcome = mine.tags.get(TAG_OUTCOME)
        if outcome == PROMOTED:
            return self._still_champion(mine)
        if outcome is not None:
            raise LostError(_ended(mine, outcome))
        candidate = replace(candidate, against=int(mine.tags.get(TAG_AGAINST, 0)))  # what rivals see
        known = {version.number: version for version in self._versions(candidate.name)}
        model = self._model(candidate.name)  # read last: a rival that was not pending had moved the alias
        number = _number(model, CHAMPION)
        if number == mine.number:
            self._finish(mine)
            return mine
        if number != candidate.against or (number == 0 and _was_promoted(model)):
            self._set_tag(mine, TAG_OUTCOME, LOST)
            raise LostError(_changed(candidate, number))
        old = known.get(candidate.against)
        rival = min(filter(partial(_precedes, mine), known.values()), key=_in_order, default=None)
        if rival is not None:
            self._crown(rival, old)
            self._set_tag(mine, TAG_OUTCOME, LOST)
            raise LostError(_changed(candidate, rival.number), rival)
        self._crown(mine, old)
        return mine

    def promoted(self, name: str, candidacy: str) -> Version | None:
        """Return the version that a run has promoted, whatever became of it since; None if it has not."""
        versions = self._versions(name)
        own = (one for one in versions if one.tags.get(TAG_CANDIDACY) == candidacy)
        return next((one for one in own if one.tags.get(TAG_OUTCOME) in (PROMOTED, ROLLED_BACK)), None)

    def _still_champion(self, mine: Version) -> Version:
        number = _number(self._model(mine.name), CHAMPION)
        if number != mine.number:
            raise PromotedBeforeError(
                f"{mine.uri} was promoted before, and the champion is version {number} by now."
            )
        return mine

    def rollback(self, name: str, request: str = "") -> tuple[Version, Version]:
        """Make the previous version the champion again; return it and the one that was.

        What is pending against it then has lost. ``previous`` becomes what that one had replaced. A rollback
        that was cut off is finished by the next call, which then is that one.

        :param request: who asks; a call with what a rollback was asked with before returns what that did.
        :raises ModelError: if there is no version before, or it was deleted.
        """
        model = self._model(name)
        known = {version.number: version for version in self._versions(name)}
        rolled_back = next((one for one in known.values() if _was_asked_for(one, request)), None)
        if rolled_back is not None:
            to_version = int(rolled_back.tags[TAG_ROLLBACK_REQUEST].rpartition(" ")[2])
            return known.get(to_version, Version(name, to_version)), rolled_back
        rollback = _newest_rollback(model)
        cut_off = rollback is not None and _is_cut_off(rollback, model, known)
        if rollback is None or not (cut_off or (request and rollback.request == request)):
            rollback, cut_off = _next_rollback(name, model, known, request), True
            self._set_model_tag(name, TAG_ROLLBACK, json.dumps(asdict(rollback)))
        to = known.get(rollback.to_version, Version(name, rollback.to_version))
        if cut_off:
            self._finish_rollback(rollback, to, known)
        return to, known.get(rollback.from_version, Version(name, rollback.from_version))

    def _finish_rollback(self, rollback: _Rollback, to: Version, known: Mapping[int, Version]) -> None:
        for version in known.values():
            pending = TAG_AGAINST in version.tags and TAG_OUTCOME not in version.tags
            if version.number == rollback.from_version or (pending and version.number > to.number):
                self._set_tag(version, TAG_OUTCOME, ROLLED_BACK)
        self._set_alias(to, CHAMPION)
        self._set_model_tag(to.name, TAG_CHAMPION, str(to.number))
        before = known.get(int(to.tags.get(TAG_AGAINST, "0")))
        if before is not None:
            self._set_alias(before, PREVIOUS)
        else:
            with answers():
                self._tracking.client.delete_registered_model_alias(to.name, PREVIOUS)
        self._set_model_tag(to.name, TAG_ROLLBACK, json.dumps(asdict(replace(rollback, done=True))))
        gone = known.get(rollback.from_version)
        if rollback.request and gone is not None:
            self._set_tag(gone, TAG_ROLLBACK_REQUEST, f"{rollback.request} {to.number}")

    def _registered(self, candidate: Candidate) -> Version:
        """Return the candidate's version, made unless an attempt before has."""
        found = self._of_candidacy(candidate)
        if found is not None:
            return found
        self._check_source(candidate)
        with answers("model.name"):
            self._make_model(candidate.name)
        tags = {
            **candidate.tags,
            TAG_CANDIDACY: candidate.candidacy,
            TAG_AGAINST: str(candidate.against),
        }
        with answers("checkpoint"):
            made = _version(
                self._tracking.client.create_model_version(
                    candidate.name,
                    candidate.source,
                    tags=tags,
                    description=candidate.description[:MAX_DESCRIPTION_LENGTH],
                    model_id=candidate.model_id,
                )
            )
        first = self._of_candidacy(candidate)
        if first is None or first.number == made.number:
            return made
        self._set_tag(made, TAG_OUTCOME, LOST)  # another attempt, thought dead, was faster
        return first

    def _of_candidacy(self, candidate: Candidate) -> Version | None:
        """Return the first version that was registered for the candidate."""
        versions = self._versions(candidate.name)
        return next((one for one in versions if one.tags.get(TAG_CANDIDACY) == candidate.candidacy), None)

    def _check_source(self, candidate: Candidate) -> None:
        """Refuse a logged model that is not there, which MLflow would call an error of its own."""
        from mlflow.exceptions import MlflowException

        if candidate.model_id is None:
            return
        with answers():
            try:
                self._tracking.client.get_logged_model(candidate.model_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise InvalidRequestError.of(
                    "checkpoint", f"MLflow has no logged model {candidate.model_id}"
                ) from None

    def _make_model(self, name: str) -> None:
        """Make the registered model unless it is there."""
        from mlflow.exceptions import MlflowException

        if self._model(name) is not None:
            return
        try:
            self._tracking.client.create_registered_model(name)
        except MlflowException:
            if self._model(name) is None:  # nor was another promoter faster
                raise

    def _crown(self, version: Version, old: Version | None) -> None:
        """Move the aliases; the champion's comes last, and with it the promotion is there."""
        if old is not None:
            self._set_alias(old, PREVIOUS)
        self._set_alias(version, CHAMPION)
        self._finish(version)

    def _finish(self, version: Version) -> None:
        self._set_model_tag(version.name, TAG_CHAMPION, str(version.number))
        self._set_tag(version, TAG_OUTCOME, PROMOTED)

    def _set_alias(self, version: Version, alias: str) -> None:
        _set(self._tracking.client.set_registered_model_alias, version.name, alias, str(version.number))

    def _set_tag(self, version: Version, key: str, value: str) -> None:
        _set(self._tracking.client.set_model_version_tag, version.name, str(version.number), key, value)

    def _set_model_tag(self, name: str, key: str, value: str) -> None:
        _set(self._tracking.client.set_registered_model_tag, name, key, value)

    def _numbered(self, name: str, number: int) -> Version | None:
        """Return a version, None where it was deleted or the number is 0."""
        return next(iter(self._versions(name, number)), None) if number else None

    def _model(self, name: str) -> Any:
        """Return the registered model, None where there is none."""
        with answers():
            found = self._tracking.client.search_registered_models(f"name='{checked_name(name)}'")
        return next(iter(found), None)

    def _versions(self, name: str, number: int | None = None) -> list[Version]:
        """Return the versions that were not deleted, all or one, in the order of their numbers."""
        wanted = f"name='{checked_name(name)}'"
        if number is not None:
            wanted += f" AND version_number = {number}"
        search = partial(self._tracking.client.search_model_versions, wanted)
        return sorted(map(_version, of_every_page(search)), key=_in_order)


def checked_name(name: str) -> str:
    """Return a registered model's name, which MLflow's filter language can hold.

    :raises InvalidRequestError: if it cannot.
    """
    if not re.fullmatch(r"[\w. -]{1,200}", name):
        raise InvalidRequestError.of(
            "model.name", f"may hold letters, digits, blanks and _ . -, got {name[:80]!r}"
        )
    return name


def _set(call: Callable[..., None], *args: str) -> None:
    """Set an alias or a tag; MLflow, asked by two at once for what is not there yet, refuses one of them."""
    from mlflow.exceptions import MlflowException

    with answers():
        try:
            call(*args)
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            call(*args)


def _was_asked_for(version: Version, request: str) -> bool:
    """Whether a version was rolled back on this very request."""
    return bool(request) and version.tags.get(TAG_ROLLBACK_REQUEST, "").rpartition(" ")[0] == request


def _in_order(version: Version) -> int:
    return version.number


def _number(model: Any, alias: str) -> int:
    """Return the number that bears an alias of a registered model, 0 where none does."""
    return int(model.aliases.get(alias, 0)) if model is not None else 0


def _was_promoted(model: Any) -> bool:
    """Whether a registered model has ever had a champion."""
    return model is not None and TAG_CHAMPION in model.tags


def _newest_rollback(model: Any) -> _Rollback | None:
    text = model.tags.get(TAG_ROLLBACK) if model is not None else None
    return _Rollback(**json.loads(text)) if text else None


def _is_cut_off(rollback: _Rollback, model: Any, known: Mapping[int, Version]) -> bool:
    """Whether a rollback is still to be finished, and nothing has happened since that forbids it."""
    untouched = (0, rollback.from_version, rollback.to_version)
    return not rollback.done and rollback.to_version in known and _number(model, CHAMPION) in untouched


def _next_rollback(name: str, model: Any, known: Mapping[int, Version], request: str) -> _Rollback:
    """Return what is to be done.

    :raises ModelError: if there is no version to go back to.
    """
    champion, previous = _number(model, CHAMPION), _number(model, PREVIOUS)
    if champion and previous == champion:  # a promotion was cut off between the aliases
        previous = int(known[champion].tags.get(TAG_AGAINST, "0")) if champion in known else 0
    if previous not in known:
        raise ModelError(f"the registered model {name!r} has no version {PREVIOUS!r} to roll back to")
    last = int(model.tags.get(TAG_CHAMPION, previous))
    return _Rollback(request, champion or last, previous)


def _precedes(mine: Version, other: Version) -> bool:
    """Whether another pending candidacy against the same champion is older."""
    pending = TAG_OUTCOME not in other.tags and TAG_CANDIDACY in other.tags
    return (
        pending and other.number < mine.number and other.tags.get(TAG_AGAINST) == mine.tags.get(TAG_AGAINST)
    )


def _ended(mine: Version, outcome: str) -> str:
    if outcome == ROLLED_BACK:
        return f"The candidate, version {mine.number} of {mine.name}, was rolled back."
    return f"The candidate, version {mine.number} of {mine.name}, has lost to another champion before."


def _changed(candidate: Candidate, now: int) -> str:
    was = f"version {candidate.against}" if candidate.against else "no champion"
    is_now = f"version {now}" if now else "gone"
    return (
        f"The candidate was compared with {was} of {candidate.name}, and the champion is {is_now} by now:"
        " another run promoted meanwhile, or somebody moved the alias."
    )


def _version(found: ModelVersion) -> Version:
    return Version(found.name, int(found.version), dict(found.tags or {}), found.source or "")
