"""Who calls, by Airflow's own authentication, and what Airflow's auth manager lets them do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.base_auth_manager import ResourceMethod
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import get_user
from fastapi import Depends, HTTPException, Request, status
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from post_training.airflow_runs import team_of

_bearer = HTTPBearer(auto_error=False, description="An Airflow token, from POST /auth/token.")


@dataclass(frozen=True)
class AirflowAccess:
    """The caller's rights by DAG, asked of Airflow's auth manager."""

    user: BaseUser

    @property
    def user_name(self) -> str:
        """The caller's name."""
        return self.user.get_name()

    def may_read(self, dag_id: str) -> bool:
        """Whether the caller may see the DAG's runs."""
        return self._may("GET", dag_id)

    def may_read_logs(self, dag_id: str) -> bool:
        """Whether the caller may read the logs of the DAG's tasks."""
        return self._may("GET", dag_id, DagAccessEntity.TASK_LOGS)

    def may_trigger(self, dag_id: str) -> bool:
        """Whether the caller may start runs of the DAG."""
        return self._may("POST", dag_id)

    def may_cancel(self, dag_id: str) -> bool:
        """Whether the caller may change runs of the DAG."""
        return self._may("PUT", dag_id)

    def may_retry(self, dag_id: str) -> bool:
        """Whether the caller may clear tasks of the DAG."""
        return self._may("PUT", dag_id, DagAccessEntity.TASK_INSTANCE)

    def _may(
        self, method: ResourceMethod, dag_id: str, entity: DagAccessEntity = DagAccessEntity.RUN
    ) -> bool:
        return get_auth_manager().is_authorized_dag(
            method=method,
            access_entity=entity,
            details=DagDetails(id=dag_id, team_name=team_of(dag_id)),
            user=self.user,
        )


async def current_access(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> AirflowAccess:
    """Return the caller's rights.

    :raises HTTPException: 401 without a valid token. Airflow itself answers a broken token with 403, which
        would tell a client that it is known.
    """
    try:
        user = await get_user(request, None, credentials)
    except HTTPException as error:
        if error.status_code in (status.HTTP_401_UNAUTHORIZED, status.HTTP_403_FORBIDDEN):
            raise HTTPException(
                status.HTTP_401_UNAUTHORIZED, str(error.detail), headers={"WWW-Authenticate": "Bearer"}
            ) from None
        raise
    return AirflowAccess(user)
