"""Champions, in the registry of a real MLflow server."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Barrier
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from post_training.errors import InvalidRequestError, ModelError, RecordUnavailableError
from post_training.model_registry import (
    CHAMPION,
    LOST,
    PREVIOUS,
    PROMOTED,
    ROLLED_BACK,
    TAG_AGAINST,
    TAG_CANDIDACY,
    TAG_CHAMPION,
    TAG_OUTCOME,
    Candidate,
    LostError,
    ModelRegistry,
    PromotedBeforeError,
    Version,
)
from post_training.tracking import Tracking, TrackingServer
from tests.mlflow_server import MLflowServer

ANYTHING = re.compile("")
WRITES = ("create_", "set_", "delete_")


@pytest.fixture(scope="module")
def source(mlflow_server: MLflowServer) -> str:
    """URI of a logged model."""
    client = MlflowClient(mlflow_server.uri)
    model = client.create_logged_model("0", name="epoch-0")
    return f"models:/{client.finalize_logged_model(model.model_id, 'READY').model_id}"


@pytest.fixture
def client(mlflow_server: MLflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri)


@pytest.fixture
def tracking(mlflow_server: MLflowServer) -> Tracking:
    return Tracking(TrackingServer(mlflow_server.uri))


@pytest.fixture
def other(mlflow_server: MLflowServer) -> ModelRegistry:
    """What another process uses at the same time."""
    return ModelRegistry(Tracking(TrackingServer(mlflow_server.uri)))


@pytest.fixture
def registry(tracking: Tracking) -> ModelRegistry:
    return ModelRegistry(tracking)


@pytest.fixture
def nobody() -> ModelRegistry:
    """One whose MLflow does not answer."""
    return ModelRegistry(Tracking(TrackingServer("http://127.0.0.1:9")))


@pytest.fixture
def name() -> str:
    """A registered model that is not there yet."""
    return f"support {uuid4().hex[:8]}"


@pytest.fixture
def candidate(name: str, source: str) -> Callable[..., Candidate]:
    """Candidates, by what they were compared with; each is of another retraining, unless it is named."""

    def made(against: int, candidacy: str | None = None) -> Candidate:
        return Candidate(name, source, candidacy or uuid4().hex, against, {"a": "b"}, "it is better")

    return made


@pytest.fixture
def promoted(
    registry: ModelRegistry, candidate: Callable[..., Candidate]
) -> Callable[[int], list[Candidate]]:
    """Promote so many candidates, one after the other."""
    return lambda count: [given for n in range(count) if registry.promote(given := candidate(n))]


def at_call(
    tracking: Tracking,
    method: str,
    act: Callable[[], Any],
    *,
    args: re.Pattern[str] = ANYTHING,
    behind: bool = False,
) -> None:
    """Act before or behind the client's first call of a method, or its first with such arguments."""
    real, acted = getattr(tracking.client, method), []

    def wrapped(*given: Any, **further: Any) -> Any:
        if acted or not args.search(" ".join(map(str, given))):
            return real(*given, **further)
        acted.append(given)
        if not behind:
            act()
        answer = real(*given, **further)
        if behind:
            act()
        return answer

    setattr(tracking.client, method, wrapped)


def cut() -> None:
    raise ConnectionError("cut off")


