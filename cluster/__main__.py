"""``make cluster``: start the services of ``docker/compose.yaml`` as processes, until Ctrl-C.

Variables of the compose file come from the environment: ``CPU_WORKERS=2 make cluster``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from time import sleep

from rich.console import Console

from cluster.cluster import Cluster
from cluster.images import ROOT


def main() -> int:
    """Run the cluster; return the exit code."""
    parser = argparse.ArgumentParser(prog="make cluster", description=__doc__)
    parser.add_argument("--home", type=Path, default=ROOT / ".cluster", help="folder of volumes and logs")
    parser.add_argument("--stop", action="store_true", help="end a cluster whose terminal is gone")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    console = Console()
    cluster = Cluster(options.home, variables=os.environ)
    if options.stop:
        cluster.stop()
        return 0
    try:
        console.print(f"Starting {len(cluster.replicas)} services under {cluster.home}")
        with cluster:
            console.print(f"Airflow {cluster.airflow_url}  user admin  passwords {_passwords(cluster)}")
            console.print(f"MLflow  {cluster.mlflow_url}  user admin  password {_mlflow_password(cluster)}")
            console.print("Ctrl-C ends them.")
            while True:
                sleep(1)
                for name in cluster.mend():
                    console.print(f"[yellow]{name} ended and was started again")
    except KeyboardInterrupt:
        console.print("\nThe services have ended.")
    except RuntimeError as error:
        console.print(f"[red]{error}")
        return 1
    return 0


def _passwords(cluster: Cluster) -> Path:
    return cluster.home / "volumes" / "secrets-people" / "passwords.json"


def _mlflow_password(cluster: Cluster) -> Path:
    return cluster.home / "volumes" / "secrets-mlflow" / "admin_password"


if __name__ == "__main__":
    sys.exit(main())
