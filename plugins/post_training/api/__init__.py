"""The HTTP API, mounted into Airflow's api-server."""