class Cut:
    """Fails at one of the client's writes: before it reaches the server, or when it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, client: MlflowClient, at: int, *, done: bool) -> None:
        self.happened = False
        self._count = itertools.count()
        self._at, self._done = at, done
        for method in dir(MlflowClient):
            if method.startswith(WRITES):
                monkeypatch.setattr(client, method, partial(self._call, getattr(client, method)))

    def _call(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mine = next(self._count) == self._at
        if mine:
            self.happened = True
        if mine and not self._done:
            cut()
        answer = real(*args, **kwargs)
        if mine:
            cut()
        return answer


def aliases(client: MlflowClient, name: str) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}


def outcomes(client: MlflowClient, name: str) -> list[str | None]:
    """What became of each version, by number."""
    versions = client.search_model_versions(f"name='{name}'")
    return [one.tags.get(TAG_OUTCOME) for one in sorted(versions, key=lambda one: int(one.version))]


def register(client: MlflowClient, candidate: Candidate) -> None:
    """Leave a version as an attempt does that ends before it moves an alias."""
    if not client.search_registered_models(f"name='{candidate.name}'"):
        client.create_registered_model(candidate.name)
    tags = {TAG_CANDIDACY: candidate.candidacy, TAG_AGAINST: str(candidate.against)}
    client.create_model_version(candidate.name, candidate.source, tags=tags, model_id=candidate.model_id)


def test_what_was_never_promoted_has_no_champion(
    registry: ModelRegistry, client: MlflowClient, name: str
) -> None:
    assert registry.champion(name) is None
    client.create_registered_model(name)
    assert registry.champion(name) is None


def test_two_promotions(
    registry: ModelRegistry, client: MlflowClient, candidate: Callable[..., Candidate], name: str
) -> None:
    first = registry.promote(candidate(0))
    assert (first.number, first.uri) == (1, f"models:/{name}/1")
    assert aliases(client, name) == {CHAMPION: 1}
    second = registry.promote(candidate(1, "run-2"))
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert client.get_registered_model(name).tags[TAG_CHAMPION] == "2"
    champion = registry.champion(name)
    assert champion is not None
    assert champion.number == second.number == 2
    assert champion.tags == {
        "a": "b",
        TAG_CANDIDACY: "run-2",
        TAG_AGAINST: "1",
        TAG_OUTCOME: PROMOTED,
    }
    assert client.get_model_version(name, "2").description == "it is better"
    assert outcomes(client, name) == [PROMOTED, PROMOTED]


def test_a_checkpoint_names_its_versions(
    registry: ModelRegistry, client: MlflowClient, candidate: Callable[..., Candidate], name: str
) -> None:
    """MLflow's pages lead from the one to the other."""
    given = candidate(0)
    registry.promote(given)
    assert given.model_id is not None
    assert f'"{name}"' in client.get_logged_model(given.model_id).tags["mlflow.modelVersions"]


def test_a_repeated_promotion_finds_the_first(
    registry: ModelRegistry,
    other: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    name: str,
) -> None:
    given = candidate(0)
    first = registry.promote(given)
    assert registry.promote(given).number == first.number
    registry.promote(candidate(1))
    with pytest.raises(PromotedBeforeError, match="/1 was promoted before, and the champion is version 2"):
        other.promote(given)
    with pytest.raises(PromotedBeforeError, match="/1 of another checkpoint before"):
        other.promote(replace(given, source=f"models:/m-{'0' * 32}"))
    promoted = other.promoted(name, given.candidacy)
    assert promoted is not None
    assert promoted.number == 1
    assert other.promoted(name, "nobody's") is None
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert outcomes(client, name) == [PROMOTED, PROMOTED]


def test_what_was_compared_with_an_older_champion_has_lost(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(2)
    late = candidate(1)
    with pytest.raises(LostError, match=r"^The candidate was compared with version 1 .* is version 2 by now"):
        registry.promote(late)
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert client.get_registered_model(name).tags[TAG_CHAMPION] == "2"
    client.set_registered_model_alias(name, CHAMPION, "1")
    with pytest.raises(LostError, match=r"^The candidate, version 3 of .*, has lost"):
        registry.promote(late)
    assert outcomes(client, name) == [PROMOTED, PROMOTED, LOST]
    assert aliases(client, name)[CHAMPION] == 1


@pytest.mark.parametrize("done", [False, True], ids=["unsent", "unanswered"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("against", [0, 1])
def test_a_promotion_that_was_cut_off_is_repeated(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
    against: int,
    at: int,
    done: bool,
) -> None:
    """The first of all makes the registered model, the second moves two aliases: both are five writes."""
    promoted(against)
    given = candidate(against)
    with pytest.MonkeyPatch.context() as patch:
        fault = Cut(patch, tracking.client, at, done=done)
        with pytest.raises(RecordUnavailableError):
            registry.promote(given)
        assert fault.happened
    assert other.promote(given).number == against + 1
    assert aliases(client, name) == ({CHAMPION: 2, PREVIOUS: 1} if against else {CHAMPION: 1})
    assert outcomes(client, name) == [PROMOTED] * (against + 1)
    assert client.get_registered_model(name).tags[TAG_CHAMPION] == str(against + 1)


def test_the_loser_crowns_who_was_registered_before(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(1)
    rival = candidate(1)
    register(client, rival)
    register(client, candidate(1))
    with pytest.raises(LostError, match="version 2 by now"):
        registry.promote(candidate(1))
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert outcomes(client, name) == [PROMOTED, PROMOTED, None, LOST]
    assert registry.promote(rival).number == 2


def test_a_candidacy_stays_compared_with_what_it_was_registered_with(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    """Else those that were compared with the newer champion would not see it as their rival."""
    promoted(2)
    register(client, candidate(1, "again"))
    with pytest.raises(LostError, match=r"compared with version 1 .* is version 2 by now"):
        registry.promote(candidate(2, "again"))
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert outcomes(client, name) == [PROMOTED, PROMOTED, LOST]


def test_versions_of_others_are_no_rivals(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    """What a person registers, and what was compared with another champion."""
    (first,) = promoted(1)
    client.create_model_version(name, first.source, model_id=first.model_id)
    register(client, candidate(0))
    assert registry.promote(candidate(1)).number == 4
    registry.rollback(name)
    assert outcomes(client, name) == [PROMOTED, None, ROLLED_BACK, ROLLED_BACK]


def test_a_rival_that_somebody_moved_back_does_not_block(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(2)
    client.set_registered_model_alias(name, CHAMPION, "1")
    assert registry.promote(candidate(1)).number == 3
    assert aliases(client, name) == {CHAMPION: 3, PREVIOUS: 1}


def test_of_many_at_once_one_is_promoted(
    mlflow_server: MLflowServer, client: MlflowClient, candidate: Callable[..., Candidate], name: str
) -> None:
    count, against = 6, 0
    registries = [ModelRegistry(Tracking(TrackingServer(mlflow_server.uri))) for _ in range(count)]
    barrier = Barrier(count)

    def attempt(registry: ModelRegistry, given: Candidate) -> Version | LostError:
        barrier.wait()
        try:
            return registry.promote(given)
        except LostError as lost:
            return lost

    with ThreadPoolExecutor(count) as pool:
        for _ in range(3):
            given = [candidate(against) for _ in range(count)]
            results = list(pool.map(attempt, registries, given))
            (winner,) = [result for result in results if isinstance(result, Version)]
            expected = {CHAMPION: winner.number} | ({PREVIOUS: against} if against else {})
            assert aliases(client, name) == expected
            assert client.get_model_version(name, str(winner.number)).tags[TAG_OUTCOME] == PROMOTED
            against = winner.number
    assert sorted(map(str, outcomes(client, name))) == [LOST] * 15 + [PROMOTED] * 3


@pytest.mark.parametrize("method", ["set_registered_model_alias", "set_model_version_tag"])
def test_what_two_set_at_once_is_set(
    registry: ModelRegistry,
    tracking: Tracking,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    name: str,
    method: str,
) -> None:
    """MLflow tells one of them of its database's unique keys."""
    refusal = MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed", BAD_REQUEST)

    def refuse() -> None:
        raise refusal

    at_call(tracking, method, refuse)
    assert registry.promote(candidate(0)).number == 1
    assert aliases(client, name) == {CHAMPION: 1}
    assert outcomes(client, name) == [PROMOTED]


@pytest.mark.parametrize(
    ("method", "args", "behind"),
    [
        ("create_model_version", "", True),
        ("search_model_versions", "", True),
        ("set_registered_model_alias", PREVIOUS, False),
        ("set_registered_model_alias", CHAMPION, False),
        ("set_registered_model_alias", CHAMPION, True),
        ("set_registered_model_tag", "", False),
    ],
)
def test_a_promoter_that_pauses_is_helped(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
    method: str,
    args: str,
    behind: bool,
) -> None:
    """Wherever it stands behind its registration, one that comes meanwhile loses to it."""
    promoted(1)
    rivals = []

    def meanwhile() -> None:
        with pytest.raises(LostError, match="version 2 by now"):
            other.promote(candidate(1))
        rivals.append(other.champion(name))

    pause = partial(at_call, tracking, method, meanwhile, args=re.compile(args), behind=behind)
    if method == "search_model_versions":  # the next one behind its registration
        at_call(tracking, "create_model_version", pause, behind=True)
    else:
        pause()
    assert registry.promote(candidate(1)).number == 2
    assert [champion and champion.number for champion in rivals] == [2]
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert outcomes(client, name) == [PROMOTED, PROMOTED, LOST]


@pytest.mark.parametrize(("args", "behind"), [(PREVIOUS, False), (CHAMPION, False), (CHAMPION, True)])
def test_a_helper_that_pauses_changes_nothing(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
    args: str,
    behind: bool,
) -> None:
    promoted(1)
    rival = candidate(1)
    register(client, rival)
    at_call(
        tracking,
        "set_registered_model_alias",
        lambda: other.promote(rival),
        args=re.compile(args),
        behind=behind,
    )
    with pytest.raises(LostError, match="version 2 by now"):
        registry.promote(candidate(1))
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert outcomes(client, name) == [PROMOTED, PROMOTED, LOST]


def test_who_is_overtaken_before_it_registers_has_lost(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    name: str,
) -> None:
    for against, method in ((0, "create_registered_model"), (1, "create_model_version")):
        faster = partial(other.promote, candidate(against))
        at_call(tracking, method, faster)
        with pytest.raises(LostError, match=r"is version [13] by now"):
            registry.promote(candidate(against))
    assert outcomes(client, name) == [PROMOTED, LOST, PROMOTED, LOST]
    assert aliases(client, name) == {CHAMPION: 3, PREVIOUS: 1}


def test_two_attempts_of_one_retraining_promote_once(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    name: str,
) -> None:
    given, others = candidate(0), []
    at_call(tracking, "create_model_version", lambda: others.append(other.promote(given)))
    assert registry.promote(given).number == others[0].number == 1
    assert outcomes(client, name) == [PROMOTED, LOST]
    assert aliases(client, name) == {CHAMPION: 1}


def test_a_deleted_champion(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(2)
    client.delete_model_version(name, "2")
    with pytest.raises(ModelError, match=r"^the champion of .*, version 2, was deleted"):
        registry.champion(name)
    for against in (0, 2):
        with pytest.raises(LostError, match="the champion is gone by now"):
            registry.promote(candidate(against))
    assert aliases(client, name) == {PREVIOUS: 1}
    to, gone = registry.rollback(name)
    assert (to.number, gone.number) == (1, 2)
    assert aliases(client, name) == {CHAMPION: 1}
    champion = registry.champion(name)
    assert champion is not None
    assert champion.number == 1


def test_a_deleted_model_was_never_promoted(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(1)
    client.delete_registered_model(name)
    assert registry.champion(name) is None
    assert registry.promote(candidate(0)).number == 1


def test_a_first_promotion_seen_half_done_is_no_deleted_champion(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    candidate: Callable[..., Candidate],
    name: str,
) -> None:
    at_call(tracking, "search_registered_models", lambda: other.promote(candidate(0)), behind=True)
    assert registry.champion(name) is None
    champion = registry.champion(name)
    assert champion is not None
    assert champion.number == 1


def test_a_rollback(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    *_, third = promoted(3)
    late, pending = candidate(1), candidate(2)
    with pytest.raises(LostError):
        registry.promote(late)
    register(client, pending)
    to, gone = registry.rollback(name)
    assert (to.number, gone.number) == (2, 3)
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert client.get_registered_model(name).tags[TAG_CHAMPION] == "2"
    assert outcomes(client, name) == [PROMOTED, PROMOTED, ROLLED_BACK, LOST, ROLLED_BACK]
    for rolled_back in (third, pending):
        with pytest.raises(LostError, match=r"^The candidate, version [35] of .*, was rolled back"):
            registry.promote(rolled_back)
    assert registry.promote(candidate(2)).number == 6
    assert aliases(client, name) == {CHAMPION: 6, PREVIOUS: 2}
    assert [version.number for version in registry.rollback(name)] == [2, 6]
    assert [version.number for version in registry.rollback(name)] == [1, 2]
    assert aliases(client, name) == {CHAMPION: 1}
    with pytest.raises(ModelError, match="has no version 'previous' to roll back to"):
        registry.rollback(name)
    assert aliases(client, name) == {CHAMPION: 1}


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_roll_back_to(
    registry: ModelRegistry, promoted: Callable[[int], list[Candidate]], name: str, count: int
) -> None:
    promoted(count)
    with pytest.raises(ModelError, match=f"^the registered model '{name}' has no version 'previous'"):
        registry.rollback(name)


@pytest.mark.parametrize(
    ("at", "done", "request_id"),
    [
        (at, done, request_id)
        for at in range(6)
        for done in (False, True)
        for request_id in ("", "manual.rollback")
        if (at, done, request_id) != (5, True, "")
    ],
)
def test_a_rollback_that_was_cut_off_is_finished(
    registry: ModelRegistry,
    tracking: Tracking,
    other: ModelRegistry,
    client: MlflowClient,
    promoted: Callable[[int], list[Candidate]],
    name: str,
    at: int,
    done: bool,
    request_id: str,
) -> None:
    """The last answer's loss is known from a second rollback only where it is told who asks."""
    promoted(3)
    with pytest.MonkeyPatch.context() as patch:
        fault = Cut(patch, tracking.client, at, done=done)
        with pytest.raises(RecordUnavailableError):
            registry.rollback(name, request_id)
        assert fault.happened
    assert [version.number for version in other.rollback(name, request_id)] == [2, 3]
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 1}
    assert client.get_registered_model(name).tags[TAG_CHAMPION] == "2"
    assert outcomes(client, name) == [PROMOTED, PROMOTED, ROLLED_BACK]


def test_who_asks_twice_rolls_back_once(
    registry: ModelRegistry,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(3)
    for _ in range(2):
        assert [version.number for version in registry.rollback(name, "first")] == [2, 3]
    assert registry.promote(candidate(2)).number == 4
    assert [version.number for version in registry.rollback(name, "first")] == [2, 3]
    assert aliases(client, name) == {CHAMPION: 4, PREVIOUS: 2}
    assert [version.number for version in registry.rollback(name, "second")] == [2, 4]
    assert [version.number for version in registry.rollback(name, "third")] == [1, 2]
    assert aliases(client, name) == {CHAMPION: 1}


def test_what_was_promoted_behind_half_a_rollback_stays(
    registry: ModelRegistry,
    tracking: Tracking,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    promoted(2)
    at_call(tracking, "set_registered_model_alias", cut, behind=True)
    with pytest.raises(RecordUnavailableError):
        registry.rollback(name, "first")
    assert registry.promote(candidate(1)).number == 3
    assert [version.number for version in registry.rollback(name, "first")] == [1, 2]
    assert aliases(client, name) == {CHAMPION: 3, PREVIOUS: 1}
    assert [version.number for version in registry.rollback(name, "second")] == [1, 3]


def test_half_a_promotion_is_not_rolled_back_to_itself(
    registry: ModelRegistry,
    tracking: Tracking,
    client: MlflowClient,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
    name: str,
) -> None:
    """It has set ``previous`` to the champion."""
    promoted(2)
    at_call(tracking, "set_registered_model_alias", cut, args=re.compile(CHAMPION))
    cut_off = candidate(2)
    with pytest.raises(RecordUnavailableError):
        registry.promote(cut_off)
    assert aliases(client, name) == {CHAMPION: 2, PREVIOUS: 2}
    assert [version.number for version in registry.rollback(name)] == [1, 2]
    assert aliases(client, name) == {CHAMPION: 1}
    with pytest.raises(LostError, match="was rolled back"):
        registry.promote(cut_off)


def test_an_alias_is_pinned_and_nothing_else(
    registry: ModelRegistry, promoted: Callable[[int], list[Candidate]], name: str
) -> None:
    promoted(2)
    assert registry.pinned(f"models:/{name}@{CHAMPION}") == f"models:/{name}/2"
    assert registry.pinned(f"models:/{name}@{PREVIOUS}/adapter/a.bin") == f"models:/{name}/1/adapter/a.bin"
    for uri in (f"models:/{name}/1", f"models:/m-{'0' * 32}", "runs:/abc/model@champion", "hf:org/x@main"):
        assert registry.pinned(uri) == uri
    for unknown in (f"models:/{name}@nobody", "models:/nothing@champion"):
        with pytest.raises(ModelError, match="no version of the registered model"):
            registry.pinned(unknown)


def test_more_versions_than_mlflow_lists_at_once(
    registry: ModelRegistry,
    tracking: Tracking,
    candidate: Callable[..., Candidate],
    promoted: Callable[[int], list[Candidate]],
) -> None:
    *_, last = promoted(3)
    tracking.client.search_model_versions = partial(  # type: ignore[method-assign]
        tracking.client.search_model_versions, max_results=1
    )
    assert registry.promote(last).number == 3
    assert registry.promote(candidate(3)).number == 4


@pytest.mark.parametrize(
    "odd", ["it's", 'a"b', "a`b", "a/b", "a:b", "a%b", "a\nb", "", "x" * 201, "' OR '1'='1"]
)
def test_a_name_that_mlflow_might_misread_is_refused(nobody: ModelRegistry, odd: str) -> None:
    """Before MLflow is asked: there is none."""
    calls: list[Callable[[], Any]] = [
        lambda: nobody.champion(odd),
        lambda: nobody.promote(Candidate(odd, "models:/m", "run", 0)),
        lambda: nobody.rollback(odd),
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="may hold letters") as refused:
            call()
        assert refused.value.errors[0]["loc"] == ["model", "name"]


@pytest.mark.parametrize("uri", [f"models:/m-{'0' * 32}", "/etc/passwd", "models://elsewhere/m/1"])
def test_a_source_that_mlflow_refuses(
    registry: ModelRegistry, client: MlflowClient, name: str, uri: str
) -> None:
    with pytest.raises(InvalidRequestError, match=r"^checkpoint: MLflow") as refused:
        registry.promote(Candidate(name, uri, "run", 0))
    assert refused.value.errors[0]["loc"] == ["checkpoint"]
    assert not client.search_model_versions(f"name='{name}'")
    assert registry.champion(name) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda registry: registry.champion("support"),
        lambda registry: registry.pinned("models:/support@champion"),
        lambda registry: registry.promote(Candidate("support", f"models:/m-{'0' * 32}", "run", 0)),
        lambda registry: registry.rollback("support"),
    ],
    ids=["champion", "pinned", "promote", "rollback"],
)
def test_mlflow_does_not_answer(nobody: ModelRegistry, call: Callable[[ModelRegistry], Any]) -> None:
    with pytest.raises(RecordUnavailableError, match=r"^MLflow does not answer$"):
        call(nobody)
